package server

import (
	"sync"
	"sync/atomic"
)

// budget bounds the requests that are in flight and the bytes they hold. Those who wait are served in order,
// so that a large request is not starved by small ones.
type budget struct {
	mu       sync.Mutex
	changed  sync.Cond
	requests int64 // free
	bytes    int64 // free
	next     uint64
	serving  uint64 // tickets [serving, next) wait
}

func newBudget(requests, bytes int64) *budget {
	b := &budget{requests: requests, bytes: bytes}
	b.changed.L = &b.mu
	return b
}

// tryTake takes a request of the given size unless it would have to wait.
func (b *budget) tryTake(bytes int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.serving != b.next || b.requests == 0 || b.bytes < bytes {
		return false
	}
	b.requests--
	b.bytes -= bytes
	return true
}

// take waits for a request of the given size. It returns false when stop was set before there was room;
// whoever sets stop calls wake.
func (b *budget) take(bytes int64, stop *atomic.Bool) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	ticket := b.next
	b.next++
	for b.serving != ticket || (b.requests == 0 || b.bytes < bytes) && !stop.Load() {
		b.changed.Wait()
	}
	b.serving++
	if b.serving != b.next {
		b.changed.Broadcast()
	}
	if b.requests == 0 || b.bytes < bytes {
		return false
	}
	b.requests--
	b.bytes -= bytes
	return true
}

// put gives a request of the given size back.
func (b *budget) put(bytes int64) {
	b.mu.Lock()
	b.requests++
	b.bytes += bytes
	if b.serving != b.next {
		b.changed.Broadcast()
	}
	b.mu.Unlock()
}

// taken tells whether anything is taken of a budget that began with so many requests.
func (b *budget) taken(requests int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.requests < requests
}

// wake makes those who wait look at their stop flags.
func (b *budget) wake() {
	b.mu.Lock()
	b.changed.Broadcast()
	b.mu.Unlock()
}
