package jobs

import (
	"fmt"

	"github.com/platter-disk/platter/block"
)

// cursorBatch is how many runs a cursor fetches at a time. Fetching in batches keeps the callback of
// Device.Extents short, whatever the device holds while it runs.
const cursorBatch = 512

// cursor walks the extents of a device in order. It is for one goroutine.
type cursor struct {
	dev  block.Device
	next int64 // first byte that has not been fetched
	end  int64
	runs []block.Extent
	i    int
}

func newCursor(dev block.Device, off, end int64) *cursor {
	return &cursor{dev: dev, next: off, end: end, runs: make([]block.Extent, 0, cursorBatch)}
}

// peek returns the run at the cursor; ok is false at the end.
func (c *cursor) peek() (e block.Extent, ok bool, err error) {
	if c.i == len(c.runs) {
		if c.next >= c.end {
			return block.Extent{}, false, nil
		}
		if err := c.fetch(); err != nil {
			return block.Extent{}, false, &ExtentsError{Offset: c.next, Err: err}
		}
	}
	return c.runs[c.i], true, nil
}

// advance moves the cursor n bytes on, at most to the end of the run that peek returned.
func (c *cursor) advance(n int64) {
	r := &c.runs[c.i]
	r.Offset += n
	r.Length -= n
	if r.HostOffset >= 0 {
		r.HostOffset += n
	}
	if r.Length == 0 {
		c.i++
	}
}

func (c *cursor) fetch() error {
	c.runs, c.i = c.runs[:0], 0
	var bad error
	err := c.dev.Extents(c.next, c.end-c.next, func(e block.Extent) bool {
		if e.Offset != c.next || e.Length <= 0 || e.Length > c.end-e.Offset {
			bad = fmt.Errorf("the device reports a run of %d bytes at %d, expected one that begins at %d and ends by %d",
				e.Length, e.Offset, c.next, c.end)
			return false
		}
		c.next += e.Length
		if n := len(c.runs); n > 0 && sameKind(c.runs[n-1], e) {
			c.runs[n-1].Length += e.Length
			return true
		}
		c.runs = append(c.runs, e)
		return len(c.runs) < cursorBatch
	})
	switch {
	case bad != nil:
		return bad
	case err != nil:
		return err
	case len(c.runs) == 0:
		return fmt.Errorf("the device reports nothing for the %d bytes at %d", c.end-c.next, c.next)
	}
	return nil
}

// sameKind tells whether b continues a as far as a job cares: where the bytes lie does not matter.
func sameKind(a, b block.Extent) bool {
	return a.Depth == b.Depth && a.Allocated == b.Allocated && a.Zero == b.Zero && a.Data == b.Data
}
