package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"

	"github.com/platter-disk/platter/storage"
)

// DefaultRefcountCacheSize bounds the memory for cached pieces of refcount blocks, in bytes.
const DefaultRefcountCacheSize = 1 << 20

// refcounts is the refcount structure of an image: the table in memory, a cache of pieces of its blocks.
// What it holds may be written to the file at any moment: counts are raised here as soon as somebody wants
// the cluster, and lowered only when the update that released it is durable. All methods run under Image.mu.
type refcounts struct {
	file  storage.File
	geo   *geometry
	table []uint64 // host offsets of the refcount blocks
	at    hostOff  // of the table

	pieceBytes int64
	pieces     map[hostOff]*refPiece
	order      []*refPiece // clock
	hand       int
	limit      int // pieces
	last       *refPiece

	// store writes metadata to its place.
	store func(p []byte, at hostOff) error

	// log, if it is set, is told every change, as the aligned 8 bytes of a block that hold it; nothing is
	// written to its place then but by collect.
	log func(at hostOff, word uint64)
}

// refPiece is a cached piece of a refcount block.
type refPiece struct {
	at    hostOff
	data  []byte
	dirty uint64 // sectors that differ from the file
	used  bool

	writing bool // a batch holds a copy that is not in the file yet: stays
}

func openRefcounts(f storage.File, geo *geometry, h *Header, cacheBytes int64) (*refcounts, error) {
	raw := make([]byte, int64(h.RefcountTableClusters)<<geo.clusterBits)
	if err := storage.ReadFull(f, raw, int64(h.RefcountTableOffset)); err != nil {
		return nil, fmt.Errorf("%s: refcount table at offset %#x: %w", f.Name(), h.RefcountTableOffset, err)
	}
	r := &refcounts{
		file: f, geo: geo,
		table:      make([]uint64, len(raw)/8),
		at:         hostOff(h.RefcountTableOffset),
		pieceBytes: min(sliceBytes, geo.clusterSize),
		pieces:     map[hostOff]*refPiece{},
	}
	for i := range r.table {
		r.table[i] = binary.BigEndian.Uint64(raw[i*8:])
	}
	r.limit = int(max(cacheBytes/r.pieceBytes, 4))
	return r, nil
}

// replace has other tables take the place of all those there were. Everything in them is in the file.
func (r *refcounts) replace(table []uint64, at hostOff) {
	r.table, r.at = table, at
	clear(r.pieces)
	r.order, r.hand, r.last = nil, 0, nil
}

// blockOf returns the index of the block that counts a cluster and the cluster's place in it.
func (r *refcounts) blockOf(c hostCluster) (block int64, index int64) {
	return int64(c) / r.geo.refPerBlock, int64(c) % r.geo.refPerBlock
}

// hasBlock reports whether a block exists for the cluster; without one its count is 0.
func (r *refcounts) hasBlock(c hostCluster) bool {
	b, _ := r.blockOf(c)
	return b < int64(len(r.table)) && r.table[b]&^511 != 0
}

// countsOnlyItself reports whether block b lies in cluster c and counts that, once, and nothing else.
func (r *refcounts) countsOnlyItself(b int64, c hostCluster) (bool, error) {
	if b >= int64(len(r.table)) || hostOff(r.table[b]&^511) != r.geo.offsetOf(c) {
		return false, nil
	}
	for i := range r.geo.refPerBlock {
		at := hostCluster(b*r.geo.refPerBlock + i)
		want := uint64(0)
		if at == c {
			want = 1
		}
		if v, err := r.get(at); err != nil || v != want {
			return false, err
		}
	}
	return true, nil
}

// drop forgets block b, of which nothing has to reach the file any more.
func (r *refcounts) drop(b int64) {
	block := hostOff(r.table[b] &^ 511)
	for at := block; at < block+hostOff(r.geo.clusterSize); at += hostOff(r.pieceBytes) {
		if p := r.pieces[at]; p != nil {
			r.forget(p)
		}
	}
	r.table[b] = 0
}

// get returns the count of a cluster.
func (r *refcounts) get(c hostCluster) (uint64, error) {
	if !r.hasBlock(c) {
		return 0, nil
	}
	p, i, err := r.piece(c)
	if err != nil {
		return 0, err
	}
	return getRefcount(p.data, r.geo.refOrder, i), nil
}

// set changes the count of a cluster whose block exists.
func (r *refcounts) set(c hostCluster, v uint64) error {
	if v > maxRefcount(r.geo.refOrder) {
		return fmt.Errorf("%s: reference count of cluster %d would become %d: the image's counts are %d bits wide and end at %d",
			r.file.Name(), c, v, 1<<r.geo.refOrder, maxRefcount(r.geo.refOrder))
	}
	p, i, err := r.piece(c)
	if err != nil {
		return err
	}
	setRefcount(p.data, r.geo.refOrder, i, v)
	byteAt := i << r.geo.refOrder / 8
	p.dirty |= 1 << (byteAt / sectorSize)
	if r.log != nil {
		byteAt &^= 7
		r.log(p.at+hostOff(byteAt), binary.BigEndian.Uint64(p.data[byteAt:]))
	}
	return nil
}

// piece returns the cached piece that holds a cluster's count, and the count's place in it.
func (r *refcounts) piece(c hostCluster) (*refPiece, int, error) {
	b, index := r.blockOf(c)
	block := hostOff(r.table[b] &^ 511)
	if int64(block)&(r.geo.clusterSize-1) != 0 {
		return nil, 0, fmt.Errorf("%s: refcount table entry %d is %#x: want a multiple of the cluster size %d",
			r.file.Name(), b, r.table[b], r.geo.clusterSize)
	}
	perPiece := r.pieceBytes * 8 >> r.geo.refOrder
	at := block + hostOff(index/perPiece*r.pieceBytes)
	i := int(index % perPiece)
	if r.last != nil && r.last.at == at {
		return r.last, i, nil
	}
	p := r.pieces[at]
	if p == nil {
		var err error
		if p, err = r.loadPiece(at); err != nil {
			return nil, 0, err
		}
	}
	p.used = true
	r.last = p
	return p, i, nil
}

func (r *refcounts) loadPiece(at hostOff) (*refPiece, error) {
	p, err := r.room()
	if err != nil {
		return nil, err
	}
	if err := storage.ReadFull(r.file, p.data, int64(at)); err != nil {
		return nil, fmt.Errorf("%s: refcount block piece at offset %#x: %w", r.file.Name(), at, err)
	}
	p.at = at
	r.pieces[at] = p
	return p, nil
}

// room returns a piece to fill: a new one while there are few, else one that is written out and given up.
func (r *refcounts) room() (*refPiece, error) {
	if len(r.order) < r.limit {
		p := &refPiece{data: make([]byte, r.pieceBytes)}
		r.order = append(r.order, p)
		return p, nil
	}
	for range 2 * len(r.order) {
		p := r.order[r.hand]
		r.hand = (r.hand + 1) % len(r.order)
		if p.used {
			p.used = false
			continue
		}
		if p.writing || p.dirty != 0 && r.log != nil {
			continue
		}
		if err := r.write(p); err != nil {
			return nil, err
		}
		r.forget(p)
		return p, nil
	}
	// Everything has changes that a commit or a checkpoint is about to bring to the file.
	p := &refPiece{data: make([]byte, r.pieceBytes)}
	r.order = append(r.order, p)
	return p, nil
}

func (r *refcounts) forget(p *refPiece) {
	if r.pieces[p.at] == p {
		delete(r.pieces, p.at)
	}
	if r.last == p {
		r.last = nil
	}
	p.at, p.dirty = 0, 0
}

// write brings the changed sectors of a piece to the file.
func (r *refcounts) write(p *refPiece) error {
	for p.dirty != 0 {
		from, n := sectorRun(p.dirty)
		if err := r.store(p.data[from*sectorSize:(from+n)*sectorSize], p.at+hostOff(from*sectorSize)); err != nil {
			return err
		}
		p.dirty &^= (1<<n - 1) << from
	}
	return nil
}

// sectorRun returns the first run of set bits in a mask that is not 0.
func sectorRun(mask uint64) (from, n int) {
	from = bits.TrailingZeros64(mask)
	return from, bits.TrailingZeros64(^(mask >> from))
}

// collect copies all changed sectors to a batch of writes. Their pieces stay cached until writtenBack.
func (r *refcounts) collect(w *writeBatch) {
	for _, p := range r.order {
		p.writing = p.writing || p.dirty != 0
		for p.dirty != 0 {
			from, n := sectorRun(p.dirty)
			w.add(p.at+hostOff(from*sectorSize), p.data[from*sectorSize:(from+n)*sectorSize])
			p.dirty &^= (1<<n - 1) << from
		}
	}
}

// writtenBack lets go of what was collected: it is in the file.
func (r *refcounts) writtenBack() {
	for _, p := range r.order {
		p.writing = false
	}
}

// changed reports whether there are counts that the file does not have.
func (r *refcounts) changed() bool {
	for _, p := range r.order {
		if p.dirty != 0 {
			return true
		}
	}
	return false
}

// errImageFull means that the refcount table cannot grow any further.
var errImageFull = errors.New("the image has reached the largest size its refcount table can describe")
