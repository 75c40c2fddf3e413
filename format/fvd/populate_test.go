package fvd

import (
	"testing"

	"github.com/platter-disk/platter/storage"
)

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
	if info.ChunksAllocated != 2 {
		t.Errorf("%d chunks are stored, want 2", info.ChunksAllocated)
	}
	im = opened(t, f, Options{})
	_, err = im.WriteAt([]byte("y"), chunk+5) // a chunk of zeros gets a place
	must(t, err)
	want[chunk+5] = 'y'
	must(t, diff(get(t, im, 0, chunks*chunk), want))
	must(t, im.Close())
}
