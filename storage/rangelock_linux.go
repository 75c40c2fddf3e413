package storage

import (
	"slices"
	"sync"
)

// rangeLock lets holders of overlapping byte ranges in together only when all of them hold shared. Who comes
// first is served first, so that nobody starves.
type rangeLock struct {
	mu    sync.Mutex
	gone  sync.Cond      // somebody left the queue
	next  uint64         // ticket of the next who comes
	queue []rangeRequest // holders and waiters, in the order they came
}

type rangeRequest struct {
	off, end  int64
	exclusive bool
	ticket    uint64
}

func (r *rangeLock) init() { r.gone.L = &r.mu }

// lock waits until nobody who came earlier conflicts with [off, end), holds it, and returns the ticket that
// gives it up.
func (r *rangeLock) lock(off, end int64, exclusive bool) uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	me := rangeRequest{off, end, exclusive, r.next}
	r.next++
	r.queue = append(r.queue, me)
	for r.mustWait(me) {
		r.gone.Wait()
	}
	return me.ticket
}

func (r *rangeLock) mustWait(me rangeRequest) bool {
	for _, q := range r.queue {
		if q.ticket == me.ticket {
			return false
		}
		if me.off < q.end && q.off < me.end && (me.exclusive || q.exclusive) {
			return true
		}
	}
	return false
}

func (r *rangeLock) unlock(ticket uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.queue = slices.DeleteFunc(r.queue, func(q rangeRequest) bool { return q.ticket == ticket })
	r.gone.Broadcast()
}
