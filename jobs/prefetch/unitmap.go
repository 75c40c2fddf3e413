package prefetch

import (
	"math/bits"
	"sync/atomic"
)

// maxUnits bounds a unitMap: 32 MiB of memory, 4 TiB of a disk with clusters of 64 KiB.
const maxUnits = 1 << 26

// unitMap remembers where the units of a disk live, so that the base image is not asked twice. Looking takes no
// lock; changes are made by one goroutine at a time.
//
//	in     touched  gone  zero
//	 -        -       -     -    nobody asked yet
//	set       -       -     -    in the base image
//	 -       set      -     -    a guest changed some of it: asked for when a copy of it is to be stored
//	 -        -      set    -    has left the base image for good
//	 -        -      set   set   nowhere, or a hole of the base image: reads as zeros, with the base and without it
type unitMap struct {
	n                       int64 // units
	in, touched, gone, zero bitset
}

func newUnitMap(n int64) *unitMap {
	return &unitMap{n, newBitset(n), newBitset(n), newBitset(n), newBitset(n)}
}

// bitset is a row of bits that may be read while another goroutine changes it.
type bitset []atomic.Uint64

func newBitset(n int64) bitset { return make(bitset, (n+63)/64) }

func (b bitset) get(i int64) bool { return b[i>>6].Load()&(1<<(i&63)) != 0 }
func (b bitset) set(i int64)      { b[i>>6].Or(1 << (i & 63)) }
func (b bitset) clear(i int64)    { b[i>>6].And(^uint64(1 << (i & 63))) }

// next is the first bit in [i, end) that is set, or is not; end if there is none.
func (b bitset) next(i, end int64, set bool) int64 {
	for i < end {
		w := b[i>>6].Load()
		if !set {
			w = ^w
		}
		if w >>= i & 63; w != 0 {
			return min(i+int64(bits.TrailingZeros64(w)), end)
		}
		i = i&^63 + 64
	}
	return end
}

// isKnown tells that unit u need not be asked for.
func (m *unitMap) isKnown(u int64) bool { return m.in.get(u) || m.gone.get(u) || m.touched.get(u) }

// settled tells that no unit of [first, last) will ever be copied, and all have a place of their own.
func (m *unitMap) settled(first, last int64) bool {
	return m.gone.next(first, last, false) == last && m.zero.next(first, last, true) == last
}

// place is where a unit was found to live.
type place uint8

const (
	placeBase  place = iota // all of it
	placeMixed              // in part
	placeZero               // reads as zeros, with the base image and without it
	placeOwn                // the disk's own
)

// learned notes what was found out about a unit while guests were at work: only what no change since can have
// made wrong.
func (m *unitMap) learned(u int64, v place) {
	if m.gone.get(u) {
		return
	}
	switch {
	case v == placeOwn:
		m.left(u)
	case m.touched.get(u):
	case v == placeZero:
		m.zero.set(u)
		m.left(u)
	case v == placeBase:
		m.in.set(u)
	}
}

// left notes that a unit has left the base image for good.
func (m *unitMap) left(u int64) {
	m.gone.set(u)
	m.in.clear(u)
	m.touched.clear(u)
}

// changed notes that a guest changed some of a unit.
func (m *unitMap) changed(u int64) {
	m.zero.clear(u)
	if !m.gone.get(u) {
		m.in.clear(u)
		m.touched.set(u)
	}
}
