package qcow2

import (
	"errors"
	"fmt"
	"slices"
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
	pages := c.counts.keys()
	for at := hostCluster(0); at < end; {
		if at&(countPageSize-1) == 0 {
			if err := c.interrupted(); err != nil {
				return err
			}
		}
		skip, err := c.nothingAt(at, end, pages)
		if err != nil {
			return err
		}
		if skip > at {
			at = skip
			continue
		}
		stored, err := c.stored.get(at)
		if err != nil {
			reason := any(err)
			if errors.Is(err, errBadBlock) {
				reason = reasonIO
			}
			c.internal("Can't get refcount for cluster %d: %v", at, reason)
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
// It steps over the empty parts of a file that is sparse beyond all measure. pages are the keys of c.counts.
func (c *checker) nothingAt(at, end hostCluster, pages []hostCluster) (hostCluster, error) {
	per := hostCluster(c.g.refPerBlock)
	if at%per != 0 && at&(countPageSize-1) != 0 || c.counts.page(at) != nil {
		return at, nil
	}
	to := end
	if i, _ := slices.BinarySearch(pages, at>>countPageBits); i < len(pages) {
		to = min(to, pages[i]<<countPageBits)
	}
	for i := int64(at / per); hostCluster(i)*per < to; i++ {
		if i >= c.stored.tableEntries() {
			return to, nil
		}
		e, err := c.stored.entry(i)
		if err != nil {
			return at, c.readError("the refcount table", err)
		}
		if e == 0 {
			continue
		}
		if start := hostCluster(i) * per; start > at {
			return start, nil
		}
		return c.emptyBlock(e, at, min(to, hostCluster(i+1)*per, (at>>countPageBits+1)<<countPageBits))
	}
	return to, nil
}

// emptyBlock returns to if the refcount block of table entry e has nothing but a hole for the clusters from at
// to to, else at. They all belong to that block.
func (c *checker) emptyBlock(e uint64, at, to hostCluster) (hostCluster, error) {
	if int64(e) < 0 || c.g.inCluster(int64(e)) != 0 {
		return at, nil
	}
	bits := int64(1) << c.h.RefcountOrder
	from := int64(at) % c.g.refPerBlock * bits / 8
	hole, err := isHole(c.f, int64(e)+from, (int64(to-at)*bits+7)/8)
	if err != nil || !hole {
		return at, err
	}
	return to, nil
}

// internal reports that something could not be examined.
func (c *checker) internal(format string, args ...any) {
	c.res.CheckErrors++
	c.report(Finding{Kind: FindingError, Message: fmt.Sprintf(format, args...)})
}
