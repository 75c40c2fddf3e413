package fvd

import (
	"errors"
	"fmt"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/bufpool"
)

// zeroStep is how much of the disk is zeroed under one hold of its blocks and one journal update, in bytes,
// rounded up to whole chunks or blocks.
const zeroStep = 256 << 20

// zeroWay says how a range is to be zeroed.
type zeroWay struct {
	unmap   bool // space may be given back
	fast    bool // fail rather than write zeros out
	discard bool // what cannot be zeroed cheaply may keep its bytes
}

// WriteZeroes implements block.Device.
func (im *Image) WriteZeroes(off, length int64, flags block.ZeroFlags) error {
	return im.zeroRequest("write zeroes", off, length, zeroWay{unmap: flags&block.MayUnmap != 0, fast: flags&block.FastOnly != 0})
}

// Discard implements block.Device. Whole blocks inside the range read as zeros afterwards, where the storage can
// punch holes or the chunk can be given back; blocks of the base image count as theirs from then on.
func (im *Image) Discard(off, length int64) error {
	return im.zeroRequest("discard", off, length, zeroWay{unmap: true, fast: true, discard: true})
}

func (im *Image) zeroRequest(op string, off, length int64, way zeroWay) error {
	pass, err := im.begin(op, off, length)
	if err != nil {
		return err
	}
	defer im.m.guard.leave(pass)
	if err := im.zero(guestOffset(off), guestOffset(off+length), way); err != nil {
		return fmt.Errorf("fvd image %s: %s of %d bytes at %d: %w", im.m.name, op, length, off, err)
	}
	if im.writethrough {
		return im.flush()
	}
	return nil
}

// zero zeroes [off, end): blocks of the base image that are only partly covered by writing zeros and copying up
// the rest, everything else without a byte of data where possible.
func (im *Image) zero(off, end guestOffset, way zeroWay) error {
	m := im.m
	innerOff, innerEnd := off, end
	if im.baseLive.Load() {
		if first, last := m.g.blockRange(off, end); first < last {
			if off > m.g.blockStart(first) && !m.fresh.get(first) {
				innerOff = min(end, m.g.blockEnd(first))
			}
			if end < m.g.blockEnd(last-1) && !m.fresh.get(last-1) {
				innerEnd = max(innerOff, m.g.blockStart(last-1))
			}
		}
	}
	if !way.discard {
		if way.fast && (off < innerOff || innerEnd < end) {
			return im.unsupported("zeroing a part of a block of the base image without writing it")
		}
		if err := im.writeZeros(off, innerOff); err != nil {
			return err
		}
		if err := im.writeZeros(innerEnd, end); err != nil {
			return err
		}
	}
	step := int64(zeroStep)
	if unit := max(m.g.chunkSize, m.g.blockSize); unit > 0 {
		step = roundUp(step, unit)
	}
	for innerOff < innerEnd {
		next := min(innerEnd, guestOffset(roundDown(int64(innerOff), step)+step))
		if err := im.zeroBlocks(innerOff, next, way); err != nil {
			return err
		}
		innerOff = next
	}
	return nil
}

// writeZeros writes zeros like any other data.
func (im *Image) writeZeros(off, end guestOffset) error {
	if off >= end {
		return nil
	}
	buf := bufpool.Get(int(min(end-off, ioUnit)))
	defer buf.Put()
	clear(buf.B)
	for off < end {
		p := buf.B[:min(int64(len(buf.B)), int64(end-off))]
		if err := im.write(p, off); err != nil {
			return err
		}
		off += guestOffset(len(p))
	}
	return nil
}

// zeroBlocks zeroes [off, end), whose blocks are covered whole or have left the base image.
func (im *Image) zeroBlocks(off, end guestOffset, way zeroWay) error {
	m := im.m
	if im.allZero(off, end) {
		// Nothing is stored; but that may be someone else's news that is not recoverable yet.
		return im.commit(off, end, nil, false)
	}
	if m.g.compact() || m.fresh.n > 0 {
		if err := m.markInUse(); err != nil {
			return err
		}
	}
	hold := im.lockBase(off, end)
	releases, stored, err := im.zeroChunks(&off, &end, way)
	if hold != nil {
		if err == nil {
			m.setFresh(m.g.blockRange(off, end))
		}
		im.ranges.unlock(hold)
	}
	if err != nil {
		if way.discard && errors.Is(err, errors.ErrUnsupported) {
			return nil
		}
		return err
	}
	return im.commit(off, end, releases, stored)
}

// allZero reports whether nothing is stored for [off, end) here or in the base image.
func (im *Image) allZero(off, end guestOffset) bool {
	p := im.locate(off, int64(end-off))
	return p.kind == pieceHole && p.n == int64(end-off)
}

// zeroChunks makes the storage of [off, end) read as zeros, by taking the mappings of whole chunks away or in
// place. What must be done in place comes first, as only that can fail; a discard for which it fails on account
// of the storage is cut down to the chunks that can be unmapped. stored: some of the zeros are bytes of the
// storage.
func (im *Image) zeroChunks(off, end *guestOffset, way zeroWay) (releases []chunkID, stored bool, err error) {
	m := im.m
	if !m.g.compact() {
		return nil, true, zeroStore(m.data, m.g.dataStart+dataOffset(*off), int64(*end-*off), way.unmap, way.fast)
	}
	unmap := way.unmap && m.g.unmap
	first, last := m.g.chunkRange(*off, *end)
	for c := first; c < last; c++ {
		e := m.table.get(c)
		from, to := max(*off, m.g.chunkStart(c)), min(*end, m.g.chunkEnd(c))
		whole := from == m.g.chunkStart(c) && to == m.g.chunkEnd(c)
		if !e.mapped() || unmap && whole {
			continue
		}
		err := zeroStore(m.data, m.g.chunkData(e.id())+dataOffset(from-m.g.chunkStart(c)), int64(to-from), way.unmap, way.fast)
		switch {
		case err == nil:
			stored = true
		case way.discard && unmap && errors.Is(err, errors.ErrUnsupported):
			if c == first && from > m.g.chunkStart(c) {
				*off = min(*end, to)
			} else {
				*end = from
			}
		default:
			return nil, false, err
		}
	}
	if !unmap {
		return nil, stored, nil
	}
	first, last = m.g.chunkRange(*off, *end)
	for c := first; c < last; c++ {
		if *off > m.g.chunkStart(c) || *end < m.g.chunkEnd(c) {
			continue
		}
		if id, ok := m.unmapChunk(c); ok {
			releases = append(releases, id)
		}
	}
	return releases, stored, nil
}
