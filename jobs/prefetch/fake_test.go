package prefetch

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// fakeClock moves when somebody sleeps or works.
type fakeClock struct {
	mu  sync.Mutex
	now time.Time
}

func newFakeClock() *fakeClock { return &fakeClock{now: time.Unix(1000, 0)} }

func (c *fakeClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *fakeClock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func (c *fakeClock) Sleep(ctx context.Context, d time.Duration) error {
	c.advance(d)
	return ctx.Err()
}

// layered is a block.Device in memory over a base of another content, in units, as a qcow2 overlay is in clusters.
type layered struct {
	unit int64
	base []byte

	mu         sync.Mutex
	top        []byte
	ours       []bool // by unit
	baseReads  []Run  // in order
	flushes    int
	failWrites error
	failBase   error // of reads of the base and of asking it where things live
	asked      int   // how often it was asked
	holes      bool  // zeros of the base show as holes, in whole units
	closed     bool
	beforeRead func() // called before the base is read; nil: nothing
}

func newLayered(size, unit int64) *layered {
	d := &layered{unit: unit, base: make([]byte, size), top: make([]byte, size), ours: make([]bool, (size+unit-1)/unit)}
	for i := range d.base {
		d.base[i] = byte(i/512)*3 | 1
	}
	return d
}

func (d *layered) ReadAt(p []byte, off int64) (int, error) {
	if d.beforeRead != nil {
		d.beforeRead()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	n := int(min(int64(len(p)), max(0, int64(len(d.base))-off)))
	for u := off / d.unit; d.failBase != nil && u*d.unit < off+int64(n); u++ {
		if !d.ours[u] {
			return 0, d.failBase
		}
	}
	for i := range p[:n] {
		at := off + int64(i)
		if d.ours[at/d.unit] {
			p[i] = d.top[at]
			continue
		}
		p[i] = d.base[at]
		if i == 0 || at%d.unit == 0 {
			d.baseReads = append(d.baseReads, Run{at / d.unit * d.unit, d.unit})
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *layered) TryReadAt(p []byte, off int64) error {
	_, err := d.ReadAt(p, off)
	return err
}

func (d *layered) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.failWrites != nil {
		return 0, d.failWrites
	}
	for u := off / d.unit; u*d.unit < off+int64(len(p)); u++ {
		if !d.ours[u] {
			copy(d.top[u*d.unit:min((u+1)*d.unit, int64(len(d.top)))], d.base[u*d.unit:])
			d.ours[u] = true
		}
	}
	return copy(d.top[off:], p), nil
}

func (d *layered) WriteCompressed([]byte, int64) error { return errors.ErrUnsupported }

func (d *layered) WriteZeroes(off, n int64, _ block.ZeroFlags) error {
	_, err := d.WriteAt(make([]byte, n), off)
	return err
}

func (d *layered) Discard(off, n int64) error { return d.WriteZeroes(off, n, 0) }

func (d *layered) Flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.flushes++
	return nil
}

func (d *layered) Extents(off, n int64, fn func(block.Extent) bool) error {
	for end := off + n; off < end; {
		d.mu.Lock()
		ours, err := d.ours[off/d.unit], d.failBase
		d.mu.Unlock()
		length := min(d.unit-off%d.unit, end-off)
		e := block.Extent{Offset: off, Length: length, Allocated: true, Data: true}
		if !ours {
			d.mu.Lock()
			d.asked++
			d.mu.Unlock()
			if err != nil {
				return err
			}
			e.Depth = 1
			e.Zero = d.holes && bytes.Count(d.base[off:off+length], []byte{0}) == int(length)
		}
		if !fn(e) {
			return nil
		}
		off += length
	}
	return nil
}

func (d *layered) Size() int64                             { return int64(len(d.base)) }
func (d *layered) Resize(int64, block.Preallocation) error { return errors.ErrUnsupported }
func (d *layered) Limits() block.Limits                    { return block.Limits{Preferred: d.unit} }

func (d *layered) Close() error {
	d.closed = true
	return nil
}

// breakBase makes the base fail from now on; nil: work again.
func (d *layered) breakBase(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.failBase = err
}

// inBase is how many bytes still live in the base.
func (d *layered) inBase() (n int64) {
	for u, ours := range d.ours {
		if !ours {
			n += min(d.unit, d.Size()-int64(u)*d.unit)
		}
	}
	return n
}

// slow is an Overlay whose operations take time on a fake clock.
type slow struct {
	Overlay
	clock       *fakeClock
	read, write float64 // bytes a second
	order       *[]int64
}

func (s slow) ReadBase(p []byte, off int64) error {
	if s.order != nil {
		*s.order = append(*s.order, off)
	}
	s.clock.advance(time.Duration(float64(len(p)) / s.read * float64(time.Second)))
	return s.Overlay.ReadBase(p, off)
}

func (s slow) Populate(p []byte, off int64) (int64, error) {
	s.clock.advance(time.Duration(float64(len(p)) / s.write * float64(time.Second)))
	return s.Overlay.Populate(p, off)
}

// memoryDevice is a base image over memory for fvd.
type memoryDevice struct {
	*storage.Memory
	mu    sync.Mutex
	reads int64
}

func newMemoryDevice(t testing.TB, size int64) *memoryDevice {
	d := &memoryDevice{Memory: storage.NewMemory("base")}
	p := make([]byte, size)
	for i := range p {
		p[i] = byte(i/512)*5 | 1
	}
	_, err := d.Memory.WriteAt(p, 0)
	must(t, err)
	return d
}

func (d *memoryDevice) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	d.reads += int64(len(p))
	d.mu.Unlock()
	return d.Memory.ReadAt(p, off)
}

func (d *memoryDevice) read() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.reads
}

func (d *memoryDevice) TryReadAt([]byte, int64) error                   { return block.ErrWouldBlock }
func (d *memoryDevice) WriteAt([]byte, int64) (int, error)              { return 0, block.ErrReadOnly }
func (d *memoryDevice) WriteCompressed([]byte, int64) error             { return block.ErrReadOnly }
func (d *memoryDevice) WriteZeroes(int64, int64, block.ZeroFlags) error { return block.ErrReadOnly }
func (d *memoryDevice) Discard(int64, int64) error                      { return block.ErrReadOnly }
func (d *memoryDevice) Flush() error                                    { return nil }
func (d *memoryDevice) Resize(int64, block.Preallocation) error         { return block.ErrReadOnly }
func (d *memoryDevice) Limits() block.Limits                            { return block.Limits{Preferred: 512, ReadOnly: true} }
func (d *memoryDevice) Extents(off, n int64, f func(block.Extent) bool) error {
	f(block.Extent{Offset: off, Length: n, Allocated: true, Data: true, HostOffset: off})
	return nil
}

func (d *memoryDevice) Size() int64 {
	n, err := d.Memory.Size()
	if err != nil {
		panic(err)
	}
	return n
}
