package crashlab

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"github.com/platter-disk/platter/storage"
)

// request is one request of the guest. It is in doubt between issue and end.
type request struct {
	text  string
	issue int  // event number
	end   int  // event number; never while unanswered
	ok    bool // answered without an error
	flush bool
}

// value is one content of one guest sector: a request's contribution to it.
type value struct {
	req  *request
	data *sector
	weak bool // the sector may as well keep what it had: a discard without a promise
	cut  bool // by a change of size, which is one with it: a disk that still has its size still has this too
}

// since is the issue of the change of size that a value comes with, or 0.
func (v *value) since() int {
	if v.cut {
		return v.req.issue
	}
	return 0
}

// sizeValue is one size of the guest disk.
type sizeValue struct {
	req  *request
	size int64
}

// A value written by w is obsolete when a later write w' is sure to have replaced it: w had ended before w' was
// issued, and w' was answered before bound. For a guest that reads, bound is the instant it begins to; after
// a crash, it is the beginning of the last flush that completed. Writes that overlap in time may come
// in either order, and one that failed may have been done or not.

// inPlace says that a write is sure to have replaced whatever had ended before it was issued.
func (r *request) inPlace(bound int) bool { return r.ok && r.end < bound }

// allowed returns which of a sector's values it may hold, where false as a first result rules out the initial
// contents. upTo is the first event that has not happened.
func allowed(values []value, upTo, bound int) (initial bool, rest []possible) {
	latest := -1 // issue of the last write in place
	for _, v := range values {
		if !v.weak && v.req.inPlace(bound) {
			latest = max(latest, v.req.issue)
		}
	}
	for _, v := range values {
		if c := (possible{v.data, v.since()}); v.req.issue < upTo && v.req.end >= latest && !slices.Contains(rest, c) {
			rest = append(rest, c)
		}
	}
	return latest < 0, rest
}

// Oracle knows what each watched sector of the guest disk may hold at one moment. Safe for concurrent use.
type Oracle struct {
	g      *Guest
	rules  []rule // by slot
	sizes  []int64
	issues []int // of the requests that may have given the disk these sizes, 0 for the size it began with
}

// rule is the set of contents a sector may have.
type rule struct {
	initial bool
	rest    []possible
}

// possible is one content of a sector, on a disk whose size comes from a request issued at since or later.
type possible struct {
	data  *sector
	since int
}

// oracle returns what a crash after event may leave to the guest.
func (g *Guest) oracle(event int) *Oracle {
	g.mu.Lock()
	defer g.mu.Unlock()
	bound := 0
	for _, r := range g.flushes {
		if r.ok && r.end <= event {
			bound = max(bound, r.issue)
		}
	}
	return g.rules(event+1, bound)
}

// rules builds the oracle of the instant before event upTo. g.mu is held.
func (g *Guest) rules(upTo, bound int) *Oracle {
	o := &Oracle{g: g, rules: make([]rule, g.watch.slots)}
	for slot, values := range g.values {
		if len(values) == 0 {
			o.rules[slot].initial = true
			continue
		}
		o.rules[slot].initial, o.rules[slot].rest = allowed(values, upTo, bound)
	}
	latest := -1
	for _, v := range g.sizes {
		if v.req.inPlace(bound) {
			latest = max(latest, v.req.issue)
		}
	}
	if latest < 0 {
		o.sizes, o.issues = append(o.sizes, g.initialSize), append(o.issues, 0)
	}
	for _, v := range g.sizes {
		if v.req.issue < upTo && v.req.end >= latest {
			o.sizes, o.issues = append(o.sizes, v.size), append(o.issues, v.req.issue)
		}
	}
	return o
}

// Judge says what is wrong with a disk of the given size whose watched sectors read as view; nil if nothing is.
func (o *Oracle) Judge(view []byte, size int64) error {
	if !slices.Contains(o.sizes, size) {
		return fmt.Errorf("the disk has %d bytes; allowed: %d", size, o.sizes)
	}
	newest := 0 // issue of the last request that may have given the disk its size
	for i, issue := range o.issues {
		if o.sizes[i] == size {
			newest = max(newest, issue)
		}
	}
	for slot := range o.rules {
		got := view[slot*storage.SectorSize:][:storage.SectorSize]
		r := &o.rules[slot]
		if r.initial && bytes.Equal(got, o.g.initialOf(slot)) {
			continue
		}
		if r.has(got, newest) {
			continue
		}
		if sector := o.g.watch.sector(slot); sector*storage.SectorSize < size {
			if n := size - sector*storage.SectorSize; n < storage.SectorSize && o.fits(slot, got[:n]) {
				continue
			}
			return o.wrong(slot, got, newest)
		}
	}
	return nil
}

func (r *rule) has(got []byte, newest int) bool {
	for _, c := range r.rest {
		if c.since <= newest && bytes.Equal(got, c.data[:]) {
			return true
		}
	}
	return false
}

// fits says whether the beginning of the disk's last sector is allowed; the rest of it does not exist.
func (o *Oracle) fits(slot int, got []byte) bool {
	r := &o.rules[slot]
	return r.initial && bytes.HasPrefix(o.g.initialOf(slot), got) ||
		slices.ContainsFunc(r.rest, func(c possible) bool { return bytes.HasPrefix(c.data[:], got) })
}

// wrong describes a sector that holds what it must not.
func (o *Oracle) wrong(slot int, got []byte, newest int) error {
	o.g.mu.Lock()
	defer o.g.mu.Unlock()
	r := &o.rules[slot]
	var want []string
	if r.initial {
		want = append(want, o.g.describe(slot, o.g.initialOf(slot)))
	}
	for _, c := range r.rest {
		if c.since <= newest {
			want = append(want, o.g.describe(slot, c.data[:]))
		}
	}
	return fmt.Errorf("guest sector %d holds %s; allowed: %s",
		o.g.watch.sector(slot), o.g.describe(slot, got), strings.Join(want, ", or "))
}

// sameView compares two readings of a disk, the second of which must equal the first.
func (g *Guest) sameView(first, second []byte) error {
	for slot := range g.watch.slots {
		a, b := first[slot*storage.SectorSize:][:storage.SectorSize], second[slot*storage.SectorSize:][:storage.SectorSize]
		if !bytes.Equal(a, b) {
			g.mu.Lock()
			defer g.mu.Unlock()
			return fmt.Errorf("guest sector %d held %s after the first recovery and now holds %s",
				g.watch.sector(slot), g.describe(slot, a), g.describe(slot, b))
		}
	}
	return nil
}

// stampMagic begins every 16-byte piece of a stamped sector, followed by the tag (u32) and the sector (u64).
const stampMagic = "CLab"

// Stamp fills p, the bytes of a disk at off, with contents that name their place and the tag: each 16 bytes
// hold "CLab", the tag (u32) and the sector number (u64), little-endian. Oracles recognise them.
func Stamp(p []byte, off int64, tag uint32) {
	for len(p) > 0 {
		s := stamped(off/storage.SectorSize, tag)
		n := copy(p, s[off%storage.SectorSize:])
		p, off = p[n:], off+int64(n)
	}
}

// stamped is the contents that Stamp gives to a sector.
func stamped(i int64, tag uint32) *sector {
	s := new(sector)
	copy(s[:], stampMagic)
	binary.LittleEndian.PutUint32(s[4:], tag)
	binary.LittleEndian.PutUint64(s[8:], uint64(i))
	for n := 16; n < len(s); n *= 2 {
		copy(s[n:], s[:n])
	}
	return s
}

// describe says what a sector's contents are. g.mu is held.
func (g *Guest) describe(slot int, p []byte) string {
	switch {
	case allBytes(p, 0):
		return "zeros"
	case allBytes(p, Poison):
		return "poison (space that was never written)"
	case bytes.Equal(p, g.initialOf(slot)):
		return "its initial contents"
	case string(p[:4]) != stampMagic:
		return fmt.Sprintf("bytes nobody wrote to it (%x…)", p[:16])
	}
	tag, at := binary.LittleEndian.Uint32(p[4:]), int64(binary.LittleEndian.Uint64(p[8:]))
	what := fmt.Sprintf("contents stamped %d", tag)
	if r := g.tagged[tag]; r != nil {
		what = r.text
	}
	if !bytes.Equal(p, stamped(at, tag)[:]) {
		return "a mixture of contents that begins with " + what
	}
	if at != g.watch.sector(slot) {
		return fmt.Sprintf("what belongs to sector %d: %s", at, what)
	}
	return what
}

func allBytes(p []byte, b byte) bool {
	for _, c := range p {
		if c != b {
			return false
		}
	}
	return true
}
