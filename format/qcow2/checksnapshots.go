package qcow2

import (
	"errors"
	"fmt"
)

// readSnapshotTable reads the snapshot table as far as it can be made sense of.
func (c *checker) readSnapshotTable() error {
	h := c.h
	if h.SnapshotsOffset&uint64(c.g.clusterSize-1) != 0 || h.SnapshotsOffset > 1<<63-1-maxSnapshots*snapshotFixedSize {
		c.res.CheckErrors++
		c.report(Finding{Kind: FindingError, Named: true, Message: "ERROR snapshot table offset invalid"})
		return &CheckFailure{File: c.f.Name(), Reason: reasonInvalid}
	}
	mend := c.repair == RepairAll
	if over := int64(h.NbSnapshots) - maxSnapshots; over > 0 {
		if !mend {
			return c.snapshotsFailed("ERROR snapshot table too large\n"+
				"You can force-remove all %d overhanging snapshots with qemu-img check -r all", over)
		}
		c.discard(over, "Discarding %d overhanging snapshots", over)
		h.NbSnapshots = maxSnapshots
	}
	r := newSnapshotScanner(c.f, int64(h.SnapshotsOffset))
	for i := range h.NbSnapshots {
		s, err := r.next(mend)
		if err != nil && !errors.Is(err, errSnapshotExtra) {
			return c.readError("the snapshot table", err)
		}
		if s.ExtraSize > maxSnapshotExtra {
			if !mend {
				return c.snapshotsFailed("ERROR failed to read the snapshot table: Too much extra metadata in snapshot table entry %d\n"+
					"You can force-remove this extra metadata with qemu-img check -r all", i)
			}
			c.discard(1, "Discarding too much extra metadata in snapshot table entry %d (%d > %d)", i, s.ExtraSize, maxSnapshotExtra)
		}
		if r.pos > maxSnapshotTableBytes {
			over := int64(h.NbSnapshots - i)
			if !mend {
				return c.snapshotsFailed("ERROR failed to read the snapshot table: Snapshot table is too big\n"+
					"You can force-remove all %d overhanging snapshots with qemu-img check -r all", over)
			}
			c.discard(over, "Discarding %d overhanging snapshots (snapshot table is too big)", over)
			h.NbSnapshots = i
			break
		}
		c.tableSize = r.pos
		c.snapshots = append(c.snapshots, s)
	}
	for i := range c.snapshots {
		s := &c.snapshots[i]
		if h.Version < 3 || s.ExtraSize >= snapshotExtraV3 {
			continue
		}
		if !mend {
			c.corrupt(1, "ERROR snapshot table entry %d is incomplete", i)
			continue
		}
		c.discard(1, "Repairing snapshot table entry %d is incomplete", i)
		s.DiskSize = h.Size // what it is taken for while the entry does not say
	}
	return nil
}

// snapshotsFailed reports that the snapshot table cannot be read.
func (c *checker) snapshotsFailed(format string, args ...any) error {
	c.res.CheckErrors++
	c.report(Finding{Kind: FindingError, Named: true, Message: fmt.Sprintf(format, args...)})
	return &CheckFailure{File: c.f.Name(), Reason: reasonTooLarge}
}

// discard reports a repair that makes a new snapshot table necessary.
func (c *checker) discard(n int64, format string, args ...any) {
	c.newTable = true
	c.fixed(n, format, args...)
}
