package qcow2

import (
	"fmt"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/bufpool"
)

// WriteAt writes to the virtual disk.
func (im *Image) WriteAt(p []byte, off int64) (int, error) {
	if err := im.checkChange("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	done, err := im.write(p, guestOff(off))
	if err == nil {
		err = im.afterChange()
	}
	return done, err
}

func (im *Image) write(p []byte, off guestOff) (done int, err error) {
	for done < len(p) {
		rest, at := p[done:], off+guestOff(done)
		hold, err := im.hold(int64(at), int64(at)+int64(len(rest)), false)
		if err != nil {
			return done, err
		}
		n, err := im.writeInPlace(rest, at)
		im.locks.unlock(hold)
		done += n
		if err != nil {
			return done, err
		}
		if rest, at = rest[n:], at+guestOff(n); len(rest) == 0 {
			break
		}
		n = len(rest)
		if room := im.exclusiveRoom(at); int64(n) > room {
			n = int(room)
		}
		if hold, err = im.lockClusters(at, int64(n)); err != nil {
			return done, err
		}
		err = im.writeMapping(rest[:n], at)
		im.locks.unlock(hold)
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// maxExclusive bounds the bytes of the disk that one change of mapping holds at a time.
const maxExclusive = 4 << 20

// exclusiveRoom is how far a change of mapping at off may go: within one cached slice of an L2 table.
func (im *Image) exclusiveRoom(off guestOff) int64 {
	entries := im.tables.bytes / im.geo.entrySize()
	slice := entries << im.geo.clusterBits
	room := slice - int64(off)%slice
	limit := max(int64(maxExclusive), im.geo.clusterSize)
	return min(room, limit-int64(off)%limit)
}

// lockClusters holds the clusters that [off, off+n) touches exclusively.
func (im *Image) lockClusters(off guestOff, n int64) (rangeHold, error) {
	mask := im.geo.clusterSize - 1
	return im.hold(int64(off)&^mask, (int64(off)+n+mask)&^mask, true)
}

// writeInPlace writes as much of p as needs no change of mapping.
func (im *Image) writeInPlace(p []byte, off guestOff) (done int, err error) {
	for done < len(p) {
		s, err := im.span(off+guestOff(done), int64(len(p)-done), false)
		if err != nil || !s.inPlace() {
			return done, err
		}
		if err := im.overwrite(p[done:done+int(s.n)], s.host); err != nil {
			return done, err
		}
		done += int(s.n)
	}
	return done, nil
}

// overwrite writes guest data to clusters that the tables designate already.
func (im *Image) overwrite(p []byte, host hostOff) error {
	if err := im.checkOverlap(host, int64(len(p))); err != nil {
		return err
	}
	return im.writeData(p, host)
}

// writeData writes guest data to the file it lives in.
func (im *Image) writeData(p []byte, host hostOff) error {
	if !im.geo.dataFile && int64(host)+int64(len(p)) > im.alloc.end.Load() {
		// Clusters of a sparse image may lie past the end of the file; the allocator has to know that end.
		im.mu.Lock()
		err := im.alloc.extend(int64(host) + int64(len(p)))
		im.mu.Unlock()
		if err != nil {
			return err
		}
	}
	if im.beforeOverwrite != nil {
		if err := im.beforeOverwrite(host, int64(len(p))); err != nil {
			return err
		}
	}
	if _, err := im.data.WriteAt(p, int64(host)); err != nil {
		return fmt.Errorf("%s: write: %w", im.file.Name(), err)
	}
	im.wrote()
	return nil
}

// writeMapping writes a range of one L2 slice whose clusters the caller holds exclusively.
func (im *Image) writeMapping(p []byte, off guestOff) error {
	if int64(off)%sectorSize != 0 || len(p)%sectorSize != 0 {
		return im.writeUnaligned(p, off)
	}
	if err := im.ownL2(off); err != nil {
		return err
	}
	for len(p) > 0 {
		n, err := im.writeStep(p, off)
		if err != nil {
			return err
		}
		p, off = p[n:], off+guestOff(n)
	}
	return nil
}

// writeUnaligned widens a write to whole sectors.
func (im *Image) writeUnaligned(p []byte, off guestOff) error {
	start := off &^ (sectorSize - 1)
	end := (off + guestOff(len(p)) + sectorSize - 1) &^ (sectorSize - 1)
	buf := bufpool.Get(int(end - start))
	defer buf.Put()
	if err := im.readHeld(buf.B[:sectorSize], start); err != nil {
		return err
	}
	if err := im.readHeld(buf.B[len(buf.B)-sectorSize:], end-sectorSize); err != nil {
		return err
	}
	copy(buf.B[off-start:], p)
	return im.writeMapping(buf.B, start)
}

// writeStep writes the part of p that one case covers and returns its length.
func (im *Image) writeStep(p []byte, off guestOff) (int, error) {
	in := im.geo.inCluster(int64(off))
	inside := min(int64(len(p)), im.geo.clusterSize-in) // up to the end of the cluster
	s, err := im.span(off, int64(len(p)), false)
	if err != nil {
		return 0, err
	}
	if s.inPlace() {
		return int(s.n), im.overwrite(p[:s.n], s.host)
	}
	inside = min(inside, im.pieceLimit(&s, inside))
	if part, n := im.partials.find(off, inside, im.geo.clusterSize); part != nil {
		return int(n), im.writePartial(part, p[:n], off)
	}
	old, own, err := im.mapping(off)
	if err != nil {
		return 0, err
	}
	if own && im.geo.hasHost(old) {
		// Without subclusters only preallocated zeros are not in place.
		part := im.newPartial(im.geo.clusterStart(off), old, true, freeRun{}, !im.geo.extended)
		return int(inside), im.writePartial(part, p[:inside], off)
	}
	return im.writeNew(p, off, old)
}

// pieceLimit keeps a write into a cluster that is in place in parts to the part that is not.
func (im *Image) pieceLimit(s *span, inside int64) int64 {
	if im.geo.extended && s.kind != kindCompressed {
		return min(s.n, inside)
	}
	return inside
}

// writePartial writes to a cluster whose copy-up is delayed, and links it once nothing is missing or there
// are too many of its kind.
func (im *Image) writePartial(part *partial, p []byte, off guestOff) error {
	in := im.geo.inCluster(int64(off))
	if err := im.overwrite(p, part.host+hostOff(in)); err != nil {
		return err
	}
	part.mark(in, in+int64(len(p)))
	im.partials.add(part)
	if part.missing == 0 || im.tooManyPartials() {
		return im.link(part)
	}
	return nil
}

// writeNew writes to the clusters from off on that need a new host cluster, as many as the allocator gives in
// one run.
func (im *Image) writeNew(p []byte, off guestOff, first mapping) (int, error) {
	g := &im.geo
	olds, zeroSrc, err := im.newRun(off, int64(len(p)), first)
	if err != nil {
		return 0, err
	}
	run, err := im.takeClusters(off, int64(len(olds)), zeroSrc)
	if err != nil {
		return 0, err
	}
	olds = olds[:run.n]
	in := g.inCluster(int64(off))
	p = p[:min(int64(len(p)), run.n<<g.clusterBits-in)]
	write := func() error { return im.overwrite(p, g.offsetOf(run.start)+hostOff(in)) }
	linkFirst := im.opts.Mutant == MutantLinkFirst || im.opts.Mutant == MutantHistorical
	if !linkFirst {
		if err := write(); err != nil {
			im.giveBack(run)
			return 0, err
		}
	}
	// Whole pieces, and pieces whose rest reads as zeros above and below, are linked now; the clusters at the
	// ends of the write may have to wait for their copy-up.
	u := update{exposes: run.zeroed}
	if !zeroSrc || run.zeroed == never {
		u.exposes = im.now()
	}
	start := g.clusterStart(off)
	end := int64(off) + int64(len(p))
	linkFrom, linked := start, int64(0)
	for i, old := range olds {
		at := start + guestOff(i)<<g.clusterBits
		from := max(int64(off), int64(at)) - int64(at)
		to := min(end-int64(at), g.clusterSize)
		rest := (from|to)&(g.unitSize()-1) != 0 || im.oldNeedsCopy(old, from, to)
		if rest && !(zeroSrc && run.zeroed != never) {
			one := run
			one.start, one.n = run.start+hostCluster(i), 1
			part := im.newPartial(at, old, false, one, zeroSrc)
			part.mark(from, to)
			im.partials.add(part)
			if i == 0 {
				linkFrom += guestOff(g.clusterSize)
			}
			continue
		}
		linked++
		u.words = append(u.words, uint64(g.offsetOf(run.start+hostCluster(i)))|entryCopied)
		if g.extended {
			mask := g.subclusterMask(from, to)
			u.words = append(u.words, old.bitmap&^(mask<<32|0xffffffff)|mask)
		}
		u.releases = append(u.releases, im.releases(old, false)...)
	}
	if linked > 0 {
		use := run
		use.start, use.n = run.start+hostCluster((linkFrom-start)>>g.clusterBits), linked
		if err := im.linkRun(linkFrom, use, u); err != nil {
			return 0, err
		}
	}
	if linkFirst {
		if err := im.discipline.flush(); err != nil {
			return 0, err
		}
		if err := write(); err != nil {
			return 0, err
		}
	}
	return len(p), im.boundPartials(start, end)
}

// linkRun applies an update that maps clusters from off on to a run of new host clusters, or gives those back.
func (im *Image) linkRun(off guestOff, run freeRun, u update) error {
	if !im.geo.dataFile {
		u.uses = []freeRun{run}
	}
	at, _, _, err := im.l2Word(off)
	if err == nil {
		err = im.apply(at, u)
	}
	if err != nil {
		im.giveBack(run) // an update that was accepted and failed all the same ended all changes
	}
	return err
}

// oldNeedsCopy reports whether a new host cluster has to take over pieces of the old one that a write of
// [from, to) does not cover.
func (im *Image) oldNeedsCopy(old mapping, from, to int64) bool {
	if !im.geo.extended {
		return false // the edges of the write tell
	}
	if old.entry.compressed() {
		return to-from < im.geo.clusterSize
	}
	return old.bitmap&0xffffffff&^im.geo.subclusterMask(from, to) != 0
}

// boundPartials links the clusters at the ends of a write if too many copy-ups are delayed.
func (im *Image) boundPartials(start guestOff, end int64) error {
	if !im.tooManyPartials() {
		return nil
	}
	for _, at := range []guestOff{start, im.geo.clusterStart(guestOff(end - 1))} {
		if part := im.partials.get(at); part != nil {
			if err := im.link(part); err != nil {
				return err
			}
		}
	}
	return nil
}

// newRun returns the old mappings of the clusters from off on that a write of n bytes has to move to new host
// clusters, as far as they agree on whether what lies underneath is zeros.
func (im *Image) newRun(off guestOff, n int64, first mapping) (olds []mapping, zeroSrc bool, err error) {
	g := &im.geo
	start := g.clusterStart(off)
	count := g.clustersFor(int64(off-start) + n)
	olds = make([]mapping, 0, count)
	for i := range count {
		at := start + guestOff(i)<<g.clusterBits
		old := first
		if i > 0 {
			var own bool
			if old, own, err = im.mapping(at); err != nil {
				return nil, false, err
			}
			if own && g.hasHost(old) || im.partials.get(at) != nil {
				break
			}
		}
		zero, err := im.zeroCluster(at, old)
		if err != nil {
			return nil, false, err
		}
		if i > 0 && zero != zeroSrc {
			break
		}
		zeroSrc = zero
		olds = append(olds, old)
	}
	return olds, zeroSrc, nil
}

// zeroCluster reports whether the cluster at off is known to read as zeros.
func (im *Image) zeroCluster(off guestOff, m mapping) (bool, error) {
	g := &im.geo
	if !g.extended {
		return im.zeroSource(off, g.clusterSize, g.kindAt(m, 0))
	}
	for sub := range uint(subclusters) {
		at := off + guestOff(sub)<<g.unitBits
		if zero, err := im.zeroSource(at, g.unitSize(), g.kindAt(m, sub)); !zero || err != nil {
			return false, err
		}
	}
	return true, nil
}

// zeroSource reports whether a range of one kind is known to read as zeros.
func (im *Image) zeroSource(off guestOff, n int64, k kind) (bool, error) {
	switch k {
	case kindZero:
		return true, nil
	case kindUnallocated:
		return im.backingZero(off, n)
	}
	return false, nil
}

// backingZero reports whether the backing device is known to read as zeros in [off, off+n).
func (im *Image) backingZero(off guestOff, n int64) (bool, error) {
	if n = im.backed(off, n); n == 0 {
		return true, nil
	}
	zero := true
	err := im.backing.get().Extents(int64(off), n, func(e block.Extent) bool {
		zero = e.Zero
		return zero
	})
	return zero && err == nil, err
}

// takeClusters allocates up to n host clusters in one run. In an external data file they are where they are.
func (im *Image) takeClusters(off guestOff, n int64, zero bool) (freeRun, error) {
	if im.geo.dataFile {
		return freeRun{start: hostCluster(off >> im.geo.clusterBits), n: n, zeroed: never}, nil
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	return im.alloc.take(n, zero)
}

// giveBack returns clusters that were taken and not linked.
func (im *Image) giveBack(r freeRun) {
	if im.geo.dataFile {
		return
	}
	im.mu.Lock()
	im.alloc.giveBack(r)
	im.mu.Unlock()
}

// now is the generation of everything that was written before the call.
func (im *Image) now() generation {
	im.mu.Lock()
	defer im.mu.Unlock()
	return im.gen
}

// releases lists the host clusters that an entry refers to.
func (im *Image) releases(old mapping, punch bool) []hostRun {
	g := &im.geo
	if old.entry.compressed() {
		at, n := g.compressedRange(old.entry)
		first, last := g.clusterOf(at), g.clusterOf(at+hostOff(n)-1)
		im.inflated.forget()
		return []hostRun{{start: first, n: int64(last-first) + 1, punch: punch}}
	}
	if !g.hasHost(old) || g.dataFile {
		return nil
	}
	return []hostRun{{start: g.clusterOf(old.entry.offset()), n: 1, punch: punch}}
}
