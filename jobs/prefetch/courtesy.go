package prefetch

import (
	"context"
	"time"
)

const (
	quietGuest = 100 * time.Millisecond // without a request: the guest has nothing to lose
	yieldSlice = 20 * time.Millisecond  // between looks at the guest
	maxDebt    = 30 * time.Second       // an operation that took so long was not holding up the guest alone
)

// courtesy keeps prefetching from costing a busy guest more than a share of its time.
//
// Whatever prefetching takes from a guest (the way to the base image, the disk, the processor) it takes while the
// guest is busy and an operation of prefetching is under way. So that time is counted, and for each second of it
// prefetching then keeps still for (1-share)/share seconds: even if the guest got nothing done meanwhile, it would not
// lose more than the share. A guest that asks for nothing for a while loses nothing, and what is still to be waited
// out is forgiven.
//
// The averages of the control algorithm see only what slows down prefetching itself; a guest that waits for flushes
// of the same disk is not among that.
type courtesy struct {
	guest *Activity // nil: there is no guest
	share float64   // of a busy guest's time, in (0, 1]

	debt time.Duration // to keep still before the next read
}

// present tells that a guest is at work.
func (c *courtesy) present() bool { return c.guest != nil && c.guest.Quiet() < quietGuest }

// begin opens the account of an operation; the caller passes what it returns to charge when the operation is over.
func (c *courtesy) begin() (busy time.Duration) {
	if c.guest == nil {
		return 0
	}
	return c.guest.Busy()
}

// charge adds for how long the guest was busy during an operation.
func (c *courtesy) charge(busy time.Duration) {
	if c.guest != nil {
		c.debt = min(maxDebt, c.debt+time.Duration(float64(c.guest.Busy()-busy)*(1-c.share)/c.share))
	}
}

// next is how long to keep still before looking again.
func (c *courtesy) next() time.Duration {
	if c.debt > 0 && !c.present() {
		c.debt = 0
	}
	return min(c.debt, yieldSlice)
}

// owes tells that prefetching has to keep still for a while, unless the guest has gone.
func (p *Prefetcher) owes() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.courtesy.debt > 0
}

// forgive clears the account of what is exempt: nobody is to wait for it later either.
func (p *Prefetcher) forgive() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.courtesy.debt = 0
}

// yield keeps still for as long as the guest is owed that; drain empties the slots first.
func (p *Prefetcher) yield(ctx context.Context, drain func() error) error {
	if !p.owes() {
		return nil
	}
	if err := drain(); err != nil {
		return err
	}
	var kept time.Duration
	for p.owes() {
		p.mu.Lock()
		wait := p.courtesy.next()
		p.courtesy.debt -= wait
		p.status.Yielded += wait.Seconds()
		p.mu.Unlock()
		kept += wait
		if err := p.o.Clock.Sleep(ctx, wait); err != nil {
			return err
		}
	}
	p.trace(Event{Kind: EventYield, Wait: kept})
	return nil
}
