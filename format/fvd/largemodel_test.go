package fvd

import (
	"bytes"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
	"pgregory.net/rapid"
)

// patterned is a base image of any length that is not stored anywhere: baseByte says what it holds.
type patterned struct {
	*ram
	size int64
}

func (d patterned) Size() int64 { return d.size }

func (d patterned) ReadAt(p []byte, off int64) (int, error) {
	n := int(max(0, min(int64(len(p)), d.size-off)))
	for i := range p[:n] {
		p[i] = baseByte(off + int64(i))
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d patterned) TryReadAt([]byte, int64) error { return block.ErrWouldBlock }

// sparseModel is what a large disk must hold, as the list of what was written to it.
type sparseModel struct {
	base    int64
	changes []struct {
		off, end int64
		tag      byte
	}
}

// sector is what the sector at off must be.
func (m *sparseModel) sector(off int64) []byte {
	for i := len(m.changes) - 1; i >= 0; i-- {
		if c := m.changes[i]; c.off <= off && off < c.end {
			return filled(c.tag, sectorSize)
		}
	}
	p := make([]byte, sectorSize)
	for i := range p {
		if off+int64(i) < m.base {
			p[i] = baseByte(off + int64(i))
		}
	}
	return p
}

func (m *sparseModel) change(off, end int64, tag byte) {
	m.changes = append(m.changes, struct {
		off, end int64
		tag      byte
	}{off, end, tag})
}

// compare reads the sectors on both sides of every edge that a change has, or the block or chunk under one.
func (m *sparseModel) compare(im *Image) error {
	edges := []int64{0, m.base, im.Size()}
	for _, c := range m.changes {
		for _, off := range []int64{c.off, c.end} {
			edges = append(edges, off)
			for _, unit := range []int64{im.m.g.blockSize, im.m.g.chunkSize} {
				if unit > 0 {
					edges = append(edges, off/unit*unit, off/unit*unit+unit)
				}
			}
		}
	}
	got := make([]byte, sectorSize)
	for _, edge := range edges {
		for _, off := range []int64{edge/sectorSize*sectorSize - sectorSize, edge / sectorSize * sectorSize} {
			if off < 0 || off >= im.Size() {
				continue
			}
			if _, err := im.ReadAt(got, off); err != nil {
				return err
			}
			if want := m.sector(off); !bytes.Equal(got, want) {
				return fmt.Errorf("the sector at %d begins with % x, want % x", off, got[:4], want[:4])
			}
		}
	}
	return nil
}

// TestModelOfLargeBlocks is TestModel for the large half of the 2011 tester's matrix (FVD specification 2.14): blocks of
// 1 MiB and of 1048064 bytes, chunks of up to 99 of them, on disks of several chunks. Few requests, most of them where
// blocks and chunks meet.
func TestModelOfLargeBlocks(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		blockSize := rapid.SampledFrom([]int64{1 << 20, 1048064}).Draw(t, "block")
		chunk := blockSize * rapid.SampledFrom([]int64{9, 16, 33, 99}).Draw(t, "chunk/block")
		o := CreateOptions{
			Compact: rapid.IntRange(0, 3).Draw(t, "compact") > 0, BlockSize: blockSize, ChunkSize: chunk, GrowUnit: 2 * lcm(chunk, pageSize),
			JournalSize: rapid.SampledFrom([]int64{512, 8192, 64 << 10}).Draw(t, "journal"), PlainJournal: rapid.Bool().Draw(t, "plain"),
			JournalBuffer: rapid.SampledFrom([]int64{-1, 0}).Draw(t, "buffer"), JournalBufferDelay: time.Hour,
		}
		o.Size = 4*lcm(chunk, pageSize) + 512*int64(rapid.IntRange(1, 5000).Draw(t, "more"))
		model := &sparseModel{base: o.Size - 512*int64(rapid.IntRange(0, int(o.Size/512/2)).Draw(t, "past the base"))}
		base := patterned{newRAM(0), model.base}
		o.BaseImage, o.Base = "base", base
		f := storage.NewMemory("image")
		ok := func(what string, err error) {
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
		}
		ok("create", Create(f, o))
		reopen := func() *Image {
			ruled, err := newRuled(f)
			ok("open", err)
			im, err := Open(ruled, Options{Base: base})
			ok("open", err)
			return im
		}
		im := reopen()
		unit := im.m.g.chunkSize
		if unit == 0 {
			unit = chunk
		}
		span := func() (off, n int64) {
			at := rapid.SampledFrom([]int64{unit, unit, blockSize}).Draw(t, "near a multiple of")
			off = at*int64(rapid.IntRange(0, int(o.Size/at)).Draw(t, "multiple")) + 512*int64(rapid.IntRange(-3, 3).Draw(t, "away"))
			off = max(0, min(o.Size-512, off))
			n = 512 * int64(rapid.IntRange(1, rapid.SampledFrom([]int{8, 8, 3000}).Draw(t, "most")).Draw(t, "n"))
			return off, min(n, o.Size-off)
		}
		for i := range rapid.IntRange(2, 10).Draw(t, "requests") {
			switch rapid.SampledFrom([]string{"write", "write", "write", "zero", "zero chunk", "populate", "checkpoint", "reopen", "kill"}).Draw(t, "request") {
			case "write":
				off, n := span()
				tag := byte(i*2 + 1)
				_, err := im.WriteAt(bytes.Repeat([]byte{tag}, int(n)), off)
				ok("write", err)
				model.change(off, off+n, tag)
			case "zero":
				off, n := span()
				ok("zeroes", im.WriteZeroes(off, n, block.MayUnmap))
				model.change(off, off+n, 0)
			case "zero chunk":
				off, _ := span()
				off = off / unit * unit
				end := min(off+unit, o.Size)
				ok("zeroes", im.WriteZeroes(off, end-off, block.MayUnmap))
				model.change(off, end, 0)
			case "populate":
				off, n := span()
				p := make([]byte, max(0, min(n, im.BaseSize()-off)))
				ok("read base", im.ReadBase(p, min(off, im.BaseSize())))
				_, err := im.Populate(p, min(off, im.BaseSize()))
				ok("populate", err)
			case "checkpoint":
				ok("checkpoint", im.Checkpoint())
			case "reopen":
				ok("close", im.Close())
				res, err := Check(f, CheckOptions{})
				ok("check", err)
				if len(res.Findings) > 0 {
					t.Fatalf("the checker found %+v", res.Findings)
				}
				im = reopen()
			case "kill":
				ok("flush", im.Flush())
				old := im
				f = clone(f)
				old.m.fail("being killed", io.ErrClosedPipe)
				im = reopen()
			}
			ok("compare", model.compare(im))
			ok("audit", im.Audit())
		}
		ok("close", im.Close())
	})
}
