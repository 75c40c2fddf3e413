package fvd

import (
	"sync"
	"sync/atomic"
)

// barrier makes the changes of one file durable. It counts them: a sync makes durable what was counted when it began,
// so that callers who wait together are served by one sync, and one for whom nothing is left to do costs none. A sync
// that failed makes nothing durable and fails every later one too, as nobody knows what is on the disk.
type barrier struct {
	sync    func() error
	changes atomic.Uint64 // counted, each when it was over
	durable atomic.Uint64 // of those, how many the syncs that succeeded have covered

	mu  sync.Mutex // held for the length of a sync
	err error
}

// newBarrier counts a change to begin with: what an earlier process left in the file need not be durable yet.
func newBarrier(sync func() error) *barrier {
	b := &barrier{sync: sync}
	b.changed()
	return b
}

// changed counts a change, one that failed as well. It is called when the change is over and before anybody is told
// so: a sync that began before may have missed it.
func (b *barrier) changed() { b.changes.Add(1) }

// wait returns once every change that was over before the call is durable.
func (b *barrier) wait() error {
	owed := b.tag()
	if b.reached(owed) {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err != nil || b.reached(owed) {
		return b.err
	}
	covers := b.changes.Load()
	if b.err = b.sync(); b.err == nil {
		b.durable.Store(covers)
	}
	return b.err
}

// tag stands for the changes that are over by now: they are durable when reached reports true for it.
func (b *barrier) tag() uint64 { return b.changes.Load() }

func (b *barrier) reached(tag uint64) bool { return b.durable.Load() >= tag }
