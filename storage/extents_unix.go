//go:build linux || darwin

package storage

import (
	"errors"

	"golang.org/x/sys/unix"
)

// DataExtents implements File with SEEK_DATA and SEEK_HOLE. They move the descriptor's file position, which
// nothing here reads.
func (l *local) DataExtents(off, length int64, fn func(Extent) bool) error {
	if err := checkRange(off, length); err != nil {
		return l.wrap("map", err)
	}
	size, err := l.Size()
	if err != nil {
		return err
	}
	for end := off + min(length, size-off); off < end; {
		e, err := l.extentAt(off, end)
		if err != nil {
			return err
		}
		off += e.Length
		if !fn(e) {
			return nil
		}
	}
	return nil
}

// extentAt returns the run that starts at off, cut at end.
func (l *local) extentAt(off, end int64) (Extent, error) {
	e := Extent{Offset: off, Length: end - off, Data: true}
	if l.device {
		return e, nil
	}
	err := l.withFD("map", func(fd uintptr) error {
		data, err := unix.Seek(int(fd), off, unix.SEEK_DATA)
		switch {
		case err == unix.ENXIO: // no data up to the end of the file
			e.Data = false
			return nil
		case err == unix.EINVAL || errors.Is(err, errors.ErrUnsupported): // the file system cannot tell
			return nil
		case err != nil:
			return err
		case data > off:
			e.Data, e.Length = false, min(data, end)-off
			return nil
		}
		hole, err := unix.Seek(int(fd), off, unix.SEEK_HOLE)
		if err == unix.ENXIO { // the file was cut meanwhile
			return nil
		}
		if err == nil && hole > off { // hole == off: punched meanwhile
			e.Length = min(hole, end) - off
		}
		return err
	})
	return e, err
}
