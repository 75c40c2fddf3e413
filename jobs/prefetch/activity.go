package prefetch

import (
	"sync"
	"time"
)

// lull is the longest time between two requests in which a guest counts as busy: it computes what to ask next, and
// what slows that down slows down the guest.
const lull = 10 * time.Millisecond

// Activity tells when a guest is busy with its disk. Safe for concurrent use.
type Activity struct {
	clock Clock

	mu      sync.Mutex
	waiting int           // requests under way
	since   time.Time     // when the first of them began, or when the last one ended
	busy    time.Duration // before since
}

func newActivity(clock Clock) *Activity {
	return &Activity{clock: clock, since: clock.Now().Add(-lull), busy: -lull}
}

// begin notes that a request began; end must be called when it is answered.
func (a *Activity) begin() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.waiting++; a.waiting == 1 {
		now := a.clock.Now()
		a.busy += min(now.Sub(a.since), lull)
		a.since = now
	}
}

// end notes that a request is answered; a nil Activity had none.
func (a *Activity) end() {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.waiting--; a.waiting == 0 {
		now := a.clock.Now()
		a.busy += now.Sub(a.since)
		a.since = now
	}
}

// Busy is for how long so far a request was under way, or had ended less than 10 ms before.
func (a *Activity) Busy() time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.clock.Now().Sub(a.since)
	if a.waiting == 0 {
		now = min(now, lull)
	}
	return a.busy + now
}

// Quiet is for how long no request has been under way; 0 while one is.
func (a *Activity) Quiet() time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.waiting > 0 {
		return 0
	}
	return a.clock.Now().Sub(a.since)
}
