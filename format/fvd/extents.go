package fvd

import (
	"fmt"
	"math"

	"github.com/platter-disk/platter/block"
)

// lookAhead bounds in entries of the table, and words of the bitmap, how far a look for one extent goes: a batch may
// end after the first, and the next one would look as far again.
const lookAhead = 4096

// extentBatch is how many extents are gathered before the caller sees them. The image must not be held while the
// caller's function runs: it may call back.
const extentBatch = 128

// Extents implements block.Device.
func (im *Image) Extents(off, length int64, fn func(block.Extent) bool) error {
	end := off + length
	var batch []block.Extent
	for first := true; first || off < end; first = false {
		var err error
		if batch, err = im.gatherExtents(batch[:0], off, end-off); err != nil {
			return err
		}
		for _, e := range batch {
			if !fn(e) {
				return nil
			}
			off = e.Offset + e.Length
		}
	}
	return nil
}

// gatherExtents appends the first extents of the range to batch, at least one if the range is not empty.
func (im *Image) gatherExtents(batch []block.Extent, off, length int64) ([]block.Extent, error) {
	pass, ok := im.m.guard.enter(off)
	if !ok {
		return nil, im.errClosed()
	}
	defer im.m.guard.leave(pass)
	if err := block.CheckRange("block status", off, length, im.m.g.size); err != nil {
		return nil, err
	}
	add := func(e block.Extent) bool {
		batch = append(batch, e)
		return len(batch) < extentBatch
	}
	for length > 0 && len(batch) < extentBatch {
		p := im.locate(guestOffset(off), min(length, im.m.g.lookAhead()))
		var err error
		switch p.kind {
		case pieceHole:
			add(block.Extent{Offset: off, Length: p.n, Allocated: im.leftBase(off), Zero: true, HostOffset: -1})
		case pieceBase:
			err = im.baseExtents(off, p.n, add)
		default:
			err = im.storedExtents(off, p, add)
		}
		if err != nil {
			return nil, fmt.Errorf("fvd image %s: block status of %d bytes at %d: %w", im.m.name, p.n, off, err)
		}
		off, length = off+p.n, length-p.n
		if n := len(batch); n > 0 { // the batch may have ended inside the piece
			last := batch[n-1].Offset + batch[n-1].Length
			off, length = last, length+off-last
		}
	}
	return batch, nil
}

// lookAhead is how many bytes of the disk an extent is sought in.
func (g *geometry) lookAhead() int64 {
	n := int64(math.MaxInt64)
	if g.compact() {
		n = lookAhead * g.chunkSize
	}
	if g.blockSize > 0 {
		n = min(n, 64*lookAhead*g.blockSize)
	}
	return n
}

// leftBase reports whether off is covered by the base image's size: then its zeros are this image's entry.
func (im *Image) leftBase(off int64) bool {
	return im.baseLive.Load() && off < int64(im.m.g.baseSize)
}

// baseExtents reports what the base image says, a layer down.
func (im *Image) baseExtents(off, n int64, add func(block.Extent) bool) error {
	var inside int64
	if im.base != nil {
		inside = min(n, max(0, im.base.Size()-off))
	}
	more := true
	if inside > 0 {
		err := im.base.Extents(off, inside, func(e block.Extent) bool {
			e.Depth++
			more = add(e)
			return more
		})
		if err != nil {
			return err
		}
	}
	if more && inside < n {
		add(block.Extent{Offset: off + inside, Length: n - inside, Zero: true, HostOffset: -1})
	}
	return nil
}

// storedExtents reports bytes of the data storage; its holes read as zeros.
func (im *Image) storedExtents(off int64, p piece, add func(block.Extent) bool) error {
	entry := im.m.g.compact() || im.leftBase(off)
	return im.m.data.extents(p.at, p.n, func(at dataOffset, n int64, data bool) bool {
		e := block.Extent{Offset: off + int64(at-p.at), Length: n, Allocated: data || entry, Zero: !data, Data: data, HostOffset: -1}
		if data {
			e.HostOffset = int64(at)
		}
		return add(e)
	})
}
