package fvd

import (
	"errors"
	"io"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
)

// ram is a block.Device in memory: a base image, or a data file of another format.
type ram struct {
	f      *storage.Memory
	closed bool
	reads  func(off, n int64) error // called before each read; nil: nothing
}

func newRAM(size int64) *ram {
	f := storage.NewMemory("ram")
	if err := f.Truncate(size); err != nil {
		panic(err)
	}
	return &ram{f: f}
}

// newBase is a ram whose every sector differs from every other one and from zero.
func newBase(size int64) *ram {
	d := newRAM(size)
	p := make([]byte, size)
	for i := range p {
		p[i] = baseByte(int64(i))
	}
	if size > 0 {
		if _, err := d.f.WriteAt(p, 0); err != nil {
			panic(err)
		}
	}
	return d
}

func baseByte(off int64) byte { return byte(off/512*7+off%512*3) | 1 }

func (d *ram) ReadAt(p []byte, off int64) (int, error) {
	if d.reads != nil {
		if err := d.reads(off, int64(len(p))); err != nil {
			return 0, err
		}
	}
	return d.f.ReadAt(p, off)
}

func (d *ram) TryReadAt(p []byte, off int64) error {
	if d.reads != nil {
		return block.ErrWouldBlock
	}
	_, err := d.f.ReadAt(p, off)
	if err == io.EOF {
		err = nil
	}
	return err
}

func (d *ram) WriteAt(p []byte, off int64) (int, error) {
	if err := block.CheckRange("write", off, int64(len(p)), d.Size()); err != nil {
		return 0, err
	}
	return d.f.WriteAt(p, off)
}

func (d *ram) WriteCompressed([]byte, int64) error { return errors.ErrUnsupported }

func (d *ram) WriteZeroes(off, n int64, _ block.ZeroFlags) error {
	if err := block.CheckRange("zero", off, n, d.Size()); err != nil {
		return err
	}
	return d.f.PunchHole(off, n)
}

func (d *ram) Discard(off, n int64) error { return d.f.PunchHole(off, n) }
func (d *ram) Flush() error               { return d.f.Sync() }

func (d *ram) Extents(off, n int64, fn func(block.Extent) bool) error {
	return d.f.DataExtents(off, n, func(e storage.Extent) bool {
		return fn(block.Extent{Offset: e.Offset, Length: e.Length, Allocated: e.Data, Data: e.Data, Zero: !e.Data, HostOffset: e.Offset})
	})
}

func (d *ram) Size() int64 {
	n, err := d.f.Size()
	if err != nil {
		panic(err)
	}
	return n
}

func (d *ram) Resize(size int64, _ block.Preallocation) error {
	if size < d.Size() {
		return errors.ErrUnsupported
	}
	return d.f.Truncate(size)
}

func (d *ram) Limits() block.Limits { return block.Limits{Preferred: 512} }

func (d *ram) Close() error {
	d.closed = true
	return nil
}

// must fails the test on an error.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// script runs steps until one fails.
func script(steps ...func() error) error {
	for _, s := range steps {
		if err := s(); err != nil {
			return err
		}
	}
	return nil
}
