package prefetch

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/platter-disk/platter/internal/bufpool"
)

// slot is a buffer on its way from reader to writer.
type slot struct {
	buf   *bufpool.Buffer
	off   int64
	zeros bool // known without reading the base image
}

// maxBad is how many reads of the base image in a row may fail before it counts as gone.
const maxBad = 16

// ordered fetches what a profile lists. Parts that cannot be read are left to the pass over the whole image, unless
// too many fail.
func (p *Prefetcher) ordered(ctx context.Context, order Profile) error {
	work, workCtx := errgroup.WithContext(ctx)
	work.SetLimit(p.o.OrderReads)
	drain := func() error {
		err := work.Wait()
		work, workCtx = errgroup.WithContext(ctx)
		work.SetLimit(p.o.OrderReads)
		return err
	}
	var bad atomic.Int64
	for _, run := range order {
		if run.Offset < 0 || run.Length <= 0 {
			continue
		}
		err := p.eachInBase(run.Offset, run.Offset+run.Length, p.o.orderRead, func(off, n int64) error {
			if err := p.breathe(ctx, drain); err != nil {
				return err
			}
			if workCtx.Err() != nil {
				return context.Cause(workCtx)
			}
			fetchCtx := workCtx
			work.Go(func() error {
				err := p.fetch(fetchCtx, off, n)
				var base *baseError
				switch {
				case err == nil:
					bad.Store(0)
				case errors.As(err, &base) && bad.Add(1) < maxBad:
					return nil
				}
				return err
			})
			return nil
		})
		if err != nil {
			work.Wait() // with the error that ended workCtx, or none
			return err
		}
	}
	return work.Wait()
}

// fetch moves a part over, unless somebody else does. It waits for the maximum rates first: while the part is
// announced, reads wait for it.
func (p *Prefetcher) fetch(ctx context.Context, off, n int64) error {
	for _, rate := range []*pacer{&p.readPace, &p.writePace} {
		if err := p.pace(ctx, rate, n); err != nil {
			return err
		}
	}
	finished, ok := p.o.Announce(off, n)
	if !ok {
		return nil
	}
	defer finished()
	buf := bufpool.Get(int(n))
	defer buf.Put()
	if err := p.load(buf.B, off); err != nil {
		return err
	}
	return p.store(slot{buf: buf, off: off})
}

// eachInBase calls fn for what lives in the base image of the blocks that [at, end) touches, at most size bytes at a
// time.
func (p *Prefetcher) eachInBase(at, end, size int64, fn func(off, n int64) error) error {
	unit := max(1, p.over.CopyUnit())
	for at = at / unit * unit; at < end; {
		start, n := p.over.NextInBase(at)
		if n == 0 || start >= end {
			return nil
		}
		n = min(n, size)
		if past := start + n - end; past >= unit { // no further than the range, in whole blocks
			n -= past / unit * unit
		}
		if err := fn(start, n); err != nil {
			return err
		}
		at = start + n
	}
	return nil
}

// pass goes over the whole base image once. It goes on behind what cannot be read, and returns the last such error in
// the end; when several reads in a row fail it leaves out ever larger parts, and then gives up.
func (p *Prefetcher) pass(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	free := make(chan *bufpool.Buffer, p.o.Slots)
	filled := make(chan slot, p.o.Slots)
	for range p.o.Slots {
		free <- bufpool.Get(int(p.o.PerPrefetch))
	}
	written := make(chan struct{}) // closed when the writer has ended
	go func() {
		defer close(written)
		for s := range filled {
			if ctx.Err() == nil {
				if err := p.writeSlot(ctx, s); err != nil {
					cancel(err)
				}
			}
			free <- s.buf
		}
	}()
	drain := func() error { return drainSlots(ctx, free, p.o.Slots) }
	fill := func(off, n int64, zeros bool) error {
		if err := p.yield(ctx, drain); err != nil {
			return err
		}
		if err := p.breathe(ctx, drain); err != nil {
			return err
		}
		var buf *bufpool.Buffer
		select {
		case buf = <-free:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		buf.B = buf.B[:n]
		if zeros {
			clear(buf.B)
		} else if err := p.readSlot(ctx, buf.B, off); err != nil {
			free <- buf
			return err
		}
		filled <- slot{buf, off, zeros}
		return nil
	}
	known := holes{over: p.over, unit: max(1, p.over.CopyUnit())}
	var failed error // of the last read that failed
	bad, next := 0, int64(0)
	readErr := p.eachInBase(0, p.over.BaseSize(), p.o.PerPrefetch, func(off, n int64) error {
		for end := off + n; off < end; {
			zeros, n := known.sameKind(off, end-off)
			var base *baseError
			var err error
			if off >= next {
				err = fill(off, n, zeros)
			}
			switch {
			case errors.As(err, &base):
				p.troubled(base.err)
				next = off + n<<bad
				if failed, bad = err, bad+1; bad == maxBad {
					return err
				}
			case err != nil:
				return err
			case off >= next && !zeros:
				bad = 0
			}
			off += n
		}
		return nil
	})
	close(filled)
	<-written
	for range p.o.Slots {
		(<-free).Put()
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if readErr == nil {
		readErr = failed
	}
	return readErr
}

// drainSlots waits until the writer has emptied every slot.
func drainSlots(ctx context.Context, free chan *bufpool.Buffer, slots int) error {
	var taken []*bufpool.Buffer
	defer func() {
		for _, b := range taken {
			free <- b
		}
	}()
	for range slots {
		select {
		case b := <-free:
			taken = append(taken, b)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// readSlot reads the base image, within the maximum rate.
func (p *Prefetcher) readSlot(ctx context.Context, b []byte, off int64) error {
	if err := p.pace(ctx, &p.readPace, int64(len(b))); err != nil {
		return err
	}
	return p.load(b, off)
}

// load reads the base image, and measures it.
func (p *Prefetcher) load(b []byte, off int64) error {
	p.mu.Lock()
	p.reading++
	busy := p.courtesy.begin()
	p.mu.Unlock()
	start := p.o.Clock.Now()
	err := p.over.ReadBase(b, off)
	took := p.o.Clock.Now().Sub(start)
	p.mu.Lock()
	took /= time.Duration(p.reading) // reads at the same time share what there is
	p.reading--
	p.courtesy.charge(busy)
	if err == nil {
		if p.status.Error = ""; p.status.State == StateRetrying {
			p.status.State = StateRunning
		}
	}
	p.mu.Unlock()
	if err != nil {
		return &baseError{err}
	}
	p.measured(&p.read, p.o.MinRead, EventRead, off, int64(len(b)), took)
	return nil
}

// writeSlot keeps what was read, within the maximum rate.
func (p *Prefetcher) writeSlot(ctx context.Context, s slot) error {
	if s.zeros {
		return p.store(s)
	}
	if err := p.pace(ctx, &p.writePace, int64(len(s.buf.B))); err != nil {
		return err
	}
	return p.store(s)
}

// store keeps what was read, and measures it.
func (p *Prefetcher) store(s slot) error {
	p.mu.Lock()
	busy := p.courtesy.begin()
	p.mu.Unlock()
	start := p.o.Clock.Now()
	kept, err := p.over.Populate(s.buf.B, s.off)
	if err == nil && kept > 0 && p.courtesy.present() {
		err = p.over.Flush() // or the guest's next flush would have to write it
	}
	p.mu.Lock()
	p.courtesy.charge(busy)
	p.mu.Unlock()
	if err != nil {
		return err
	}
	took := p.o.Clock.Now().Sub(start)
	if s.zeros {
		p.keptZeros(s.off, kept, took)
	} else {
		p.measured(&p.write, p.o.MinWrite, EventWrite, s.off, kept, took)
	}
	p.mu.Lock()
	p.unsaved += kept
	due := p.o.CheckpointEvery > 0 && p.unsaved >= p.o.CheckpointEvery
	p.mu.Unlock()
	if due {
		return p.checkpoint()
	}
	return nil
}

// pace waits until an operation of that many bytes may begin.
func (p *Prefetcher) pace(ctx context.Context, pacer *pacer, bytes int64) error {
	p.mu.Lock()
	wait := pacer.reserve(p.o.Clock.Now(), bytes)
	p.mu.Unlock()
	if wait <= 0 {
		return ctx.Err()
	}
	return p.o.Clock.Sleep(ctx, wait)
}

// checkpoint makes what was kept durable.
func (p *Prefetcher) checkpoint() error {
	p.mu.Lock()
	unsaved := p.unsaved
	p.unsaved = 0
	p.mu.Unlock()
	if unsaved == 0 {
		return nil
	}
	return p.over.Checkpoint()
}
