package qcow2

import (
	"math"
	"math/bits"
	"sync"
	"sync/atomic"
)

// rangeLock lets requests hold byte ranges of the virtual disk, shared (reads, writes in place) or
// exclusive (changes of mapping). Two holders exclude each other only where their ranges overlap and at
// least one is exclusive; waiters are served in the order they came.
//
// The disk is cut into regions that are dealt out to shards. As long as nobody holds anything exclusively in
// a shard, a shared holder is one atomic increment and leaves no record of its range. The first exclusive
// holder turns the shard to the slow mode, waits until those unrecorded holders are gone, and from then on
// ranges are recorded under the shard's mutex until no exclusive holder is left.
type rangeLock struct {
	ids    atomic.Uint64 // of recorded holders
	shards [rangeShards]rangeShard
}

const (
	rangeShards     = 64
	rangeRegionBits = 22 // 4 MiB

	slowUnit = 1 << 32 // state: slow-mode users in the high half, unrecorded shared holders in the low half
)

type rangeShard struct {
	state atomic.Int64
	mu    sync.Mutex
	free  sync.Cond
	queue []heldRange // in order of arrival; an entry holds once no earlier one conflicts
	_     [48]byte    // keep neighbours off this shard's cache line
}

type heldRange struct {
	from, to  int64
	id        uint64
	exclusive bool
}

// rangeHold is what lock returns and unlock takes.
type rangeHold struct {
	from, to  int64
	fast      uint64 // bit i: shard i is held by its counter only
	id        uint64 // in the queues of the other shards
	exclusive bool
}

func newRangeLock() *rangeLock {
	l := &rangeLock{}
	for i := range l.shards {
		l.shards[i].free.L = &l.shards[i].mu
	}
	return l
}

// shardMask has a bit for every shard that [from, to) touches; shards are taken in ascending order.
func shardMask(from, to int64) uint64 {
	first, last := from>>rangeRegionBits, (to-1)>>rangeRegionBits
	if last-first >= rangeShards-1 {
		return math.MaxUint64
	}
	mask := uint64(1)<<(last-first+1) - 1
	return bits.RotateLeft64(mask, int(first&(rangeShards-1)))
}

// lock holds [from, to) until unlock.
func (l *rangeLock) lock(from, to int64, exclusive bool) rangeHold {
	h := rangeHold{from: from, to: to, exclusive: exclusive}
	for mask := shardMask(from, to); mask != 0; mask &= mask - 1 {
		i := bits.TrailingZeros64(mask)
		s := &l.shards[i]
		if !exclusive && s.fastLock() {
			h.fast |= 1 << i
			continue
		}
		if h.id == 0 {
			h.id = l.ids.Add(1)
		}
		s.slowLock(h)
	}
	return h
}

// tryLockShared holds [from, to) shared if that needs no waiting and no record.
func (l *rangeLock) tryLockShared(from, to int64) (rangeHold, bool) {
	h := rangeHold{from: from, to: to}
	for mask := shardMask(from, to); mask != 0; mask &= mask - 1 {
		i := bits.TrailingZeros64(mask)
		if !l.shards[i].fastLock() {
			for taken := h.fast; taken != 0; taken &= taken - 1 {
				l.shards[bits.TrailingZeros64(taken)].fastUnlock()
			}
			return rangeHold{}, false
		}
		h.fast |= 1 << i
	}
	return h, true
}

func (l *rangeLock) unlock(h rangeHold) {
	for mask := shardMask(h.from, h.to); mask != 0; mask &= mask - 1 {
		i := bits.TrailingZeros64(mask)
		if h.fast>>i&1 != 0 {
			l.shards[i].fastUnlock()
		} else {
			l.shards[i].slowUnlock(h)
		}
	}
}

func (s *rangeShard) fastLock() bool {
	if s.state.Add(1) < slowUnit {
		return true
	}
	s.fastUnlock()
	return false
}

func (s *rangeShard) fastUnlock() {
	if n := s.state.Add(-1); n >= slowUnit && n&(slowUnit-1) == 0 {
		s.mu.Lock()
		s.free.Broadcast()
		s.mu.Unlock()
	}
}

func (s *rangeShard) slowLock(h rangeHold) {
	s.mu.Lock()
	defer s.mu.Unlock()
	me := heldRange{from: h.from, to: h.to, id: h.id, exclusive: h.exclusive}
	s.queue = append(s.queue, me)
	if h.exclusive {
		s.state.Add(slowUnit)
	}
	for s.blocked(me) {
		s.free.Wait()
	}
}

// blocked reports whether someone who came before me still keeps me out.
func (s *rangeShard) blocked(me heldRange) bool {
	if me.exclusive && s.state.Load()&(slowUnit-1) != 0 {
		return true
	}
	for i := range s.queue {
		q := &s.queue[i]
		if q.id == me.id {
			return false
		}
		if (q.exclusive || me.exclusive) && q.from < me.to && me.from < q.to {
			return true
		}
	}
	return false
}

func (s *rangeShard) slowUnlock(h rangeHold) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.queue {
		if s.queue[i].id == h.id { // of two equal ranges the other may belong to one that has yet to wake up
			s.queue = append(s.queue[:i], s.queue[i+1:]...)
			break
		}
	}
	if h.exclusive {
		s.state.Add(-slowUnit)
	}
	s.free.Broadcast()
}
