package jobs

import (
	"context"
	"fmt"

	"github.com/platter-disk/platter/block"
)

// CommitOptions says how Commit copies. The zero value of each but Depth is a good choice.
type CommitOptions struct {
	// Depth is the layer of the overlay's chain that the base is, 1 or more: 1 is the overlay's own backing device.
	Depth int

	// Workers, BufferSize, RateLimit and Progress are as in ConvertOptions.
	Workers    int
	BufferSize int
	RateLimit  int64
	Progress   func(done, total int64)
}

// Commit writes what the layers of overlay above base hold into base, and flushes base, which must be the device
// in the overlay's chain at Options.Depth. A base that is smaller than the overlay grows to its size; one that is
// larger keeps what lies past the overlay's end. The overlay reads the same bytes before, during and after; it is
// not changed. Nobody else may write either.
//
// Errors are those of Convert. After one the base holds any part of what was to be written, and the overlay, read
// through it, still the same bytes.
func Commit(ctx context.Context, overlay, base block.Device, o CommitOptions) error {
	if o.Depth < 1 {
		return fmt.Errorf("commit to layer %d of the chain, expected 1 or more", o.Depth)
	}
	if base.Size() < overlay.Size() {
		if err := base.Resize(overlay.Size(), block.PreallocOff); err != nil {
			return fmt.Errorf("the base is smaller than the overlay: %w", err)
		}
	}
	c, err := newConversion(overlay, base, ConvertOptions{
		Workers: o.Workers, BufferSize: o.BufferSize, RateLimit: o.RateLimit, Progress: o.Progress, SkipDepth: o.Depth,
	})
	if err != nil {
		return err
	}
	c.zeroFrom = base.Size() // however empty the base was when it was opened
	return c.run(ctx)
}
