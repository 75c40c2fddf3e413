package fvd

import (
	"encoding/binary"
	"sync/atomic"
)

// entry is a word of the lookup table. On disk it is EMPTY or a chunk number; in memory and in journal records
// it may also be marked as not yet durable.
type entry uint32

// chunkID numbers chunks of the storage: chunk id lies at data_offset + id*chunk_size.
type chunkID uint32

const (
	entryEmpty entry = 0xFFFFFFFF // never written, or given back: reads as zeros
	entryDirty entry = 1 << 31    // mapped in memory, not yet recoverable after a crash

	// entryUnmapped is used in memory only: the mapping was taken away and the record that says so is not
	// written yet. Chunk number 0x7FFFFFFF is not a legal one, so the value is free.
	entryUnmapped entry = 0x7FFFFFFF

	maxChunks = 0x7FFFFFFF // chunk numbers are below this (FVD specification 1.4)
)

// mapped reports whether the entry names a chunk.
func (e entry) mapped() bool { return e != entryEmpty && e != entryUnmapped }

// pending reports whether the entry says something that a crash would lose.
func (e entry) pending() bool {
	return e == entryUnmapped || e != entryEmpty && e&entryDirty != 0
}

// id is the chunk an entry names that is mapped.
func (e entry) id() chunkID { return chunkID(e &^ entryDirty) }

// settled is the entry as it stands on disk once it is durable.
func (e entry) settled() entry {
	if e == entryUnmapped || e == entryEmpty {
		return entryEmpty
	}
	return e &^ entryDirty
}

// recorded is the entry as a journal record carries it: DIRTY is set on mappings (FVD specification 1.4).
func (e entry) recorded() entry {
	if !e.mapped() {
		return entryEmpty
	}
	return e | entryDirty
}

// table is the lookup table in memory. Entries are read and changed atomically.
type table []uint32

func newTable(n chunkIndex) table {
	t := make(table, n)
	for i := range t {
		t[i] = uint32(entryEmpty)
	}
	return t
}

func (t table) get(c chunkIndex) entry    { return entry(atomic.LoadUint32(&t[c])) }
func (t table) set(c chunkIndex, e entry) { atomic.StoreUint32(&t[c], uint32(e)) }
func (t table) swap(c chunkIndex, from, to entry) bool {
	return atomic.CompareAndSwapUint32(&t[c], uint32(from), uint32(to))
}

// settle turns a pending entry whose durable form is e into that form, unless it has changed since.
func (t table) settle(c chunkIndex, e entry) {
	if e == entryEmpty {
		t.swap(c, entryUnmapped, entryEmpty)
		return
	}
	t.swap(c, e|entryDirty, e)
}

// anyPending reports whether a crash would lose an entry of [first, last).
func (t table) anyPending(first, last chunkIndex) bool {
	for c := first; c < last; c++ {
		if t.get(c).pending() {
			return true
		}
	}
	return false
}

// encodePage writes the durable form of the entries from page*pageEntries on into p; entries past the end of the
// table are EMPTY.
func (t table) encodePage(page int, p []byte) {
	first := chunkIndex(page) * pageEntries
	for i := range chunkIndex(pageEntries) {
		e := entryEmpty
		if first+i < chunkIndex(len(t)) {
			e = t.get(first + i).settled()
		}
		binary.LittleEndian.PutUint32(p[4*i:], uint32(e))
	}
}

// decodeEntries reads table words as stored. It judges nothing: see scanTable.
func decodeEntries(dst []uint32, b []byte) {
	for i := range dst {
		dst[i] = binary.LittleEndian.Uint32(b[4*i:])
	}
}
