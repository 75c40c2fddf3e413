package jobs

import (
	"bytes"
	"fmt"
	"io"
	"sync"

	"github.com/platter-disk/platter/block"
)

// fakeDevice is a small disk in memory whose allocation, layers and failures a test sets as it likes.
type fakeDevice struct {
	mu         sync.Mutex
	content    []byte
	cluster    int64
	runs       []block.Extent // as Extents reports them; nil: everything is data
	limits     block.Limits
	badSectors map[int64]bool // sectors that cannot be read
	failWrite  error
	failMap    error

	reads, writes, zeroed, compressed int64 // bytes
	writeOffs                         []int64
	flushes                           int
}

func newFake(size int, cluster int64) *fakeDevice {
	return &fakeDevice{content: make([]byte, size), cluster: cluster, limits: block.Limits{Preferred: cluster, Compress: true}}
}

func (d *fakeDevice) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := copy(p, d.content[min(off, int64(len(d.content))):])
	d.reads += int64(n)
	for s := off / sectorSize; s*sectorSize < off+int64(n); s++ {
		if d.badSectors[s] {
			return 0, fmt.Errorf("bad sector %d", s)
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *fakeDevice) TryReadAt(p []byte, off int64) error {
	_, err := d.ReadAt(p, off)
	return err
}

func (d *fakeDevice) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.failWrite != nil {
		return 0, d.failWrite
	}
	if err := block.CheckRange("write", off, int64(len(p)), d.Size()); err != nil {
		return 0, err
	}
	d.writes += int64(len(p))
	d.writeOffs = append(d.writeOffs, off)
	return copy(d.content[off:], p), nil
}

func (d *fakeDevice) WriteCompressed(p []byte, off int64) error {
	if off%d.cluster != 0 || (int64(len(p)) != d.cluster && off+int64(len(p)) != d.Size()) {
		return fmt.Errorf("compressed write of %d bytes at %d is no whole cluster", len(p), off)
	}
	d.mu.Lock()
	d.compressed += int64(len(p))
	copy(d.content[off:], p)
	d.mu.Unlock()
	return nil
}

func (d *fakeDevice) WriteZeroes(off, length int64, _ block.ZeroFlags) error {
	if err := block.CheckRange("write zeroes", off, length, d.Size()); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.failWrite != nil {
		return d.failWrite
	}
	d.zeroed += length
	clear(d.content[off : off+length])
	return nil
}

func (d *fakeDevice) Extents(off, length int64, fn func(block.Extent) bool) error {
	if d.failMap != nil {
		return d.failMap
	}
	if d.runs == nil {
		fn(block.Extent{Offset: off, Length: length, Allocated: true, Data: true, HostOffset: off})
		return nil
	}
	for _, r := range d.runs {
		from, to := max(r.Offset, off), min(r.Offset+r.Length, off+length)
		if from >= to {
			continue
		}
		r.Offset, r.Length = from, to-from
		if !fn(r) {
			return nil
		}
	}
	return nil
}

func (d *fakeDevice) Discard(int64, int64) error              { return nil }
func (d *fakeDevice) Flush() error                            { d.flushes++; return nil }
func (d *fakeDevice) Size() int64                             { return int64(len(d.content)) }
func (d *fakeDevice) Resize(int64, block.Preallocation) error { return nil }
func (d *fakeDevice) Limits() block.Limits                    { return d.limits }
func (d *fakeDevice) Close() error                            { return nil }

// add appends a run of the given kind, filled with fill, to a disk whose runs are being laid out.
func (d *fakeDevice) add(length int64, e block.Extent, fill byte) *fakeDevice {
	var off int64
	if n := len(d.runs); n > 0 {
		off = d.runs[n-1].Offset + d.runs[n-1].Length
	}
	e.Offset, e.Length = off, length
	d.runs = append(d.runs, e)
	copy(d.content[off:off+length], bytes.Repeat([]byte{fill}, int(length)))
	return d
}

var (
	dataRun        = block.Extent{Allocated: true, Data: true}
	zeroRun        = block.Extent{Allocated: true, Zero: true}
	unallocatedRun = block.Extent{Zero: true}
	backingRun     = block.Extent{Allocated: true, Data: true, Depth: 1}
)
