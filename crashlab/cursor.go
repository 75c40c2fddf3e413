package crashlab

import (
	"slices"

	"github.com/platter-disk/platter/storage"
)

// history is a recorded history that no longer changes.
type history struct {
	files  []*content
	events []event
}

// history freezes what the lab has recorded. Operations that have not returned stay in flight for ever.
func (l *Lab) history() *history {
	l.mu.RLock()
	defer l.mu.RUnlock()
	h := &history{files: l.files, events: slices.Clone(l.events)}
	for i, e := range h.events {
		if e.op != nil && !e.ends {
			o := *e.op
			h.events[i].op = &o
		}
	}
	return h
}

// cursor walks along a history and knows, at each instant, what of every file is durable and what contents
// each unit and each size may have instead.
type cursor struct {
	h     *history
	model Model
	next  int // the event to look at next; -1 before the start
	files []fileCursor
}

// fileCursor is a cursor's knowledge of one file.
type fileCursor struct {
	c       *content
	durable sectorTree // as of the last completed barrier
	current sectorTree // everything that has begun
	size    int64      // durable
	sizes   []sizeStep // since the barrier
	sum     uint64     // fingerprint of durable, relative to the start of the history
	units   map[int64]*unitState
	order   []int64 // keys of units, sorted
}

// sizeStep is a change of a file's size that is not yet durable.
type sizeStep struct {
	op   *op
	size int64
}

// unitState is a unit that was changed since the last barrier.
type unitState struct {
	was    uint64      // contribution of the durable contents
	base   candidate   // what is there when nothing survives: the durable contents, or poison
	later  []candidate // since, in order
	choice *unitChoice // what a crash may leave after the first chosen of later; nil: not known yet
	chosen int
}

// candidate is one content of a unit.
type candidate struct {
	op   *op // who first gave the unit this content; nil for the durable one
	data unitData
	sum  uint64 // its contribution to the fingerprint
}

func newCursor(h *history, m Model) *cursor {
	cur := &cursor{h: h, model: m, next: -1}
	for _, c := range h.files {
		cur.files = append(cur.files, fileCursor{
			c: c, durable: c.initial.fork(), current: c.initial.fork(), size: c.initialSize,
			units: make(map[int64]*unitState),
		})
	}
	return cur
}

// point is an instant of a history at which crash states appear that were not possible, or not wrong, before.
type point struct {
	event   int   // the crash happens after this event and before the next; -1: before the first
	op      *op   // the operation that has just begun; nil at the start and at a promise
	promise *Mark // the promise that was just made to the guest, nil if none was
}

// advance moves to the next point; false at the end of the history.
//
// Other instants need no look of their own: the end of an operation changes nothing, and the completion of a
// barrier only takes possibilities away, all of them seen before with the same promises in force.
func (cur *cursor) advance() (point, bool) {
	if cur.next < 0 {
		cur.next = 0
		return point{event: -1}, true
	}
	for cur.next < len(cur.h.events) {
		at := cur.next
		e := cur.h.events[at]
		cur.next++
		switch {
		case e.mark != nil:
			if e.mark.Promise {
				return point{event: at, promise: e.mark}, true
			}
		case e.op.kind == KindSync:
			if e.ends {
				cur.files[e.op.file].cover(e.op, cur.model)
			}
		case !e.ends:
			if cur.files[e.op.file].apply(e.op, cur.model) {
				return point{event: at, op: e.op}, true
			}
		}
	}
	return point{}, false
}

// apply lets an operation begin; it returns whether that makes anything new possible.
func (f *fileCursor) apply(o *op, m Model) bool {
	per := m.sectors()
	for i := 0; i < len(o.changes); {
		unit := o.changes[i].sector / per
		u := f.unit(unit, m)
		for ; i < len(o.changes) && o.changes[i].sector/per == unit; i++ {
			f.current.set(o.changes[i].sector, o.changes[i].data)
			if m.Poison && o.kind == KindWrite && u.base.poison(f.c, o.changes[i].sector, unit*per, o.oldSize) {
				u.choice = nil
			}
		}
		data := readUnit(&f.current, unit*per, per)
		u.later = append(u.later, candidate{op: o, data: data, sum: data.contribution(f.c.index, unit*per, f.c.blank)})
	}
	if o.newSize != o.oldSize {
		f.sizes = append(f.sizes, sizeStep{o, o.newSize})
	}
	return len(o.changes) > 0 || o.newSize != o.oldSize
}

// poison makes a sector that an operation brought into the file read as poison should only its place survive.
// It returns whether that is new.
func (b *candidate) poison(c *content, sector, firstSector, oldSize int64) bool {
	k := sector - firstSector
	if sector*storage.SectorSize < oldSize || b.data[k] != nil {
		return false
	}
	b.data[k] = &poisonSector
	b.sum += contribution(c.index, sector, &poisonSector, c.blank)
	return true
}

// unit returns the state of a unit, which starts from its durable contents when it was not changed before.
func (f *fileCursor) unit(unit int64, m Model) *unitState {
	if u := f.units[unit]; u != nil {
		return u
	}
	per := m.sectors()
	data := readUnit(&f.durable, unit*per, per)
	sum := data.contribution(f.c.index, unit*per, f.c.blank)
	u := &unitState{was: sum, base: candidate{data: data, sum: sum}}
	f.units[unit] = u
	at, _ := slices.BinarySearch(f.order, unit)
	f.order = slices.Insert(f.order, at, unit)
	return u
}

func readUnit(t *sectorTree, first, n int64) unitData {
	var d unitData
	for i := range n {
		d[i] = t.get(first + i)
	}
	return d
}

// cover makes durable what had ended before a completed barrier began.
func (f *fileCursor) cover(sync *op, m Model) {
	covered := func(o *op) bool { return o.end < sync.begin }
	per := m.sectors()
	kept := f.order[:0]
	for _, unit := range f.order {
		u := f.units[unit]
		last := -1
		for i, v := range u.later {
			if covered(v.op) {
				last = i
			}
		}
		if last >= 0 {
			v := u.later[last]
			f.sum += v.sum - u.was
			for i := range per {
				f.durable.set(unit*per+i, v.data[i])
			}
			u.was, u.base = v.sum, candidate{data: v.data, sum: v.sum}
			u.later = slices.Clone(u.later[last+1:])
			u.choice = nil
		}
		if len(u.later) == 0 {
			delete(f.units, unit)
			continue
		}
		kept = append(kept, unit)
	}
	f.order = kept
	for i := len(f.sizes) - 1; i >= 0; i-- {
		if covered(f.sizes[i].op) {
			f.size = f.sizes[i].size
			f.sizes = slices.Clone(f.sizes[i+1:])
			break
		}
	}
}
