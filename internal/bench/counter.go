package bench

import (
	"sync/atomic"

	"github.com/platter-disk/platter/storage"
)

// What is counted.
const (
	writeCalls = iota
	bytesWritten
	syncs
	otherChanges
	numCounts
)

// counts are shared by the files of an image.
type counts [numCounts]atomic.Int64

func (c *counts) read() (v [numCounts]int64) {
	for i := range c {
		v[i] = c[i].Load()
	}
	return v
}

// counter counts what an engine changes in a file. It does nothing else, so that it does not show in the CPU
// and allocations that are measured beside.
type counter struct {
	storage.File
	counts *counts
}

func (c counter) WriteAt(p []byte, off int64) (int, error) {
	n, err := c.File.WriteAt(p, off)
	c.counts[writeCalls].Add(1)
	c.counts[bytesWritten].Add(int64(n))
	return n, err
}

func (c counter) Sync() error {
	c.counts[syncs].Add(1)
	return c.File.Sync()
}

func (c counter) Truncate(size int64) error {
	c.counts[otherChanges].Add(1)
	return c.File.Truncate(size)
}

func (c counter) PunchHole(off, length int64) error {
	c.counts[otherChanges].Add(1)
	return c.File.PunchHole(off, length)
}

func (c counter) ZeroRange(off, length int64) error {
	c.counts[otherChanges].Add(1)
	return c.File.ZeroRange(off, length)
}

func (c counter) Allocate(off, length int64) error {
	c.counts[otherChanges].Add(1)
	return c.File.Allocate(off, length)
}
