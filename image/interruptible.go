package image

import (
	"context"
	"sync/atomic"

	"github.com/platter-disk/platter/storage"
)

// interruptStep is the most in bytes that an interruptible file reserves or zeroes in one call of the system.
const interruptStep = 256 << 20

// interruptible is a file that fails every request once ctx has ended, with its error. It is for work that may be
// given up at any point: creating an image, looking at one.
type interruptible struct {
	storage.File
	ctx     context.Context
	changed atomic.Bool // something was written or cut off
}

func (f *interruptible) ReadAt(p []byte, off int64) (int, error) {
	if err := f.ctx.Err(); err != nil {
		return 0, err
	}
	return f.File.ReadAt(p, off)
}

func (f *interruptible) WriteAt(p []byte, off int64) (int, error) {
	if err := f.ctx.Err(); err != nil {
		return 0, err
	}
	f.changed.Store(true)
	return f.File.WriteAt(p, off)
}

func (f *interruptible) Truncate(size int64) error {
	if err := f.ctx.Err(); err != nil {
		return err
	}
	err := f.File.Truncate(size)
	if err == nil {
		f.changed.Store(true)
	}
	return err
}

func (f *interruptible) Sync() error {
	if err := f.ctx.Err(); err != nil {
		return err
	}
	return f.File.Sync()
}

func (f *interruptible) ZeroRange(off, length int64) error {
	f.changed.Store(true)
	return f.inSteps(f.File.ZeroRange, off, length)
}

func (f *interruptible) Allocate(off, length int64) error {
	return f.inSteps(f.File.Allocate, off, length)
}

// inSteps calls fn for one part of the range after the other.
func (f *interruptible) inSteps(fn func(off, length int64) error, off, length int64) error {
	for {
		if err := f.ctx.Err(); err != nil {
			return err
		}
		n := min(length, interruptStep)
		if err := fn(off, n); err != nil {
			return err
		}
		if off, length = off+n, length-n; length == 0 {
			return nil
		}
	}
}

func (f *interruptible) DataExtents(off, length int64, fn func(storage.Extent) bool) error {
	if err := f.ctx.Err(); err != nil {
		return err
	}
	return f.File.DataExtents(off, length, fn)
}
