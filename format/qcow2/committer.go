package qcow2

import (
	"sync"
	"sync/atomic"
)

// committer is what the disciplines that change tables in place share: changed words stay in memory until a
// commit writes them in an order in which a crash leaves nothing worse than a leak.
//
//	data, new tables, raised counts     whenever they come up
//	   barrier                          only if a word below owes one
//	words of L2 and L1 tables           at a commit
//	   barrier                          if the commit is to be durable
//	lowered counts, reuse, hole punches afterwards
type committer struct {
	im         *Image
	holdCounts bool         // counts stay in memory until close
	prepare    func() error // runs before words are written, if it is set; the caller holds commitMu

	commitMu sync.Mutex // one commit at a time
	words    writeBatch
	written  []*tableSlice

	started  atomic.Uint64 // flushes that began
	finished uint64        // number of the newest flush that succeeded; guarded by commitMu
}

// take changes an update's words and counts in memory and notes what they wait for. The caller holds Image.mu.
func (w *committer) take(u *update) error {
	im := w.im
	need := u.exposes
	counted, err := im.linkUses(u)
	if err != nil {
		return err
	}
	if !w.holdCounts {
		need = max(need, counted)
	}
	im.changeWords(u)
	if u.slice != nil {
		u.slice.need = max(u.slice.need, need)
	} else {
		im.l1Need = max(im.l1Need, need)
	}
	for _, r := range u.releases {
		im.quarantine = append(im.quarantine, r)
		im.quarantined += r.n
	}
	return nil
}

// bound keeps what memory holds back within bounds when the guest does not flush.
func (w *committer) bound() error {
	im := w.im
	im.mu.Lock()
	crowded := int64(len(im.dirtySlices))*im.tables.bytes > im.tables.capacity()*3/4
	full := im.quarantined > max(im.alloc.maxBatch, 64)
	im.mu.Unlock()
	switch {
	case full:
		return w.flush()
	case crowded:
		return w.writeback()
	}
	return nil
}

func (w *committer) writeback() error {
	w.commitMu.Lock()
	defer w.commitMu.Unlock()
	return w.commit(false)
}

// flush is one barrier for all who wait: a flush that began after the call covers it.
func (w *committer) flush() error {
	before := w.started.Load()
	w.commitMu.Lock()
	defer w.commitMu.Unlock()
	if w.finished > before {
		return w.im.failed()
	}
	number := w.started.Add(1)
	if err := w.commit(true); err != nil {
		return err
	}
	w.finished = number
	return nil
}

// commit writes what was accepted so far; a durable one ends with a barrier and then makes what the updates
// released available again. The caller holds commitMu.
func (w *committer) commit(durable bool) error {
	im := w.im
	if err := im.failed(); err != nil {
		return err
	}
	counts := &im.countBatch
	im.mu.Lock()
	if durable {
		if err := im.alloc.topUp(); err != nil {
			im.mu.Unlock()
			return err
		}
	}
	counts.reset()
	if !w.holdCounts {
		im.alloc.refs.collect(counts)
	}
	w.words.reset()
	w.written = w.written[:0]
	need := im.collectTables(&w.words, &w.written)
	released := im.quarantine
	im.quarantine, im.quarantined = nil, 0
	im.gen++
	now := im.gen
	reached := im.durable
	im.mu.Unlock()

	if err := im.writeBatch(counts); err != nil {
		return err
	}
	if w.prepare != nil && !w.words.empty() {
		if err := w.prepare(); err != nil {
			return err
		}
	}
	if need >= reached {
		if err := im.barrier(now); err != nil {
			return err
		}
	}
	if err := im.writeBatch(&w.words); err != nil {
		return err
	}
	if durable {
		if err := im.barrier(now); err != nil {
			return err
		}
	}

	im.mu.Lock()
	defer im.mu.Unlock()
	im.writtenBack(w.written)
	if !durable {
		im.quarantine = append(released, im.quarantine...)
		for _, r := range released {
			im.quarantined += r.n
		}
		return nil
	}
	for _, r := range released {
		if err := im.alloc.release(r); err != nil {
			return im.fail(err)
		}
	}
	return nil
}

// finish makes everything durable and gives the reserve back; what is left for the caller is to trim the file.
func (w *committer) finish() error {
	im := w.im
	if err := w.flush(); err != nil {
		return err
	}
	im.mu.Lock()
	im.alloc.policy = countExact // what is released from now on is not kept
	err := im.alloc.returnReserve()
	im.mu.Unlock()
	if err != nil {
		return im.fail(err)
	}
	w.holdCounts = false
	return w.flush()
}
