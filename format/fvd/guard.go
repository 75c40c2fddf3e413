package fvd

import (
	"sync"
	"sync/atomic"
)

const guardShards = 8 // spreads the counters of concurrent requests over cache lines

// guard counts requests in flight without a lock, for two purposes. A chunk that was taken out of the table may
// be used again only when no request can still hold its number: requests that began before are over once the
// guard's age has advanced twice. And pause lets one caller have the image to itself.
type guard struct {
	age    atomic.Uint64
	paused atomic.Bool
	count  [3][guardShards]struct {
		n atomic.Int64
		_ [56]byte
	}

	mu      sync.Mutex  // pause, resume and advance
	changed sync.Cond   // a request ended while paused, or the pause is over
	closed  atomic.Bool // set while paused, under mu
}

// pass is held by a request for as long as it runs.
type pass struct {
	slot, shard uint8
}

func newGuard() *guard {
	g := &guard{}
	g.changed.L = &g.mu
	return g
}

// enter admits a request; ok is false once the image is closed. hint spreads the counting.
func (g *guard) enter(hint int64) (p pass, ok bool) {
	for {
		if p, ok = g.tryEnter(hint); ok {
			return p, true
		}
		if g.paused.Load() && !g.await() {
			return pass{}, false
		}
	}
}

// tryEnter is enter without waiting: ok is also false while someone has the image to himself, and may be when he
// comes or the age advances.
func (g *guard) tryEnter(hint int64) (p pass, ok bool) {
	if g.paused.Load() {
		return pass{}, false
	}
	age := g.age.Load()
	p = pass{uint8(age % 3), uint8(uint64(hint)>>16) % guardShards}
	g.count[p.slot][p.shard].n.Add(1)
	if g.age.Load() == age && !g.paused.Load() {
		return p, true
	}
	g.leave(p)
	return pass{}, false
}

// leave ends a request.
func (g *guard) leave(p pass) {
	g.count[p.slot][p.shard].n.Add(-1)
	if g.paused.Load() {
		g.mu.Lock()
		g.changed.Broadcast()
		g.mu.Unlock()
	}
}

// await blocks until nobody holds a pause; false means closed.
func (g *guard) await() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.paused.Load() && !g.closed.Load() {
		g.changed.Wait()
	}
	return !g.closed.Load()
}

func (g *guard) empty(slot uint64) bool {
	for i := range g.count[slot] {
		if g.count[slot][i].n.Load() != 0 {
			return false
		}
	}
	return true
}

// advance moves the age on if no request of the previous age runs any more, and returns the age. What was made
// unreachable at age a is out of every request's hands at age a+2.
func (g *guard) advance() uint64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	age := g.age.Load()
	if g.empty((age + 2) % 3) {
		age = g.age.Add(1)
	}
	return age
}

// pause waits until no request runs and keeps new ones out until resume; false means that the image is closed.
func (g *guard) pause() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.paused.Load() && !g.closed.Load() {
		g.changed.Wait()
	}
	if g.closed.Load() {
		return false
	}
	g.paused.Store(true)
	for !g.empty(0) || !g.empty(1) || !g.empty(2) {
		g.changed.Wait()
	}
	return true
}

// resume ends a pause. With closed set every request from now on, waiting ones included, is refused.
func (g *guard) resume(closed bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed.Store(closed)
	g.paused.Store(closed)
	g.changed.Broadcast()
}
