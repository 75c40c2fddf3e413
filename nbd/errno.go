package nbd

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"
)

// Errno is the error value of a reply.
type Errno uint32

// The error values that the protocol defines.
const (
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

// Error is the text of the value.
func (e Errno) Error() string {
	switch e {
	case EPERM:
		return "operation not permitted"
	case EIO:
		return "input/output error"
	case ENOMEM:
		return "cannot allocate memory"
	case EINVAL:
		return "invalid argument"
	case ENOSPC:
		return "no space left on device"
	case EOVERFLOW:
		return "value too large"
	case ENOTSUP:
		return "operation not supported"
	case ESHUTDOWN:
		return "the server is shutting down"
	}
	return fmt.Sprintf("error %d", uint32(e))
}

// Is lets errors.Is find the local counterparts: errors.ErrUnsupported, fs.ErrPermission, syscall.ENOSPC,
// syscall.EIO, syscall.EINVAL and syscall.ENOMEM.
func (e Errno) Is(target error) bool {
	switch e {
	case EPERM:
		return target == fs.ErrPermission || target == syscall.EPERM
	case ENOTSUP:
		return target == errors.ErrUnsupported
	case ENOSPC:
		return target == syscall.ENOSPC
	case EIO:
		return target == syscall.EIO
	case EINVAL:
		return target == syscall.EINVAL
	case ENOMEM:
		return target == syscall.ENOMEM
	}
	return false
}

// RemoteError is a request that the server refused or failed.
type RemoteError struct {
	Command Command
	Offset  uint64 // bytes
	Length  uint64 // bytes
	Errno   Errno
	Message string // what the server said besides, or ""
}

// Error names the request and everything the server said.
func (e *RemoteError) Error() string {
	s := fmt.Sprintf("NBD server: %s", e.Command)
	if e.Command != CmdFlush {
		s += fmt.Sprintf(" of %d bytes at %d", e.Length, e.Offset)
	}
	s += ": " + e.Errno.Error()
	if e.Message != "" {
		s += fmt.Sprintf(" (%q)", e.Message)
	}
	return s
}

// Unwrap gives the Errno.
func (e *RemoteError) Unwrap() error { return e.Errno }

// OptionError is an option of the handshake that the server refused.
type OptionError struct {
	Option  OptionCode
	Code    ReplyCode
	Message string // what the server said besides, or ""
}

// Error names the option and everything the server said.
func (e *OptionError) Error() string {
	s := fmt.Sprintf("NBD server: option %s: %s", e.Option, e.Code)
	if e.Message != "" {
		s += fmt.Sprintf(" (%q)", e.Message)
	}
	return s
}
