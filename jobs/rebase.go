package jobs

import (
	"context"
	"fmt"
	"io"

	"golang.org/x/sync/errgroup"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/bufpool"
)

// RebaseOptions says how Rebase copies. The zero value is right for an overlay that may get anything of its disk
// from a backing device.
type RebaseOptions struct {
	// SameDepth, when it is not 0, is the layer of the overlay's chain that the new base is, too: what that layer
	// and those below it decide stays what it is.
	SameDepth int

	// Backed is how many bytes of the disk, from its start, may come from a backing device; 0 means all.
	Backed int64

	// HoldZeroes records zeros in the overlay so that they stay when another backing device comes to lie
	// underneath, even where the range reads as zeros anyway. Nil: WriteZeroes of the overlay does.
	HoldZeroes func(off, length int64) error

	// Workers, BufferSize and RateLimit are as in ConvertOptions; each worker holds two buffers.
	Workers    int
	BufferSize int
	RateLimit  int64

	// Progress, when set, is told how many bytes of the disk are done. It is called from several goroutines, one
	// at a time.
	Progress func(done, total int64)
}

// Rebase writes into overlay whatever its disk holds that it would not find in another backing device: the ranges
// that it does not hold itself, and that read differently from newBase. Past the end of newBase that is everything
// but zeros; nil is a base of length 0. Then it flushes the overlay. Afterwards the overlay may be given newBase in
// place of the backing device that it has; that is the caller's part. The disk reads the same bytes all the while.
//
// It fails with a *ReadError, *WriteError or *ExtentsError for the overlay, a *BaseError that wraps one for the new
// base, and with the context's error when ctx is cancelled. The overlay then holds more than before, of the same
// bytes.
func Rebase(ctx context.Context, overlay, newBase block.Device, o RebaseOptions) error {
	if o.Workers == 0 {
		o.Workers = DefaultWorkers
	}
	if o.Workers < 1 || o.Workers > MaxWorkers {
		return fmt.Errorf("%d workers: expected 1 to %d", o.Workers, MaxWorkers)
	}
	if o.BufferSize == 0 {
		o.BufferSize = DefaultBufferSize
	}
	if n := o.BufferSize; n < 4096 || n > MaxBufferSize || n&(n-1) != 0 {
		return fmt.Errorf("a buffer of %d bytes: expected a power of two from 4096 to %d", n, MaxBufferSize)
	}
	if o.HoldZeroes == nil {
		o.HoldZeroes = func(off, length int64) error { return overlay.WriteZeroes(off, length, block.MayUnmap) }
	}
	r := &rebase{
		overlay: overlay, base: newBase, o: o, size: overlay.Size(),
		cluster: max(overlay.Limits().Preferred, sectorSize), limit: newRateLimit(o.RateLimit),
	}
	if o.Backed > 0 {
		r.size = min(r.size, o.Backed)
	}
	r.progress = newProgress(o.Progress, r.size)
	group, ctx := errgroup.WithContext(ctx)
	work := make(chan rebasePiece)
	group.Go(func() error {
		defer close(work)
		return r.plan(ctx, work)
	})
	for range o.Workers {
		group.Go(func() error { return r.worker(ctx, work) })
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if err := overlay.Flush(); err != nil {
		return fmt.Errorf("flush of the overlay: %w", err)
	}
	r.progress.finish()
	return nil
}

// BaseError says that the new base failed, not the overlay.
type BaseError struct{ Err error }

func (e *BaseError) Error() string { return "new backing file: " + e.Err.Error() }
func (e *BaseError) Unwrap() error { return e.Err }

// rebase is one call of Rebase.
type rebase struct {
	overlay, base block.Device
	o             RebaseOptions
	size          int64 // bytes to look at
	cluster       int64 // unit in bytes that the overlay holds whole
	limit         *rateLimit
	progress      *progress
}

// rebasePiece is a range that the overlay does not hold and that may read differently once it is rebased.
type rebasePiece struct {
	off, length     int64
	oldZero, inBase bool // it is known to read as zeros; it has to be read from the new base
}

// plan walks the maps of overlay and new base side by side and hands out what must be looked at.
func (r *rebase) plan(ctx context.Context, work chan<- rebasePiece) error {
	above := newCursor(r.overlay, 0, r.size)
	var below *cursor
	if r.base != nil {
		below = newCursor(r.base, 0, min(r.base.Size(), r.size))
	}
	for {
		e, ok, err := above.peek()
		if err != nil || !ok {
			return err
		}
		b := block.Extent{Offset: e.Offset, Length: e.Length, Zero: true}
		inBase := false
		if below != nil {
			x, ok, err := below.peek()
			if err != nil {
				return &BaseError{err}
			}
			if ok {
				b, inBase = x, true
			}
		}
		n := min(e.Length, b.Length)
		p := rebasePiece{off: e.Offset, length: n, oldZero: e.Zero, inBase: !b.Zero}
		if r.held(e) || e.Zero && b.Zero {
			r.progress.add(n)
			err = ctx.Err()
		} else {
			err = r.emit(ctx, work, p)
		}
		if err != nil {
			return err
		}
		above.advance(n)
		if inBase {
			below.advance(n)
		}
	}
}

// held tells whether a run keeps its contents whatever backing device the overlay gets.
func (r *rebase) held(e block.Extent) bool {
	return e.Depth == 0 && e.Allocated || r.o.SameDepth > 0 && e.Depth >= r.o.SameDepth
}

// emit cuts a range into pieces of at most a buffer, at multiples of it.
func (r *rebase) emit(ctx context.Context, work chan<- rebasePiece, p rebasePiece) error {
	end := p.off + p.length
	for p.off < end {
		step := int64(r.o.BufferSize)
		p.length = min(end-p.off, step-p.off%step)
		select {
		case work <- p:
		case <-ctx.Done():
			return ctx.Err()
		}
		p.off += p.length
	}
	return nil
}

func (r *rebase) worker(ctx context.Context, work <-chan rebasePiece) error {
	var bufs [2]*bufpool.Buffer
	for i := range bufs {
		bufs[i] = bufpool.Get(r.o.BufferSize)
		defer bufs[i].Put()
	}
	for p := range work {
		if err := r.move(ctx, p, bufs[0].B[:p.length], bufs[1].B[:p.length]); err != nil {
			return err
		}
		r.progress.add(p.length)
	}
	return nil
}

// move writes the clusters of a piece that read differently.
func (r *rebase) move(ctx context.Context, p rebasePiece, before, after []byte) error {
	if err := load(r.overlay, before, p.off, !p.oldZero); err != nil {
		return err
	}
	if err := load(r.base, after, p.off, p.inBase); err != nil {
		return &BaseError{err}
	}
	var ops []run
	for off := p.off; off < p.off+p.length; {
		n := min(r.cluster-off%r.cluster, p.off+p.length-off)
		old := before[off-p.off:][:n]
		k := data
		switch {
		case firstDifference(old, after[off-p.off:][:n]) < 0:
			k = skip
		case isZero(old):
			k = zero
		}
		ops = appendRun(ops, run{off, n, k})
		off += n
	}
	for _, op := range ops {
		var err error
		switch op.kind {
		case skip:
			continue
		case zero:
			err = r.o.HoldZeroes(op.off, op.length)
		case data:
			if err := r.limit.wait(ctx, op.length); err != nil {
				return err
			}
			_, err = r.overlay.WriteAt(before[op.off-p.off:][:op.length], op.off)
		}
		if err != nil {
			return &WriteError{Offset: op.off, Err: err}
		}
	}
	return ctx.Err()
}

// load fills p with what a device holds at off, or with zeros unless it is to be read.
func load(d block.Device, p []byte, off int64, read bool) error {
	if !read {
		clear(p)
		return nil
	}
	n, err := d.ReadAt(p, off)
	if n == len(p) && (err == nil || err == io.EOF) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return &ReadError{Offset: off, Err: err}
}
