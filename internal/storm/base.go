package storm

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"

	"github.com/platter-disk/platter/block"
)

// Base is a device whose reads, and whose map, fail from time to time.
type Base struct {
	block.Device

	mu  sync.Mutex
	r   *rand.Rand
	one int
}

// NewBase returns a Base over a device, of which nothing fails yet. Closing it does not close the device.
func NewBase(d block.Device, seed uint64) *Base {
	return &Base{Device: d, r: rand.New(rand.NewPCG(seed, 14))}
}

// FailReads makes one read in about so many fail with EIO; 0: none.
func (b *Base) FailReads(one int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.one = one
}

func (b *Base) strike() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.one > 0 && b.r.IntN(b.one) == 0 {
		return fmt.Errorf("the base image: %w", syscall.EIO)
	}
	return nil
}

// ReadAt implements block.Device.
func (b *Base) ReadAt(p []byte, off int64) (int, error) {
	if err := b.strike(); err != nil {
		return 0, err
	}
	return b.Device.ReadAt(p, off)
}

// TryReadAt implements block.Device.
func (b *Base) TryReadAt(p []byte, off int64) error {
	if b.strike() != nil {
		return block.ErrWouldBlock
	}
	return b.Device.TryReadAt(p, off)
}

// Extents implements block.Device.
func (b *Base) Extents(off, n int64, fn func(block.Extent) bool) error {
	if err := b.strike(); err != nil {
		return err
	}
	return b.Device.Extents(off, n, fn)
}

// Close implements block.Device; the device may be used again.
func (b *Base) Close() error { return nil }
