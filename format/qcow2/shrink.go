package qcow2

import (
	"errors"
	"fmt"

	"github.com/platter-disk/platter/block"
)

// shrink makes the disk smaller. The new size takes effect first, as one durable change: a crash before it leaves the
// whole disk, one after it the smaller disk, in an image that may still hold some of what lay past its end. The next
// shrink gives that up too, and growth clears it. The caller holds resizing.
func (im *Image) shrink(size int64) error {
	if im.opts.Mutant == MutantShrinkLate {
		if err := im.dropPast(size); err != nil {
			return err
		}
	}
	hold, err := im.quiet()
	if err != nil {
		return err
	}
	old := im.size.Load()
	if err = im.changeSize(size); err == nil {
		if err = im.discipline.flush(); err != nil && im.failed() == nil {
			// A journal that found no space: nothing has reached the file, and the disk keeps its size.
			err = errors.Join(err, im.changeSize(old))
		}
	}
	im.locks.unlock(hold)
	if err != nil {
		return err
	}
	if err := im.dropPast(size); err != nil {
		return fmt.Errorf("made smaller, and not all of what lay past the end was given up: %w", err)
	}
	return nil
}

// dropPast durably gives up what the image holds past the end of a disk of the given size.
func (im *Image) dropPast(size int64) error {
	end := (size + im.geo.clusterSize - 1) &^ (im.geo.clusterSize - 1)
	first := im.geo.l1Index(guestOff(end))
	for i := first; i < int64(len(im.l1.Load().words)); i++ {
		if im.opts.Interrupt != nil {
			if err := im.opts.Interrupt(); err != nil {
				return err
			}
		}
		if im.l1.Load().entry(i).offset() == 0 {
			continue // a table made meanwhile belongs to a request that was under way
		}
		if err := im.dropTablePast(i, guestOff(end)); err != nil {
			return err
		}
	}
	if err := im.flush(); err != nil {
		return err
	}
	// The rest of the last cluster may have to move, and what was given up makes room for that on a full file system.
	if err := im.clearPast(size, end-size); err != nil {
		return err
	}
	if im.geo.dataFile {
		return im.sizeData(size)
	}
	im.mu.Lock()
	im.alloc.atEnd = min(im.alloc.atEnd, im.geo.clusterSize) // Close cuts off whatever is free at the end of the file
	im.mu.Unlock()
	return nil
}

// clearPast durably writes zeros to the rest of the cluster that the disk ends in, if the image holds it: whoever lets
// the disk grow again need not know that something was there.
func (im *Image) clearPast(off, n int64) error {
	held := false
	err := im.extents(off, n, func(e block.Extent) bool {
		held = e.Allocated && e.Depth == 0 && !e.Zero
		return !held
	})
	if err != nil || !held {
		return err
	}
	if err := im.writeZeroBytes(guestOff(off), n); err != nil {
		return err
	}
	return im.flush()
}

// dropTablePast gives up what an L2 table maps at off or past it, and the table if that is all of it.
func (im *Image) dropTablePast(i int64, off guestOff) error {
	g := &im.geo
	span := g.l2Entries() << g.clusterBits
	start, end := guestOff(i*span), guestOff((i+1)*span)
	from := max(start, off)
	hold, err := im.hold(int64(from), int64(end), true)
	if err != nil {
		return err
	}
	defer im.locks.unlock(hold)
	for from < end {
		step := min(int64(end-from), im.exclusiveRoom(from))
		if err := im.zeroSlice(from, step, zeroDrop); err != nil {
			return err
		}
		from += guestOff(step)
	}
	if start < off {
		return nil
	}
	if err := im.lockForUpdate(); err != nil {
		return err
	}
	table := g.clusterOf(im.l1.Load().entry(i).offset())
	im.guard.remove(table)
	err = im.discipline.accept(&update{first: i, words: []uint64{0}, releases: []hostRun{{start: table, n: 1, table: true}}})
	im.mu.Unlock()
	if err != nil {
		return im.fail(err)
	}
	return im.settle()
}
