package fvd

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/bufpool"
)

// This file is what copy-on-read and prefetching need of the format. Package jobs/prefetch decides what is copied
// when; here is how a copy is kept ("soft write", FVD specification 1.10): the data are written and the fresh bits
// set, and nothing is made durable. A crash loses nothing by it, as the base image still holds the same bytes;
// the next checkpoint makes the copies last.

// leastHole is how many bytes of zeros in a copy are worth a hole rather than being written.
const leastHole = 64 << 10

// ErrStillNeeded is wrapped by DetachBase while a block still lives in the base image.
var ErrStillNeeded = errors.New("the base image is still needed")

// BaseSize is how many bytes of the disk the base image covers; 0 once it is not needed any more.
func (im *Image) BaseSize() int64 {
	if !im.baseLive.Load() {
		return 0
	}
	return int64(im.m.g.baseSize)
}

// CopyUnit is the size in bytes of the blocks that Populate stores whole.
func (im *Image) CopyUnit() int64 { return im.m.g.blockSize }

// NextInBase finds the first run of bytes at or after off that still lives in the base image: n bytes from start,
// n == 0 if there is none. It begins on a block boundary or at off, and ends on a block boundary or with the
// base image; a very long run is told in parts. It waits for nobody.
func (im *Image) NextInBase(off int64) (start, n int64) {
	m := im.m
	if !im.baseLive.Load() || off < 0 || off >= int64(m.g.baseSize) {
		return off, 0
	}
	first, last := m.g.blockRange(guestOffset(off), m.g.baseSize)
	for b := m.firstInBase(first); b < last; b = m.firstInBase(b) {
		run, set := m.fresh.run(b, min(last, b+64*lookAhead))
		if !set {
			start = max(off, int64(m.g.blockStart(b)))
			return start, int64(m.g.blockEnd(b+run-1)) - start
		}
	}
	return off, 0
}

// ReadBase reads the base image, whatever this image holds. The range must lie below BaseSize.
func (im *Image) ReadBase(p []byte, off int64) error {
	pass, ok := im.m.guard.enter(off)
	if !ok {
		return im.errClosed()
	}
	defer im.m.guard.leave(pass)
	if err := block.CheckRange("read of the base image", off, int64(len(p)), im.BaseSize()); err != nil {
		return err
	}
	if err := im.readBase(p, guestOffset(off), false); err != nil {
		return fmt.Errorf("fvd image %s: reading %d bytes at %d of the base image: %w", im.m.name, len(p), off, err)
	}
	return nil
}

// Populate keeps p, which the caller read from the base image at off. Blocks that have left the base image, that
// a write is changing, or that p holds only in part, are passed over, and so is what the base image does not hold any
// more, as the image was committed to it and emptied after p was read. It returns how many bytes it kept.
func (im *Image) Populate(p []byte, off int64) (kept int64, err error) {
	pass, err := im.begin("copy from the base image", off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	defer im.m.guard.leave(pass)
	m := im.m
	if !im.baseLive.Load() {
		return 0, nil
	}
	end := guestOffset(off + int64(len(p)))
	b, last := m.g.blockRange(guestOffset(off), end)
	if b < last && m.g.blockStart(b) < guestOffset(off) {
		b++
	}
	if b < last && m.g.blockEnd(last-1) > end {
		last--
	}
	for b < last {
		run, set := m.fresh.run(b, last)
		if !set {
			n, err := im.populateRun(p, guestOffset(off), b, b+run)
			kept += n
			if err != nil {
				return kept, fmt.Errorf("fvd image %s: keeping a copy of the base image: %w", m.name, err)
			}
		}
		b += run
	}
	return kept, nil
}

// populateRun stores blocks [first, last) of p; if a write holds one of them, each of the others by itself.
func (im *Image) populateRun(p []byte, off guestOffset, first, last blockIndex) (kept int64, err error) {
	m := im.m
	hold := im.ranges.tryLock(first, last)
	if hold == nil {
		for b := first; b < last && last-first > 1; b++ {
			n, err := im.populateRun(p, off, b, b+1)
			kept += n
			if err != nil {
				return kept, err
			}
		}
		return kept, nil
	}
	defer im.ranges.unlock(hold)
	for first < last { // some may have left the base image before the lock
		run, set := m.fresh.run(first, last)
		if !set {
			if current, err := im.current(p, off, first, first+run); err != nil || !current {
				return kept, err
			}
			if err := m.markInUse(); err != nil {
				return kept, err
			}
			var zero bool
			run, zero = im.zeroRun(p, off, first, first+run)
			from, to := m.g.blockStart(first), m.g.blockEnd(first+run-1)
			var err error
			switch {
			case !zero:
				err = im.writeMapped(p[from-off:to-off], from)
			case !m.g.compact():
				err = zeroStore(m.data, m.g.dataStart+dataOffset(from), int64(to-from), true, false)
			}
			if err != nil {
				return kept, err
			}
			m.setFresh(first, first+run)
			kept += int64(to - from)
		}
		first += run
	}
	return kept, nil
}

// current reports whether blocks [first, last) of p are what the base image holds. Only a commit to the base image
// changes it, and only what this image holds, which the base image has no say in before Empty is called. From then on
// p may have been read before, and is compared.
func (im *Image) current(p []byte, off guestOffset, first, last blockIndex) (bool, error) {
	if !im.emptied.Load() {
		return true, nil
	}
	at, end := im.m.g.blockStart(first), im.m.g.blockEnd(last-1)
	buf := bufpool.Get(int(min(end-at, ioUnit)))
	defer buf.Put()
	for at < end {
		now := buf.B[:min(int64(len(buf.B)), int64(end-at))]
		if err := im.readBase(now, at, false); err != nil {
			return false, fmt.Errorf("comparing with the base image: %w", err)
		}
		if !bytes.Equal(now, p[at-off:][:len(now)]) {
			return false, nil
		}
		at += guestOffset(len(now))
	}
	return true, nil
}

// zeroRun returns how many blocks from first on, up to last, agree on whether they are zeros that need not be
// written: those of a compact image in a chunk that has no place yet, and long runs of them in others, where a hole
// will do.
func (im *Image) zeroRun(p []byte, off guestOffset, first, last blockIndex) (n blockIndex, zero bool) {
	m := im.m
	spared := func(b blockIndex) bool {
		from, to := m.g.blockStart(b), m.g.blockEnd(b)
		if m.g.compact() {
			if chunk, _ := m.g.chunkRange(from, to); m.table.get(chunk).mapped() {
				return false
			}
		}
		return bytes.Count(p[from-off:to-off], []byte{0}) == int(to-from)
	}
	least := blockIndex(1)
	if !m.g.compact() {
		least = blockIndex(max(1, leastHole/m.g.blockSize))
	}
	run := blockIndex(0) // of spared blocks up to b
	for b := first; b < last; b++ {
		if !spared(b) {
			if start := b - run; start == first && run >= least {
				return run, true
			}
			run = 0
			continue
		}
		if run++; run == least && b+1-run > first {
			return b + 1 - run - first, false
		}
	}
	if run == last-first && run >= least {
		return run, true
	}
	return last - first, false
}

// DetachBase ends the image's dependence on its base: when every block has left it (D-11: every bit is looked
// at), the tables are made durable, the header says so for good, and the base image is closed. Otherwise it
// returns an error that wraps ErrStillNeeded. Detaching twice is no error.
func (im *Image) DetachBase() error {
	if err := im.detach(); err != nil {
		return err
	}
	if !im.m.guard.pause() {
		return im.errClosed()
	}
	base := im.base
	im.base = nil
	im.m.guard.resume(false)
	if base == nil {
		return nil
	}
	return base.Close()
}

func (im *Image) detach() error {
	pass, err := im.begin("detaching the base image", 0, 0)
	if err != nil {
		return err
	}
	defer im.m.guard.leave(pass)
	if !im.baseLive.Load() {
		return nil
	}
	m := im.m
	if !m.fresh.all(0, m.fresh.n) {
		left := m.fresh.n - m.fresh.count()
		return fmt.Errorf("fvd image %s: %d of %d blocks live in base image %q: %w", m.name, left, m.fresh.n, m.header.BaseImage, ErrStillNeeded)
	}
	if err := m.markInUse(); err != nil {
		return err
	}
	if err := im.discipline.checkpoint(headerChange{prefetched: true}); err != nil {
		return err
	}
	im.baseLive.Store(false)
	return nil
}
