//go:build !linux

package storage

import "errors"

// blockDevices: this system's block devices cannot be opened, for want of their size and of a way to test it.
const blockDevices = false

// localSystem is what the operating system's part keeps for a local file: nothing here.
type localSystem struct{}

// setNoCoW is a hint that no file system here knows.
func setNoCoW(uintptr) {}

func (l *local) TryReadAt([]byte, int64) (int, error) { return 0, ErrWouldBlock }

// Sync is F_FULLFSYNC on darwin and FlushFileBuffers on windows: both see to it that the drive's own cache is
// written, which fsync on darwin does not.
func (l *local) Sync() error {
	if l.readOnly {
		return nil
	}
	return l.f.Sync()
}

func (l *local) PunchHole(off, length int64) error {
	return l.unsupported("punch hole in", off, length)
}

func (l *local) ZeroRange(off, length int64) error {
	return l.unsupported("zero range of", off, length)
}

func (l *local) Allocate(off, length int64) error { return l.unsupported("allocate in", off, length) }

func (l *local) unsupported(op string, off, length int64) error {
	if err := l.change(op, off, length); err != nil {
		return err
	}
	return l.wrap(op, errors.ErrUnsupported)
}
