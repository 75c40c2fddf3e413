package storage

import (
	"io/fs"

	"golang.org/x/sys/windows"
)

// lockByteHigh puts the locked byte far past the end of any file, because locks here keep others from reading
// and writing what they cover.
const lockByteHigh = 0x7fffffff

// lockFile takes the locks described at LockError; closing the descriptor drops them.
func lockFile(fd uintptr, path string, readOnly, share bool) error {
	if share {
		return nil
	}
	flags, perm := uint32(windows.LOCKFILE_FAIL_IMMEDIATELY|windows.LOCKFILE_EXCLUSIVE_LOCK), "write"
	if readOnly {
		flags, perm = windows.LOCKFILE_FAIL_IMMEDIATELY, "consistent read"
	}
	err := windows.LockFileEx(windows.Handle(fd), flags, 0, 1, 0, &windows.Overlapped{OffsetHigh: lockByteHigh})
	switch err {
	case nil:
		return nil
	case windows.ERROR_LOCK_VIOLATION, windows.ERROR_IO_PENDING:
		return &LockError{Path: path, Permission: perm}
	}
	return &fs.PathError{Op: "lock", Path: path, Err: err}
}
