package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/platter-disk/platter/internal/bufpool"
	"github.com/platter-disk/platter/storage"
)

// repairImage examines an image and repairs what it finds, in this order, a barrier after each step:
//
//  1. entries of L2 tables that read as zeros lose a host offset that cannot be right
//  2. counts that are too low are raised in place; or, where blocks are missing or the refcount table is
//     damaged, or the snapshot table has to be replaced, new tables are written above everything in use and
//     the header is switched to them in one sector
//  3. counts that are too high are lowered
//  4. COPIED flags are made to agree with the counts
//  5. the image is examined again, and only if nothing is left of its corruption
//  6. the dirty bit is cleared, then the corrupt bit
//
// After a crash at any point the image is no worse than it was, and repairing it again goes on from there: a
// step never makes a count too low or overwrites what is in use. Where two owners claim a cluster that they
// must not share, nobody can tell whose bytes it holds: the collision is reported and stays, the count is not
// raised to make it look intended, and no leaked cluster is given back, because it may be what one of the
// owners has lost.
func repairImage(f storage.File, h *Header, o CheckOptions) (*CheckResult, error) {
	if err := clearUnknownAutoclear(f, h); err != nil {
		return nil, err
	}
	c, err := newChecker(f, h, o)
	if err != nil {
		return nil, err
	}
	c.repair = o.Repair
	for _, phase := range []func() error{c.readSnapshotTable, c.countReferences, c.compareCounts} {
		if err := phase(); err != nil {
			return nil, err
		}
	}
	if err := c.repairFindings(); err != nil {
		return nil, err
	}
	res := c.res
	if res.CorruptionsFixed+res.LeaksFixed > 0 {
		again := o
		again.Repair = RepairNone
		if res, err = Check(f, again); err != nil {
			return nil, err
		}
		res.CorruptionsFixed, res.LeaksFixed = c.res.CorruptionsFixed, c.res.LeaksFixed
	}
	if res.CheckErrors+res.Corruptions == 0 {
		if err := clearDamageFlags(f, h); err != nil {
			return nil, err
		}
	}
	return res, nil
}

// repairFindings changes the image according to what the first examination found.
func (c *checker) repairFindings() error {
	before := *c.res
	if c.repair == RepairLeaks && (c.damaged > 0 || c.uncounted) {
		c.internal("ERROR need to rebuild refcount structures")
		return &CheckFailure{File: c.f.Name(), Reason: reasonIO}
	}
	if err := c.fixZeros(); err != nil {
		return err
	}
	if c.repair == RepairAll && (c.damaged > 0 || c.blockless || c.newTable) {
		if err := c.rebuild(); err != nil {
			return err
		}
	} else {
		if c.repair == RepairAll {
			if err := c.fixCounts(c.raised); err != nil {
				return err
			}
		}
		if err := c.fixCounts(c.lowered); err != nil {
			return err
		}
	}
	c.stored = newStoredCounts(c.f, c.h, &c.g)
	inOrder := before.Corruptions+before.CheckErrors == 0 && before.Leaks == c.res.LeaksFixed
	if err := c.checkCopied(c.repair == RepairAll || inOrder); err != nil {
		return err
	}
	return c.f.Sync()
}

// fixZeros takes the host offset out of entries that read as zeros and have one that cannot be right.
func (c *checker) fixZeros() error {
	size := c.g.entrySize()
	plain := uint64(entryZero)
	if c.g.extended {
		plain = 0 // the bitmap says what reads as zeros
	}
	if len(c.zeroTables) == 0 {
		return nil
	}
	for _, table := range c.zeroTables {
		if !c.single(table) {
			continue
		}
		err := c.forEachChunk("an L2 table", table, c.g.clusterSize, func(base int64, p []byte) error {
			var changed changedRange
			for k := int64(0); k < int64(len(p)); k += size {
				m := c.g.mappingAt(p[k:])
				if !c.unalignedZero(m) {
					continue
				}
				c.fixed(1, "Repairing offset=%x: Preallocated cluster is not properly aligned; L2 entry corrupted.", int64(m.entry.offset()))
				binary.BigEndian.PutUint64(p[k:], plain)
				changed.add(k)
			}
			return c.writeBack(table+hostOff(base), p, changed)
		})
		if err != nil {
			return err
		}
	}
	return c.f.Sync()
}

// raised returns a count that is at least the number of references.
func (c *checker) raised(at hostCluster, stored, found uint64) uint64 {
	if stored >= found || c.counts.owner(at) == ownerCollision {
		return stored
	}
	c.fixed(1, "Repairing cluster %d refcount=%d reference=%d", at, stored, found)
	return found
}

// lowered returns a count that is at most the number of references.
func (c *checker) lowered(at hostCluster, stored, found uint64) uint64 {
	if stored <= found || c.res.Collisions > 0 {
		return stored
	}
	c.res.LeaksFixed++
	c.report(Finding{Kind: FindingLeak, Fixed: true, Message: fmt.Sprintf("Repairing cluster %d refcount=%d reference=%d", at, stored, found)})
	return found
}

// fixCounts replaces wrong counts in place by what fix makes of them, and ends with a barrier.
func (c *checker) fixCounts(fix func(at hostCluster, stored, found uint64) uint64) error {
	buf := bufpool.Get(int(c.g.clusterSize))
	defer buf.Put()
	for _, i := range c.wrongBlocks {
		e, err := c.stored.entry(i)
		if err != nil {
			return c.readError("the refcount table", err)
		}
		if e == 0 || hostOff(e) < 0 || c.g.inCluster(int64(e)) != 0 {
			continue // reported as such
		}
		block := hostOff(e)
		if err := storage.ReadFull(c.f, buf.B, int64(block)); err != nil {
			return c.readError("a refcount block", err)
		}
		var changed changedRange
		end := max(hostCluster(c.clusters), c.counts.end)
		for k := range c.g.refPerBlock {
			at := hostCluster(i*c.g.refPerBlock + k)
			if at >= end {
				break
			}
			stored := getRefcount(buf.B, c.h.RefcountOrder, int(k))
			found := c.counts.get(at)
			if stored == found {
				continue
			}
			if v := fix(at, stored, found); v != stored {
				setRefcount(buf.B, c.h.RefcountOrder, int(k), v)
				changed.add(k << c.h.RefcountOrder / 8)
			}
		}
		if err := c.writeBack(block, buf.B, changed); err != nil {
			return err
		}
	}
	return c.f.Sync()
}

// clearUnknownAutoclear clears the autoclear bits that this package does not maintain, as every program must
// that is about to change an image (qcow2 specification, "Feature bits").
func clearUnknownAutoclear(f storage.File, h *Header) error {
	known := h.Autoclear & (AutoclearBitmaps | AutoclearRawData)
	if known == h.Autoclear {
		return nil
	}
	h.Autoclear = known
	return writeHeaderWord(f, 88, known)
}

// clearDamageFlags clears the dirty bit and then the corrupt bit, each durably.
func clearDamageFlags(f storage.File, h *Header) error {
	for _, bit := range []uint64{IncompatDirty, IncompatCorrupt} {
		if h.Incompatible&bit == 0 {
			continue
		}
		if err := writeHeaderWord(f, 72, h.Incompatible&^bit); err != nil {
			return err
		}
		h.Incompatible &^= bit
	}
	return nil
}

// writeHeaderWord changes 8 bytes of the header durably.
func writeHeaderWord(f storage.File, off int64, v uint64) error {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], v)
	if _, err := f.WriteAt(b[:], off); err != nil {
		return err
	}
	return f.Sync()
}

// repairDirty makes an image whose dirty bit is set usable for writing: the reference counts are corrected
// and the bit is cleared. An image that is damaged beyond that is refused and keeps the bit.
func repairDirty(f storage.File, h *Header) error {
	var first string
	res, err := repairImage(f, h, CheckOptions{Repair: RepairAll, Report: func(f Finding) {
		if first == "" && !f.Fixed && f.Kind != FindingLeak {
			first = f.Message
		}
	}})
	if err != nil {
		return fmt.Errorf("%s: Could not repair dirty image: %w", f.Name(), err)
	}
	if res.CheckErrors+res.Corruptions > 0 {
		return &FormatError{
			File: f.Name(), Problem: "Could not repair dirty image", Field: "tables",
			Found:    fmt.Sprintf("%d errors that cannot be repaired, such as %q", res.CheckErrors+res.Corruptions, first),
			Expected: "only wrong reference counts", Err: errUnrepairable,
		}
	}
	return nil
}

var errUnrepairable = errors.New("the image is damaged beyond repair")
