package storage

import (
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

func openDescriptor(path string, flags int, perm fs.FileMode, direct bool) (*os.File, error) {
	f, err := os.OpenFile(path, flags, perm)
	if err != nil || !direct {
		return f, err
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_NOCACHE, 1); err != nil {
		f.Close()
		return nil, &fs.PathError{Op: "fcntl F_NOCACHE", Path: path, Err: err}
	}
	return f, nil
}

// syncDirectoryOf makes the directory entry of a new file durable.
func syncDirectoryOf(path string) error {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// newDirect has nothing to add: F_NOCACHE takes any alignment.
func newDirect(l *local) (File, error) { return l, nil }
