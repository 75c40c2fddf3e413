package qcow2

import (
	"encoding/binary"
	"slices"
)

// compaction is where the tables of an image that holds nothing move to, so that its file can end early:
//
//	| header | … | refcount table | refcount blocks | L1 table | cut off when the image is closed
//	               start                                       end
//
// Only clusters that nothing refers to are written. One write to the first sector of the header puts all of them in
// force, with counts that leave every other cluster free; a crash leaves the old tables or these.
type compaction struct {
	start, end        hostCluster
	table, blocks, l1 int64 // clusters of the refcount table, of its blocks, of the L1 table
}

// compact moves the tables of an image that was just emptied to the start of its file, and has Close cut the file
// off behind them. It leaves an image alone that has snapshots, or in which something is counted that is no table
// of this image: a leak, or what a feature that it does not know keeps there. Nothing of the metadata is on its way
// to the file, and nobody uses the image; the caller holds mu.
func (im *Image) compact() error {
	a := im.alloc
	if im.header.NbSnapshots > 0 {
		return nil
	}
	used, only, err := im.onlyTables()
	if err != nil || !only {
		return err
	}
	if c := im.planCompaction(); c.end < used {
		if err := im.moveTables(c); err != nil {
			return err
		}
		used = c.end
	}
	a.atEnd = min(a.atEnd, int64(im.geo.offsetOf(used)))
	return nil
}

// onlyTables returns the first cluster past all tables, and whether nothing else in the file is counted but
// what the allocator set aside. The caller holds mu.
func (im *Image) onlyTables() (end hostCluster, only bool, err error) {
	a, v, per := im.alloc, im.guard.view.Load(), hostCluster(im.geo.refPerBlock)
	for c := hostCluster(0); c < a.fileClusters(); c++ {
		if !a.refs.hasBlock(c) {
			c += per - c%per - 1 // up to the end of what the block would count
			continue
		}
		n, err := a.refs.get(c)
		switch {
		case err != nil:
			return 0, false, err
		case n == 0:
		case n == 1 && v.overlaps(c, c):
			end = c + 1
		case !a.inReserve(c):
			return 0, false, nil
		}
	}
	return end, true, nil
}

// planCompaction finds the first place for the tables that holds none now. The caller holds mu.
func (im *Image) planCompaction() compaction {
	g := &im.geo
	c := compaction{start: 1, l1: g.clustersFor(int64(len(im.l1.Load().words)) * 8)}
	for {
		c.table, c.blocks = g.refcountClusters(int64(c.start) + c.l1)
		c.end = c.start + hostCluster(c.table+c.blocks+c.l1)
		taken := im.lastTaken(c.start, c.end)
		if taken < c.start {
			return c
		}
		c.start = taken + 1
	}
}

// lastTaken returns the last cluster in [from, to) that holds a table or the journal, or one before from.
func (im *Image) lastTaken(from, to hostCluster) hostCluster {
	v := im.guard.view.Load()
	c := to - 1
	for c >= from && !v.overlaps(c, c) && !im.alloc.journal.contains(c) {
		c--
	}
	return c
}

// moveTables writes the tables to their new places and switches to them. The caller holds mu.
func (im *Image) moveTables(c compaction) error {
	g, a, h := &im.geo, im.alloc, im.header
	refTable, raw := c.encode(g)
	refTableAt := g.offsetOf(c.start)
	l1 := &l1Table{at: g.offsetOf(c.end - hostCluster(c.l1)), words: im.l1.Load().words}
	for i := range a.reserve {
		a.reserve[i].zeroed = never // the new tables may come to lie there, in part if writing them fails
	}
	steps := []func() error{
		func() error { return im.writeFresh(raw, refTableAt) },
		func() error {
			h.RefcountTableOffset, h.RefcountTableClusters, h.L1Offset = uint64(refTableAt), uint32(c.table), uint64(l1.at)
			return im.switchHeader(fieldTables)
		},
	}
	if im.opts.Mutant == MutantMoveEarly {
		slices.Reverse(steps)
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	a.refs.replace(refTable, refTableAt)
	a.restart()
	im.l1.Store(l1)
	im.guard.init(im)
	return nil
}

// encode returns the new refcount table, and the bytes of all tables: everything but the header and themselves is
// free, and the L1 table is empty.
func (c compaction) encode(g *geometry) (refTable []uint64, raw []byte) {
	raw = make([]byte, int64(g.offsetOf(c.end)-g.offsetOf(c.start)))
	counts := raw[c.table<<g.clusterBits:]
	count := func(at hostCluster) {
		block, index := int64(at)/g.refPerBlock, int64(at)%g.refPerBlock
		setRefcount(counts[block<<g.clusterBits:], g.refOrder, int(index), 1)
	}
	count(0)
	for at := c.start; at < c.end; at++ {
		count(at)
	}
	refTable = make([]uint64, c.table<<g.clusterBits/8)
	for i := range c.blocks {
		refTable[i] = uint64(g.offsetOf(c.start + hostCluster(c.table+i)))
		binary.BigEndian.PutUint64(raw[i*8:], refTable[i])
	}
	return refTable, raw
}
