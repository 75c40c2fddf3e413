package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
)

func openDescriptor(path string, flags int, perm fs.FileMode, direct bool) (*os.File, error) {
	if direct {
		return nil, &fs.PathError{Op: "open", Path: path, Err: fmt.Errorf("direct I/O on windows: %w", errors.ErrUnsupported)}
	}
	return os.OpenFile(path, flags, perm)
}

// syncDirectoryOf has nothing to do: NTFS journals directory entries, and a directory cannot be flushed.
func syncDirectoryOf(string) error { return nil }

// newDirect is not reached: openDescriptor refuses.
func newDirect(l *local) (File, error) { return l, nil }

// DataExtents implements File: everything counts as data.
func (l *local) DataExtents(off, length int64, fn func(Extent) bool) error {
	if err := checkRange(off, length); err != nil {
		return l.wrap("map", err)
	}
	size, err := l.Size()
	if err != nil {
		return err
	}
	if length = min(length, size-off); length > 0 {
		fn(Extent{Offset: off, Length: length, Data: true})
	}
	return nil
}
