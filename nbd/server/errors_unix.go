//go:build unix

package server

import "syscall"

// Local errors that the protocol has a value of its own for.
var (
	noSpace      = [...]error{syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG}
	noPermission = [...]error{syscall.EPERM, syscall.EACCES, syscall.EROFS}
)

// refused is how the system says that nobody listens.
const refused = syscall.ECONNREFUSED
