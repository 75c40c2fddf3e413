package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/bufpool"
)

// Resize changes the size of the disk, in bytes and a multiple of 512; a new part reads as zeros, and what lies past a
// smaller size is lost. An image whose snapshots do not record a size of their own (version 2), or that has persistent
// dirty bitmaps, cannot change its size. Requests for the part of the disk that stays may go on meanwhile.
//
// Growth that fails, or is interrupted (Options.Interrupt), gives back what it has laid out; the disk keeps its size.
// A disk shrinks in one durable step; of the requests that lie past its new end, the ones already under way may still be
// answered. What lay there is given up after that: Close cuts the file off behind what is left, and an external data file
// ends with the disk. If that fails or is interrupted the disk is smaller, and the image keeps some of the space until
// the next time it shrinks. A smaller disk takes no preallocation.
func (im *Image) Resize(size int64, prealloc block.Preallocation) error {
	im.resizing.Lock()
	defer im.resizing.Unlock()
	if err := im.checkResize(size, prealloc); err != nil {
		return err
	}
	if err := im.checkChange("resize", 0, 0); err != nil {
		return err
	}
	old := im.size.Load()
	switch {
	case size == old:
		return im.flush() // of a change of size that failed before it was durable
	case size < old:
		return im.shrink(size)
	}
	if err := im.growL1(im.geo.l1Needed(size)); err != nil {
		return err
	}
	if err := im.prepareGrown(guestOff(old), size-old, prealloc); err != nil {
		return err
	}
	if err := im.flush(); err != nil {
		return err
	}
	if err := im.changeSize(size); err != nil {
		return err
	}
	return im.flush()
}

func (im *Image) changeSize(size int64) error {
	im.mu.Lock()
	defer im.mu.Unlock()
	im.header.Size = uint64(size)
	if err := im.discipline.changeHeader(fieldSize, nil); err != nil {
		return err
	}
	im.size.Store(size)
	return nil
}

func (im *Image) checkResize(size int64, prealloc block.Preallocation) error {
	old := im.size.Load()
	need := im.geo.l1Needed(size)
	switch {
	case size < 0 || size%sectorSize != 0:
		return fmt.Errorf("%s: The new size must be a multiple of 512, not %d", im.file.Name(), size)
	case size < old && prealloc != block.PreallocOff:
		return fmt.Errorf("%s: preallocation of a disk that shrinks from %d to %d bytes: %w", im.file.Name(), old, size, errors.ErrUnsupported)
	case need*8 > maxL1Bytes || need > maxL1Index:
		return fmt.Errorf("%s: The image size is too large: %d bytes need %d L1 entries, at most %d fit",
			im.file.Name(), size, need, maxL1Bytes/8)
	}
	return im.checkChangeOfSize()
}

// checkChangeOfSize refuses to change the size of a disk that something else in the image depends on.
func (im *Image) checkChangeOfSize() error {
	switch h := im.header; {
	case h.Version < 3 && h.NbSnapshots > 0:
		return fmt.Errorf("%s: Can't resize a v2 image which has snapshots", im.file.Name())
	case h.Bitmaps != nil:
		return fmt.Errorf("%s: Cannot resize qcow2 with persistent bitmaps", im.file.Name())
	}
	return nil
}

// prepareGrown gives the part of the disk that is about to appear its contents: zeros, whatever a longer
// backing file holds there, and the place that preallocation asks for.
func (im *Image) prepareGrown(off guestOff, n int64, prealloc block.Preallocation) error {
	if im.rawData() {
		prealloc = max(prealloc, block.PreallocMetadata)
	}
	if im.geo.dataFile {
		if err := im.sizeData(int64(off) + n); err != nil {
			return err
		}
	}
	// A longer backing file shows through there, and an earlier, larger disk may have left entries.
	if zero, err := im.readsZero(int64(off), n); err != nil {
		return err
	} else if !zero {
		if err := im.zeroGrown(off, n); err != nil {
			return err
		}
	}
	if prealloc == block.PreallocOff {
		return nil
	}
	if im.backing.get() != nil && !im.geo.extended {
		return fmt.Errorf("%s: preallocation with a backing file needs extended L2 entries: %w", im.file.Name(), errors.ErrUnsupported)
	}
	if err := im.preallocate(off, n, prealloc); err != nil {
		if im.failed() == nil {
			err = errors.Join(err, im.unmapGrown(off, n))
		}
		return err
	}
	return nil
}

// sizeData makes the external data file as long as the disk. A block device keeps its size, which has to be enough.
func (im *Image) sizeData(size int64) error {
	err := im.data.Truncate(size)
	if errors.Is(err, errors.ErrUnsupported) {
		if have, sizeErr := im.data.Size(); sizeErr == nil && have >= size {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("%s: data file: %w", im.file.Name(), err)
	}
	return nil
}

// unmapGrown gives back what was laid out of a range that is not going to appear after all.
func (im *Image) unmapGrown(off guestOff, n int64) error {
	mask := im.geo.clusterSize - 1
	from, to := (int64(off)+mask)&^mask, (int64(off)+n+mask)&^mask
	if from >= to || !im.canZero() || im.rawData() {
		return nil
	}
	return im.zeroUnits(guestOff(from), to-from, zeroUnmap)
}

// zeroGrown makes a range past the end of the disk read as zeros.
func (im *Image) zeroGrown(off guestOff, n int64) error {
	unit := im.geo.unitSize()
	end := int64(off) + n
	from := (int64(off) + unit - 1) &^ (unit - 1)
	if from >= end || !im.canZero() {
		return im.writeOutZeroes(off, n)
	}
	if err := im.writeOutZeroes(off, from-int64(off)); err != nil {
		return err
	}
	to := (end + unit - 1) &^ (unit - 1)
	return im.zeroUnits(guestOff(from), to-from, zeroUnmap)
}

// preallocate maps every cluster of a range that has no host cluster to one that reads as zeros.
func (im *Image) preallocate(off guestOff, n int64, how block.Preallocation) error {
	end := off + guestOff(n)
	for at := im.geo.clusterStart(off); at < end; {
		if im.opts.Interrupt != nil {
			if err := im.opts.Interrupt(); err != nil {
				return err
			}
		}
		step := min(int64(end-at), im.exclusiveRoom(at))
		hold, err := im.lockClusters(at, step)
		if err != nil {
			return err
		}
		err = im.preallocateSlice(at, im.geo.clustersFor(step), how)
		im.locks.unlock(hold)
		if err != nil {
			return err
		}
		at += guestOff(im.geo.clustersFor(step) << im.geo.clusterBits)
	}
	return nil
}

func (im *Image) preallocateSlice(off guestOff, clusters int64, how block.Preallocation) error {
	g := &im.geo
	if err := im.ownL2(off); err != nil {
		return err
	}
	for clusters > 0 {
		old, _, err := im.mapping(off)
		if err != nil {
			return err
		}
		if g.hasHost(old) || old.entry.compressed() || im.partials.get(off) != nil {
			off, clusters = off+guestOff(g.clusterSize), clusters-1
			continue
		}
		olds, _, err := im.newRun(off, clusters<<g.clusterBits, old)
		if err != nil {
			return err
		}
		run, err := im.takeClusters(off, int64(len(olds)), true)
		if err != nil {
			return err
		}
		exposes, err := im.layOut(run, how)
		if err != nil {
			im.giveBack(run)
			return err
		}
		u := update{exposes: exposes}
		for i := range run.n {
			u.words = append(u.words, uint64(g.offsetOf(run.start+hostCluster(i)))|entryCopied)
			if g.extended {
				u.words = append(u.words, olds[i].bitmap)
			}
		}
		if err := im.linkRun(off, run, u); err != nil {
			return err
		}
		off, clusters = off+guestOff(run.n<<g.clusterBits), clusters-run.n
	}
	return nil
}

// layOut makes a run of new host clusters read as zeros in the way that preallocation asks for, and tells
// since when they do.
func (im *Image) layOut(run freeRun, how block.Preallocation) (generation, error) {
	at, n := int64(im.geo.offsetOf(run.start)), run.n<<im.geo.clusterBits
	if how == block.PreallocFalloc {
		if err := im.data.Allocate(at, n); err != nil {
			return 0, fmt.Errorf("%s: preallocation: %w", im.file.Name(), err)
		}
		im.wrote()
	}
	if how != block.PreallocFull {
		if run.zeroed != never {
			return run.zeroed, nil
		}
		if im.geo.dataFile && im.clearData(at, n, how) == nil {
			return im.now(), nil
		}
	}
	const chunk = 1 << 20
	buf := bufpool.Get(chunk)
	defer buf.Put()
	clear(buf.B)
	for ; n > 0; at, n = at+chunk, n-chunk {
		if err := im.overwrite(buf.B[:min(n, chunk)], hostOff(at)); err != nil {
			return 0, err
		}
	}
	return im.now(), nil
}

// clearData makes a range of an external data file read as zeros without writing them. What the disk held at its end
// before it was zeroed by its entries, or past that when it was larger, may lie there still.
func (im *Image) clearData(at, n int64, how block.Preallocation) error {
	zero := im.data.PunchHole
	if how == block.PreallocFalloc {
		zero = im.data.ZeroRange
	}
	if err := zero(at, n); err != nil {
		return err
	}
	im.wrote()
	return nil
}

// growL1 moves the L1 table to a larger place (specification section 18.8).
func (im *Image) growL1(need int64) error {
	hold, err := im.hold(0, 1<<62, true)
	if err != nil {
		return err
	}
	defer im.locks.unlock(hold)
	old := im.l1.Load()
	if need <= int64(len(old.words)) {
		return nil
	}
	if err := im.discipline.flush(); err != nil {
		return err
	}
	im.mu.Lock()
	grown, run, err := im.newL1(old.words, need)
	im.mu.Unlock()
	if err != nil {
		return err
	}
	if err := im.discipline.settleCounts(); err != nil {
		im.giveBack(run)
		return err
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	if _, err := im.alloc.link(run); err != nil {
		return im.fail(err)
	}
	im.header.L1Offset, im.header.L1Size = uint64(grown.at), uint32(need)
	im.l1.Store(grown)
	im.guard.place(im)
	return im.discipline.changeHeader(fieldL1, []hostRun{im.l1Area(old)})
}

// l1Area is the clusters that an L1 table lies in.
func (im *Image) l1Area(t *l1Table) hostRun {
	return hostRun{start: im.geo.clusterOf(t.at), n: im.geo.clustersFor(int64(len(t.words)) * 8), table: true}
}

// newL1 writes an L1 table with the given words, and n entries in all, to clusters that the caller is to link.
// The caller holds mu.
func (im *Image) newL1(words []uint64, n int64) (*l1Table, freeRun, error) {
	t := &l1Table{words: make([]uint64, n)}
	raw := make([]byte, 0, n*8)
	for i := range t.words {
		if i < len(words) {
			t.words[i] = atomic.LoadUint64(&words[i])
		}
		raw = binary.BigEndian.AppendUint64(raw, t.words[i])
	}
	run, err := im.writeTable(raw)
	t.at = im.geo.offsetOf(run.start)
	return t, run, err
}

// writeTable writes a table of one piece to clusters that the caller is to link. The caller holds mu.
func (im *Image) writeTable(raw []byte) (freeRun, error) {
	run, err := im.alloc.contiguous(im.geo.clustersFor(int64(len(raw))))
	if err != nil {
		return freeRun{}, err
	}
	whole := make([]byte, run.n<<im.geo.clusterBits)
	copy(whole, raw)
	if err := im.writeFresh(whole, im.geo.offsetOf(run.start)); err != nil {
		im.alloc.giveBack(run)
		return freeRun{}, err
	}
	return run, nil
}
