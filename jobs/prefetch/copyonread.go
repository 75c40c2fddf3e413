package prefetch

import (
	"fmt"
	"io"
	"math"
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
	// default. What is over the limit is read for the guest and not kept. Negative: nothing is kept, reads are
	// counted and recorded.
	MaxOutstanding int64
	// Recorder notes what the guest reads of the part that the base image covers; may be nil.
	Recorder *Recorder
	// Failed is told, once, why copies are not kept any more; reads go on. May be nil.
	Failed func(error)
}

// CopyOnReadStats counts bytes.
type CopyOnReadStats struct {
	BaseRead int64  `json:"base_read"`       // read from the base image for the guest, in whole blocks where they are kept
	Kept     int64  `json:"kept"`            // of those kept
	Dropped  int64  `json:"dropped"`         // not kept: over the limit, or no longer in the base
	Error    string `json:"error,omitempty"` // why copies are not kept any more
}

// CopyOnRead is an Overlay that keeps what its guest reads from the base image. The guest's read is answered first.
type CopyOnRead struct {
	Overlay
	o                                    CopyOnReadOptions
	guest                                atomic.Pointer[Activity] // nil: nobody wants to know
	outstanding, baseRead, kept, dropped atomic.Int64
	broken                               atomic.Pointer[error]

	flights flights
	copies  chan *flight
	mu      sync.RWMutex // closing copies against those who send
	closed  bool
	done    sync.WaitGroup
}

// NewCopyOnRead wraps an overlay. Closing it closes the overlay.
func NewCopyOnRead(over Overlay, o CopyOnReadOptions) *CopyOnRead {
	if o.MaxOutstanding == 0 {
		o.MaxOutstanding = DefaultMaxOutstanding
	}
	c := &CopyOnRead{Overlay: over, o: o, copies: make(chan *flight, copyQueue)}
	for range copyWorkers {
		c.done.Go(c.keep)
	}
	return c
}

// Stats returns the counts so far.
func (c *CopyOnRead) Stats() CopyOnReadStats {
	s := CopyOnReadStats{BaseRead: c.baseRead.Load(), Kept: c.kept.Load(), Dropped: c.dropped.Load()}
	if err := c.broken.Load(); err != nil {
		s.Error = (*err).Error()
	}
	return s
}

// Guest tells, from its first call on, when requests to c are under way, those aside that TryReadAt answers.
func (c *CopyOnRead) Guest() *Activity {
	c.guest.CompareAndSwap(nil, newActivity(systemClock{}))
	return c.guest.Load()
}

// request notes that a request began; end must be called on what it returns.
func (c *CopyOnRead) request() *Activity {
	g := c.guest.Load()
	if g != nil {
		g.begin()
	}
	return g
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
	defer c.request().end()
	size := c.Size()
	if off < 0 || off >= min(c.BaseSize(), size) {
		return c.Overlay.ReadAt(p, off)
	}
	c.touch(off, len(p))
	end := min(off+int64(len(p)), size)
	for at := off; at < end; {
		start, n := c.nextInBase(at, end)
		if at < start {
			if _, err := c.Overlay.ReadAt(p[at-off:start-off], at); err != nil {
				return int(at - off), err
			}
		}
		at = start
		for n = min(n, maxSpan); n > 0; {
			done, err := c.readBase(p[at-off:at-off+n], at)
			if err != nil {
				return int(at - off), err
			}
			if done == 0 { // look again
				break
			}
			at, n = at+done, n-done
		}
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

// buffer is a buffer for another copy of n bytes; nil if none may be begun now.
func (c *CopyOnRead) buffer(unit int64) func(n int64) *bufpool.Buffer {
	if c.o.MaxOutstanding < 0 || c.broken.Load() != nil || c.outstanding.Load() >= max(c.o.MaxOutstanding, unit) {
		return nil
	}
	return func(n int64) *bufpool.Buffer { return bufpool.Get(int(n)) }
}

// readBase answers the first part of a read from the base image, reading whole blocks, and hands them to be kept.
// It returns how many bytes it read; none if the disk may have them by now.
func (c *CopyOnRead) readBase(p []byte, off int64) (int64, error) {
	unit, base := c.CopyUnit(), c.BaseSize()
	from, end := off/unit*unit, off+int64(len(p))
	if rest := end % unit; rest > 0 {
		end = min(end+unit-rest, max(base, end))
	}
	mine := c.buffer(unit)
	if base == 0 || end-from > 2*maxSpan {
		mine = nil
	}
	f, joined := c.flights.enter(from, end, mine)
	switch {
	case f == nil:
		return c.readPlain(p, off)
	case joined:
		return c.readJoined(f, p, off)
	}
	n := min(f.end, off+int64(len(p))) - off
	if n <= 0 { // another flight begins between the start of the block and what is wanted
		f.failed = true
	} else if err := c.ReadBase(f.buf.B, f.off); err != nil {
		// It was detached meanwhile, or more was asked of it than the guest wants.
		f.failed = true
	}
	close(f.ready)
	if f.failed {
		c.flights.end(f)
		return c.readPlain(p, off)
	}
	c.baseRead.Add(f.end - f.off)
	copy(p[:n], f.buf.B[off-f.off:])
	c.hand(f)
	return n, nil
}

// readPlain answers a read that is not kept.
func (c *CopyOnRead) readPlain(p []byte, off int64) (int64, error) {
	_, err := c.Overlay.ReadAt(p, off)
	if err == nil && c.BaseSize() > 0 {
		c.baseRead.Add(int64(len(p)))
		c.dropped.Add(int64(len(p)))
	}
	return int64(len(p)), err
}

// readJoined answers the first part of a read from what somebody else is fetching.
func (c *CopyOnRead) readJoined(f *flight, p []byte, off int64) (int64, error) {
	defer c.flights.release(f)
	<-f.ready
	n := min(f.end-off, int64(len(p)))
	switch {
	case f.failed || n <= 0:
		return c.readPlain(p, off)
	case f.buf != nil:
		copy(p[:n], f.buf.B[off-f.off:])
		return n, nil
	}
	if start, left := c.nextInBase(off, off+n); left == 0 || start > off {
		return 0, nil // it is in the disk
	}
	return c.readPlain(p, off)
}

// Announce tells that [off, off+n) of the base image is about to be fetched and kept by others: reads wait for
// that rather than ask for the same bytes. finished must be called when it is done or given up. ok is false if
// some of it is being fetched already.
func (c *CopyOnRead) Announce(off, n int64) (finished func(), ok bool) {
	f, ok := c.flights.announce(off, off+n)
	if !ok {
		return nil, false
	}
	return func() {
		close(f.ready)
		c.flights.end(f)
	}, true
}

// WriteAt implements block.Device.
func (c *CopyOnRead) WriteAt(p []byte, off int64) (int, error) {
	defer c.request().end()
	defer c.flights.changed(off, int64(len(p)))
	return c.Overlay.WriteAt(p, off)
}

// WriteCompressed implements block.Device.
func (c *CopyOnRead) WriteCompressed(p []byte, off int64) error {
	defer c.request().end()
	defer c.flights.changed(off, int64(len(p)))
	return c.Overlay.WriteCompressed(p, off)
}

// WriteZeroes implements block.Device.
func (c *CopyOnRead) WriteZeroes(off, n int64, flags block.ZeroFlags) error {
	defer c.request().end()
	defer c.flights.changed(off, n)
	return c.Overlay.WriteZeroes(off, n, flags)
}

// Discard implements block.Device.
func (c *CopyOnRead) Discard(off, n int64) error {
	defer c.request().end()
	defer c.flights.changed(off, n)
	return c.Overlay.Discard(off, n)
}

// Resize implements block.Device. Who reads what a smaller disk has cut off waits for no flight over it.
func (c *CopyOnRead) Resize(size int64, prealloc block.Preallocation) error {
	defer c.request().end()
	from := min(size, c.Size())
	defer c.flights.changed(from, math.MaxInt64-from)
	return c.Overlay.Resize(size, prealloc)
}

// Flush implements block.Device.
func (c *CopyOnRead) Flush() error {
	defer c.request().end()
	return c.Overlay.Flush()
}

// hand passes a flight on to be kept, or drops it if the workers do not keep up.
func (c *CopyOnRead) hand(f *flight) {
	n := f.end - f.off
	c.outstanding.Add(n)
	c.mu.RLock()
	defer c.mu.RUnlock()
	if !c.closed {
		select {
		case c.copies <- f:
			return
		default:
		}
	}
	c.outstanding.Add(-n)
	c.dropped.Add(n)
	c.flights.end(f)
}

// keep stores copies until Close.
func (c *CopyOnRead) keep() {
	for f := range c.copies {
		n := f.end - f.off
		var kept int64
		if c.broken.Load() == nil {
			var err error
			if kept, err = c.Populate(f.buf.B, f.off); err != nil {
				err = fmt.Errorf("copy-on-read is off: %w", err)
				if c.broken.CompareAndSwap(nil, &err) && c.o.Failed != nil {
					c.o.Failed(err)
				}
			}
		}
		c.kept.Add(kept)
		c.dropped.Add(n - kept)
		c.outstanding.Add(-n)
		c.flights.end(f)
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
