package fvd

import (
	"errors"
	"fmt"

	"github.com/platter-disk/platter/internal/bufpool"
)

// assembleMax is up to how many bytes a write and what is copied up around it are put together in one buffer
// and written at once.
const assembleMax = 256 << 10

// errMoved says that a discard took a chunk away between looking and writing.
var errMoved = errors.New("the chunk lost its mapping")

// WriteAt implements block.Device.
func (im *Image) WriteAt(p []byte, off int64) (int, error) {
	pass, err := im.begin("write", off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	defer im.m.guard.leave(pass)
	if err := im.write(p, guestOffset(off)); err != nil {
		return 0, err
	}
	if im.writethrough {
		if err := im.flush(); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// write stores p. Where everything is in place already, in memory and recoverably, that is one write of the data
// and no lock. Else (FVD specification 1.10):
//
//	lock the blocks that still live in the base image, copy up around p
//	map chunks, which durably read as zeros
//	write the data
//	set the fresh bits, unlock
//	commit bits and mappings through the discipline
func (im *Image) write(p []byte, off guestOffset) error {
	end := off + guestOffset(len(p))
	if im.settled(off, end) {
		if err := im.writeStored(p, off); err != errMoved {
			if err != nil || im.settled(off, end) {
				return im.writeError(err, off, len(p))
			}
			// A discard took a chunk away meanwhile, and another write that is still under way gave it a new
			// place: the bytes may be there.
			return im.commit(off, end, nil, true)
		}
	}
	if err := im.m.markInUse(); err != nil {
		return err
	}
	hold := im.lockBase(off, end)
	var err error
	if hold == nil {
		err = im.writeMapped(p, off)
	} else {
		err = im.writeCopyUp(p, off, hold)
		im.ranges.unlock(hold)
	}
	if err != nil {
		return im.writeError(err, off, len(p))
	}
	return im.commit(off, end, nil, true)
}

func (im *Image) writeError(err error, off guestOffset, n int) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("fvd image %s: writing %d bytes at %d: %w", im.m.name, n, off, err)
}

// settled reports whether [off, end) has left the base image and is mapped, and a crash would not change that.
func (im *Image) settled(off, end guestOffset) bool {
	m := im.m
	if im.baseLive.Load() {
		if first, last := m.g.blockRange(off, end); !m.stale.all(first, last) {
			return false
		}
	}
	first, last := m.g.chunkRange(off, end)
	for c := first; c < last; c++ {
		if e := m.table.get(c); !e.mapped() || e.pending() {
			return false
		}
	}
	return true
}

// lockBase locks the blocks of [off, end) if one of them still lives in the base image, else returns nil.
func (im *Image) lockBase(off, end guestOffset) *rangeHold {
	if !im.baseLive.Load() {
		return nil
	}
	first, last := im.m.g.blockRange(off, end)
	if im.m.fresh.all(first, last) {
		return nil
	}
	hold := im.ranges.lock(first, last)
	if im.m.fresh.all(first, last) {
		im.ranges.unlock(hold)
		return nil
	}
	return hold
}

// writeStored writes p where the table says; errMoved if a part has no place.
func (im *Image) writeStored(p []byte, off guestOffset) error {
	for len(p) > 0 {
		piece := im.place(off, int64(len(p)))
		if piece.kind == pieceHole {
			return errMoved
		}
		if err := im.m.data.write(p[:piece.n], piece.at); err != nil {
			return err
		}
		p, off = p[piece.n:], off+guestOffset(piece.n)
	}
	return nil
}

// writeMapped maps the chunks of the range and writes p.
func (im *Image) writeMapped(p []byte, off guestOffset) error {
	first, last := im.m.g.chunkRange(off, off+guestOffset(len(p)))
	for {
		if err := im.m.mapChunks(first, last); err != nil {
			return err
		}
		if err := im.writeStored(p, off); err != errMoved {
			return err
		}
	}
}

// writeCopyUp writes p and, around it, what its first and last block hold in the base image, then sets the fresh
// bits. The caller holds the blocks.
func (im *Image) writeCopyUp(p []byte, off guestOffset, hold *rangeHold) error {
	m := im.m
	end := off + guestOffset(len(p))
	start, stop := off, end
	if !m.fresh.get(hold.first) {
		start = min(start, m.g.blockStart(hold.first))
	}
	if !m.fresh.get(hold.last - 1) {
		stop = max(stop, m.g.blockEnd(hold.last-1))
	}
	var err error
	if stop-start <= assembleMax && (start < off || end < stop) {
		err = im.writeAssembled(p, off, start, stop)
	} else {
		err = im.copyUp(start, off)
		if err == nil {
			err = im.copyUp(end, stop)
		}
		if err == nil {
			err = im.writeMapped(p, off)
		}
	}
	if err == nil {
		m.setFresh(hold.first, hold.last)
	}
	return err
}

// writeAssembled writes [start, stop) in one piece: p, and the base image's bytes before and after it.
func (im *Image) writeAssembled(p []byte, off, start, stop guestOffset) error {
	buf := bufpool.Get(int(stop - start))
	defer buf.Put()
	head, tail := buf.B[:off-start], buf.B[int(off-start)+len(p):]
	var err error
	switch {
	case len(head) > 0 && len(tail) > 0: // one request to the base image, whatever lies between
		err = im.readBase(buf.B, start, false)
	case len(head) > 0:
		err = im.readBase(head, start, false)
	default:
		err = im.readBase(tail, off+guestOffset(len(p)), false)
	}
	if err != nil {
		return fmt.Errorf("copying up from the base image: %w", err)
	}
	copy(buf.B[len(head):], p)
	return im.writeMapped(buf.B, start)
}

// copyUp copies [start, stop) from the base image.
func (im *Image) copyUp(start, stop guestOffset) error {
	if start >= stop {
		return nil
	}
	buf := bufpool.Get(int(min(stop-start, ioUnit)))
	defer buf.Put()
	for start < stop {
		p := buf.B[:min(int64(len(buf.B)), int64(stop-start))]
		if err := im.readBase(p, start, false); err != nil {
			return fmt.Errorf("copying up from the base image: %w", err)
		}
		if err := im.writeMapped(p, start); err != nil {
			return err
		}
		start += guestOffset(len(p))
	}
	return nil
}

// commit makes bits and mappings of [off, end) recoverable where they are not, and releases what lost its
// mapping. exposesData says whether bytes in the storage become reachable through the bits.
func (im *Image) commit(off, end guestOffset, releases []chunkID, exposesData bool) error {
	m := im.m
	bits := false
	if im.baseLive.Load() {
		first, last := m.g.blockRange(off, end)
		bits = !m.stale.all(first, last)
	}
	first, last := m.g.chunkRange(off, end)
	// A checkpoint may have settled the range already; chunks to release go through the journal all the same.
	entries := m.g.compact() && (bits || len(releases) > 0 || m.table.anyPending(first, last))
	if !bits && !entries {
		return nil
	}
	u := im.updates.Get().(*update)
	*u = update{
		span: span{
			off: guestOffset(roundDown(int64(off), sectorSize)), end: guestOffset(roundUp(int64(end), sectorSize)),
			bits: bits, entries: entries, exposesData: bits && exposesData,
		},
		releases: releases,
	}
	err := im.discipline.commit(u)
	im.updates.Put(u)
	return err
}
