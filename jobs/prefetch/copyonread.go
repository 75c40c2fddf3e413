package prefetch

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/bufpool"
)

const (
	// DefaultMaxOutstanding is the default limit of copies under way, in bytes (FVD specification 2.3).
	DefaultMaxOutstanding = 2_000_000

	copyWorkers = 2
	copyQueue   = 64
	maxSpan     = 4 << 20 // bytes: larger reads of the base image are made in parts
)

// CopyOnReadOptions says what a CopyOnRead does.
type CopyOnReadOptions struct {
	// MaxOutstanding: a copy is kept only if less than that many bytes of copies are under way; 0: the
	// default. What is over the limit is read for the guest and not kept.
	MaxOutstanding int64
	// Recorder notes what the guest reads of the part that the base image covers; may be nil.
	Recorder *Recorder
	// Failed is told, once, why copies are not kept any more; reads go on. May be nil.
	Failed func(error)
}

// CopyOnReadStats counts bytes.
type CopyOnReadStats struct {
	BaseRead int64 // read from the base image for the guest
	Kept     int64 // of those kept
	Dropped  int64 // not kept: over the limit, or no longer in the base
}

// CopyOnRead is an Overlay that keeps what its guest reads from the base image. The guest's read is answered first.
type CopyOnRead struct {
	Overlay
	o CopyOnReadOptions

	outstanding, baseRead, kept, dropped atomic.Int64
	broken                               atomic.Bool

	copies chan copyTask
	mu     sync.RWMutex // closing copies against those who send
	closed bool
	done   sync.WaitGroup
}

// copyTask is what was read and is to be kept.
type copyTask struct {
	buf *bufpool.Buffer
	off int64
}

// NewCopyOnRead wraps an overlay. Closing it closes the overlay.
func NewCopyOnRead(over Overlay, o CopyOnReadOptions) *CopyOnRead {
	if o.MaxOutstanding <= 0 {
		o.MaxOutstanding = DefaultMaxOutstanding
	}
	c := &CopyOnRead{Overlay: over, o: o, copies: make(chan copyTask, copyQueue)}
	for range copyWorkers {
		c.done.Go(c.keep)
	}
	return c
}

// Stats returns the counts so far.
func (c *CopyOnRead) Stats() CopyOnReadStats {
	return CopyOnReadStats{c.baseRead.Load(), c.kept.Load(), c.dropped.Load()}
}

// nextInBase is the first run of [off, end) that lives in the base image; n is 0 if there is none.
func (c *CopyOnRead) nextInBase(off, end int64) (start, n int64) {
	if c.BaseSize() == 0 {
		return end, 0
	}
	start, n = c.NextInBase(off)
	if n == 0 || start >= end {
		return end, 0
	}
	return start, min(n, end-start)
}

// ReadAt implements block.Device.
func (c *CopyOnRead) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off >= c.BaseSize() {
		return c.Overlay.ReadAt(p, off)
	}
	c.touch(off, len(p))
	end := min(off+int64(len(p)), c.Size())
	at := off
	for at < end {
		start, n := c.nextInBase(at, end)
		if at < start {
			if _, err := c.Overlay.ReadAt(p[at-off:start-off], at); err != nil {
				return int(at - off), err
			}
		}
		n = min(n, maxSpan)
		if n > 0 {
			if err := c.readBase(p[start-off:start-off+n], start); err != nil {
				return int(start - off), err
			}
		}
		at = start + n
	}
	if end-off < int64(len(p)) {
		return int(end - off), io.EOF
	}
	return len(p), nil
}

// TryReadAt implements block.Device: what lives in the base image is left to ReadAt.
func (c *CopyOnRead) TryReadAt(p []byte, off int64) error {
	if off >= 0 && off < c.BaseSize() {
		if _, n := c.nextInBase(off, off+int64(len(p))); n > 0 {
			return block.ErrWouldBlock
		}
		c.touch(off, len(p))
	}
	return c.Overlay.TryReadAt(p, off)
}

func (c *CopyOnRead) touch(off int64, n int) {
	if c.o.Recorder != nil {
		c.o.Recorder.Touch(off, int64(n))
	}
}

// readBase answers a read from the base image, reading whole blocks, and hands them to be kept.
func (c *CopyOnRead) readBase(p []byte, off int64) error {
	unit, base := c.CopyUnit(), c.BaseSize()
	from, end := off/unit*unit, off+int64(len(p))
	if rest := end % unit; rest > 0 {
		end = min(end+unit-rest, max(base, end))
	}
	if base == 0 || c.broken.Load() || end-from > 2*maxSpan || c.outstanding.Load() >= max(c.o.MaxOutstanding, unit) {
		if base > 0 {
			c.baseRead.Add(int64(len(p)))
			c.dropped.Add(int64(len(p)))
		}
		_, err := c.Overlay.ReadAt(p, off)
		return err
	}
	buf := bufpool.Get(int(end - from))
	if err := c.ReadBase(buf.B, from); err != nil {
		buf.Put()
		if c.BaseSize() == 0 { // detached meanwhile: the disk has it all
			_, err = c.Overlay.ReadAt(p, off)
		}
		return err
	}
	c.baseRead.Add(end - from)
	copy(p, buf.B[off-from:])
	c.hand(copyTask{buf, from})
	return nil
}

// hand passes a task on, or drops it if the workers do not keep up.
func (c *CopyOnRead) hand(t copyTask) {
	n := int64(len(t.buf.B))
	c.outstanding.Add(n)
	c.mu.RLock()
	defer c.mu.RUnlock()
	if !c.closed {
		select {
		case c.copies <- t:
			return
		default:
		}
	}
	c.outstanding.Add(-n)
	c.dropped.Add(n)
	t.buf.Put()
}

// keep stores copies until Close.
func (c *CopyOnRead) keep() {
	for t := range c.copies {
		n := int64(len(t.buf.B))
		var kept int64
		if !c.broken.Load() {
			var err error
			kept, err = c.Populate(t.buf.B, t.off)
			if err != nil && !c.broken.Swap(true) && c.o.Failed != nil {
				c.o.Failed(fmt.Errorf("copy-on-read is off: %w", err))
			}
		}
		c.kept.Add(kept)
		c.dropped.Add(n - kept)
		c.outstanding.Add(-n)
		t.buf.Put()
	}
}

// Close implements block.Device: copies under way are kept first.
func (c *CopyOnRead) Close() error {
	c.mu.Lock()
	if !c.closed {
		c.closed = true
		close(c.copies)
	}
	c.mu.Unlock()
	c.done.Wait()
	return c.Overlay.Close()
}
