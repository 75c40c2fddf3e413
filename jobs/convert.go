package jobs

import (
	"context"
	"fmt"
	"runtime"

	"golang.org/x/sync/errgroup"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/bufpool"
)

const (
	// DefaultWorkers is how many windows are copied at a time when the caller does not say.
	DefaultWorkers = 8
	// MaxWorkers bounds Workers, and with it the memory of a job.
	MaxWorkers = 64
	// DefaultBufferSize is the size in bytes of a window when the caller does not say.
	DefaultBufferSize = 2 << 20
	// MaxBufferSize bounds BufferSize, and with it the memory of a job.
	MaxBufferSize = 64 << 20
	// DefaultSparseSize is the run of zeros in bytes, and its alignment, that is kept out of a target.
	DefaultSparseSize = 4096

	// zeroStep is the most that is zeroed in one call, so that a job notices soon that it is cancelled.
	zeroStep = 1 << 30
	// sectorSize is the unit in bytes in which an unreadable source is salvaged.
	sectorSize = 512
)

// ConvertOptions says how Convert copies. The zero value is a good copy.
type ConvertOptions struct {
	// Workers is how many windows are in work at a time, 1 to MaxWorkers; 0 means DefaultWorkers, or one
	// for each processor where that is more and the copy is compressed.
	Workers int
	// BufferSize is the size of a window in bytes, a power of two from 4 KiB to MaxBufferSize;
	// 0 means DefaultBufferSize. It grows to the cluster size of a compressed target.
	BufferSize int
	// SparseSize is the unit in bytes in which data is searched for zeros, a power of two or any multiple
	// of 512; 0 means DefaultSparseSize.
	SparseSize int64
	// NoSparse writes everything out, zeros and unallocated parts too: the target becomes fully allocated.
	NoSparse bool
	// Compressed stores every cluster compressed. Such clusters are always written out of order.
	Compressed bool
	// OutOfOrder lets a window be written before those that precede it on the disk. That is faster on
	// devices, and scatters the disk a little over an image that grows.
	OutOfOrder bool

	// TargetIsZero promises that the target reads as zeros everywhere, so that zeros need not be written.
	// It is implied by the ZeroInit limit of the target.
	TargetIsZero bool
	// TargetBackingSize promises, when it is not 0, that the target is an untouched overlay over a backing
	// file of this many bytes: it reads as zeros from there on, and only from there on.
	TargetBackingSize int64
	// SkipDepth leaves out, when it is not 0, what the layers from this depth of the source on decide: the
	// target finds it in its own backing file.
	SkipDepth int

	// RateLimit is the most to write in bytes a second, on average; 0 means no limit.
	RateLimit int64
	// Salvage, when set, is told of each part of the source that cannot be read, and the copy goes on with
	// zeros in its place. It is called from several goroutines at a time.
	Salvage func(off, length int64, err error)
	// Progress, when set, is told how many bytes of data are done, of how many. It is called from several
	// goroutines, one at a time.
	Progress func(done, total int64)
}

// Convert copies all of src over the beginning of dst, and flushes dst. Nothing is known to be zero is read,
// and nothing is written where the target already reads as zeros.
//
// It fails when dst is smaller than src, with a *ReadError, *WriteError or *ExtentsError when a device fails,
// and with the context's error when ctx is cancelled; the target then holds any part of the source.
func Convert(ctx context.Context, src, dst block.Device, o ConvertOptions) error {
	c, err := newConversion(src, dst, o)
	if err != nil {
		return err
	}
	return c.run(ctx)
}

func (c *conversion) run(ctx context.Context) error {
	if c.o.Progress != nil {
		total, err := c.dataBytes(ctx)
		if err != nil {
			return err
		}
		c.progress = newProgress(c.o.Progress, total)
	}
	group, ctx := errgroup.WithContext(ctx)
	work := make(chan window)
	group.Go(func() error {
		defer close(work)
		return c.plan(ctx, work)
	})
	for range c.o.Workers {
		group.Go(func() error { return c.worker(ctx, work) })
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if err := c.dst.Flush(); err != nil {
		return fmt.Errorf("flush of the target: %w", err)
	}
	c.progress.finish()
	return nil
}

// conversion is one call of Convert.
type conversion struct {
	src, dst block.Device
	o        ConvertOptions
	size     int64 // bytes to copy
	cluster  int64 // unit in bytes that the target writes whole
	zeroFrom int64 // from this offset on the target reads as zeros
	limit    *rateLimit
	progress *progress
}

func newConversion(src, dst block.Device, o ConvertOptions) (*conversion, error) {
	c := &conversion{src: src, dst: dst, o: o, size: src.Size(), limit: newRateLimit(o.RateLimit)}
	if dst.Size() < c.size {
		return nil, fmt.Errorf("the target has %d bytes, fewer than the %d of the source", dst.Size(), c.size)
	}
	limits := dst.Limits()
	if o.Compressed && !limits.Compress {
		return nil, fmt.Errorf("the target cannot store compressed data")
	}
	c.cluster = max(limits.Preferred, sectorSize)
	switch {
	case o.TargetIsZero || limits.ZeroInit:
		c.zeroFrom = 0
	case o.TargetBackingSize > 0:
		c.zeroFrom = o.TargetBackingSize
	default:
		c.zeroFrom = dst.Size()
	}
	if c.o.Workers == 0 {
		c.o.Workers = DefaultWorkers
		if o.Compressed {
			c.o.Workers = min(max(DefaultWorkers, runtime.GOMAXPROCS(0)), MaxWorkers)
		}
	}
	if c.o.Workers < 1 || c.o.Workers > MaxWorkers {
		return nil, fmt.Errorf("%d workers: expected 1 to %d", o.Workers, MaxWorkers)
	}
	if c.o.BufferSize == 0 {
		c.o.BufferSize = DefaultBufferSize
	}
	if n := c.o.BufferSize; n < 4096 || n > MaxBufferSize || n&(n-1) != 0 {
		return nil, fmt.Errorf("a buffer of %d bytes: expected a power of two from 4096 to %d", n, MaxBufferSize)
	}
	if c.o.Compressed && c.cluster > int64(c.o.BufferSize) {
		if c.cluster > MaxBufferSize {
			return nil, fmt.Errorf("the target compresses clusters of %d bytes: more than %d at a time are not supported", c.cluster, MaxBufferSize)
		}
		c.o.BufferSize = int(c.cluster)
	}
	if c.o.SparseSize == 0 {
		c.o.SparseSize = DefaultSparseSize
	}
	if c.o.SparseSize < sectorSize || c.o.SparseSize%sectorSize != 0 {
		return nil, fmt.Errorf("a sparse size of %d bytes: expected a multiple of %d", o.SparseSize, sectorSize)
	}
	return c, nil
}

// kindOf tells what is to be done with an extent of the source.
func (c *conversion) kindOf(e block.Extent) kind {
	switch {
	case c.o.SkipDepth > 0 && e.Depth >= c.o.SkipDepth:
		return skip
	case e.Zero:
		return zero
	default:
		return data
	}
}

// dataBytes counts what Progress counts: the bytes that the source does not say to be zero.
func (c *conversion) dataBytes(ctx context.Context) (int64, error) {
	var total int64
	cur := newCursor(c.src, 0, c.size)
	for {
		e, ok, err := cur.peek()
		if err != nil || !ok {
			return total, err
		}
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		if c.kindOf(e) == data || c.o.NoSparse {
			total += e.Length
		}
		cur.advance(e.Length)
	}
}

func (c *conversion) worker(ctx context.Context, work <-chan window) error {
	var buf *bufpool.Buffer
	defer func() {
		if buf != nil {
			buf.Put()
		}
	}()
	var ops []run
	for w := range work {
		var err error
		if w.whole() {
			ops = append(ops[:0], w.runs...)
		} else {
			if buf == nil {
				buf = bufpool.Get(c.o.BufferSize)
			}
			if ops, err = c.load(w, buf.B[:w.length], ops[:0]); err != nil {
				return err
			}
		}
		if err := w.wait(ctx); err != nil {
			return err
		}
		if err := c.store(ctx, w, buf, ops); err != nil {
			return err
		}
		w.done()
		c.progress.add(w.data(c.o.NoSparse))
	}
	return nil
}
