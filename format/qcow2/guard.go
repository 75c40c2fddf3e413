package qcow2

import (
	"fmt"
	"slices"
	"sync/atomic"
)

// guard knows where the metadata of the image lies and refuses guest data there. In a sound image no guest
// cluster designates metadata; a damaged or hostile one must not make a guest's write change the tables, or
// the name of the backing file in the header (specification section 21.8).
//
// Writers look at an immutable view; it is replaced, under Image.mu, when metadata comes or goes.
type guard struct{ view atomic.Pointer[guardView] }

type guardView struct {
	tables []hostCluster // L2 tables and refcount blocks, sorted
	recent []hostCluster // the same; those made lately, so that adding one copies few
	ranges []hostRun     // header, L1 table, refcount table, snapshot table
}

const maxRecent = 1024

func (g *guard) init(im *Image) {
	v := &guardView{}
	l1 := im.l1.Load()
	for i := range l1.words {
		if e := l1.entry(int64(i)); e.offset() != 0 {
			v.tables = append(v.tables, im.geo.clusterOf(e.offset()))
		}
	}
	for _, e := range im.alloc.refs.table {
		if e&^511 != 0 {
			v.tables = append(v.tables, im.geo.clusterOf(hostOff(e&^511)))
		}
	}
	slices.Sort(v.tables)
	g.view.Store(v)
	g.place(im)
}

// place notes where the tables of level 1 lie, at open and after one of them moved.
func (g *guard) place(im *Image) {
	h := im.header
	v := *g.view.Load()
	v.ranges = nil
	for _, t := range []struct{ at, bytes uint64 }{
		{0, 1},
		{h.L1Offset, uint64(h.L1Size) * 8},
		{h.RefcountTableOffset, uint64(h.RefcountTableClusters) << im.geo.clusterBits},
		{h.SnapshotsOffset, uint64(min(h.NbSnapshots, 1))},
	} {
		if t.bytes > 0 {
			v.ranges = append(v.ranges, hostRun{start: im.geo.clusterOf(hostOff(t.at)), n: im.geo.clustersFor(int64(t.bytes))})
		}
	}
	g.view.Store(&v)
}

// checkPlaces refuses to write to an image whose metadata shares a cluster or lies past the end of the file: to
// allocate by it would destroy more. An L2 table may have several users if none takes it for its own.
func (im *Image) checkPlaces(fileSize int64) error {
	const alone = 1 // the lowest bit of what is found; the cluster is above it
	var found []hostCluster
	l1 := im.l1.Load()
	for i := range l1.words {
		if e := l1.entry(int64(i)); e.offset() != 0 {
			found = append(found, im.geo.clusterOf(e.offset())<<1|hostCluster(e>>63))
		}
	}
	for _, e := range im.alloc.refs.table {
		if at := hostOff(e &^ 511); at != 0 {
			found = append(found, im.geo.clusterOf(at)<<1|alone)
		}
	}
	slices.Sort(found)
	ranges := guardView{ranges: im.guard.view.Load().ranges}
	last := hostCluster(-1)
	for _, f := range found {
		c := f >> 1
		field := fmt.Sprintf("L2 table or refcount block at offset %#x", im.geo.offsetOf(c))
		if c == last>>1 && (f|last)&alone != 0 || ranges.overlaps(c, c) {
			return im.corrupt(field, "other metadata there", "a cluster of its own")
		}
		if int64(im.geo.offsetOf(c)) >= fileSize {
			return im.corrupt(field, fmt.Sprintf("a file of %d bytes", fileSize), "a place inside the file")
		}
		last = f
	}
	for i, r := range ranges.ranges {
		for _, other := range ranges.ranges[:i] {
			if r.start < other.start+hostCluster(other.n) && other.start < r.start+hostCluster(r.n) {
				return im.corrupt(fmt.Sprintf("table at offset %#x", im.geo.offsetOf(max(r.start, other.start))),
					"the header or another table there", "clusters of its own")
			}
		}
	}
	return nil
}

// add notes a new L2 table or refcount block.
func (g *guard) add(c hostCluster) {
	v := *g.view.Load()
	i, _ := slices.BinarySearch(v.recent, c)
	v.recent = slices.Insert(slices.Clone(v.recent), i, c)
	if len(v.recent) > maxRecent {
		v.tables = slices.Concat(v.tables, v.recent)
		slices.Sort(v.tables)
		v.recent = nil
	}
	g.view.Store(&v)
}

// remove forgets an L2 table or refcount block that was given up.
func (g *guard) remove(c hostCluster) {
	v := *g.view.Load()
	if i, ok := slices.BinarySearch(v.recent, c); ok {
		v.recent = slices.Delete(slices.Clone(v.recent), i, i+1)
	}
	if i, ok := slices.BinarySearch(v.tables, c); ok {
		v.tables = slices.Delete(slices.Clone(v.tables), i, i+1)
	}
	g.view.Store(&v)
}

// overlaps reports whether metadata lies in clusters first to last.
func (v *guardView) overlaps(first, last hostCluster) bool {
	for _, r := range v.ranges {
		if first < r.start+hostCluster(r.n) && r.start <= last {
			return true
		}
	}
	for _, sorted := range [][]hostCluster{v.tables, v.recent} {
		if i, _ := slices.BinarySearch(sorted, first); i < len(sorted) && sorted[i] <= last {
			return true
		}
	}
	return false
}

// checkOverlap refuses guest data in [at, at+n) of the image file if metadata lies there, and refuses every
// change from then on: the tables of this image are not to be trusted.
func (im *Image) checkOverlap(at hostOff, n int64) error {
	if im.geo.dataFile || !im.guard.view.Load().overlaps(im.geo.clusterOf(at), im.geo.clusterOf(at+hostOff(n)-1)) {
		return nil
	}
	return im.fail(im.corrupt(fmt.Sprintf("host offset %#x of guest data", at), "metadata of the image there", "a cluster of its own"))
}
