package fvd

import (
	"fmt"
	"io"

	"github.com/platter-disk/platter/block"
)

// pieceKind says where the bytes of a guest range come from.
type pieceKind uint8

const (
	pieceBase   pieceKind = iota // the base image, same offset
	pieceStored                  // the data storage
	pieceHole                    // nowhere: zeros
)

// piece is the beginning of a guest range that one read can answer.
type piece struct {
	kind pieceKind
	n    int64
	at   dataOffset // pieceStored
}

// locate finds out where the first bytes of [off, off+n) are. The bits are looked at before the table: a block's
// mapping is in place before its bit is set.
func (im *Image) locate(off guestOffset, n int64) piece {
	g := &im.m.g
	if im.baseLive.Load() && off < g.baseSize {
		first, last := g.blockRange(off, off+guestOffset(n))
		run, set := im.m.fresh.run(first, last)
		end := int64(g.blockEnd(first+run-1) - off)
		if !set {
			return piece{kind: pieceBase, n: min(n, end)}
		}
		if first+run < last {
			n = min(n, end)
		}
	}
	return im.place(off, n)
}

// place is locate by the table alone.
func (im *Image) place(off guestOffset, n int64) piece {
	g := &im.m.g
	if !g.compact() {
		return piece{pieceStored, n, g.dataStart + dataOffset(off)}
	}
	c := chunkIndex(int64(off) / g.chunkSize)
	in := int64(off) % g.chunkSize
	have := g.chunkSize - in
	e := im.m.table.get(c)
	if !e.mapped() {
		for have < n && !im.m.table.get(c+1).mapped() {
			c++
			have += g.chunkSize
		}
		return piece{kind: pieceHole, n: min(n, have)}
	}
	id := e.id()
	p := piece{kind: pieceStored, at: g.chunkData(id) + dataOffset(in)}
	for have < n {
		c, id = c+1, id+1
		if e := im.m.table.get(c); !e.mapped() || e.id() != id {
			break
		}
		have += g.chunkSize
	}
	p.n = min(n, have)
	return p
}

// ReadAt implements block.Device.
func (im *Image) ReadAt(p []byte, off int64) (int, error) {
	pass, ok := im.m.guard.enter(off)
	if !ok {
		return 0, im.errClosed()
	}
	defer im.m.guard.leave(pass)
	if off < 0 {
		return 0, block.CheckRange("read", off, int64(len(p)), im.m.g.size)
	}
	n := int(min(int64(len(p)), max(0, im.m.g.size-off)))
	if err := im.read(p[:n], guestOffset(off), false); err != nil {
		return 0, err
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// TryReadAt implements block.Device.
func (im *Image) TryReadAt(p []byte, off int64) error {
	pass, ok := im.m.guard.tryEnter(off)
	switch {
	case ok:
	case im.m.guard.closed.Load():
		return im.errClosed()
	default:
		return block.ErrWouldBlock
	}
	defer im.m.guard.leave(pass)
	if err := block.CheckRange("read", off, int64(len(p)), im.m.g.size); err != nil {
		return err
	}
	return im.read(p, guestOffset(off), true)
}

// read fills p; with try it returns block.ErrWouldBlock instead of waiting.
func (im *Image) read(p []byte, off guestOffset, try bool) error {
	for len(p) > 0 {
		piece := im.locate(off, int64(len(p)))
		part := p[:piece.n]
		var err error
		switch {
		case piece.kind == pieceHole:
			clear(part)
		case piece.kind == pieceBase:
			err = im.readBase(part, off, try)
		case try:
			err = im.m.data.tryRead(part, piece.at)
		default:
			err = im.m.data.read(part, piece.at)
		}
		if err == block.ErrWouldBlock {
			return err
		}
		if err != nil {
			return fmt.Errorf("fvd image %s: reading %d bytes at %d: %w", im.m.name, len(part), off, err)
		}
		p, off = p[piece.n:], off+guestOffset(piece.n)
	}
	return nil
}

// readBase reads the base image; where it ends before base_img_size, in its last sector, it reads as zeros.
func (im *Image) readBase(p []byte, off guestOffset, try bool) error {
	var inside int64
	if im.base != nil {
		inside = min(int64(len(p)), max(0, im.base.Size()-int64(off)))
	}
	clear(p[inside:])
	if inside == 0 {
		return nil
	}
	if try {
		return im.base.TryReadAt(p[:inside], int64(off))
	}
	n, err := im.base.ReadAt(p[:inside], int64(off))
	if err == io.EOF && int64(n) == inside {
		err = nil
	}
	return err
}
