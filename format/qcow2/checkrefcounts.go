package qcow2

import (
	"fmt"
)

// countRefcountBlocks validates the refcount table and counts its blocks.
func (c *checker) countRefcountBlocks() error {
	return c.forEachWord("the refcount table", hostOff(c.h.RefcountTableOffset), c.stored.tableEntries(), func(i int64, e uint64) error {
		off := e &^ refcountTableReserved
		at := off >> c.g.clusterBits
		switch {
		case e&refcountTableReserved != 0:
			c.corrupt(1, "ERROR refcount table entry %d has reserved bits set", i)
			c.damaged++
			return nil
		case off&uint64(c.g.clusterSize-1) != 0:
			c.corrupt(1, "ERROR refcount block %d is not cluster aligned; refcount table entry corrupted", i)
			c.damaged++
			return nil
		case at >= uint64(c.clusters):
			c.corrupt(1, "ERROR refcount block %d is outside image", i)
			c.damaged++
			return nil
		}
		if err := c.reference(ownerRefcountBlock, hostOff(off), c.g.clusterSize, 1); err != nil {
			return err
		}
		if n := c.counts.get(hostCluster(at)); n != 1 {
			c.corrupt(1, "ERROR refcount block %d refcount=%d", i, n)
		}
		if c.counts.owner(hostCluster(at)) == ownerCollision {
			c.damaged++
		}
		return nil
	})
}

// compareCounts compares the stored count of every cluster with the references that were found.
func (c *checker) compareCounts() error {
	highest := hostCluster(0) // the header's
	end := max(hostCluster(c.clusters), c.counts.end)
	for at := hostCluster(0); at < end; {
		skip, err := c.nothingAt(at, end)
		if err != nil {
			return err
		}
		if skip > at {
			at = skip
			continue
		}
		stored, err := c.stored.get(at)
		if err != nil {
			c.internal("Can't get refcount for cluster %d: %v", at, err)
			at++
			continue
		}
		found := c.counts.get(at)
		if stored > 0 || found > 0 {
			highest = at
		}
		if stored != found {
			if err := c.noteMismatch(at, stored, found); err != nil {
				return err
			}
		}
		at++
	}
	c.res.ImageEndOffset = int64(c.g.offsetOf(highest + 1))
	return nil
}

// noteMismatch reports a wrong count and remembers where it is.
func (c *checker) noteMismatch(at hostCluster, stored, found uint64) error {
	block := int64(at) / c.g.refPerBlock
	if n := len(c.wrongBlocks); n == 0 || c.wrongBlocks[n-1] != block {
		c.wrongBlocks = append(c.wrongBlocks, block)
	}
	if stored > found {
		c.res.Leaks++
		c.report(Finding{Kind: FindingLeak, Message: fmt.Sprintf("Leaked cluster %d refcount=%d reference=%d", at, stored, found)})
		return nil
	}
	c.corrupt(1, "ERROR cluster %d refcount=%d reference=%d", at, stored, found)
	c.tooLow++
	if stored == 0 {
		c.uncounted = true
		e, err := c.stored.entry(block)
		if err != nil {
			return c.readError("the refcount table", err)
		}
		c.blockless = c.blockless || e == 0
	}
	return nil
}

// nothingAt returns where to go on if there are neither stored nor found counts from cluster at on, else at.
// It steps over the empty parts of a file that is sparse beyond all measure.
func (c *checker) nothingAt(at, end hostCluster) (hostCluster, error) {
	per := hostCluster(c.g.refPerBlock)
	if at%per != 0 && at&(countPageSize-1) != 0 {
		return at, nil
	}
	if c.counts.page(at) != nil {
		return at, nil
	}
	e, err := c.stored.entry(int64(at / per))
	if err != nil {
		return at, c.readError("the refcount table", err)
	}
	to := min(end, (at>>countPageBits+1)<<countPageBits, (at/per+1)*per)
	if e == 0 {
		return to, nil
	}
	if int64(e)&(c.g.clusterSize-1) != 0 || int64(e) < 0 {
		return at, nil
	}
	bits := int64(1) << c.h.RefcountOrder
	from := int64(at%per) * bits / 8
	size := (int64(to-at)*bits + 7) / 8
	if hole, err := isHole(c.f, int64(e)+from, size); err != nil || !hole {
		return at, err
	}
	return to, nil
}

// internal reports that something could not be examined.
func (c *checker) internal(format string, args ...any) {
	c.res.CheckErrors++
	c.report(Finding{Kind: FindingError, Message: fmt.Sprintf(format, args...)})
}
