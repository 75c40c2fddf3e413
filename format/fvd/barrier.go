package fvd

import (
	"sync"
	"sync/atomic"
)

// barrier combines flushes: any number of callers that wait are served by the next single sync. A sync that
// failed fails every later call too, as nobody knows what is durable.
type barrier struct {
	sync    func() error
	arrived atomic.Uint64

	mu     sync.Mutex
	served uint64 // callers up to this one are done
	err    error

	begun, done atomic.Uint64 // syncs: how many began, how many of those ended well
}

func newBarrier(sync func() error) *barrier { return &barrier{sync: sync} }

// wait returns once everything written before the call is durable.
func (b *barrier) wait() error {
	ticket := b.arrived.Add(1)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err != nil || b.served >= ticket {
		return b.err
	}
	// Everyone who has a ticket by now finished writing before the sync below begins.
	b.served = b.arrived.Load()
	n := b.begun.Add(1)
	if b.err = b.sync(); b.err == nil {
		b.done.Store(n)
	}
	return b.err
}

// tag names the next sync to begin: once reached reports true for it, everything written before tag was called
// is durable.
func (b *barrier) tag() uint64 { return b.begun.Load() + 1 }

func (b *barrier) reached(tag uint64) bool { return b.done.Load() >= tag }
