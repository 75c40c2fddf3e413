package storage

import (
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"
)

// lockFile takes the locks described at LockError; closing the descriptor drops them.
func lockFile(fd uintptr, path string, readOnly, share bool) error {
	if share {
		return nil
	}
	how, perm := unix.LOCK_EX, "write"
	if readOnly {
		how, perm = unix.LOCK_SH, "consistent read"
	}
	err := unix.Flock(int(fd), how|unix.LOCK_NB)
	switch {
	case err == nil, errors.Is(err, errors.ErrUnsupported): // the file system has no locks
		return nil
	case err == unix.EWOULDBLOCK:
		return &LockError{Path: path, Permission: perm}
	}
	return &fs.PathError{Op: "lock", Path: path, Err: err}
}
