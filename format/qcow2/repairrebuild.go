package qcow2

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/platter-disk/platter/internal/bufpool"
)

// rebuilding is a set of new tables that replaces the refcount table and all its blocks, and the snapshot
// table if that is to be replaced. It lies above everything the file holds, and above what entries refer to
// past its end (which comes to lie inside the file by that, and goes on reading as zeros):
//
//	| file … | snapshot table | refcount blocks | refcount table |
//
// Nothing that is in use is overwritten; one write to the header's first sector puts all of it in force.
type rebuilding struct {
	c         *checker // the examination that asked for it
	counts    *clusterCounts
	collides  bool // some cluster has two owners that must not share it
	snapshots []byte

	top         hostCluster // first cluster of the new tables
	blocks      []int64     // indices of the blocks there will be, ascending
	blocksAt    hostCluster
	tableAt     hostCluster
	tableLength int64 // clusters
}

// rebuild replaces the refcount structures. Old ones are free afterwards.
func (c *checker) rebuild() error {
	if c.damaged > 0 || c.blockless {
		c.report(Finding{Kind: FindingNote, Message: "Rebuilding refcount structure"})
	}
	r := &rebuilding{c: c}
	if err := r.count(); err != nil {
		return err
	}
	if err := r.layout(); err != nil {
		return err
	}
	if err := r.write(); err != nil {
		return fmt.Errorf("%s: rebuild the refcount structure: %w", c.f.Name(), err)
	}
	// Whatever was wrong with the counts is now right, except that collisions are still there.
	c.res.CorruptionsFixed += c.damaged + c.tooLow + c.dangling
	if !r.collides {
		c.res.LeaksFixed += c.res.Leaks
	}
	c.counts = r.counts
	return nil
}

// count counts all references again, without those of the tables that are about to be replaced.
func (r *rebuilding) count() error {
	c, err := newChecker(r.c.f, r.c.h, CheckOptions{Memory: r.c.o.Memory, Interrupt: r.c.o.Interrupt})
	if err != nil {
		return err
	}
	// A reference that ends up to 2^63 and more past the file cannot be brought inside it.
	end := max(uint64(c.size), r.c.danglingEnd)
	if end > maxCheckClusters<<c.g.clusterBits {
		return r.unrepairable("references up to byte %d, past the end of the file", end)
	}
	c.size = int64(end)
	c.clusters = c.g.clustersFor(c.size)
	c.snapshots, c.tableSize = r.c.snapshots, r.c.tableSize
	c.withoutRefs, c.newTable = true, r.c.newTable
	if err := c.countReferences(); err != nil {
		return err
	}
	r.counts = c.counts
	r.collides = c.res.Collisions > 0
	r.top = max(hostCluster(c.clusters), c.counts.end)
	if r.c.newTable {
		r.snapshots, err = encodeSnapshots(r.c.snapshots)
	}
	return err
}

func (r *rebuilding) unrepairable(format string, args ...any) error {
	return &FormatError{
		File: r.c.f.Name(), Problem: "The refcount structure cannot be rebuilt", Field: "refcount table",
		Found: fmt.Sprintf(format, args...), Expected: "what the table can describe", Err: errUnrepairable,
	}
}

// layout decides how many blocks there have to be. The new tables are counted in them, so that is a fixed
// point; it is reached because every round only adds blocks.
func (r *rebuilding) layout() error {
	c := r.c
	inUse := make(map[int64]struct{})
	for at := range r.counts.clusters() {
		inUse[int64(at)/c.g.refPerBlock] = struct{}{}
	}
	if r.collides { // leaks are kept
		for _, i := range c.wrongBlocks {
			inUse[i] = struct{}{}
		}
	}
	first := r.top + hostCluster(c.g.clustersFor(int64(len(r.snapshots))))
	for n := -1; n != len(inUse); {
		n = len(inUse)
		last := int64(0)
		for i := range inUse {
			last = max(last, i)
		}
		r.blocksAt = first
		r.tableAt = first + hostCluster(n)
		r.tableLength = c.g.clustersFor((last + 1) * 8)
		for at := r.top; at < r.tableAt+hostCluster(r.tableLength); at++ {
			inUse[int64(at)/c.g.refPerBlock] = struct{}{}
		}
	}
	for i := range inUse {
		r.blocks = append(r.blocks, i)
	}
	slices.Sort(r.blocks)
	if r.tableLength<<c.g.clusterBits > maxRefcountTableBytes {
		return r.unrepairable("a table of %d bytes, more than %d, would be needed", r.tableLength<<c.g.clusterBits, maxRefcountTableBytes)
	}
	for at := r.top; at < r.tableAt+hostCluster(r.tableLength); at++ {
		who := ownerRefcountTable
		switch {
		case at < r.blocksAt:
			who = ownerSnapshotTable
		case at < r.tableAt:
			who = ownerRefcountBlock
		}
		if _, err := r.counts.add(at, who, 1); err != nil {
			return c.readError("the tables", err)
		}
	}
	return nil
}

// write writes the new tables and then switches the header to them.
func (r *rebuilding) write() error {
	c := r.c
	if len(r.snapshots) > 0 {
		if _, err := c.f.WriteAt(r.snapshots, int64(c.g.offsetOf(r.top))); err != nil {
			return err
		}
	}
	buf := bufpool.Get(int(c.g.clusterSize))
	defer buf.Put()
	for n, i := range r.blocks {
		if err := r.fillBlock(buf.B, i); err != nil {
			return err
		}
		if _, err := c.f.WriteAt(buf.B, int64(c.g.offsetOf(r.blocksAt+hostCluster(n)))); err != nil {
			return err
		}
	}
	if err := r.writeTable(); err != nil {
		return err
	}
	if err := c.f.Sync(); err != nil {
		return err
	}
	return r.switchHeader()
}

// fillBlock makes the contents of a refcount block.
func (r *rebuilding) fillBlock(block []byte, i int64) error {
	c := r.c
	clear(block)
	for k := range c.g.refPerBlock {
		at := hostCluster(i*c.g.refPerBlock + k)
		n := r.counts.get(at)
		if r.collides && at < r.top {
			stored, known, err := c.storedCount(c.g.offsetOf(at))
			if err != nil {
				return err
			}
			switch {
			case r.counts.owner(at) == ownerCollision: // not to be raised
				n = min(n, max(stored, 1))
			case known:
				n = max(n, stored)
			}
		}
		if n > 0 {
			setRefcount(block, c.h.RefcountOrder, int(k), n)
		}
	}
	return nil
}

func (r *rebuilding) writeTable() error {
	c := r.c
	table := make([]byte, r.tableLength<<c.g.clusterBits) // at most 8 MiB
	for n, i := range r.blocks {
		binary.BigEndian.PutUint64(table[i*8:], uint64(c.g.offsetOf(r.blocksAt+hostCluster(n))))
	}
	_, err := c.f.WriteAt(table, int64(c.g.offsetOf(r.tableAt)))
	return err
}

// switchHeader puts the new tables in force. The fields for the refcount table and the snapshot table are
// neighbours, bytes 48 to 72, so that one write changes both.
func (r *rebuilding) switchHeader() error {
	c, h := r.c, r.c.h
	h.RefcountTableOffset = uint64(c.g.offsetOf(r.tableAt))
	h.RefcountTableClusters = uint32(r.tableLength)
	if c.newTable {
		h.NbSnapshots = uint32(len(c.snapshots))
		h.SnapshotsOffset = 0
		if len(c.snapshots) > 0 {
			h.SnapshotsOffset = uint64(c.g.offsetOf(r.top))
		}
	}
	var b [24]byte
	binary.BigEndian.PutUint64(b[0:], h.RefcountTableOffset)
	binary.BigEndian.PutUint32(b[8:], h.RefcountTableClusters)
	binary.BigEndian.PutUint32(b[12:], h.NbSnapshots)
	binary.BigEndian.PutUint64(b[16:], h.SnapshotsOffset)
	if _, err := c.f.WriteAt(b[:], 48); err != nil {
		return err
	}
	return c.f.Sync()
}
