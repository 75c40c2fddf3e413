package fvd

import (
	"encoding/binary"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
)

// crashedImage is a small compact image over a base image, as a killed process leaves it: with records to replay.
func crashedImage(t testing.TB, base *ram) *storage.Memory {
	o := smallCompact(8 << 10)
	o.Base, o.BaseImage = base, "base"
	f := made(t, o)
	im := opened(t, f, Options{Base: base})
	for i := range 5 {
		put(t, im, int64(i)*10000, filled(byte(i+1), 5000))
	}
	must(t, im.WriteZeroes(8192, 8192, block.MayUnmap))
	must(t, im.Flush())
	left := clone(f)
	must(t, im.Close())
	return left
}

// FuzzImage patches an image and opens, uses, checks and repairs it: whatever the bytes, nothing panics, hangs or
// takes much memory, and what a repair calls good opens.
func FuzzImage(f *testing.F) {
	base := newBase(100 << 10)
	image := crashedImage(f, base)
	h, err := ReadHeader(image)
	must(f, err)
	patch := func(off uint64, value ...byte) []byte {
		return append(binary.LittleEndian.AppendUint32(nil, uint32(off)), append(value, make([]byte, 4-len(value))...)...)
	}
	f.Add(patch(h.TableOffset, 5, 0, 0, 0))
	f.Add(patch(h.TableOffset+8, 0xFF, 0xFF, 0xFF, 0x7F))
	f.Add(patch(h.JournalOffset+12, 0xFF))
	f.Add(patch(h.BitmapOffset+3, 0xFF))
	f.Add(append(patch(3216, 1), patch(8, 0, 0, 0, 1)...))
	f.Add(patch(3344, 0))
	f.Fuzz(func(t *testing.T, patches []byte) {
		g := clone(image)
		size, err := g.Size()
		must(t, err)
		for ; len(patches) >= 8; patches = patches[8:] {
			at := int64(binary.LittleEndian.Uint32(patches)) % (size - 4)
			_, err := g.WriteAt(patches[4:8], at)
			must(t, err)
		}
		use := func(f *storage.Memory, o Options) error {
			im, err := Open(f, o)
			if err != nil {
				return err
			}
			p := make([]byte, min(im.Size(), 300<<10))
			_, _ = im.ReadAt(p, 0)
			if !o.ReadOnly && len(p) > 0 {
				_, _ = im.WriteAt(p[:min(len(p), 10000)], 0)
				_ = im.Discard(0, int64(len(p)))
			}
			_ = im.Extents(0, min(im.Size(), 1<<20), func(block.Extent) bool { return true })
			return im.Close()
		}
		small := Options{Base: borrowedDevice{base}, MaxMetadata: 1 << 20, ReadOnly: true}
		_ = use(g, small)
		small.ReadOnly = false
		_ = use(clone(g), small)
		res, err := Check(g, CheckOptions{Repair: RepairAll, MaxMetadata: 1 << 20})
		if err != nil || res.Corruptions > 0 {
			return
		}
		if res, err := Check(g, CheckOptions{MaxMetadata: 1 << 20}); err != nil || res.Corruptions > 0 {
			t.Fatalf("after a repair: %+v, %v", res, err)
		}
		small.ReadOnly = true
		small.Base, small.NoBase = nil, true
		if h, err := ReadHeader(g); err == nil && h.DataFile == "" {
			if err := use(g, small); err != nil {
				t.Fatalf("opening after a repair: %v", err)
			}
		}
	})
}
