package fvd

import (
	"errors"
	"fmt"
)

// Audit verifies the tables of an open image against each other, in memory: what a crash would leave is a part of
// what is there now (FVD specification 5, invariant 7), no chunk of the storage has two owners, and none that an
// entry names can be handed out again (invariants 11 and 12). It writes nothing, is safe for concurrent use, and is
// for tests: a correct image that is open never fails it. It waits for who has the image to himself (Resize, Empty).
func (im *Image) Audit() error {
	pass, ok := im.m.guard.enter(0)
	if !ok {
		return im.errClosed()
	}
	defer im.m.guard.leave(pass)
	m := im.m
	for b := blockIndex(0); b < m.fresh.n; b += 64 {
		stale := m.stale.word(b) // before fresh, as bits are set in the other order
		if lost := stale &^ m.fresh.word(b); lost != 0 {
			return fmt.Errorf("fvd image %s: blocks %d and following: bits %#x are recoverable and not set", m.name, b, lost)
		}
	}
	if m.alloc == nil {
		return nil
	}
	m.alloc.mu.Lock()
	defer m.alloc.mu.Unlock()
	if err := m.alloc.audit(); err != nil {
		return fmt.Errorf("fvd image %s: %w", m.name, err)
	}
	return nil
}

// audit wants every chunk to have one owner at most: a table entry or one of the allocator's lists. The caller
// holds mu.
func (a *allocator) audit() error {
	owner := map[chunkID]string{}
	var err error
	claim := func(id chunkID, who string) {
		switch was, taken := owner[id]; {
		case taken:
			err = errors.Join(err, fmt.Errorf("chunk %d belongs to %s and %s", id, was, who))
		case id >= a.limit:
			err = errors.Join(err, fmt.Errorf("chunk %d of %s is past the end of the storage, chunk %d", id, who, a.limit))
		}
		owner[id] = who
	}
	for c := range a.m.g.chunks() {
		e := a.m.table.get(c)
		if !e.mapped() {
			continue
		}
		if e.id() >= a.next {
			err = errors.Join(err, fmt.Errorf("chunk %d of entry %d is not below the high-water mark %d", e.id(), c, a.next))
		}
		claim(e.id(), fmt.Sprintf("entry %d", c))
	}
	for _, id := range a.clean {
		claim(id, "the clean list")
	}
	for _, q := range a.quarantine {
		claim(q.id, "the quarantine")
	}
	for _, p := range a.punched {
		claim(p.id, "the punched list")
	}
	for id := range a.next {
		if int(id>>6) < len(a.free) && a.free[id>>6]>>(id&63)&1 == 1 {
			claim(id, "the free set")
		}
	}
	return err
}
