package bench

import (
	"context"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/platter-disk/platter/internal/bufpool"
)

// Disk is what workloads run on.
type Disk interface {
	io.ReaderAt
	io.WriterAt
	Flush() error
	Survey(fn func(Span) bool) error
	Unit() int64 // bytes that are allocated at a time
	Close() error
}

// Options say how a workload is run.
type Options struct {
	Depth      int    // requests in flight, at least 1
	Operations int    // 0 for the workload's own number
	Seed       uint64 // of the places; the same seed on the same disk gives the same requests
}

// operations is how many are measured, and how many run before them to warm caches and buffers.
func (o Options) operations(w Workload) (measured, warm int) {
	measured = w.Operations
	if o.Operations > 0 {
		measured = o.Operations
	}
	return measured, max(measured/10, o.Depth)
}

// Run runs a workload on a disk and charges it to the meter. A run that writes ends with one flush, which is
// part of what is measured.
func Run(ctx context.Context, d Disk, w Workload, o Options, m Meter) (Result, error) {
	measured, warm := o.operations(w)
	p, err := newPlan(w, d.Survey, d.Unit(), measured+warm, o.Seed)
	if err != nil {
		return Result{}, err
	}
	r := &runner{disk: d, workload: w, plan: p}
	if err := r.run(ctx, 0, int64(warm), o.Depth); err != nil {
		return Result{}, err
	}
	if err := m.Start(); err != nil {
		return Result{}, err
	}
	begin := time.Now()
	err = r.run(ctx, int64(warm), int64(measured), o.Depth)
	took := time.Since(begin)
	cost, merr := m.Stop() // in any case: a meter may be another process
	if err != nil {
		return Result{}, err
	}
	if merr != nil {
		return Result{}, merr
	}
	return Result{Workload: w.Name, Depth: o.Depth, Operations: measured, Seconds: took.Seconds(), Cost: cost}, nil
}

type runner struct {
	disk     Disk
	workload Workload
	plan     *plan
}

// run carries out operations from..from+n of the plan, depth at a time.
func (r *runner) run(ctx context.Context, from, n int64, depth int) error {
	var next atomic.Int64
	next.Store(from)
	g, ctx := errgroup.WithContext(ctx)
	for range depth {
		g.Go(func() error {
			buf := bufpool.Get(r.workload.Block)
			defer buf.Put()
			for i := range buf.B {
				buf.B[i] = byte(i*7 + 1) // not zeros: an engine may treat those apart
			}
			for {
				i := next.Add(1) - 1
				if i >= from+n {
					return nil
				}
				if err := ctx.Err(); err != nil {
					return err
				}
				if err := r.operation(buf.B, r.plan.offset(i)); err != nil {
					return fmt.Errorf("%s: %w", r.workload.Name, err)
				}
			}
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if r.workload.Writes && !r.workload.Flush {
		return r.disk.Flush()
	}
	return nil
}

func (r *runner) operation(b []byte, off int64) error {
	if !r.workload.Writes {
		_, err := r.disk.ReadAt(b, off)
		return err
	}
	if _, err := r.disk.WriteAt(b, off); err != nil {
		return err
	}
	if r.workload.Flush {
		return r.disk.Flush()
	}
	return nil
}
