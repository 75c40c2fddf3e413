package jobs

import (
	"errors"
	"fmt"
	"io"
	"math"
	"sort"

	"github.com/platter-disk/platter/block"
)

// Concat is a read-only disk made of several, one after the other. It is safe for concurrent use if they are.
type Concat struct {
	parts  []block.Device
	starts []int64 // where each part begins, and the size of the whole at the end
}

// NewConcat joins the parts, at least one, in their order. Closing the result closes them.
func NewConcat(parts ...block.Device) (*Concat, error) {
	if len(parts) == 0 {
		return nil, fmt.Errorf("nothing to join: expected at least one device")
	}
	c := &Concat{parts: parts, starts: make([]int64, 1, len(parts)+1)}
	for i, p := range parts {
		start := c.starts[i]
		if p.Size() > math.MaxInt64-start {
			return nil, fmt.Errorf("the joined devices have more than %d bytes", int64(math.MaxInt64))
		}
		c.starts = append(c.starts, start+p.Size())
	}
	return c, nil
}

// each calls fn for the pieces of [off, off+length) with the device that holds each and the offset on it.
func (c *Concat) each(off, length int64, fn func(d block.Device, devOff, at, n int64) error) error {
	i := sort.Search(len(c.parts), func(i int) bool { return c.starts[i+1] > off })
	for end := off + length; off < end; i++ {
		n := min(end, c.starts[i+1]) - off
		if n == 0 {
			continue
		}
		if err := fn(c.parts[i], off-c.starts[i], off, n); err != nil {
			return err
		}
		off += n
	}
	return nil
}

// ReadAt implements block.Device.
func (c *Concat) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > c.Size() {
		return 0, block.CheckRange("read", off, int64(len(p)), c.Size())
	}
	length := min(int64(len(p)), c.Size()-off)
	done := 0
	err := c.each(off, length, func(d block.Device, devOff, _, n int64) error {
		got, err := d.ReadAt(p[done:done+int(n)], devOff)
		done += got
		if int64(got) == n && err == io.EOF {
			err = nil
		}
		return err
	})
	if err == nil && done < len(p) {
		err = io.EOF
	}
	return done, err
}

// TryReadAt implements block.Device.
func (c *Concat) TryReadAt(p []byte, off int64) error {
	if err := block.CheckRange("read", off, int64(len(p)), c.Size()); err != nil {
		return err
	}
	start := off
	return c.each(off, int64(len(p)), func(d block.Device, devOff, at, n int64) error {
		return d.TryReadAt(p[at-start:][:n], devOff)
	})
}

// Extents implements block.Device.
func (c *Concat) Extents(off, length int64, fn func(block.Extent) bool) error {
	if err := block.CheckRange("extents", off, length, c.Size()); err != nil {
		return err
	}
	stopped := errors.New("stopped by the caller")
	err := c.each(off, length, func(d block.Device, devOff, at, n int64) error {
		more := true
		err := d.Extents(devOff, n, func(e block.Extent) bool {
			e.Offset += at - devOff
			more = fn(e)
			return more
		})
		if err == nil && !more {
			err = stopped
		}
		return err
	})
	if err == stopped {
		return nil
	}
	return err
}

// Size implements block.Device.
func (c *Concat) Size() int64 { return c.starts[len(c.parts)] }

// Limits implements block.Device.
func (c *Concat) Limits() block.Limits {
	l := block.Limits{ReadOnly: true, Preferred: sectorSize}
	for _, p := range c.parts {
		l.Preferred = max(l.Preferred, p.Limits().Preferred)
	}
	return l
}

// Flush implements block.Device; there is nothing to flush.
func (c *Concat) Flush() error { return nil }

// WriteAt implements block.Device; it is refused, as every change is.
func (c *Concat) WriteAt([]byte, int64) (int, error) { return 0, c.readOnly("write") }

// WriteCompressed implements block.Device; it is refused.
func (c *Concat) WriteCompressed([]byte, int64) error { return c.readOnly("compressed write") }

// WriteZeroes implements block.Device; it is refused.
func (c *Concat) WriteZeroes(int64, int64, block.ZeroFlags) error { return c.readOnly("write zeroes") }

// Discard implements block.Device; it is refused.
func (c *Concat) Discard(int64, int64) error { return c.readOnly("discard") }

// Resize implements block.Device; it is refused.
func (c *Concat) Resize(int64, block.Preallocation) error { return c.readOnly("resize") }

func (c *Concat) readOnly(op string) error {
	return fmt.Errorf("%s of joined devices: %w", op, block.ErrReadOnly)
}

// Close closes every part and returns their errors.
func (c *Concat) Close() error {
	var errs []error
	for _, p := range c.parts {
		errs = append(errs, p.Close())
	}
	return errors.Join(errs...)
}
