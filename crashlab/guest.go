package crashlab

import (
	"fmt"
	"io"
	"maps"
	"sync"

	"github.com/platter-disk/platter/storage"
)

// Subject is the disk under test as its guest sees it, with the checker that goes with its format.
type Subject interface {
	io.ReaderAt
	io.WriterAt
	// WriteZeroes makes the range read as zeros; unmap allows the space to be given back.
	WriteZeroes(off, length int64, unmap bool) error
	Discard(off, length int64) error
	// Flush makes every request that completed before the call durable.
	Flush() error
	// Size is the size of the disk in bytes.
	Size() int64
	// Check is the format's checker, called on a subject that was just opened and not used: it returns an
	// error for anything but the leaks the discipline under test may leave.
	Check() error
	// Close flushes and leaves the image clean. After Lab.PowerOff it must release what the subject holds,
	// goroutines included, whatever its files answer.
	Close() error
}

// Guest issues requests to a subject, gives every write contents of its own, and remembers what was issued and
// answered when. Safe for concurrent use.
type Guest struct {
	lab         *Lab
	sub         Subject
	watch       *watch
	discardUnit int64
	initial     []byte // a sector for each slot
	initialSize int64

	mu      sync.Mutex
	values  [][]value // by slot, in the order of issue
	sizes   []sizeValue
	flushes []*request
	count   int                 // requests
	tagged  map[uint32]*request // by tag; the tag is the request's number
}

// newGuest returns a guest of a disk that holds initial. Numbers of requests continue those of before, whose
// writes may be on the disk.
func newGuest(l *Lab, s Subject, w *watch, discardUnit int64, initial []byte, before *Guest) *Guest {
	g := &Guest{
		lab: l, sub: s, watch: w, discardUnit: discardUnit, initial: initial, initialSize: s.Size(),
		values: make([][]value, w.slots), tagged: make(map[uint32]*request),
	}
	if before != nil {
		g.count, g.tagged = before.count, maps.Clone(before.tagged)
	}
	return g
}

func (g *Guest) initialOf(slot int) []byte {
	return g.initial[slot*storage.SectorSize:][:storage.SectorSize]
}

// Subject returns the disk, for requests that Guest has no method for. What changes the contents of the disk
// must go through the guest.
func (g *Guest) Subject() Subject { return g.sub }

// Write writes stamped contents of the request's own to the range.
func (g *Guest) Write(off, length int64) error {
	return g.WriteWith("write", off, length, func(p []byte) error {
		_, err := g.sub.WriteAt(p, off)
		return err
	})
}

// WriteWith is Write through do, which must put p at off: a compressed write, for example. verb names it.
func (g *Guest) WriteWith(verb string, off, length int64, do func(p []byte) error) error {
	p := make([]byte, length)
	r, err := g.issue(fmt.Sprintf("%s of %d bytes at %d", verb, length, off), func(r *request, tag uint32) error {
		g.tagged[tag] = r
		Stamp(p, off, tag)
		return g.put(r, off, length, false, func(i int64) *sector { return stamped(i, tag) })
	})
	if err != nil {
		return err
	}
	return g.answer(r, do(p))
}

// WriteZeroes makes the range read as zeros.
func (g *Guest) WriteZeroes(off, length int64, unmap bool) error {
	r, err := g.issue(fmt.Sprintf("zeroing of %d bytes at %d", length, off), func(r *request, _ uint32) error {
		return g.put(r, off, length, false, func(int64) *sector { return &zeroSector })
	})
	if err != nil {
		return err
	}
	return g.answer(r, g.sub.WriteZeroes(off, length, unmap))
}

// Discard tells that the range is no longer needed. Whole aligned units of the scenario's DiscardUnit read as
// zeros afterwards; each other sector keeps its contents or reads as zeros.
func (g *Guest) Discard(off, length int64) error {
	strongFrom, strongTo := off, off
	if u := g.discardUnit; u > 0 {
		strongFrom, strongTo = (off+u-1)/u*u, (off+length)/u*u
		if off+length == g.sub.Size() {
			strongTo = off + length
		}
		if strongFrom >= strongTo {
			strongFrom, strongTo = off, off
		}
	}
	r, err := g.issue(fmt.Sprintf("discard of %d bytes at %d", length, off), func(r *request, _ uint32) error {
		zero := func(int64) *sector { return &zeroSector }
		if err := g.put(r, off, strongFrom-off, true, zero); err != nil {
			return err
		}
		if err := g.put(r, strongFrom, strongTo-strongFrom, false, zero); err != nil {
			return err
		}
		return g.put(r, strongTo, off+length-strongTo, true, zero)
	})
	if err != nil {
		return err
	}
	return g.answer(r, g.sub.Discard(off, length))
}

// Flush makes every request that was answered before the call durable: that is the promise judged from then on.
func (g *Guest) Flush() error { return g.FlushWith("flush", g.sub.Flush) }

// FlushWith is Flush through do: anything that promises durability to the guest. verb names it.
func (g *Guest) FlushWith(verb string, do func() error) error {
	r, err := g.issue(verb, func(r *request, _ uint32) error {
		r.flush = true
		g.flushes = append(g.flushes, r)
		return nil
	})
	if err != nil {
		return err
	}
	return g.answer(r, do())
}

// Resize changes the size of the disk through do. The new part reads as zeros; what a smaller size cuts off is
// gone, at once with the change of size and not before. No other request may be in flight.
func (g *Guest) Resize(size int64, do func() error) error {
	r, err := g.issue(fmt.Sprintf("resize to %d bytes", size), func(r *request, _ uint32) error {
		g.sizes = append(g.sizes, sizeValue{r, size})
		for slot := range g.values {
			if start := g.watch.sector(slot) * storage.SectorSize; start+storage.SectorSize > size {
				data := *g.latest(slot)
				clear(data[max(size-start, 0):])
				g.values[slot] = append(g.values[slot], value{req: r, data: &data, cut: true})
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return g.answer(r, do())
}

// Note adds a remark to the history.
func (g *Guest) Note(text string) { g.lab.Note(text, false) }

// Check reads every watched sector and compares it with what the guest may see now. It may run beside other
// requests.
func (g *Guest) Check() error {
	before := g.now()
	view := make([]byte, g.watch.slots*storage.SectorSize)
	size := g.sub.Size()
	if err := g.watch.read(g.sub, size, view); err != nil {
		return err
	}
	after := g.now()
	g.mu.Lock()
	o := g.rules(after, before)
	g.mu.Unlock()
	return o.Judge(view, size)
}

// now is the number of the next event.
func (g *Guest) now() int {
	g.lab.mu.RLock()
	defer g.lab.mu.RUnlock()
	return len(g.lab.events)
}

// issue records the beginning of a request. prepare runs with g.mu held and may refuse it.
func (g *Guest) issue(text string, prepare func(r *request, tag uint32) error) (*request, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	r := &request{text: fmt.Sprintf("%s (request %d)", text, g.count+1), issue: never, end: never}
	if err := prepare(r, uint32(g.count+1)); err != nil {
		return nil, err
	}
	g.count++
	g.lab.mu.Lock()
	defer g.lab.mu.Unlock()
	r.issue = g.lab.mark("guest issues "+r.text, false)
	return r, nil
}

// answer records the end of a request and returns its error.
func (g *Guest) answer(r *request, err error) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.lab.mu.Lock()
	defer g.lab.mu.Unlock()
	text := "answered: " + r.text
	if err != nil {
		text = fmt.Sprintf("failed: %s: %v", r.text, err)
	}
	r.ok = err == nil
	r.end = g.lab.mark(text, r.ok && r.flush)
	if err != nil {
		return fmt.Errorf("%s: %w", r.text, err)
	}
	return nil
}

// put records new contents for each sector of a range. g.mu is held. All or nothing is recorded.
func (g *Guest) put(r *request, off, length int64, weak bool, contents func(sector int64) *sector) error {
	if off < 0 || length < 0 || length > maxFileSize || off > maxFileSize-length {
		return fmt.Errorf("crashlab: %s: want a range inside 0 to %d", r.text, int64(maxFileSize))
	}
	if length == 0 {
		return nil
	}
	type update struct {
		slot int
		data *sector
	}
	var updates []update
	for i := off / storage.SectorSize; i*storage.SectorSize < off+length; i++ {
		slot, ok := g.watch.slot(i)
		if !ok {
			return fmt.Errorf("crashlab: %s: sector %d is not watched", r.text, i)
		}
		data := contents(i)
		start := i * storage.SectorSize
		from, to := max(off-start, 0), min(off+length-start, storage.SectorSize)
		if to-from < storage.SectorSize {
			if !g.settled(slot) {
				return fmt.Errorf("crashlab: %s: sector %d is written in part while its contents are in doubt", r.text, i)
			}
			whole := *g.latest(slot)
			copy(whole[from:to], data[from:to])
			data = &whole
		}
		updates = append(updates, update{slot, data})
	}
	for _, u := range updates {
		g.values[u.slot] = append(g.values[u.slot], value{req: r, data: u.data, weak: weak})
	}
	return nil
}

// settled says whether a sector can hold one thing only, for a guest that reads it now. g.mu is held.
func (g *Guest) settled(slot int) bool {
	now := g.now()
	initial, rest := allowed(g.values[slot], now, now)
	return initial && len(rest) == 0 || !initial && len(rest) == 1
}

// latest returns the newest contents of a sector. g.mu is held.
func (g *Guest) latest(slot int) *sector {
	if v := g.values[slot]; len(v) > 0 {
		return v[len(v)-1].data
	}
	return (*sector)(g.initialOf(slot))
}
