package qcow2

import (
	"encoding/binary"

	"github.com/platter-disk/platter/internal/bufpool"
	"github.com/platter-disk/platter/storage"
)

// checkChunk is the most in bytes that is read of a table at a time.
const checkChunk = 64 << 10

// forEachChunk reads [off, off+size) of the file piecewise and calls fn with each piece that is not all zeros.
// base is the piece's first byte relative to off. Pieces are multiples of 16 bytes if size is.
func (c *checker) forEachChunk(what string, off hostOff, size int64, fn func(base int64, p []byte) error) error {
	if off < 0 || int64(off) >= c.size {
		return nil // past the end of the file everything reads as zeros
	}
	if hole, err := isHole(c.f, int64(off), min(size, c.size-int64(off))); err != nil || hole {
		return err
	}
	buf := bufpool.Get(int(min(size, checkChunk)))
	defer buf.Put()
	for base := int64(0); base < size; base += int64(len(buf.B)) {
		if err := c.interrupted(); err != nil {
			return err
		}
		p := buf.B[:min(size-base, int64(len(buf.B)))]
		if err := storage.ReadFull(c.f, p, int64(off)+base); err != nil {
			return c.readError(what, err)
		}
		if isZero(p) {
			continue
		}
		if err := fn(base, p); err != nil {
			return err
		}
	}
	return nil
}

// forEachWord calls fn for every word of a table of n big-endian words that is not zero.
func (c *checker) forEachWord(what string, off hostOff, n int64, fn func(i int64, word uint64) error) error {
	return c.forEachChunk(what, off, n*8, func(base int64, p []byte) error {
		for k := 0; k < len(p); k += 8 {
			if w := binary.BigEndian.Uint64(p[k:]); w != 0 {
				if err := fn((base+int64(k))/8, w); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// isHole reports that the file has no data in the range; a sparse file can claim to be far larger than what
// anybody would want to read.
func isHole(f storage.File, off, size int64) (bool, error) {
	hole := true
	err := f.DataExtents(off, size, func(e storage.Extent) bool {
		hole = !e.Data
		return hole
	})
	return hole, err
}

func isZero(p []byte) bool {
	for ; len(p) >= 8; p = p[8:] {
		if binary.NativeEndian.Uint64(p) != 0 {
			return false
		}
	}
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// countTrees counts the references in the active tree and in those of the snapshots. L1 tables come first:
// they tell how often each L2 table is shared, so that it has to be read only once, for all who share it.
func (c *checker) countTrees() error {
	if err := c.countL1(ownerL1, hostOff(c.h.L1Offset), int64(c.h.L1Size), 1); err != nil {
		return err
	}
	if err := c.countSnapshotL1s(); err != nil {
		return err
	}
	err := c.forEachWord("the L1 table", hostOff(c.h.L1Offset), int64(c.h.L1Size), func(_ int64, e uint64) error {
		return c.examineL2(l1Entry(e).offset(), true)
	})
	if err != nil {
		return err
	}
	// What is left belongs to snapshots only.
	for at := range c.l2.clusters() {
		if err := c.examineL2(c.g.offsetOf(at), false); err != nil {
			return err
		}
	}
	return nil
}

// countL1 counts an L1 table and the L2 tables it points to, for weight trees that have this very table.
func (c *checker) countL1(who owner, off hostOff, entries int64, weight uint32) error {
	if err := c.reference(who, off, entries*8, weight); err != nil {
		return err
	}
	return c.forEachWord("an L1 table", off, entries, func(_ int64, word uint64) error {
		e := l1Entry(word)
		if word&l1ReservedMask != 0 {
			c.corrupt(int64(weight), "ERROR found L1 entry with reserved bits set: %x", word)
		}
		if err := c.reference(ownerL2, e.offset(), c.g.clusterSize, weight); err != nil {
			return err
		}
		if c.g.inCluster(int64(e.offset())) != 0 {
			c.corrupt(int64(weight), "ERROR l2_offset=%x: Table is not cluster aligned; L1 entry corrupted", int64(e.offset()))
			return nil
		}
		if e.offset() == 0 || int64(e.offset()) >= c.size {
			return nil
		}
		_, err := c.l2.add(c.g.clusterOf(e.offset()), ownerL2, weight)
		return err
	})
}

// countSnapshotL1s counts the L1 tables of the snapshots. Snapshots whose entries name the same table are
// counted together.
func (c *checker) countSnapshotL1s() error {
	if c.g.dataFile && len(c.snapshots) > 0 {
		c.corrupt(1, "ERROR %d snapshots in image with data file", len(c.snapshots))
	}
	type table struct {
		off  uint64
		size uint32
	}
	weights := make(map[table]uint32)
	var order []table
	walked := int64(0) // bytes of L1 tables
	for i := range c.snapshots {
		s := &c.snapshots[i]
		switch {
		case s.L1Offset&uint64(c.g.clusterSize-1) != 0:
			c.corrupt(1, "ERROR snapshot %s (%s) l1_offset=%#x: L1 table is not cluster aligned; snapshot table entry corrupted",
				printable(cString(s.ID)), printable(cString(s.Name)), s.L1Offset)
			continue
		case s.L1Size > maxL1Bytes/8:
			c.corrupt(1, "ERROR snapshot %s (%s) l1_size=%#x: L1 table is too large; snapshot table entry corrupted",
				printable(cString(s.ID)), printable(cString(s.Name)), s.L1Size)
			continue
		}
		t := table{s.L1Offset, s.L1Size}
		if weights[t] == 0 {
			order = append(order, t)
		}
		weights[t]++
	}
	for _, t := range order {
		// Tables that lie side by side are no larger together than the file. What is larger overlaps, has
		// been reported as colliding, and is not worth the hours it could take to walk it all.
		if walked += int64(t.size) * 8; walked > c.size+int64(c.h.L1Size)*8+maxL1Bytes {
			return &CheckFailure{File: c.f.Name(), Reason: reasonTooLarge}
		}
		if err := c.countL1(ownerSnapshotL1, hostOff(t.off), int64(t.size), weights[t]); err != nil {
			return err
		}
	}
	return nil
}

// mappingAt decodes an L2 entry.
func (g *geometry) mappingAt(p []byte) mapping {
	m := mapping{entry: l2EntryAt(p)}
	if g.extended {
		m.bitmap = binary.BigEndian.Uint64(p[8:])
	}
	return m
}

// l2EntryAt decodes the first word of an L2 entry.
func l2EntryAt(p []byte) l2Entry { return l2Entry(binary.BigEndian.Uint64(p)) }

// examineL2 validates the entries of an L2 table and counts their references, once for every reference to the
// table. Statistics are taken of the active tree only, and of each of its tables once.
func (c *checker) examineL2(table hostOff, active bool) error {
	if table == 0 || c.g.inCluster(int64(table)) != 0 {
		return nil
	}
	at := c.g.clusterOf(table)
	weight := uint32(c.l2.get(at))
	if weight == 0 {
		return nil
	}
	c.l2.clear(at)
	c.next = 0
	size := c.g.entrySize()
	return c.forEachChunk("an L2 table", table, c.g.clusterSize, func(base int64, p []byte) error {
		for k := int64(0); k < int64(len(p)); k += size {
			m := c.g.mappingAt(p[k:])
			if m == (mapping{}) {
				continue
			}
			if c.repair == RepairAll && c.unalignedZero(m) {
				if n := len(c.zeroTables); n == 0 || c.zeroTables[n-1] != table {
					c.zeroTables = append(c.zeroTables, table)
				}
				continue // it is going to lose that offset
			}
			if err := c.examineEntry(m, (base+k)/size, weight, active); err != nil {
				return err
			}
		}
		return nil
	})
}

// containsData reports that bytes in the host cluster of an uncompressed entry can be read, so that losing
// the host cluster would lose data.
func (g *geometry) containsData(m mapping) bool {
	if g.extended {
		return m.bitmap&(1<<subclusters-1) != 0
	}
	return m.entry&entryZero == 0
}

// unalignedZero reports that an entry reads as zeros and has a host offset that cannot be right. Nothing is
// lost by dropping the offset.
func (c *checker) unalignedZero(m mapping) bool {
	return !m.entry.compressed() && m.entry&l2ReservedMask == 0 && c.g.inCluster(int64(m.entry.offset())) != 0 && !c.g.containsData(m)
}

// examineEntry validates entry i of an L2 table.
func (c *checker) examineEntry(m mapping, i int64, weight uint32, active bool) error {
	if m.entry.compressed() {
		return c.examineCompressed(m, i, weight, active)
	}
	n := int64(weight)
	if m.entry&l2ReservedMask != 0 {
		c.corrupt(n, "ERROR found l2 entry with reserved bits set: %x", uint64(m.entry))
	}
	off := m.entry.offset()
	plainZero := off == 0 && m.entry&entryZero != 0 && !c.g.extended
	if plainZero || !c.g.hasHost(m) {
		if c.g.extended && m.bitmap&(1<<subclusters-1) != 0 {
			c.corrupt(n, "ERROR: Unallocated cluster has non-zero subcluster allocation map")
		}
		return nil
	}
	if c.g.extended && m.bitmap&(m.bitmap>>subclusters)&(1<<subclusters-1) != 0 {
		c.corrupt(n, "ERROR offset=%x: Allocated cluster has corrupted subcluster allocation bitmap", int64(off))
	}
	if c.g.inCluster(int64(off)) != 0 {
		what := "Data"
		if !c.g.containsData(m) {
			what = "Preallocated"
		}
		c.corrupt(n, "ERROR offset=%x: %s cluster is not properly aligned; L2 entry corrupted.", int64(off), what)
	}
	if active {
		c.res.AllocatedClusters++
		if c.next != 0 && off != c.next {
			c.res.Fragmented++
		}
		c.next = off + hostOff(c.g.clusterSize)
	}
	if c.g.dataFile {
		return nil
	}
	return c.reference(ownerData, off, c.g.clusterSize, weight)
}

func (c *checker) examineCompressed(m mapping, i int64, weight uint32, active bool) error {
	n := int64(weight)
	off, length := c.g.compressedRange(m.entry)
	if m.entry.copied() {
		c.corrupt(n, "ERROR: coffset=0x%x: copied flag must never be set for compressed clusters", int64(off))
		m.entry &^= entryCopied
	}
	if c.g.dataFile {
		c.corrupt(n, "ERROR compressed cluster %d with data file, entry=0x%x", i, uint64(m.entry))
		return nil
	}
	if m.bitmap != 0 {
		c.corrupt(n, "ERROR compressed cluster %d with non-zero subcluster allocation bitmap, entry=0x%x", i, uint64(m.entry))
		return nil
	}
	if active {
		c.res.AllocatedClusters++
		c.res.Fragmented++
		c.res.Compressed++
	}
	return c.reference(ownerCompressed, off, length, weight)
}
