package prefetch

import (
	"sync"
	"sync/atomic"

	"github.com/platter-disk/platter/internal/bufpool"
)

// flights are the parts of the base image that are being fetched, from before they are read until they are kept.
// Whoever wants such a part takes it from there: the base image is asked for nothing twice.
//
// What a flight holds is what the base image holds. A guest's change ends all flights over its range for those who
// come later, before it is acknowledged: a read that begins afterwards never gets the old bytes. One that joined
// before may get either, as any read that goes on at the same time as a write.
type flights struct {
	n  atomic.Int64 // len(all)
	mu sync.Mutex
	// all is short: a flight a request under way.
	all []*flight
}

// flight is a part of the base image on its way.
type flight struct {
	off, end int64
	buf      *bufpool.Buffer // nil: the bytes show in the disk, when ready
	ready    chan struct{}   // closed when buf is filled, or all is over
	failed   bool            // before ready is closed: there is nothing in buf
	refs     int             // who uses buf; under flights.mu
}

// enter looks for a flight that has the byte at off, and joins it. If there is none and mine is not nil, it begins
// one for [off, end), or for less if other flights are in that range, and calls mine with its length for the
// buffer. Every flight that enter returns is to be released.
func (fs *flights) enter(off, end int64, mine func(n int64) *bufpool.Buffer) (f *flight, joined bool) {
	if fs.n.Load() == 0 && mine == nil {
		return nil, false
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for _, f := range fs.all {
		switch {
		case f.off <= off && off < f.end:
			f.refs++
			return f, true
		case off < f.off && f.off < end:
			end = f.off
		}
	}
	if mine == nil {
		return nil, false
	}
	f = &flight{off: off, end: end, buf: mine(end - off), ready: make(chan struct{}), refs: 1}
	fs.add(f)
	return f, false
}

func (fs *flights) add(f *flight) {
	fs.all = append(fs.all, f)
	fs.n.Store(int64(len(fs.all)))
}

// announce begins a flight without a buffer, unless others are in its range.
func (fs *flights) announce(off, end int64) (f *flight, ok bool) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for _, o := range fs.all {
		if o.off < end && off < o.end {
			return nil, false
		}
	}
	f = &flight{off: off, end: end, ready: make(chan struct{}), refs: 1}
	fs.add(f)
	return f, true
}

// release ends the use of a flight.
func (fs *flights) release(f *flight) {
	fs.mu.Lock()
	f.refs--
	last := f.refs == 0
	fs.mu.Unlock()
	if last && f.buf != nil {
		f.buf.Put()
	}
}

// end takes a flight out, so that nobody joins it any more, and releases it.
func (fs *flights) end(f *flight) {
	fs.mu.Lock()
	fs.remove(func(o *flight) bool { return o == f })
	fs.mu.Unlock()
	fs.release(f)
}

// changed takes all flights over a range out: its bytes are others now.
func (fs *flights) changed(off, n int64) {
	if fs.n.Load() == 0 {
		return
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.remove(func(o *flight) bool { return o.off < off+n && off < o.end })
}

func (fs *flights) remove(which func(*flight) bool) {
	left := fs.all[:0]
	for _, o := range fs.all {
		if !which(o) {
			left = append(left, o)
		}
	}
	clear(fs.all[len(left):])
	fs.all = left
	fs.n.Store(int64(len(left)))
}
