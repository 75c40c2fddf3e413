package jobs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/bufpool"
)

// CompareOptions says how Compare looks at two disks. The zero value compares what a guest would read.
type CompareOptions struct {
	// Strict demands equal sizes, and that the same parts are allocated and known to be zero.
	Strict bool
	// Workers and BufferSize are as in ConvertOptions; each worker holds two buffers.
	Workers    int
	BufferSize int
	// Progress, when set, is told how many bytes of the longer disk are done. It is called from several
	// goroutines, one at a time.
	Progress func(done, total int64)
}

// Difference is what Compare found.
type Difference uint8

const (
	Identical         Difference = iota
	ContentDiffers               // Offset is the sector that holds the first difference
	SizeDiffers                  // strict mode only
	AllocationDiffers            // strict mode only; Offset is the first byte with different allocation
)

// String returns "identical", or what differs.
func (d Difference) String() string {
	switch d {
	case Identical:
		return "identical"
	case ContentDiffers:
		return "content differs"
	case SizeDiffers:
		return "size differs"
	case AllocationDiffers:
		return "allocation differs"
	}
	return fmt.Sprintf("difference %d", uint8(d))
}

// CompareResult is the verdict of Compare: the disks are equal if Difference is Identical.
type CompareResult struct {
	Difference Difference
	Offset     int64 // bytes; where Difference has a place
	// SizesDiffer tells that one disk is longer. Out of strict mode the disks are identical nevertheless
	// when the longer one reads as zeros from there on.
	SizesDiffer bool
}

// CompareError says which of the two disks failed.
type CompareError struct {
	Second bool  // the second disk failed, not the first
	Err    error // a *ReadError or *ExtentsError
}

func (e *CompareError) Error() string { return e.Err.Error() }
func (e *CompareError) Unwrap() error { return e.Err }

// Compare tells whether two disks hold the same bytes. What both know to be zero is not read. It stops at the
// first difference. A device that fails before the first difference makes it fail with a *CompareError.
func Compare(ctx context.Context, a, b block.Device, o CompareOptions) (CompareResult, error) {
	if o.Workers == 0 {
		o.Workers = DefaultWorkers
	}
	if o.Workers < 1 || o.Workers > MaxWorkers {
		return CompareResult{}, fmt.Errorf("%d workers: expected 1 to %d", o.Workers, MaxWorkers)
	}
	if o.BufferSize == 0 {
		o.BufferSize = DefaultBufferSize
	}
	if n := o.BufferSize; n < 4096 || n > MaxBufferSize || n&(n-1) != 0 {
		return CompareResult{}, fmt.Errorf("a buffer of %d bytes: expected a power of two from 4096 to %d", n, MaxBufferSize)
	}
	c := &comparison{
		devs:   [2]block.Device{a, b},
		o:      o,
		common: min(a.Size(), b.Size()),
		end:    max(a.Size(), b.Size()),
	}
	if o.Strict && c.common != c.end {
		return CompareResult{Difference: SizeDiffers, SizesDiffer: true}, nil
	}
	c.progress = newProgress(o.Progress, c.end)
	if err := c.run(ctx); err != nil {
		return CompareResult{}, err
	}
	f := c.found
	if f == nil {
		c.progress.finish()
		return CompareResult{SizesDiffer: c.common != c.end}, nil
	}
	if f.err != nil {
		return CompareResult{}, f.err
	}
	return CompareResult{Difference: f.difference, Offset: f.off, SizesDiffer: c.common != c.end}, nil
}

// comparison is one call of Compare.
type comparison struct {
	devs        [2]block.Device
	o           CompareOptions
	common, end int64 // bytes: where the shorter and the longer disk end
	progress    *progress

	mu    sync.Mutex
	found *finding // the one with the lowest offset so far
}

// finding is something at an offset that ends the comparison: a difference or an error.
type finding struct {
	off        int64
	difference Difference
	err        error
}

// piece is a range to be looked at: read from both disks, or from one and expected to be zero.
type piece struct {
	off, length int64
	read        [2]bool
}

var errStop = errors.New("nothing beyond this point matters")

func (c *comparison) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	work := make(chan piece)
	group.Go(func() error {
		defer close(work)
		err := c.plan(ctx, work)
		if errors.Is(err, errStop) {
			return nil
		}
		return err
	})
	for range c.o.Workers {
		group.Go(func() error {
			var bufs [2]*bufpool.Buffer
			for i := range bufs {
				bufs[i] = bufpool.Get(c.o.BufferSize)
				defer bufs[i].Put()
			}
			for p := range work {
				c.look(p, bufs)
				c.progress.add(p.length)
			}
			return nil
		})
	}
	return group.Wait()
}

// plan walks both maps side by side and hands out what must be read.
func (c *comparison) plan(ctx context.Context, work chan<- piece) error {
	var curs [2]*cursor
	for i, d := range c.devs {
		curs[i] = newCursor(d, 0, d.Size())
	}
	for off := int64(0); off < c.end; {
		var e [2]block.Extent
		length := c.end - off
		for i, cur := range curs {
			x, ok, err := cur.peek()
			switch {
			case err != nil:
				c.note(finding{off: off, err: &CompareError{Second: i == 1, Err: err}})
				return nil
			case !ok: // past the end of the shorter disk there are zeros to compare with
				x = block.Extent{Offset: off, Length: length, Zero: true}
			}
			e[i] = x
			length = min(length, x.Length)
		}
		if c.o.Strict && !sameAllocation(e[0], e[1]) {
			c.note(finding{off: off, difference: AllocationDiffers})
			return nil
		}
		if err := c.emit(ctx, work, off, length, [2]bool{!e[0].Zero, !e[1].Zero}); err != nil {
			return err
		}
		off += length
		for _, cur := range curs {
			if _, ok, _ := cur.peek(); ok {
				cur.advance(length)
			}
		}
	}
	return nil
}

// sameAllocation is what strict mode asks of two runs.
func sameAllocation(a, b block.Extent) bool {
	return a.Allocated == b.Allocated && a.Zero == b.Zero && a.Data == b.Data
}

// emit cuts a range into pieces of at most a buffer.
func (c *comparison) emit(ctx context.Context, work chan<- piece, off, length int64, read [2]bool) error {
	if !read[0] && !read[1] {
		c.progress.add(length)
		return ctx.Err()
	}
	step := int64(c.o.BufferSize)
	for length > 0 {
		if c.reached(off) {
			return errStop
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(length, step-off%step)
		select {
		case work <- piece{off, n, read}:
		case <-ctx.Done():
			return ctx.Err()
		}
		off, length = off+n, length-n
	}
	return nil
}

// look compares one piece.
func (c *comparison) look(p piece, bufs [2]*bufpool.Buffer) {
	if c.reached(p.off) {
		return
	}
	for i, dev := range c.devs {
		if !p.read[i] {
			continue
		}
		buf := bufs[i].B[:p.length]
		if n, err := dev.ReadAt(buf, p.off); n < len(buf) || (err != nil && err != io.EOF) {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			c.note(finding{off: p.off, err: &CompareError{Second: i == 1, Err: &ReadError{Offset: p.off, Err: err}}})
			return
		}
	}
	at := -1
	switch {
	case p.read[0] && p.read[1]:
		at = firstDifference(bufs[0].B[:p.length], bufs[1].B[:p.length])
	case p.read[0]:
		at = firstNonZero(bufs[0].B[:p.length])
	default:
		at = firstNonZero(bufs[1].B[:p.length])
	}
	if at >= 0 {
		off := p.off + int64(at)
		c.note(finding{off: off - off%sectorSize, difference: ContentDiffers})
	}
}

// note keeps the finding that lies first on the disk: pieces are handed out in order, so once they are all
// looked at it is the one that a sequential comparison would have met.
func (c *comparison) note(f finding) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.found == nil || f.off < c.found.off {
		c.found = &f
	}
}

// reached tells whether something was found at or before off.
func (c *comparison) reached(off int64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.found != nil && c.found.off <= off
}
