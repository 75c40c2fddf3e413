package storage

import (
	"errors"
	"fmt"
	"io"
	"math"
)

// checkRange refuses negative offsets and lengths and ranges that end past the largest file offset.
func checkRange(off, length int64) error {
	if off < 0 || length < 0 || off > math.MaxInt64-length {
		return fmt.Errorf("%d bytes at offset %d: not a range of a file", length, off)
	}
	return nil
}

// section is a window into a File.
type section struct {
	f         File
	off, size int64
}

// NewSection presents size bytes of f from off as a File of their own, of fixed size: what writes past its
// end fails with io.ErrShortWrite, and Truncate to another size with errors.ErrUnsupported. The bytes of the
// window past the end of f read as the end of the file. off and size must not be negative; the window is cut
// where it would pass the largest file offset. Close closes f.
func NewSection(f File, off, size int64) File {
	return &section{f: f, off: off, size: min(size, math.MaxInt64-off)}
}

// clip returns how much of [off, off+length) lies inside the window.
func (s *section) clip(op string, off, length int64) (int64, error) {
	if err := checkRange(off, length); err != nil {
		return 0, fmt.Errorf("%s %s: %w", op, s.f.Name(), err)
	}
	return max(0, min(length, s.size-off)), nil
}

// inside fails unless the whole range lies inside the window.
func (s *section) inside(op string, off, length int64) error {
	n, err := s.clip(op, off, length)
	if err == nil && n < length {
		err = fmt.Errorf("%s %d bytes at %d of a section of %d bytes of %s: %w", op, length, off, s.size, s.f.Name(), io.ErrShortWrite)
	}
	return err
}

func (s *section) read(read func([]byte, int64) (int, error), p []byte, off int64) (int, error) {
	n, err := s.clip("read", off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	if n == 0 {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	got, err := read(p[:n], s.off+off)
	if err == nil && got < len(p) {
		err = io.EOF
	}
	return got, err
}

func (s *section) ReadAt(p []byte, off int64) (int, error) { return s.read(s.f.ReadAt, p, off) }

func (s *section) TryReadAt(p []byte, off int64) (int, error) { return s.read(s.f.TryReadAt, p, off) }

func (s *section) WriteAt(p []byte, off int64) (int, error) {
	if err := s.inside("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	return s.f.WriteAt(p, s.off+off)
}

func (s *section) Sync() error { return s.f.Sync() }

func (s *section) Size() (int64, error) {
	whole, err := s.f.Size()
	return max(0, min(s.size, whole-s.off)), err
}

func (s *section) Truncate(size int64) error {
	now, err := s.Size()
	if err == nil && size != now {
		err = fmt.Errorf("truncate a section of %s from %d to %d bytes: %w", s.f.Name(), now, size, errors.ErrUnsupported)
	}
	return err
}

func (s *section) PunchHole(off, length int64) error {
	n, err := s.clip("punch hole", off, length)
	if err != nil || n == 0 {
		return err
	}
	return s.f.PunchHole(s.off+off, n)
}

func (s *section) ZeroRange(off, length int64) error {
	if err := s.inside("zero", off, length); err != nil {
		return err
	}
	return s.f.ZeroRange(s.off+off, length)
}

func (s *section) Allocate(off, length int64) error {
	if err := s.inside("allocate", off, length); err != nil {
		return err
	}
	return s.f.Allocate(s.off+off, length)
}

func (s *section) DataExtents(off, length int64, fn func(Extent) bool) error {
	n, err := s.clip("map", off, length)
	if err != nil || n == 0 {
		return err
	}
	return s.f.DataExtents(s.off+off, n, func(e Extent) bool {
		e.Offset -= s.off
		return fn(e)
	})
}

func (s *section) Name() string { return s.f.Name() }

func (s *section) Close() error { return s.f.Close() }
