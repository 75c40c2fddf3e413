package fvd

import "sync"

// rangeLock serialises those who change blocks that still live in the base image: a write that copies up, a
// soft write, zeroing. Nobody takes it for blocks that have left the base image.
//
// Overlapping holders are served in the order they came, without recursion (defect D-29).
type rangeLock struct {
	mu    sync.Mutex
	queue []*rangeHold // holders and waiters in order of arrival
	free  []*rangeHold
}

// rangeHold is a held or awaited run of blocks.
type rangeHold struct {
	first, last blockIndex
	held        bool
	ready       chan struct{} // one token when held becomes true
}

func (l *rangeLock) take(first, last blockIndex) *rangeHold {
	var h *rangeHold
	if n := len(l.free); n > 0 {
		h, l.free = l.free[n-1], l.free[:n-1]
	} else {
		h = &rangeHold{ready: make(chan struct{}, 1)}
	}
	h.first, h.last, h.held = first, last, false
	return h
}

// blocked reports whether an entry of the queue before i overlaps h.
func (l *rangeLock) blocked(h *rangeHold, i int) bool {
	for _, o := range l.queue[:i] {
		if o.first < h.last && h.first < o.last {
			return true
		}
	}
	return false
}

// lock waits for [first, last).
func (l *rangeLock) lock(first, last blockIndex) *rangeHold {
	l.mu.Lock()
	h := l.take(first, last)
	h.held = !l.blocked(h, len(l.queue))
	wait := !h.held
	l.queue = append(l.queue, h)
	l.mu.Unlock()
	if wait {
		<-h.ready
	}
	return h
}

// tryLock takes [first, last) if nobody holds or awaits a part of it, else returns nil.
func (l *rangeLock) tryLock(first, last blockIndex) *rangeHold {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := l.take(first, last)
	if l.blocked(h, len(l.queue)) {
		l.free = append(l.free, h)
		return nil
	}
	h.held = true
	l.queue = append(l.queue, h)
	return h
}

// unlock gives the range up and admits those it kept waiting.
func (l *rangeLock) unlock(h *rangeHold) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, o := range l.queue {
		if o == h {
			l.queue = append(l.queue[:i], l.queue[i+1:]...)
			break
		}
	}
	l.free = append(l.free, h)
	for i, o := range l.queue {
		if !o.held && !l.blocked(o, i) {
			o.held = true
			o.ready <- struct{}{}
		}
	}
}
