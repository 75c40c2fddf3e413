package prefetch

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/platter-disk/platter/internal/bufpool"
)

// Defaults of Options, those of the 2011 driver (FVD specification 2.12).
const (
	DefaultSlots       = 2
	DefaultPerPrefetch = 1 << 20                // bytes
	DefaultMinRate     = 5120 << 10             // bytes a second
	DefaultMeasure     = 100 * time.Millisecond // of operation time
	DefaultThrottle    = 30 * time.Second
	DefaultAlpha       = 80 // percent

	defaultCheckpoint = 256 << 20 // bytes kept between checkpoints
	maxSlots          = 1024
	maxPerPrefetch    = 64 << 20

	lockedWait = 10 * time.Millisecond // before looking again at blocks that writes were changing
)

// Options says how a Prefetcher goes about its work. Zero values mean the defaults above unless something else is
// said; rates are bytes a second.
type Options struct {
	StartDelay  time.Duration // before the first read
	Slots       int           // buffers between reading and writing, 1 to 1024
	PerPrefetch int64         // bytes a read, rounded up to whole blocks, at most 64 MiB

	MinRead, MinWrite float64 // averages below which it may pause; negative: never
	MaxRead, MaxWrite float64 // rates it keeps to; 0: none

	ReadMeasure, WriteMeasure time.Duration // operation time of a sample
	AlphaPercent              int           // how much of the old average a new sample leaves

	// Throttle bounds a pause: it lasts 1 ms and up to that, evenly distributed. Negative: never pauses.
	Throttle time.Duration

	// Order is what to fetch first.
	Order Profile

	// CheckpointEvery is after how many bytes kept they are made durable, so that a restart goes on from
	// there; negative: only at the end.
	CheckpointEvery int64

	Trace func(Event) // told every step, from one goroutine at a time; may be nil

	Clock Clock          // nil: the real time
	Rand  func() float64 // in [0, 1); nil: math/rand
}

func (o Options) withDefaults(unit int64) Options {
	if o.Slots < 1 || o.Slots > maxSlots {
		o.Slots = DefaultSlots
	}
	if o.PerPrefetch <= 0 {
		o.PerPrefetch = DefaultPerPrefetch
	}
	o.PerPrefetch = min(o.PerPrefetch, max(maxPerPrefetch, unit))
	o.PerPrefetch = (o.PerPrefetch + unit - 1) / unit * unit
	for _, r := range []*float64{&o.MinRead, &o.MinWrite} {
		if *r == 0 {
			*r = DefaultMinRate
		}
	}
	for _, d := range []struct {
		v   *time.Duration
		def time.Duration
	}{{&o.ReadMeasure, DefaultMeasure}, {&o.WriteMeasure, DefaultMeasure}, {&o.Throttle, DefaultThrottle}} {
		if *d.v == 0 {
			*d.v = d.def
		}
	}
	if o.AlphaPercent <= 0 || o.AlphaPercent > 100 {
		o.AlphaPercent = DefaultAlpha
	}
	if o.CheckpointEvery == 0 {
		o.CheckpointEvery = defaultCheckpoint
	}
	if o.Trace == nil {
		o.Trace = func(Event) {}
	}
	if o.Clock == nil {
		o.Clock = systemClock{}
	}
	if o.Rand == nil {
		o.Rand = rand.Float64
	}
	return o
}

// State is what a Prefetcher is doing.
type State string

// The states of a Prefetcher.
const (
	StateWaiting State = "waiting" // for its start
	StateRunning State = "running"
	StatePausing State = "pausing" // of its own accord
	StateStopped State = "stopped" // by Pause, until Resume
	StateDone    State = "done"    // the base image is not needed any more
	StateFailed  State = "failed"
)

// Status tells how far a Prefetcher is. Bytes count from the start of this Prefetcher.
type Status struct {
	State        State   `json:"state"`
	Total        int64   `json:"total"`     // bytes that the base image covers
	Remaining    int64   `json:"remaining"` // of those, bytes that still live there
	Read         int64   `json:"read"`      // bytes read from the base image
	Kept         int64   `json:"kept"`      // of those, bytes kept
	Pauses       int     `json:"pauses"`
	ReadAverage  float64 `json:"read-average"`  // bytes a second; negative: not measured
	WriteAverage float64 `json:"write-average"` // bytes a second; negative: not measured
	Error        string  `json:"error,omitempty"`
}

// Prefetcher moves what lives in the base image over. At most one read of the base and one write of the disk are
// under way at a time; up to Slots buffers are between them.
type Prefetcher struct {
	over Overlay
	o    Options

	mu           sync.Mutex
	wake         sync.Cond // the user resumed, or the context ended
	status       Status
	stopped      bool // by the user
	read, write  meter
	readPace     pacer
	writePace    pacer
	pauseWanted  bool
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
		status: Status{State: StateWaiting, Total: over.BaseSize()},
	}
	p.wake.L = &p.mu
	return p
}

// Status returns how far it is.
func (p *Prefetcher) Status() Status {
	remaining := int64(0)
	for at := int64(0); ; {
		start, n := p.over.NextInBase(at)
		if n == 0 {
			break
		}
		remaining += n
		at = start + n
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.status
	s.Remaining, s.ReadAverage, s.WriteAverage = remaining, p.read.average, p.write.average
	return s
}

// Pause stops reading until Resume; what was read is still written.
func (p *Prefetcher) Pause() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stopped = true
}

// Resume ends a Pause.
func (p *Prefetcher) Resume() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stopped = false
	p.wake.Broadcast()
}

// Run prefetches until nothing lives in the base image any more and the disk is detached from it, or the context
// ends, or an operation fails: then prefetching is over until the disk is next opened. It may be called once.
func (p *Prefetcher) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		p.mu.Lock()
		p.wake.Broadcast()
		p.mu.Unlock()
	})
	defer stop()
	err := p.o.Clock.Sleep(ctx, max(0, p.o.StartDelay))
	if err == nil {
		err = p.run(ctx)
	}
	switch {
	case err == nil:
		p.enter(StateDone)
		p.trace(Event{Kind: EventDone})
	case ctx.Err() == nil:
		p.mu.Lock()
		p.status.Error = err.Error()
		p.mu.Unlock()
		p.enter(StateFailed)
		p.trace(Event{Kind: EventFailed})
		err = fmt.Errorf("prefetching is off: %w", err)
	default:
		err = errors.Join(err, p.checkpoint())
	}
	return err
}

// run makes passes over the base image until one finds nothing there.
func (p *Prefetcher) run(ctx context.Context) error {
	order := p.o.Order
	for {
		if _, n := p.over.NextInBase(0); n == 0 {
			if err := p.over.DetachBase(); err == nil {
				return nil
			} else if _, n := p.over.NextInBase(0); n == 0 {
				return err
			}
		}
		p.enter(StateRunning)
		p.passProgress = false
		if err := p.pass(ctx, order); err != nil {
			return err
		}
		order = nil
		if !p.passProgress {
			// What is left is being written by the guest, or will be passed over for another reason; soon it
			// is in the disk, or free again.
			if err := p.o.Clock.Sleep(ctx, lockedWait); err != nil {
				return err
			}
		}
	}
}

// slot is a buffer on its way from reader to writer.
type slot struct {
	buf *bufpool.Buffer
	off int64
}

// pass goes over the runs of order, then over the whole base image, once.
func (p *Prefetcher) pass(ctx context.Context, order Profile) error {
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
	r := reader{p: p, ctx: ctx, free: free, filled: filled}
	if err := r.all(order); err != nil {
		cancel(err)
	}
	close(filled)
	<-written
	for range p.o.Slots {
		(<-free).Put()
	}
	return context.Cause(ctx)
}

// reader is the reading half of a pass.
type reader struct {
	p      *Prefetcher
	ctx    context.Context
	free   chan *bufpool.Buffer
	filled chan slot
}

func (r *reader) all(order Profile) error {
	for _, run := range order {
		if run.Offset >= 0 && run.Length > 0 {
			if err := r.run(run.Offset, run.Offset+run.Length); err != nil {
				return err
			}
		}
	}
	if len(order) > 0 { // what is read and not yet written looks as if it had to be read
		if err := r.drain(); err != nil {
			return err
		}
	}
	return r.run(0, r.p.over.BaseSize())
}

// run reads what lives in the base image of the blocks that [at, end) touches.
func (r *reader) run(at, end int64) error {
	p := r.p
	unit := max(1, p.over.CopyUnit())
	for at = at / unit * unit; at < end; {
		start, n := p.over.NextInBase(at)
		if n == 0 || start >= end {
			return nil
		}
		if err := p.breathe(r.ctx, r.drain); err != nil {
			return err
		}
		n = min(n, p.o.PerPrefetch)
		if past := start + n - end; past >= unit { // no further than the run, in whole blocks
			n -= past / unit * unit
		}
		var buf *bufpool.Buffer
		select {
		case buf = <-r.free:
		case <-r.ctx.Done():
			return context.Cause(r.ctx)
		}
		buf.B = buf.B[:n]
		if err := p.readSlot(r.ctx, buf.B, start); err != nil {
			r.free <- buf
			return err
		}
		r.filled <- slot{buf, start}
		at = start + n
	}
	return nil
}

// drain waits until the writer has emptied every slot.
func (r *reader) drain() error {
	var taken []*bufpool.Buffer
	defer func() {
		for _, b := range taken {
			r.free <- b
		}
	}()
	for range r.p.o.Slots {
		select {
		case b := <-r.free:
			taken = append(taken, b)
		case <-r.ctx.Done():
			return context.Cause(r.ctx)
		}
	}
	return nil
}

// readSlot reads the base image, within the maximum rate, and measures it.
func (p *Prefetcher) readSlot(ctx context.Context, b []byte, off int64) error {
	if err := p.o.Clock.Sleep(ctx, p.readPace.delay(p.o.Clock.Now())); err != nil {
		return err
	}
	start := p.o.Clock.Now()
	if err := p.over.ReadBase(b, off); err != nil {
		return err
	}
	took := p.o.Clock.Now().Sub(start)
	p.readPace.took(start, int64(len(b)))
	p.measured(&p.read, p.o.MinRead, EventRead, off, int64(len(b)), took)
	return nil
}

// writeSlot keeps what was read, within the maximum rate, and measures it.
func (p *Prefetcher) writeSlot(ctx context.Context, s slot) error {
	if err := p.o.Clock.Sleep(ctx, p.writePace.delay(p.o.Clock.Now())); err != nil {
		return err
	}
	start := p.o.Clock.Now()
	kept, err := p.over.Populate(s.buf.B, s.off)
	if err != nil {
		return err
	}
	took := p.o.Clock.Now().Sub(start)
	p.writePace.took(start, kept)
	p.measured(&p.write, p.o.MinWrite, EventWrite, s.off, kept, took)
	p.unsaved += kept
	if p.o.CheckpointEvery > 0 && p.unsaved >= p.o.CheckpointEvery {
		return p.checkpoint()
	}
	return nil
}

// checkpoint makes what was kept durable.
func (p *Prefetcher) checkpoint() error {
	if p.unsaved == 0 {
		return nil
	}
	p.unsaved = 0
	return p.over.Checkpoint()
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
	if err := p.o.Clock.Sleep(ctx, wait); err != nil {
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
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.stopped && ctx.Err() == nil {
		p.status.State = StateStopped
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
	p.mu.Lock()
	defer p.mu.Unlock()
	e.Time, e.ReadAverage, e.WriteAverage = p.o.Clock.Now(), p.read.average, p.write.average
	p.o.Trace(e)
}

// stillNeeded says what keeps a base image needed.
func stillNeeded(start, n int64) error {
	return fmt.Errorf("the base image is still needed: %d bytes at %d live there", n, start)
}
