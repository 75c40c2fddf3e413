package storage

import (
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"
)

const (
	lockUses    = 100 // byte of permission 0: somebody uses it
	lockForbids = 200 // byte of permission 0: somebody forbids it to others
)

// permission is a number of QEMU's image locking; the bytes were found by tracing fcntl calls.
type permission int64

const (
	permRead   permission = 0
	permWrite  permission = 1
	permResize permission = 3
)

func (p permission) String() string {
	return map[permission]string{permRead: "consistent read", permWrite: "write", permResize: "resize"}[p]
}

// lockFile takes the locks described at LockError; closing the descriptor drops them. All are taken before
// any is looked for, so that of two who race at least one sees the other.
func lockFile(fd uintptr, path string, readOnly, share bool) error {
	uses, forbids := []permission{permRead, permWrite, permResize}, []permission{permWrite, permResize}
	if readOnly {
		uses = uses[:1]
	}
	if share {
		forbids = nil
	}
	for _, take := range []struct {
		base  int64
		perms []permission
	}{{lockUses, uses}, {lockForbids, forbids}} {
		for _, p := range take.perms {
			lk := unix.Flock_t{Type: unix.F_RDLCK, Start: take.base + int64(p), Len: 1}
			err := unix.FcntlFlock(fd, unix.F_OFD_SETLK, &lk)
			if noLocks(err) {
				return nil
			}
			if err == unix.EAGAIN || err == unix.EACCES {
				// Somebody who does not follow the protocol holds an exclusive lock there.
				return &LockError{Path: path, Permission: p.String(), Shared: take.base == lockForbids}
			}
			if err != nil {
				return &fs.PathError{Op: "lock", Path: path, Err: err}
			}
		}
	}
	if err := findLock(fd, path, lockForbids, uses); err != nil {
		return err
	}
	return findLock(fd, path, lockUses, forbids)
}

// findLock fails when another open file holds a lock on the byte of one of perms.
func findLock(fd uintptr, path string, base int64, perms []permission) error {
	for _, p := range perms {
		lk := unix.Flock_t{Type: unix.F_WRLCK, Start: base + int64(p), Len: 1}
		if err := unix.FcntlFlock(fd, unix.F_OFD_GETLK, &lk); err != nil {
			return &fs.PathError{Op: "lock", Path: path, Err: err}
		}
		if lk.Type != unix.F_UNLCK {
			return &LockError{Path: path, Permission: p.String(), Shared: base == lockUses}
		}
	}
	return nil
}

// noLocks tells whether err says that the file system has no such locks; QEMU goes on without, too.
func noLocks(err error) bool {
	return err == unix.EINVAL || err == unix.ENOLCK || errors.Is(err, errors.ErrUnsupported)
}
