package qcow2

import (
	"errors"
	"fmt"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/bufpool"
)

// WriteZeroes makes a range read as zeros (specification section 15): whole clusters or subclusters by their
// entries, the rest by writing zeros. Without block.MayUnmap clusters keep their place in the file.
func (im *Image) WriteZeroes(off, length int64, flags block.ZeroFlags) error {
	if err := im.checkChange("write zeroes", off, length); err != nil {
		return err
	}
	if length == 0 {
		return nil
	}
	mode := zeroKeep
	if flags&block.MayUnmap != 0 {
		mode = zeroUnmap
	}
	if err := im.writeZeroes(guestOff(off), length, mode, flags&block.FastOnly != 0); err != nil {
		return err
	}
	return im.afterChange()
}

// HoldZeroes is WriteZeroes for zeros that have to stay when something else comes to lie underneath, or when what
// lies there becomes longer: they are recorded even where the range reads as zeros already. Clusters give their
// place in the file up.
func (im *Image) HoldZeroes(off, length int64) error {
	if err := im.checkChange("write zeroes", off, length); err != nil {
		return err
	}
	from, to := im.wholeUnits(off, length, im.geo.unitSize())
	end := off + length
	if im.geo.version < 3 || im.rawData() || from >= to {
		from, to = end, end
	}
	if err := im.writeZeroBytes(guestOff(off), from-off); err != nil {
		return err
	}
	if err := im.zeroUnits(guestOff(from), to-from, zeroOwn); err != nil {
		return err
	}
	if err := im.writeZeroBytes(guestOff(to), end-to); err != nil {
		return err
	}
	return im.afterChange()
}

// Discard gives up the whole clusters of a range; the last, partial cluster of the disk counts as whole. What
// the backing file holds does not show through afterwards: the clusters read as zeros, except in version 2
// images with a backing file, which have no way to say so and keep their contents.
func (im *Image) Discard(off, length int64) error {
	if err := im.checkChange("discard", off, length); err != nil {
		return err
	}
	if im.geo.version < 3 && im.backing.get() != nil {
		return nil
	}
	g := &im.geo
	from, to := im.wholeUnits(off, length, g.clusterSize)
	if from >= to {
		return nil
	}
	if err := im.zeroUnits(guestOff(from), to-from, zeroUnmap); err != nil {
		return err
	}
	return im.afterChange()
}

// zeroMode says what becomes of the clusters that are zeroed.
type zeroMode uint8

const (
	zeroKeep  zeroMode = iota // they stay allocated
	zeroUnmap                 // they are freed
	zeroOwn                   // they are freed, and say that they are zeros even where that makes no difference now
	zeroDrop                  // they are freed, and say nothing: they lie past the end of the disk
)

// wholeUnits is the part of a range that consists of whole pieces of the given size.
func (im *Image) wholeUnits(off, length, unit int64) (from, to int64) {
	from, to = (off+unit-1)&^(unit-1), (off+length)&^(unit-1)
	if off+length == im.size.Load() {
		to = off + length
	}
	return from, to
}

// canZero reports whether L2 entries can say that a cluster reads as zeros.
func (im *Image) canZero() bool { return im.geo.version >= 3 || im.backing.get() == nil }

func (im *Image) writeZeroes(off guestOff, length int64, mode zeroMode, fastOnly bool) error {
	from, to := im.wholeUnits(int64(off), length, im.geo.unitSize())
	end := int64(off) + length
	if !im.canZero() || im.rawData() || from >= to {
		from, to = end, end
	}
	if fastOnly {
		fast, err := im.fastZero(off, from, to, end)
		if err != nil {
			return err
		}
		if !fast {
			return fmt.Errorf("%s: write zeroes of %d bytes at %d would write them out: %w", im.file.Name(), length, off, errors.ErrUnsupported)
		}
	}
	if err := im.writeOutZeroes(off, min(from, end)-int64(off)); err != nil {
		return err
	}
	if err := im.zeroUnits(guestOff(from), to-from, mode); err != nil {
		return err
	}
	return im.writeOutZeroes(guestOff(to), end-to)
}

// fastZero reports whether zeroing [off, end) needs nothing written outside [from, to).
func (im *Image) fastZero(off guestOff, from, to, end int64) (bool, error) {
	for _, r := range [][2]int64{{int64(off), from}, {to, end}} {
		if r[0] < r[1] {
			zero, err := im.readsZero(r[0], r[1]-r[0])
			if !zero || err != nil {
				return false, err
			}
		}
	}
	return true, nil
}

// readsZero reports whether a range is known to read as zeros.
func (im *Image) readsZero(off, n int64) (bool, error) {
	zero := true
	err := im.extents(off, n, func(e block.Extent) bool {
		zero = e.Zero
		return zero
	})
	return zero, err
}

// writeOutZeroes writes zeros as data, where the range does not read as zeros already.
func (im *Image) writeOutZeroes(off guestOff, n int64) error {
	const chunk = 1 << 20
	for n > 0 {
		step := min(n, chunk)
		zero, err := im.readsZero(int64(off), step)
		if err != nil {
			return err
		}
		if !zero {
			if err := im.writeZeroBytes(off, step); err != nil {
				return err
			}
		}
		off, n = off+guestOff(step), n-step
	}
	return nil
}

// writeZeroBytes writes zeros as data.
func (im *Image) writeZeroBytes(off guestOff, n int64) error {
	if n <= 0 {
		return nil
	}
	buf := bufpool.Get(int(min(n, 1<<20)))
	defer buf.Put()
	clear(buf.B)
	for n > 0 {
		p := buf.B[:min(n, int64(len(buf.B)))]
		if _, err := im.write(p, off); err != nil {
			return err
		}
		off, n = off+guestOff(len(p)), n-int64(len(p))
	}
	return nil
}

// rawData reports whether the external data file has to be a raw image of the disk at all times.
func (im *Image) rawData() bool { return im.header.Autoclear&AutoclearRawData != 0 }

// zeroUnits zeroes whole pieces by their entries.
func (im *Image) zeroUnits(off guestOff, n int64, mode zeroMode) error {
	if im.rawData() && n > 0 {
		return im.zeroRaw(off, n)
	}
	for n > 0 {
		step := min(n, im.exclusiveRoom(off))
		if mode != zeroOwn {
			skip, err := im.zeroAlready(off, n)
			if err != nil {
				return err
			}
			if skip > 0 {
				off, n = off+guestOff(skip), n-skip
				continue
			}
		}
		hold, err := im.lockClusters(off, step)
		if err != nil {
			return err
		}
		err = im.zeroHeld(off, step, mode)
		im.locks.unlock(hold)
		if err != nil {
			return err
		}
		off, n = off+guestOff(step), n-step
	}
	return nil
}

// zeroHeld is zeroSlice for a range that may end with the disk, inside a piece. If the disk has grown since, the rest of
// that piece is not the caller's, and zeros are written.
func (im *Image) zeroHeld(off guestOff, n int64, mode zeroMode) error {
	tail := (int64(off) + n) & (im.geo.unitSize() - 1)
	if int64(off)+n >= im.size.Load() {
		tail = 0
	}
	if n > tail {
		if err := im.zeroSlice(off, n-tail, mode); err != nil {
			return err
		}
	}
	if tail == 0 {
		return nil
	}
	buf := bufpool.Get(int(tail))
	defer buf.Put()
	clear(buf.B)
	return im.writeMapping(buf.B, off+guestOff(n-tail))
}

// zeroAlready returns how much of [off, off+n) no L2 table maps and nothing underneath fills.
func (im *Image) zeroAlready(off guestOff, n int64) (int64, error) {
	skip := int64(0)
	for skip < n {
		at, rest, _, err := im.l2Word(off + guestOff(skip))
		if err != nil {
			return 0, err
		}
		if at != 0 || im.backed(off+guestOff(skip), rest) > 0 {
			break
		}
		// A table made meanwhile belongs to a request that runs concurrently with this one.
		skip = min(n, skip+rest)
	}
	return skip, nil
}

// zeroRaw zeroes a range of a data file that has to be a raw image: its bytes change, the tables do not.
func (im *Image) zeroRaw(off guestOff, n int64) error {
	hold, err := im.lockClusters(off, n)
	if err != nil {
		return err
	}
	err = im.data.ZeroRange(int64(off), n)
	if err == nil {
		im.wrote()
	}
	im.locks.unlock(hold)
	if errors.Is(err, errors.ErrUnsupported) {
		return im.writeOutZeroes(off, n)
	}
	return err
}

// zeroSlice zeroes whole pieces inside one cached slice of an L2 table whose clusters the caller holds.
func (im *Image) zeroSlice(off guestOff, n int64, mode zeroMode) error {
	g := &im.geo
	if err := im.ownL2(off); err != nil {
		return err
	}
	start := g.clusterStart(off)
	end := off + guestOff(n)
	var u update
	var covered []guestOff // whole clusters; what was written on top of them is dropped once they are zeros
	var unused []guestOff  // clusters of an external data file that nothing is kept in any more
	for at := start; at < end; at += guestOff(g.clusterSize) {
		from := max(int64(off), int64(at)) - int64(at)
		to := min(int64(end)-int64(at), g.clusterSize)
		if int64(at)+to == im.size.Load() {
			to = g.clusterSize
		}
		old, _, err := im.mapping(at)
		if err != nil {
			return err
		}
		if whole := to-from == g.clusterSize; whole {
			covered = append(covered, at)
		} else if part := im.partials.get(at); part != nil || old.entry.compressed() {
			if err := im.zeroPart(part, at, from, to); err != nil {
				return err
			}
			if old, _, err = im.mapping(at); err != nil {
				return err
			}
		}
		words, freed := im.zeroEntry(old, from, to, mode)
		u.words = append(u.words, words...)
		if freed && g.dataFile && g.hasHost(old) && mode != zeroKeep && im.opts.Discard {
			unused = append(unused, at)
		} else if freed {
			u.releases = append(u.releases, im.releases(old, mode != zeroKeep && im.opts.Discard)...)
		}
	}
	word, _, _, err := im.l2Word(start)
	if err != nil {
		return err
	}
	if err := im.apply(word, u); err != nil {
		return err
	}
	for _, at := range covered {
		im.abandonPartial(at)
	}
	im.punchData(unused)
	return nil
}

// punchData gives back the space of clusters of an external data file, which lie there where they lie on the disk.
// It need not wait until their unlinking is durable: to whoever finds them linked still they read as zeros, as
// they were asked to. A file that cannot do it keeps the space, which loses nothing.
func (im *Image) punchData(clusters []guestOff) {
	size := guestOff(im.geo.clusterSize)
	for i := 0; i < len(clusters); {
		j := i + 1
		for j < len(clusters) && clusters[j] == clusters[j-1]+size {
			j++
		}
		if im.data.PunchHole(int64(clusters[i]), int64(j-i)*int64(size)) == nil {
			im.wrote()
		}
		i = j
	}
}

// zeroPart prepares a cluster for zeroing some of its subclusters by their bits: what is written on top of it
// is linked, and a compressed cluster becomes a plain one.
func (im *Image) zeroPart(part *partial, at guestOff, from, to int64) error {
	if part != nil {
		return im.link(part)
	}
	buf := bufpool.Get(int(to - from))
	defer buf.Put()
	clear(buf.B)
	if err := im.writeMapping(buf.B, at+guestOff(from)); err != nil {
		return err
	}
	if part = im.partials.get(at); part != nil {
		return im.link(part)
	}
	return nil
}

// zeroEntry is the entry of a cluster after [from, to) of it was zeroed, and whether it gave up its host
// clusters.
func (im *Image) zeroEntry(old mapping, from, to int64, mode zeroMode) (words []uint64, freed bool) {
	g := &im.geo
	if mode == zeroDrop {
		return make([]uint64, g.entryWords), true
	}
	unallocated := old.entry&^entryCopied == 0 && old.bitmap == 0
	if im.backing.get() == nil && unallocated && !g.dataFile && mode != zeroOwn {
		return append([]uint64{uint64(old.entry)}, make([]uint64, g.entryWords-1)...), false
	}
	if !g.extended {
		switch {
		case g.version < 3:
			return []uint64{0}, true
		case mode == zeroKeep && g.hasHost(old):
			return []uint64{uint64(old.entry) | entryZero}, false
		}
		return []uint64{entryZero}, true
	}
	mask := g.subclusterMask(from, to)
	whole := mask == 1<<subclusters-1
	if whole && (mode != zeroKeep || !g.hasHost(old)) {
		return []uint64{0, mask << 32}, true
	}
	return []uint64{uint64(old.entry), old.bitmap&^mask | mask<<32}, false
}
