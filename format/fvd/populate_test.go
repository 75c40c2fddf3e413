package fvd

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/platter-disk/platter/storage"
)

// TestNextInBase: every block is told that lives in the base image and no other, in runs of bounded length, from
// wherever one looks; and those who ask from the beginning again and again do not look at the same blocks.
func TestNextInBase(t *testing.T) {
	const unit, blocks = 512, 3 * 64 * lookAhead
	base := newRAM(blocks*unit - 100)
	im := opened(t, made(t, CreateOptions{BlockSize: unit, Base: base, BaseImage: "base"}), Options{Base: base})
	rng := rand.New(rand.NewPCG(1, 2))
	inBase := make([]bool, blocks)
	steps := 20
	if raceEnabled {
		steps = 5
	}
	for round := range 2 {
		for i := range inBase {
			inBase[i] = true
		}
		ours := func(first, last blockIndex) {
			im.m.setFresh(first, last)
			for b := first; b < last; b++ {
				inBase[b] = false
			}
		}
		for step := range steps {
			seen := make([]bool, blocks)
			for off := int64(0); ; {
				start, n := im.NextInBase(off)
				if n == 0 {
					break
				}
				if start < off || start%unit != 0 || n > 64*lookAhead*unit || start+n > im.BaseSize() {
					t.Fatalf("round %d step %d: %d bytes at %d, asked from %d", round, step, n, start, off)
				}
				for b := start / unit; b*unit < start+n; b++ {
					seen[b] = true
				}
				off = start + n
			}
			first := blocks
			for b := range seen {
				if seen[b] != inBase[b] {
					t.Fatalf("round %d step %d: block %d in the base image: %v, want %v", round, step, b, seen[b], inBase[b])
				}
				if seen[b] {
					first = min(first, b)
				}
			}
			if got := im.m.local.Load().Load(); got != int64(first) {
				t.Fatalf("the next search begins at block %d, the first in the base image is %d", got, first)
			}
			off := rng.Int64N(blocks) * unit
			if start, n := im.NextInBase(off + 7); n > 0 && inBase[off/unit] && start != off+7 {
				t.Fatalf("round %d step %d: %d bytes at %d, asked from %d", round, step, n, start, off+7)
			}
			if step%3 == 0 { // the first blocks
				ours(0, blockIndex(first)+blockIndex(rng.Int64N(int64(blocks-first)/8+1)))
				continue
			}
			from := blockIndex(rng.Int64N(blocks))
			ours(from, from+blockIndex(rng.Int64N(min(1<<step, int64(blocks-from)))))
		}
		ours(0, blocks)
		if _, n := im.NextInBase(0); n != 0 || im.m.local.Load().Load() != blocks {
			t.Fatalf("round %d: %d bytes live in the base image after all left it", round, n)
		}
		must(t, im.Empty())
	}
	must(t, im.Close())
}

// Zeros of the base image take no space: their blocks become ours with nothing stored, unless their chunk has a
// place already.
func TestPopulateZeros(t *testing.T) {
	const chunk, chunks = 64 << 10, 8
	base := newBase(chunks * chunk)
	zeros := make([]byte, chunks*chunk)
	const data = 3*chunk + 8192 // of the base, 4 KiB long; the rest is zeros
	_, err := base.WriteAt(zeros[:data], 0)
	must(t, err)
	_, err = base.WriteAt(zeros[data+4096:], data+4096)
	must(t, err)
	o := smallCompact(0)
	o.Size, o.Base, o.BaseImage, o.ChunkSize = chunks*chunk, base, "base", chunk
	f := storage.NewMemory("image")
	must(t, Create(f, o))
	im := opened(t, f, Options{Base: base})
	_, err = im.WriteAt([]byte("x"), 6*chunk+100) // gives chunk 6 a place
	must(t, err)
	want := get(t, im, 0, chunks*chunk)

	p := make([]byte, chunks*chunk)
	must(t, im.ReadBase(p, 0))
	kept, err := im.Populate(p, 0)
	must(t, err)
	if kept != chunks*chunk-4096 { // all but the block that was written
		t.Errorf("kept %d bytes", kept)
	}
	must(t, im.DetachBase())
	must(t, diff(get(t, im, 0, chunks*chunk), want))
	must(t, im.Close())
	info, err := ReadInfo(f)
	must(t, err)
	if *info.ChunksAllocated != 2 {
		t.Errorf("%d chunks are stored, want 2", *info.ChunksAllocated)
	}
	im = opened(t, f, Options{})
	_, err = im.WriteAt([]byte("y"), chunk+5) // a chunk of zeros gets a place
	must(t, err)
	want[chunk+5] = 'y'
	must(t, diff(get(t, im, 0, chunks*chunk), want))
	must(t, im.Close())
}

// An image without a table has a place for everything: long runs of zeros become holes there, also over what the
// storage held before, and short ones are written.
func TestPopulateHoles(t *testing.T) {
	const size, block = 1 << 20, 4096
	base := newBase(size)
	data := []struct{ from, to int64 }{{0, block}, {5 * block, 6 * block}, {6*block + leastHole, 6*block + leastHole + 1}, {512 << 10, 513 << 10}}
	zeros := make([]byte, size)
	at := int64(0)
	for _, d := range append(data, struct{ from, to int64 }{size, size}) {
		_, err := base.WriteAt(zeros[at:d.from], at)
		must(t, err)
		at = d.to
	}
	f := storage.NewMemory("image")
	must(t, Create(f, CreateOptions{Size: size, Base: base, BaseImage: "base", BlockSize: block, JournalSize: 64 << 10}))
	im := opened(t, f, Options{Base: base})
	start := int64(im.m.g.dataStart)
	_, err := f.WriteAt(bytes.Repeat([]byte{0xee}, 300<<10), start+600<<10) // left by somebody
	must(t, err)
	want := get(t, im, 0, size)
	p := make([]byte, size)
	must(t, im.ReadBase(p, 0))
	kept, err := im.Populate(p, 0)
	must(t, err)
	if kept != size {
		t.Errorf("kept %d bytes", kept)
	}
	must(t, im.DetachBase())
	must(t, diff(get(t, im, 0, size), want))
	stored := int64(0)
	must(t, f.DataExtents(start, size, func(e storage.Extent) bool {
		if e.Data {
			stored += e.Length
		}
		return true
	}))
	if most := int64(6*block + block + 4096); stored > most {
		t.Errorf("%d bytes are stored, want at most %d", stored, most)
	}
	must(t, im.Close())
}
