package prefetch

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/platter-disk/platter/block"
)

const (
	lockedWait    = 10 * time.Millisecond // before looking again at blocks that writes were changing; doubles
	maxLockedWait = time.Second
)

// State is what a Prefetcher is doing.
type State string

// The states of a Prefetcher.
const (
	StateWaiting  State = "waiting" // for its start
	StateRunning  State = "running"
	StatePausing  State = "pausing"  // of its own accord
	StateRetrying State = "retrying" // the base image could not be read; it is tried again soon
	StateStopped  State = "stopped"  // by Pause, until Resume
	StateDone     State = "done"     // the base image is not needed any more
	StateFailed   State = "failed"   // a copy could not be kept
)

// Status tells how far a Prefetcher is. Bytes count from the start of this Prefetcher.
type Status struct {
	State        State   `json:"state"`
	Total        int64   `json:"total"`     // bytes that the base image covers
	Remaining    int64   `json:"remaining"` // of those, bytes that still live there
	Read         int64   `json:"read"`      // bytes read from the base image
	Kept         int64   `json:"kept"`      // of those, bytes kept
	Pauses       int     `json:"pauses"`
	Yielded      float64 `json:"yielded"`         // seconds for which it kept still because the guest was busy
	Retries      int     `json:"retries"`         // how often the base image could not be read
	ReadAverage  float64 `json:"read_average"`    // bytes a second; negative: not measured
	WriteAverage float64 `json:"write_average"`   // bytes a second; negative: not measured
	Error        string  `json:"error,omitempty"` // the last one
}

// Prefetcher moves what lives in the base image over. Except for what Options.Order lists, at most one read of the
// base and one write of the disk are under way at a time; up to Slots buffers are between them.
type Prefetcher struct {
	over Overlay
	o    Options

	tracing sync.Mutex // held while Options.Trace is told of a step; taken before mu

	mu           sync.Mutex
	wake         sync.Cond // the user resumed, or the context of one that waits for that ended
	status       Status
	stopped      bool   // by the user
	cut          func() // ends the present wait; nil: there is none
	read, write  meter
	readPace     pacer
	writePace    pacer
	courtesy     courtesy
	pauseWanted  bool
	reading      int   // reads of the base image under way
	unsaved      int64 // bytes kept since the last checkpoint
	passProgress bool  // something was kept in this pass
}

// New prepares prefetching; Run does it.
func New(over Overlay, o Options) *Prefetcher {
	o = o.withDefaults(max(1, over.CopyUnit()))
	p := &Prefetcher{
		over: over, o: o,
		read: newMeter(o.ReadMeasure, o.AlphaPercent), write: newMeter(o.WriteMeasure, o.AlphaPercent),
		readPace: pacer{rate: o.MaxRead}, writePace: pacer{rate: o.MaxWrite},
		courtesy: courtesy{guest: o.Guest, share: float64(o.SharePercent) / 100},
		status:   Status{State: StateWaiting, Total: over.BaseSize()},
	}
	p.wake.L = &p.mu
	return p
}

// Status returns how far it is.
func (p *Prefetcher) Status() Status {
	remaining := Remaining(p.over)
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.status
	if p.stopped && s.State != StateDone && s.State != StateFailed {
		s.State = StateStopped
	}
	s.Remaining, s.ReadAverage, s.WriteAverage = remaining, p.read.average, p.write.average
	return s
}

// Pause stops reading until Resume; a read that is under way ends, and what was read is still written.
func (p *Prefetcher) Pause() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stopped = true
}

// Resume ends a Pause, and whatever else it is waiting for: its start, the end of a pause of its own, the next try.
func (p *Prefetcher) Resume() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stopped = false
	if p.cut != nil {
		p.cut()
	}
	p.wake.Broadcast()
}

// wait returns after d, at once when Resume is called, or with the context's error when that ends.
func (p *Prefetcher) wait(ctx context.Context, d time.Duration) error {
	short, cancel := context.WithCancel(ctx)
	defer cancel()
	p.mu.Lock()
	p.cut = cancel
	p.mu.Unlock()
	err := p.o.Clock.Sleep(short, d)
	p.mu.Lock()
	p.cut = nil
	p.mu.Unlock()
	if ctx.Err() == nil {
		return nil
	}
	return err
}

// Run prefetches until nothing lives in the base image any more and the disk is detached from it, or the context
// ends, or a copy cannot be kept: then prefetching is over until the disk is next opened. It may be called once.
func (p *Prefetcher) Run(ctx context.Context) error {
	err := p.run(ctx)
	switch {
	case err == nil:
		p.enter(StateDone)
		p.trace(Event{Kind: EventDone})
	case ctx.Err() == nil:
		p.mu.Lock()
		p.status.Error = err.Error()
		p.mu.Unlock()
		p.enter(StateFailed)
		p.trace(Event{Kind: EventFailed, Err: err})
		err = fmt.Errorf("prefetching is off: %w", err)
	default:
		err = errors.Join(err, p.checkpoint())
	}
	return err
}

// run makes passes over the base image until one finds nothing there.
func (p *Prefetcher) run(ctx context.Context) error {
	order := p.o.Order
	locked := lockedWait
	began, started := p.o.Clock.Now(), false
	for failures := 0; ; {
		if err := ctx.Err(); err != nil {
			return err
		}
		if len(order) == 0 && !started {
			p.enter(StateWaiting)
			if err := p.wait(ctx, max(0, p.o.StartDelay-p.o.Clock.Now().Sub(began))); err != nil {
				return err
			}
			started = true
		}
		if _, n := p.over.NextInBase(0); n == 0 {
			err := p.over.DetachBase()
			if err == nil {
				return nil
			}
			if _, n := p.over.NextInBase(0); n == 0 {
				if failures++; p.retry(ctx, failures, err) != nil {
					return err
				}
				continue
			}
		}
		p.enter(StateRunning)
		p.passProgress = false
		var err error
		if len(order) > 0 {
			if err = p.ordered(ctx, order); err == nil {
				order = nil
				p.forgive()
				continue
			}
		}
		var base *baseError
		if len(order) == 0 || failures > 0 && errors.As(err, &base) { // the profile may list what cannot be read
			err = p.pass(ctx)
		}
		if p.passProgress {
			failures, locked = 0, lockedWait
		}
		switch {
		case errors.As(err, &base):
			if failures++; p.retry(ctx, failures, base.err) != nil {
				return base.err
			}
			continue // with the profile's order, if that was not through yet
		case err != nil:
			return err
		}
		if !p.passProgress {
			// What is left is being written by the guest, or will be passed over for another reason; soon it
			// is in the disk, or free again.
			if err := p.wait(ctx, locked); err != nil {
				return err
			}
			locked = min(2*locked, maxLockedWait)
		}
	}
}

// baseError is a failure of the base image: nothing is wrong with the disk.
type baseError struct{ err error }

func (e *baseError) Error() string { return e.err.Error() }
func (e *baseError) Unwrap() error { return e.err }

// retry waits after the n-th failure in a row. It returns the error if there is to be no other try.
func (p *Prefetcher) retry(ctx context.Context, n int, err error) error {
	if p.o.Retry < 0 || errors.Is(err, block.ErrClosed) || ctx.Err() != nil {
		return err
	}
	p.troubled(err)
	p.mu.Lock()
	p.status.Retries++
	p.mu.Unlock()
	wait := p.o.Retry
	for ; n > 1 && wait < maxRetry; n-- {
		wait = min(2*wait, maxRetry)
	}
	p.trace(Event{Kind: EventRetry, Wait: wait, Err: err})
	if p.wait(ctx, wait) != nil {
		return err
	}
	return nil
}

// troubled tells of a read of the base image that failed, until one succeeds.
func (p *Prefetcher) troubled(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.status.Error = err.Error()
	p.status.State = StateRetrying
}

// keptZeros notes zeros that were kept without being read: they say nothing about throughput.
func (p *Prefetcher) keptZeros(off, kept int64, took time.Duration) {
	p.mu.Lock()
	p.status.Kept += kept
	p.passProgress = p.passProgress || kept > 0
	p.mu.Unlock()
	p.trace(Event{Kind: EventWrite, Offset: off, Bytes: kept, Took: took})
}

// measured notes an operation that moved done bytes, and asks for a pause if the average calls for one.
func (p *Prefetcher) measured(m *meter, least float64, kind EventKind, off, done int64, took time.Duration) {
	p.mu.Lock()
	if kind == EventRead {
		p.status.Read += done
	} else {
		p.status.Kept += done
		p.passProgress = p.passProgress || done > 0
	}
	sampled := false
	if done > 0 { // what was passed over says nothing about throughput
		sampled = m.add(done, took)
	}
	p.mu.Unlock()
	p.trace(Event{Kind: kind, Offset: off, Bytes: done, Took: took})
	if !sampled {
		return
	}
	p.trace(Event{Kind: EventSample})
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.o.Throttle > 0 && m.judge(least, func() bool { return p.o.Rand() < 0.5 }) == pause {
		p.pauseWanted = true
	}
}

// breathe waits out pauses: those the user asked for and those the averages call for. drain empties the slots
// first; afterwards all measuring begins anew.
func (p *Prefetcher) breathe(ctx context.Context, drain func() error) error {
	p.mu.Lock()
	user, own := p.stopped, p.pauseWanted
	p.mu.Unlock()
	if !user && !own {
		return nil
	}
	if err := drain(); err != nil {
		return err
	}
	var wait time.Duration
	if own {
		wait = time.Millisecond + time.Duration(p.o.Rand()*float64(p.o.Throttle))
		p.enter(StatePausing)
	}
	p.mu.Lock()
	p.status.Pauses++
	p.mu.Unlock()
	p.trace(Event{Kind: EventPause, Wait: wait})
	if err := p.wait(ctx, wait); err != nil {
		return err
	}
	if err := p.awaitResume(ctx); err != nil {
		return err
	}
	p.mu.Lock()
	p.pauseWanted = false
	p.read.reset()
	p.write.reset()
	p.mu.Unlock()
	p.enter(StateRunning)
	p.trace(Event{Kind: EventResume})
	return nil
}

// awaitResume waits for the user to resume.
func (p *Prefetcher) awaitResume(ctx context.Context) error {
	// On this very context: when one that it descends from ends, it may still live while that one's functions run.
	stop := context.AfterFunc(ctx, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.wake.Broadcast()
	})
	defer stop()
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.stopped && ctx.Err() == nil {
		p.wake.Wait()
	}
	return ctx.Err()
}

func (p *Prefetcher) enter(s State) {
	p.mu.Lock()
	p.status.State = s
	p.mu.Unlock()
}

// trace fills in the time and the averages and passes the event on.
func (p *Prefetcher) trace(e Event) {
	p.tracing.Lock()
	defer p.tracing.Unlock()
	p.mu.Lock()
	e.Time, e.ReadAverage, e.WriteAverage = p.o.Clock.Now(), p.read.average, p.write.average
	p.mu.Unlock()
	p.o.Trace(e)
}
