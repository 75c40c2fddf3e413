package jobs

import (
	"context"

	"github.com/platter-disk/platter/block"
)

// kind is what a run of the source asks of the target.
type kind uint8

const (
	data kind = iota // bytes to copy
	zero             // zeros
	skip             // nothing: the target finds it in its backing file
)

// run is a part of a window that is all of one kind.
type run struct {
	off, length int64 // bytes on the disk
	kind        kind
}

// appendRun adds r to runs, as a longer last run where it continues it.
func appendRun(runs []run, r run) []run {
	if n := len(runs); n > 0 && runs[n-1].kind == r.kind && runs[n-1].off+runs[n-1].length == r.off {
		runs[n-1].length += r.length
		return runs
	}
	return append(runs, r)
}

// window is what a worker does at a time: either one long run without data, or at most a buffer full of
// mixed runs that does not cross a multiple of the buffer size.
type window struct {
	off, length int64
	runs        []run         // consecutive; they cover the window
	before      chan struct{} // closed when the windows before this one are written; nil: need not be waited for
	after       chan struct{} // to be closed when this one is written
}

// whole tells that the window is one run without data, which needs no buffer.
func (w *window) whole() bool { return len(w.runs) == 1 && w.runs[0].kind != data }

// data is how many bytes of the window count for the progress.
func (w *window) data(all bool) int64 {
	if all {
		return w.length
	}
	var n int64
	for _, r := range w.runs {
		if r.kind == data {
			n += r.length
		}
	}
	return n
}

func (w *window) wait(ctx context.Context) error {
	if w.before == nil {
		return ctx.Err()
	}
	select {
	case <-w.before:
		return ctx.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (w *window) done() {
	if w.after != nil {
		close(w.after)
	}
}

// plan cuts the source into windows and hands them to the workers, in the order of the disk.
func (c *conversion) plan(ctx context.Context, work chan<- window) error {
	p := planner{c: c, ctx: ctx, work: work, step: int64(c.o.BufferSize)}
	if !c.o.OutOfOrder && !c.o.Compressed {
		p.turn = make(chan struct{})
		close(p.turn)
	}
	cur := newCursor(c.src, 0, c.size)
	for {
		e, ok, err := cur.peek()
		if err != nil {
			return err
		}
		if !ok {
			return p.send()
		}
		if err := p.add(e); err != nil {
			return err
		}
		cur.advance(e.Length)
	}
}

// planner gathers runs into windows.
type planner struct {
	c    *conversion
	ctx  context.Context
	work chan<- window
	step int64 // buffer size: no window with data crosses a multiple of it
	w    window
	turn chan struct{} // closed when everything handed out so far is written; nil when order does not matter
}

// add cuts an extent where windows end.
func (p *planner) add(e block.Extent) error {
	k := p.c.kindOf(e)
	if k == zero && p.c.o.NoSparse {
		k = data
	}
	off, left := e.Offset, e.Length
	for left > 0 {
		if off%p.step == 0 {
			if err := p.send(); err != nil {
				return err
			}
		}
		n := min(left, p.step-off%p.step)
		if k != data && off%p.step == 0 && left >= p.step {
			// Windows without any data need no buffer, so they may be long.
			n = min(left-left%p.step, zeroStep)
		}
		p.w.runs = appendRun(p.w.runs, run{off, n, k})
		p.w.length += n
		off, left = off+n, left-n
		if p.w.length >= p.step {
			if err := p.send(); err != nil {
				return err
			}
		}
	}
	return nil
}

// send hands the window gathered so far to a worker, and begins the next one.
func (p *planner) send() error {
	w := p.w
	if w.length == 0 {
		return p.ctx.Err()
	}
	w.off = w.runs[0].off
	p.w = window{}
	if w.whole() && (w.runs[0].kind == skip || w.off >= p.c.zeroFrom) {
		return p.ctx.Err()
	}
	if p.turn != nil {
		w.before, w.after = p.turn, make(chan struct{})
		p.turn = w.after
	}
	select {
	case p.work <- w:
		return nil
	case <-p.ctx.Done():
		return p.ctx.Err()
	}
}
