package qcow2

import (
	"fmt"

	"github.com/platter-disk/platter/storage"
)

// span is a run of the virtual disk with one kind of contents, contiguous in the file where it has bytes.
type span struct {
	kind   kind
	n      int64   // bytes
	hosted bool    // the clusters have a place in the file, whether their bytes are there or not
	host   hostOff // if hosted: the place of the first byte
	entry  l2Entry // of the first cluster
	copied bool    // the host clusters belong to the active tree alone: kindNormal may be written in place
}

// inPlace reports whether a write needs no change of mapping.
func (s *span) inPlace() bool { return s.kind == kindNormal && s.copied }

// span translates the start of [off, off+n) and says how far the answer holds. The caller holds the range,
// at least shared, so the mapping does not change meanwhile. With tryOnly it returns storage.ErrWouldBlock
// instead of waiting for a table to be read.
func (im *Image) span(off guestOff, n int64, tryOnly bool) (span, error) {
	for {
		at, rest, e, err := im.l2Word(off)
		if err != nil {
			return span{}, err
		}
		if at == 0 {
			return span{kind: kindUnallocated, n: min(n, rest)}, nil
		}
		start := im.tables.start(at)
		v, err := im.view(start, tryOnly)
		if err != nil {
			return span{}, err
		}
		s, err := im.scan(v, int64(at-start)/8, off, min(n, rest))
		if !im.seen(v, off, e) {
			continue
		}
		s.copied = s.copied && e.copied()
		return s, err
	}
}

// view is tableCache.view that makes room where changes fill the cache.
func (im *Image) view(start hostOff, tryOnly bool) (view, error) {
	for {
		v, err := im.tables.view(start, tryOnly)
		if err != errCacheFull {
			return v, err
		}
		if tryOnly {
			return v, storage.ErrWouldBlock
		}
		if im.failed() != nil || im.discipline.writeback() != nil {
			return im.tables.uncached(start) // nothing can be written to make room, but reads go on
		}
	}
}

// seen reports whether what was read from a slice of the L2 table that e designates counts: the slice was not
// refilled meanwhile, and the table was not replaced by a copy of its own, which may have freed its cluster.
func (im *Image) seen(v view, off guestOff, e l1Entry) bool {
	return v.valid() && im.l1.Load().entry(im.geo.l1Index(off)) == e
}

// l2Word returns where the L2 entry for a guest offset lies in the file (0: there is no L2 table), how many
// bytes of the disk from off on the same table maps, and the L1 entry.
func (im *Image) l2Word(off guestOff) (at hostOff, rest int64, e l1Entry, err error) {
	g := &im.geo
	l1 := im.l1.Load()
	i, index := g.l1Index(off), g.l2Index(off)
	rest = (g.l2Entries()-index)<<g.clusterBits - g.inCluster(int64(off))
	if i >= int64(len(l1.words)) {
		return 0, rest, 0, im.corrupt("L1 table", fmt.Sprintf("%d entries", len(l1.words)), fmt.Sprintf("more than %d", i))
	}
	e = l1.entry(i)
	if e.offset() == 0 {
		return 0, rest, e, nil
	}
	if e&l1ReservedMask != 0 || int64(e.offset())&(g.clusterSize-1) != 0 {
		return 0, rest, e, im.corrupt(fmt.Sprintf("L1 entry %d", i), fmt.Sprintf("%#x", uint64(e)),
			fmt.Sprintf("reserved bits clear and a multiple of the cluster size %d", g.clusterSize))
	}
	return e.offset() + hostOff(index*g.entrySize()), rest, e, nil
}

// mappingAt decodes the entry whose first word has index i in a slice.
func (im *Image) mappingAt(v view, i int64) mapping {
	m := mapping{entry: l2Entry(v.word(i))}
	if im.geo.extended {
		m.bitmap = v.word(i + 1)
	}
	return m
}

// scan is span for an entry in a cached slice, as far as the slice goes.
func (im *Image) scan(v view, i int64, off guestOff, n int64) (span, error) {
	g := &im.geo
	m := im.mappingAt(v, i)
	in := g.inCluster(int64(off))
	unit := g.unitSize()
	sub := uint(in >> g.unitBits)
	s := span{kind: g.kindAt(m, sub), entry: m.entry, copied: m.entry.copied()}
	switch s.kind {
	case kindCompressed:
		s.n = min(n, g.clusterSize-in)
		return s, nil
	case kindInvalid:
		return s, im.corrupt(fmt.Sprintf("L2 entry of guest offset %#x", off), fmt.Sprintf("subcluster bitmap %#x", m.bitmap),
			"no subcluster both allocated and zero, none allocated without a host cluster")
	case kindNormal:
		if int64(m.entry.offset())&(g.clusterSize-1) != 0 {
			return s, im.unaligned(off, m.entry)
		}
	}
	if s.hosted = g.hasHost(m); s.hosted {
		s.host = m.entry.offset() + hostOff(in)
	}
	end := in&^(unit-1) + unit // of the piece that was looked at, in its cluster
	s.n = end - in
	for s.n < n {
		if end < g.clusterSize {
			sub++
		} else {
			i += g.entryWords
			if i >= int64(len(v.s.words)) {
				break
			}
			next := im.mappingAt(v, i)
			if g.hasHost(next) != s.hosted || s.hosted &&
				(next.entry.offset() != m.entry.offset()+hostOff(g.clusterSize) || next.entry.copied() != s.copied) {
				break
			}
			m, sub, end = next, 0, 0
		}
		if g.kindAt(m, sub) != s.kind {
			break
		}
		end += unit
		s.n += unit
	}
	s.n = min(s.n, n)
	return s, nil
}

// mapping returns the whole L2 entry of the cluster at off, and whether its host cluster belongs to the active
// tree alone.
func (im *Image) mapping(off guestOff) (m mapping, own bool, err error) {
	for {
		at, _, e, err := im.l2Word(off)
		if err != nil || at == 0 {
			return mapping{}, false, err
		}
		start := im.tables.start(at)
		v, err := im.view(start, false)
		if err != nil {
			return mapping{}, false, err
		}
		m := im.mappingAt(v, int64(at-start)/8)
		if !im.seen(v, off, e) {
			continue
		}
		if im.geo.hasHost(m) && int64(m.entry.offset())&(im.geo.clusterSize-1) != 0 {
			return m, false, im.unaligned(off, m.entry)
		}
		return m, m.entry.copied() && e.copied(), nil
	}
}

// corrupt makes the error for a structure that cannot be as it is.
func (im *Image) corrupt(field, found, expected string) error {
	return &FormatError{File: im.file.Name(), Problem: "the image is corrupt", Field: field, Found: found, Expected: expected}
}

func (im *Image) unaligned(off guestOff, e l2Entry) error {
	return im.corrupt(fmt.Sprintf("L2 entry of guest offset %#x", off), fmt.Sprintf("%#x", uint64(e)),
		fmt.Sprintf("a multiple of the cluster size %d", im.geo.clusterSize))
}
