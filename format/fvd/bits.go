package fvd

import (
	"encoding/binary"
	"math/bits"
	"sync/atomic"
)

// bitset is a bitmap of the base image's blocks in memory. Bits are read and set atomically; only clear clears
// them, all at once. Bit i lies in word i/64: the words, written little-endian, are the on-disk bitmap.
type bitset struct {
	words []uint64
	n     blockIndex
}

func newBitset(n blockIndex) bitset {
	return bitset{words: make([]uint64, ceilDiv(int64(n), 64)), n: n}
}

func (b *bitset) word(i blockIndex) uint64 { return atomic.LoadUint64(&b.words[i>>6]) }

func (b *bitset) get(i blockIndex) bool { return b.word(i)>>(uint(i)&63)&1 == 1 }

// run is the length of the longest run of equal bits that begins at first and ends at last or before, and the
// value of those bits. It needs first < last <= b.n.
func (b *bitset) run(first, last blockIndex) (length blockIndex, set bool) {
	set = b.get(first)
	for i := first; i < last; {
		w := b.word(i) >> (uint(i) & 63)
		if set {
			w = ^w
		}
		// The first bit that differs; shifted-in bits count as equal, as the word ends there.
		same := blockIndex(bits.TrailingZeros64(w))
		rest := 64 - i&63
		if same < rest {
			return min(i+same, last) - first, set
		}
		i += rest
	}
	return last - first, set
}

// all reports whether every bit of [first, last) is set; true for an empty range.
func (b *bitset) all(first, last blockIndex) bool {
	if first >= last {
		return true
	}
	n, set := b.run(first, last)
	return set && n == last-first
}

// setRange sets [first, last).
func (b *bitset) setRange(first, last blockIndex) {
	for i := first; i < last; {
		lo := uint(i) & 63
		n := min(last-i, blockIndex(64-lo))
		mask := ^uint64(0) >> (64 - uint(n)) << lo
		if b.word(i)&mask != mask {
			atomic.OrUint64(&b.words[i>>6], mask)
		}
		i += n
	}
}

// clear clears all bits. Nobody else changes the bitmap.
func (b *bitset) clear() {
	for i := range b.words {
		atomic.StoreUint64(&b.words[i], 0)
	}
}

// count is the number of set bits.
func (b *bitset) count() (n blockIndex) {
	for i := range b.words {
		n += blockIndex(bits.OnesCount64(atomic.LoadUint64(&b.words[i])))
	}
	return n
}

// encodePage writes the bits from page*pageBits on into p; bits past the end are 0.
func (b *bitset) encodePage(page int, p []byte) {
	first := page * (pageBits / 64)
	for i := range pageBits / 64 {
		var w uint64
		if first+i < len(b.words) {
			w = atomic.LoadUint64(&b.words[first+i])
		}
		binary.LittleEndian.PutUint64(p[8*i:], w)
	}
}

// decode adds the bits of an on-disk bitmap, read from byte off on, off a multiple of 8. Bits past the end are
// ignored, as nothing they could describe exists; stray reports whether there were any.
func (b *bitset) decode(p []byte, off int64) (stray bool) {
	for i := 0; i < len(p); i += 8 {
		var w uint64
		if i+8 <= len(p) {
			w = binary.LittleEndian.Uint64(p[i:])
		} else {
			for j := len(p) - 1; j >= i; j-- {
				w = w<<8 | uint64(p[j])
			}
		}
		at := blockIndex(off+int64(i)) * 8
		if over := at + 64 - b.n; over > 0 {
			keep := uint64(0)
			if over < 64 {
				keep = ^uint64(0) >> uint(over)
			}
			stray = stray || w&^keep != 0
			w &= keep
		}
		if w != 0 {
			atomic.OrUint64(&b.words[at>>6], w)
		}
	}
	return stray
}

// union sets every bit that is set in the on-disk page p.
func (b *bitset) union(page int, p []byte) { b.decode(p, int64(page)*pageSize) }
