package qcow2

import (
	"encoding/binary"
	"errors"
)

// checkCopied compares the COPIED flags of the active tree with the stored counts: the flag says that the
// count is exactly 1, and that is what a writer goes by. With fix it corrects them.
func (c *checker) checkCopied(fix bool) error {
	l1 := hostOff(c.h.L1Offset)
	return c.forEachChunk("the L1 table", l1, int64(c.h.L1Size)*8, func(base int64, p []byte) error {
		var changed changedRange
		for k := int64(0); k < int64(len(p)); k += 8 {
			e := l1Entry(binary.BigEndian.Uint64(p[k:]))
			if e.offset() == 0 {
				continue
			}
			n, known, err := c.storedCount(e.offset())
			if err != nil {
				return err
			}
			if !known {
				continue // its entries' counts are in the same damaged place, most likely
			}
			if (n == 1) != e.copied() {
				mayFix := fix && c.single(e.offset()) && c.single(l1)
				c.copied(mayFix, "OFLAG_COPIED L2 cluster: l1_index=%d l1_entry=%x refcount=%d", (base+k)/8, uint64(e), n)
				if mayFix {
					binary.BigEndian.PutUint64(p[k:], uint64(e)^entryCopied)
					changed.add(k)
				}
			}
			if err := c.checkCopiedTable(e.offset(), fix); err != nil {
				return err
			}
		}
		return c.writeBack(l1+hostOff(base), p, changed)
	})
}

// checkCopiedTable does the same for the entries of an L2 table.
func (c *checker) checkCopiedTable(table hostOff, fix bool) error {
	if c.g.inCluster(int64(table)) != 0 {
		return nil
	}
	size := c.g.entrySize()
	return c.forEachChunk("an L2 table", table, c.g.clusterSize, func(base int64, p []byte) error {
		var changed changedRange
		for k := int64(0); k < int64(len(p)); k += size {
			e := l2EntryAt(p[k:])
			if e.compressed() || e.offset() == 0 {
				continue
			}
			n, known := uint64(1), true // what an external data file holds belongs to nobody else
			if !c.g.dataFile {
				var err error
				if n, known, err = c.storedCount(e.offset()); err != nil {
					return err
				}
			}
			if !known || (n == 1) == e.copied() {
				continue
			}
			mayFix := fix && c.single(table) && (c.g.dataFile || c.single(e.offset()))
			c.copied(mayFix, "OFLAG_COPIED data cluster: l2_entry=%x refcount=%d", uint64(e), n)
			if mayFix {
				binary.BigEndian.PutUint64(p[k:], uint64(e)^entryCopied)
				changed.add(k)
			}
		}
		return c.writeBack(table+hostOff(base), p, changed)
	})
}

// copied reports a wrong flag.
func (c *checker) copied(fixing bool, format string, args ...any) {
	if fixing {
		c.fixed(1, "Repairing "+format, args...)
		return
	}
	c.corrupt(1, "ERROR "+format, args...)
}

// storedCount returns the stored count of the cluster at off; known is false where the refcount table does not
// tell, which has been reported.
func (c *checker) storedCount(off hostOff) (n uint64, known bool, err error) {
	n, err = c.stored.get(c.g.clusterOf(off))
	if errors.Is(err, errBadBlock) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, c.readError("a refcount block", err)
	}
	return n, true, nil
}

// single reports that the cluster at off does not have two owners that must not share it. What has is left
// alone: nobody can tell whose bytes they are.
func (c *checker) single(off hostOff) bool {
	return c.counts.owner(c.g.clusterOf(off)) != ownerCollision
}

// changedRange is the range of sectors of a table chunk that were changed.
type changedRange struct{ from, to int64 }

// add notes a change at byte k.
func (r *changedRange) add(k int64) {
	sector := k &^ (sectorSize - 1)
	if r.to == 0 {
		r.from = sector
	}
	r.to = sector + sectorSize
}

// writeBack writes the changed sectors of a chunk that was read at off.
func (c *checker) writeBack(off hostOff, p []byte, r changedRange) error {
	if r.to == 0 {
		return nil
	}
	_, err := c.f.WriteAt(p[r.from:min(r.to, int64(len(p)))], int64(off)+r.from)
	return err
}
