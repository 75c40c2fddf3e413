package server

import (
	"syscall"

	"golang.org/x/sys/windows"
)

// Local errors that the protocol has a value of its own for: what the system says, and what this program itself says
// on every system.
var (
	noSpace = [...]error{
		windows.ERROR_DISK_FULL, windows.ERROR_HANDLE_DISK_FULL, windows.ERROR_FILE_TOO_LARGE,
		syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG,
	}
	noPermission = [...]error{windows.ERROR_ACCESS_DENIED, windows.ERROR_WRITE_PROTECT, syscall.EPERM, syscall.EACCES, syscall.EROFS}
)

// refused is how the system says that nobody listens.
const refused = windows.WSAECONNREFUSED
