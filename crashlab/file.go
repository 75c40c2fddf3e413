package crashlab

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"

	"github.com/platter-disk/platter/storage"
)

// Poison is the byte that fills space whose contents a crash left undefined.
const Poison = 0xDB

// zeroSector stands for a sector that was zeroed; poisonSector for one with undefined contents. Immutable.
var (
	zeroSector   sector
	poisonSector = sector(bytes.Repeat([]byte{Poison}, storage.SectorSize))
)

// file is a handle of a lab's file.
type file struct {
	lab    *Lab
	c      *content
	closed bool // guarded by lab.mu
}

func (f *file) Name() string { return f.c.spec.Name }

// usable says why an operation cannot be done. lab.mu is held.
func (f *file) usable(kind Kind, off, length int64) error {
	switch {
	case f.lab.off:
		return fmt.Errorf("%s of %s: %w", kind, f.Name(), ErrPowerOff)
	case f.closed:
		return fmt.Errorf("%s of %s: %w", kind, f.Name(), os.ErrClosed)
	case off < 0 || length < 0 || off > maxFileSize || length > maxFileSize-off:
		return fmt.Errorf("%s of %d bytes at %d in %s: want a range inside 0 to %d", kind, length, off, f.Name(), int64(maxFileSize))
	}
	return nil
}

// do records one changing operation: apply runs at its beginning, under the lock, and reports the changes.
func (f *file) do(kind Kind, off, length int64, apply func(*op) error) error {
	site := f.lab.sites.caller()
	l := f.lab
	l.mu.Lock()
	if err := f.usable(kind, off, length); err != nil {
		l.mu.Unlock()
		return err
	}
	if len(l.ops) >= maxOps {
		l.mu.Unlock()
		return fmt.Errorf("%s of %s: %w", kind, f.Name(), ErrRunaway)
	}
	o := l.begin(f.c, kind, off, length, site)
	err := apply(o)
	l.mu.Unlock()
	if l.Yield {
		runtime.Gosched()
	}
	l.mu.Lock()
	l.finish(o)
	l.mu.Unlock()
	return err
}

func (f *file) WriteAt(p []byte, off int64) (int, error) {
	n, short := len(p), false
	if size := f.c.spec.Size; f.c.spec.Fixed && off >= 0 && int64(n) > size-min(off, size) {
		n, short = int(size-min(off, size)), true
	}
	if n > 0 {
		err := f.do(KindWrite, off, int64(n), func(o *op) error {
			f.c.write(o, p[:n])
			return nil
		})
		if err != nil {
			return 0, err
		}
	}
	if short {
		return n, fmt.Errorf("write of %d bytes at %d in %s, a device of %d bytes: %w", len(p), off, f.Name(), f.c.spec.Size, io.ErrShortWrite)
	}
	return n, nil
}

// Sync is a barrier: it covers every operation on the file that ended before it began.
func (f *file) Sync() error {
	return f.do(KindSync, 0, 0, func(*op) error { return nil })
}

func (f *file) Truncate(size int64) error {
	if err := f.refuseResize(KindTruncate, size); err != nil {
		return err
	}
	return f.do(KindTruncate, size, 0, func(o *op) error {
		if size < f.c.size {
			f.c.zero(o, size, f.c.size-size)
		}
		f.c.resize(o, size)
		return nil
	})
}

func (f *file) PunchHole(off, length int64) error {
	return f.do(KindPunch, off, length, func(o *op) error {
		if off < f.c.size {
			f.c.zero(o, off, min(length, f.c.size-off))
		}
		return nil
	})
}

func (f *file) ZeroRange(off, length int64) error {
	if err := f.refuseResize(KindZero, max(f.c.spec.Size, off+length)); err != nil {
		return err
	}
	return f.do(KindZero, off, length, func(o *op) error {
		f.c.zero(o, off, length)
		f.c.grow(o, off+length)
		return nil
	})
}

func (f *file) Allocate(off, length int64) error {
	if err := f.refuseResize(KindAllocate, max(f.c.spec.Size, off+length)); err != nil {
		return err
	}
	return f.do(KindAllocate, off, length, func(o *op) error {
		f.c.grow(o, off+length)
		return nil
	})
}

// refuseResize refuses to change the size of a block device.
func (f *file) refuseResize(kind Kind, size int64) error {
	if f.c.spec.Fixed && size != f.c.spec.Size {
		return fmt.Errorf("%s to %d bytes of %s, a device of %d bytes: %w", kind, size, f.Name(), f.c.spec.Size, errors.ErrUnsupported)
	}
	return nil
}

func (f *file) ReadAt(p []byte, off int64) (int, error) {
	f.lab.mu.RLock()
	defer f.lab.mu.RUnlock()
	if err := f.usable(KindRead, off, int64(len(p))); err != nil {
		return 0, err
	}
	if off >= f.c.size {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), f.c.size-off))
	f.c.read(p[:n], off)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// TryReadAt is ReadAt: memory never waits.
func (f *file) TryReadAt(p []byte, off int64) (int, error) { return f.ReadAt(p, off) }

func (f *file) Size() (int64, error) {
	f.lab.mu.RLock()
	defer f.lab.mu.RUnlock()
	if err := f.usable(KindRead, 0, 0); err != nil {
		return 0, err
	}
	return f.c.size, nil
}

func (f *file) DataExtents(off, length int64, fn func(storage.Extent) bool) error {
	for {
		e, err := f.extent(off, length)
		if err != nil || e.Length == 0 || !fn(e) {
			return err
		}
		off, length = off+e.Length, length-e.Length
	}
}

// extent returns the first run of the range, of length 0 at the end.
func (f *file) extent(off, length int64) (storage.Extent, error) {
	f.lab.mu.RLock()
	defer f.lab.mu.RUnlock()
	if err := f.usable(KindExtents, off, length); err != nil {
		return storage.Extent{}, err
	}
	end := min(off+length, f.c.size)
	if off >= end {
		return storage.Extent{}, nil
	}
	data, until := f.c.run(off, end)
	return storage.Extent{Offset: off, Length: until - off, Data: data}, nil
}

func (f *file) Close() error {
	f.lab.mu.Lock()
	defer f.lab.mu.Unlock()
	f.closed = true
	return nil
}

// sectorAt returns what sector i reads as.
func (c *content) sectorAt(i int64) *sector {
	if s := c.now.get(i); s != nil {
		return s
	}
	return c.blank
}

func (c *content) read(p []byte, off int64) {
	for len(p) > 0 {
		n := copy(p, c.sectorAt(off / storage.SectorSize)[off%storage.SectorSize:])
		p, off = p[n:], off+int64(n)
	}
}

// run returns whether the sector at off holds data, and where the run of its kind ends. A block device cannot
// tell and reports data.
func (c *content) run(off, end int64) (data bool, until int64) {
	if c.spec.Fixed {
		return true, end
	}
	first := off / storage.SectorSize
	at, s := c.nextData(first)
	if s == nil || at > first {
		if s == nil || at*storage.SectorSize >= end {
			return false, end
		}
		return false, at * storage.SectorSize
	}
	for i := first; ; i++ {
		if i*storage.SectorSize >= end {
			return true, end
		}
		if s := c.now.get(i); s == nil || s == &zeroSector {
			return true, i * storage.SectorSize
		}
	}
}

// nextData is the first sector at or after i that was written and not zeroed since.
func (c *content) nextData(i int64) (int64, *sector) {
	for {
		at, s := c.now.next(i)
		if s != &zeroSector {
			return at, s
		}
		i = at + 1
	}
}

// write gives the range new bytes.
func (c *content) write(o *op, p []byte) {
	first := o.off / storage.SectorSize
	last := (o.off + int64(len(p)) - 1) / storage.SectorSize
	buf := make([]byte, (last-first+1)*storage.SectorSize)
	copy(buf, c.sectorAt(first)[:])
	copy(buf[len(buf)-storage.SectorSize:], c.sectorAt(last)[:])
	copy(buf[o.off-first*storage.SectorSize:], p)
	o.changes = make([]change, 0, last-first+1)
	for i := first; i <= last; i++ {
		c.put(o, i, (*sector)(buf[(i-first)*storage.SectorSize:]))
	}
	c.grow(o, o.off+int64(len(p)))
}

// zero makes the range read as zeros. What was never written and reads as zeros already is left alone, so that
// the cost follows what the file holds and not the length.
func (c *content) zero(o *op, off, length int64) {
	end := off + length
	for off < end {
		i := off / storage.SectorSize
		if c.blank == &zeroSector {
			at, s := c.now.next(i)
			if s == nil || at*storage.SectorSize >= end {
				return
			}
			off = max(off, at*storage.SectorSize)
			i = at
		}
		start, until := i*storage.SectorSize, min(end, (i+1)*storage.SectorSize)
		if off == start && until == start+storage.SectorSize {
			c.put(o, i, &zeroSector)
		} else {
			partly := *c.sectorAt(i)
			clear(partly[off-start : until-start])
			c.put(o, i, &partly)
		}
		off = until
	}
}

func (c *content) put(o *op, i int64, s *sector) {
	c.now.set(i, s)
	o.changes = append(o.changes, change{i, s})
}

func (c *content) grow(o *op, size int64) {
	if size > c.size {
		c.resize(o, size)
	}
}

func (c *content) resize(o *op, size int64) {
	c.size = size
	o.newSize = size
}
