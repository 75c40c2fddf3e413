package qcow2

import (
	"encoding/binary"
	"errors"
	"iter"
	"maps"
	"math"
	"slices"

	"github.com/platter-disk/platter/storage"
)

// owner is what a host cluster is used for.
type owner uint8

const (
	ownerNone owner = iota
	ownerHeader
	ownerRefcountTable
	ownerRefcountBlock
	ownerL1
	ownerL2
	ownerData
	ownerCompressed
	ownerSnapshotTable
	ownerSnapshotL1
	ownerBitmapDirectory
	ownerBitmapTable
	ownerBitmapData
	ownerEncryption
	ownerCollision // owners that must not share: already reported
)

func (o owner) String() string {
	return [...]string{
		"nothing", "header", "refcount table", "refcount block", "active L1 table", "L2 table", "data cluster",
		"compressed data", "snapshot table", "snapshot L1 table", "bitmap directory", "bitmap table", "bitmap data",
		"encryption header", "several owners",
	}[o]
}

// shareable reports that several references of this kind may lead to one cluster: the trees of snapshots share
// L2 tables and data, and many compressed clusters fit in one host cluster.
func (o owner) shareable() bool { return o == ownerL2 || o == ownerData || o == ownerCompressed }

// ErrCheckMemory is wrapped by the error of a check that would exceed CheckOptions.Memory. It says nothing about the
// image but its size.
var ErrCheckMemory = errors.New("the check needs more memory than it is allowed (CheckOptions.Memory)")

// memoryBudget is what the pages of several clusterCounts may still take, in bytes.
type memoryBudget struct{ left int64 }

func (m *memoryBudget) take(n int64) error {
	if m.left < n {
		return ErrCheckMemory
	}
	m.left -= n
	return nil
}

const (
	countPageBits = 12
	countPageSize = 1 << countPageBits // clusters

	// countWide in the low four bits of a packed count says that the count is in countPage.wide.
	countWide = 15
)

// countPage holds the counts and owners of countPageSize neighbouring clusters: a byte each, the owner in the
// high four bits and the count in the low ones, because nearly all counts are tiny.
type countPage struct {
	packed [countPageSize]byte
	wide   *[countPageSize]uint32 // allocated when a count reaches countWide; saturates
}

// clusterCounts is a sparse array of reference counts in memory.
type clusterCounts struct {
	pages  map[hostCluster]*countPage // by cluster >> countPageBits
	budget *memoryBudget
	last   *countPage // the page of the last access, lastAt its key
	lastAt hostCluster
	end    hostCluster // above the highest cluster with a count
}

func newClusterCounts(budget *memoryBudget) *clusterCounts {
	return &clusterCounts{pages: make(map[hostCluster]*countPage), budget: budget, lastAt: -1}
}

func (t *clusterCounts) page(at hostCluster) *countPage {
	if key := at >> countPageBits; key != t.lastAt {
		t.last, t.lastAt = t.pages[key], key
	}
	return t.last
}

// get returns the count of a cluster.
func (t *clusterCounts) get(at hostCluster) uint64 {
	p := t.page(at)
	if p == nil {
		return 0
	}
	return p.count(at & (countPageSize - 1))
}

func (p *countPage) count(i hostCluster) uint64 {
	if n := p.packed[i] & 15; n != countWide {
		return uint64(n)
	}
	return uint64(p.wide[i])
}

// owner returns what a cluster is used for.
func (t *clusterCounts) owner(at hostCluster) owner {
	p := t.page(at)
	if p == nil {
		return ownerNone
	}
	return owner(p.packed[at&(countPageSize-1)] >> 4)
}

// add counts weight more references to a cluster. It returns the owner that the cluster has and must not share
// with who, the first time that happens, else ownerNone.
func (t *clusterCounts) add(at hostCluster, who owner, weight uint32) (collides owner, err error) {
	p := t.page(at)
	if p == nil {
		if err := t.budget.take(countPageSize); err != nil {
			return ownerNone, err
		}
		p = new(countPage)
		t.pages[at>>countPageBits] = p
		t.last, t.lastAt = p, at>>countPageBits
	}
	t.end = max(t.end, at+1)
	i := at & (countPageSize - 1)
	had := owner(p.packed[i] >> 4)
	now := who
	switch {
	case had == ownerCollision:
		now = had
	case had == ownerNone && (weight <= 1 || who.shareable()):
	case had == ownerNone:
		now, collides = ownerCollision, who
	case had != who || !who.shareable():
		now, collides = ownerCollision, had
	}
	return collides, p.set(i, now, p.count(i)+uint64(weight), t.budget)
}

// set stores a count and its owner.
func (p *countPage) set(i hostCluster, who owner, n uint64, budget *memoryBudget) error {
	low := byte(countWide)
	if n < countWide {
		low = byte(n)
	} else {
		if p.wide == nil {
			if err := budget.take(countPageSize * 4); err != nil {
				return err
			}
			p.wide = new([countPageSize]uint32)
		}
		p.wide[i] = uint32(min(n, math.MaxUint32))
	}
	p.packed[i] = byte(who)<<4 | low
	return nil
}

// clear forgets a cluster's count and owner.
func (t *clusterCounts) clear(at hostCluster) {
	if p := t.page(at); p != nil {
		p.packed[at&(countPageSize-1)] = 0
	}
}

// keys returns the keys of the pages in ascending order.
func (t *clusterCounts) keys() []hostCluster { return slices.Sorted(maps.Keys(t.pages)) }

// clusters returns the clusters that have a count, in ascending order.
func (t *clusterCounts) clusters() iter.Seq[hostCluster] {
	return func(yield func(hostCluster) bool) {
		for _, key := range t.keys() {
			p := t.pages[key]
			for i := range hostCluster(countPageSize) {
				if p.count(i) != 0 && !yield(key<<countPageBits+i) {
					return
				}
			}
		}
	}
}

// storedCounts reads the reference counts as they stand in the image, through a small cache.
type storedCounts struct {
	f     storage.File
	h     *Header
	g     *geometry
	bytes int64 // of a cached piece of a refcount block
	cache [16]storedPiece

	last     []byte // the piece of the last access, which counts clusters from lastFrom on
	lastFrom hostCluster
	lastTo   hostCluster

	table     []byte // a piece of the refcount table
	tableFrom int64  // its first entry; -1 when nothing is cached
}

type storedPiece struct {
	at   hostOff // 0: empty
	data []byte
}

const (
	storedPieceSize = 64 << 10

	refcountTableReserved = 0x1ff // bits of a refcount table entry; the rest is the offset of a block
)

func newStoredCounts(f storage.File, h *Header, g *geometry) *storedCounts {
	return &storedCounts{f: f, h: h, g: g, bytes: min(g.clusterSize, storedPieceSize), tableFrom: -1}
}

// tableEntries is the number of entries of the refcount table.
func (s *storedCounts) tableEntries() int64 {
	return int64(s.h.RefcountTableClusters) << s.g.clusterBits / 8
}

// entry returns an entry of the refcount table, 0 past its end.
func (s *storedCounts) entry(i int64) (uint64, error) {
	if i >= s.tableEntries() {
		return 0, nil
	}
	const per = 4096 / 8
	if from := i / per * per; from != s.tableFrom {
		if s.table == nil {
			s.table = make([]byte, 4096)
		}
		s.tableFrom = -1
		if err := storage.ReadFull(s.f, s.table, int64(s.h.RefcountTableOffset)+from*8); err != nil {
			return 0, err
		}
		s.tableFrom = from
	}
	return binary.BigEndian.Uint64(s.table[i%per*8:]), nil
}

// errBadBlock says that the refcount table entry for a cluster is not the offset of a refcount block.
var errBadBlock = errors.New("the refcount table entry is not the offset of a refcount block")

// get returns the stored count of a cluster.
func (s *storedCounts) get(c hostCluster) (uint64, error) {
	if c >= s.lastFrom && c < s.lastTo {
		return getRefcount(s.last, s.h.RefcountOrder, int(c-s.lastFrom)), nil
	}
	e, err := s.entry(int64(c) / s.g.refPerBlock)
	if err != nil {
		return 0, err
	}
	block := hostOff(e &^ refcountTableReserved)
	if block == 0 {
		return 0, nil
	}
	if block < 0 || int64(block)&(s.g.clusterSize-1) != 0 {
		return 0, errBadBlock
	}
	per := s.bytes * 8 >> s.h.RefcountOrder // counts in a piece
	i := int64(c) % s.g.refPerBlock
	at := block + hostOff(i/per*s.bytes)
	p := &s.cache[int64(at)/s.bytes%int64(len(s.cache))]
	if p.at != at {
		if p.data == nil {
			p.data = make([]byte, s.bytes)
		}
		p.at, s.lastTo = 0, 0
		if err := storage.ReadFull(s.f, p.data, int64(at)); err != nil {
			return 0, err
		}
		p.at = at
	}
	s.last, s.lastFrom, s.lastTo = p.data, c-hostCluster(i%per), c+hostCluster(per-i%per)
	return getRefcount(p.data, s.h.RefcountOrder, int(i%per)), nil
}
