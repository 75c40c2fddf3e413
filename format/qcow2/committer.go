package qcow2

import (
	"encoding/binary"
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
	prepare    func() error // runs before words are written, if it is set; the caller holds commits

	commits combiner
	counts  writeBatch
	words   writeBatch
	written []*tableSlice
}

// combiner runs commits one at a time and lets any number of waiting flushes share the next one.
type combiner struct {
	sync.Mutex               // held during a commit
	started    atomic.Uint64 // flushes that began
	finished   uint64        // number of the newest flush that succeeded; guarded by the mutex
}

// flush runs commit, unless one that began after the call does instead.
func (c *combiner) flush(commit func() error) error {
	before := c.started.Load()
	c.Lock()
	defer c.Unlock()
	if c.finished > before {
		return nil
	}
	number := c.started.Add(1)
	if err := commit(); err != nil {
		return err
	}
	c.finished = number
	return nil
}

// take changes an update's words and counts in memory and notes what they wait for. The caller holds Image.mu.
func (w *committer) take(u *update) error {
	im := w.im
	need := u.exposes
	if w.im.opts.Mutant == MutantLazyNoBarrier {
		need = 0
	}
	ready, err := im.linkUses(u)
	if err != nil {
		return err
	}
	need = max(need, ready)
	im.changeWords(u)
	if u.slice != nil {
		u.slice.need = max(u.slice.need, need)
	} else {
		im.l1Need = max(im.l1Need, need)
	}
	if u.unlinked {
		return w.release(u.releases) // changes of the header are durable at once
	}
	return w.hold(u.releases)
}

// release lowers the counts of what was released durably, and makes what is free available again.
func (w *committer) release(runs []hostRun) error {
	for _, r := range runs {
		if err := w.im.alloc.release(r); err != nil {
			return w.im.fail(err)
		}
	}
	return nil
}

// full has no place: whatever was accepted can be written back.
func (w *committer) full() bool { return false }

// hold keeps what an update released until that is durable.
func (w *committer) hold(runs []hostRun) error {
	im := w.im
	for _, r := range runs {
		switch im.opts.Mutant {
		case MutantReuseEarly, MutantHistorical, MutantLowerEarly:
			if err := im.alloc.release(r); err != nil {
				return err
			}
			continue
		case MutantPunchEarly:
			for c := r.start; c < r.start+hostCluster(r.n); c++ {
				if v, err := im.alloc.refs.get(c); err == nil && v == 1 && !im.alloc.packer.pending(c) {
					im.alloc.punch(c, true)
				}
			}
		}
		im.quarantine = append(im.quarantine, r)
		im.quarantined += r.n
	}
	return nil
}

// minBound is the number of clusters that may be in transit or in quarantine however small the reserve is.
const minBound = 64

// bound keeps what memory holds back within bounds when the guest does not flush.
func (w *committer) bound() error {
	im := w.im
	im.mu.Lock()
	crowded := int64(len(im.dirtySlices))*im.tables.bytes > im.tables.capacity()*3/4
	full := im.quarantined > max(im.alloc.maxBatch, minBound)
	// What a crash may leak stays bounded by the reserve, however much the guest writes between two flushes.
	crowded = crowded || im.alloc.transit > max(2*im.alloc.maxBatch, minBound)
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
	w.commits.Lock()
	defer w.commits.Unlock()
	return w.commit(false)
}

func (w *committer) flush() error {
	return w.commits.flush(func() error { return w.commit(true) })
}

// publishBlocks makes new refcount blocks durable and then has the table point to them.
func (w *committer) publishBlocks(words []tableWord) error {
	if err := w.im.syncFiles(); err != nil {
		return err
	}
	for _, t := range words {
		if err := w.im.writeMetadata(binary.BigEndian.AppendUint64(nil, t.word), t.at); err != nil {
			return err
		}
	}
	return nil
}

func (w *committer) quiesced(fn func() error) error {
	w.commits.Lock()
	defer w.commits.Unlock()
	if err := w.commit(true); err != nil {
		return err
	}
	w.im.mu.Lock()
	defer w.im.mu.Unlock()
	return fn()
}

// progress has no place: what a crash interrupts stays unfinished, which is a leak.
func (w *committer) progress(operation) {}

// settleCounts makes raised counts durable.
func (w *committer) settleCounts() error { return w.flush() }

// changeHeader switches fields of the header durably.
func (w *committer) changeHeader(f headerField, releases []hostRun) error {
	im := w.im
	if err := im.switchHeader(f); err != nil {
		return err
	}
	return w.release(releases)
}

// commit writes what was accepted so far; a durable one ends with a barrier and then makes what the updates
// released available again. The caller holds commits.
func (w *committer) commit(durable bool) error {
	im := w.im
	if err := im.failed(); err != nil {
		return err
	}
	counts := &w.counts
	im.mu.Lock()
	if durable {
		im.alloc.topUp()
		if err := im.failed(); err != nil {
			im.mu.Unlock()
			return err
		}
	}
	im.alloc.transit = 0
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
	late := im.opts.Mutant == MutantDirtyLate
	if err := w.announce(!late); err != nil {
		return err
	}
	if need >= reached {
		if err := im.barrier(now); err != nil {
			return err
		}
	}
	if err := im.writeBatch(&w.words); err != nil {
		return err
	}
	if err := w.announce(late); err != nil {
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
	im.alloc.refs.writtenBack()
	if !durable {
		im.quarantine = append(released, im.quarantine...)
		for _, r := range released {
			im.quarantined += r.n
		}
		return nil
	}
	return w.release(released)
}

// announce runs prepare if it is due.
func (w *committer) announce(due bool) error {
	if w.prepare == nil || !due || w.words.empty() {
		return nil
	}
	return w.prepare()
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
