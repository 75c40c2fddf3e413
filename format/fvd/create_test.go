package fvd

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
)

// TestPreallocation: what is laid out is mapped, or stored, and reads as zeros; the image is clean.
func TestPreallocation(t *testing.T) {
	for _, compact := range []bool{false, true} {
		for how := block.PreallocOff; how <= block.PreallocFull; how++ {
			for _, data := range []string{"", "file", "device"} {
				t.Run(fmt.Sprintf("compact %v %v %s", compact, how, data), func(t *testing.T) {
					o := CreateOptions{Size: 1 << 20, Compact: compact, ChunkSize: 64 << 10, GrowUnit: 128 << 10, JournalSize: 8192, Preallocation: how}
					stored := storage.NewMemory("data")
					switch data {
					case "file":
						o.DataFile, o.Data = "data", stored
					case "device":
						o.DataFile, o.DataDevice = "data", &ram{f: stored}
					}
					f := storage.NewMemory("image")
					err := Create(f, o)
					if data == "device" && how == block.PreallocFalloc {
						if !errors.Is(err, errors.ErrUnsupported) {
							t.Fatalf("a disk of another format cannot reserve space: %v", err)
						}
						return
					}
					must(t, err)
					info, err := ReadInfo(f)
					must(t, err)
					if want := int64(16); compact && how != block.PreallocOff && *info.ChunksAllocated != want || !info.CleanShutdown {
						t.Errorf("chunks are not mapped, or not clean: %+v", info)
					}
					im := opened(t, f, Options{Data: o.Data, DataDevice: o.DataDevice})
					must(t, diff(get(t, im, 0, 1<<20), make([]byte, 1<<20)))
					if how == block.PreallocFull {
						must(t, im.Extents(0, 1<<20, func(e block.Extent) bool {
							if !e.Data {
								t.Errorf("%+v is not stored", e)
							}
							return true
						}))
					}
					put(t, im, 12345, filled(7, 70000))
					must(t, im.Resize(2<<20, how))
					must(t, diff(get(t, im, 1<<20, 1<<20), make([]byte, 1<<20)))
					must(t, diff(get(t, im, 12345, 70000), filled(7, 70000)))
					must(t, im.Close())
				})
			}
		}
	}
}

// TestLargeBlocks: what is copied up around a write goes in pieces when a block is large.
func TestLargeBlocks(t *testing.T) {
	base := newBase(7<<20 + 512)
	f := made(t, CreateOptions{Size: 9 << 20, BlockSize: 3 << 20, Base: base, BaseImage: "base", JournalSize: 8192})
	im := opened(t, f, Options{Base: base})
	if got := im.Limits().Preferred; got != 1<<20 {
		t.Errorf("preferred size is %d, want the power of two in 3 MiB", got)
	}
	want := make([]byte, 9<<20)
	_, err := base.ReadAt(want[:7<<20+512], 0)
	must(t, err)
	for _, w := range [][2]int{{4 << 20, 100}, {7<<20 - 50, 600}, {100, 512}} {
		put(t, im, int64(w[0]), filled(9, w[1]))
		copy(want[w[0]:], filled(9, w[1]))
	}
	must(t, diff(get(t, im, 0, 9<<20), want))
	must(t, im.Close())
	im = opened(t, f, Options{Base: base})
	must(t, diff(get(t, im, 0, 9<<20), want))
	must(t, im.Close())
}

// TestFixedStorage: on a device full of others' bytes everything reads as zeros until it is written, with and
// without a table, whether the image lies there or only its data.
func TestFixedStorage(t *testing.T) {
	for _, compact := range []bool{false, true} {
		for _, dataOnly := range []bool{false, true} {
			dev := &fixedFile{Memory: storage.NewMemory("device")}
			_, err := dev.Memory.WriteAt(filled(0xDB, 2<<20), 0)
			must(t, err)
			o := CreateOptions{Size: 1 << 20, Compact: compact, ChunkSize: 64 << 10, JournalSize: 8192}
			var f storage.File = dev
			if dataOnly {
				f = storage.NewMemory("image")
				o.DataFile, o.Data = "device", dev
			}
			must(t, Create(f, o))
			im := opened(t, f, Options{Data: o.Data})
			must(t, diff(get(t, im, 0, 1<<20), make([]byte, 1<<20)))
			put(t, im, 100, filled(1, 100))
			want := make([]byte, 1<<20)
			copy(want[100:], filled(1, 100))
			must(t, diff(get(t, im, 0, 1<<20), want))
			must(t, im.Close())
			im = opened(t, f, Options{Data: o.Data})
			must(t, diff(get(t, im, 0, 1<<20), want))
			must(t, im.Close())
		}
	}
}

// plainFile can neither punch nor zero.
type plainFile struct{ *storage.Memory }

func (plainFile) PunchHole(int64, int64) error { return errors.ErrUnsupported }
func (plainFile) ZeroRange(int64, int64) error { return errors.ErrUnsupported }
func (plainFile) Allocate(int64, int64) error  { return errors.ErrUnsupported }

// TestPlainStorage: on storage without holes zeroes are written, or refused where that must not be; discards leave
// what they cannot zero for nothing; unmapped chunks are zeroed before they are used again.
func TestPlainStorage(t *testing.T) {
	for _, compact := range []bool{false, true} {
		base := newBase(512 << 10)
		f := plainFile{storage.NewMemory("image")}
		o := CreateOptions{Size: 1 << 20, Compact: compact, BlockSize: 4096, ChunkSize: 64 << 10, GrowUnit: 64 << 10, JournalSize: 8192, Base: base, BaseImage: "base"}
		must(t, Create(f, o))
		im := opened(t, f, Options{Base: base})
		put(t, im, 0, filled(1, 256<<10))
		if err := im.WriteZeroes(5000, 10000, block.FastOnly); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("compact %v: fast zeroes: %v", compact, err)
		}
		must(t, diff(get(t, im, 0, 256<<10), filled(1, 256<<10)))
		must(t, im.WriteZeroes(5000, 10000, block.MayUnmap))
		must(t, diff(get(t, im, 5000, 10000), make([]byte, 10000)))
		before := get(t, im, 60<<10, 150<<10)
		must(t, im.Discard(60<<10, 150<<10))
		after := get(t, im, 60<<10, 150<<10)
		if compact { // chunks 1 and 2 are covered whole
			copy(before[4<<10:132<<10], make([]byte, 128<<10))
		}
		must(t, diff(after, before))
		must(t, im.Flush())
		put(t, im, 700<<10, filled(2, 100)) // takes a chunk that held something
		must(t, diff(get(t, im, 700<<10, 4096), append(filled(2, 100), make([]byte, 3996)...)))
		put(t, im, 900<<10, filled(2, 100))
		must(t, diff(get(t, im, 900<<10, 4096), append(filled(2, 100), make([]byte, 3996)...)))
		must(t, im.Close())
	}
}

// sizedBase is a base image of which nothing but the size is asked.
type sizedBase struct {
	block.Device
	size int64
}

func (d sizedBase) Size() int64 { return d.size }

// TestAutomaticBlockSize: the smallest block from 4 KiB on with a bitmap of 4 MiB at most, within a chunk, and chunks
// are whole blocks.
func TestAutomaticBlockSize(t *testing.T) {
	for _, c := range []struct {
		base         int64
		compact      bool
		block, chunk int64 // asked for
		want         int64
		wantChunk    int64
	}{
		{base: 512, want: 4 << 10},
		{base: 16 << 20, compact: true, want: 4 << 10, wantChunk: 1 << 20},
		{base: 16 << 20, compact: true, chunk: 100 << 10, want: 4 << 10, wantChunk: 100 << 10},
		{base: 16 << 20, compact: true, chunk: 512, want: 4 << 10, wantChunk: 4 << 10},
		{base: 16 << 20, block: 64 << 10, want: 64 << 10},
		{base: 16 << 20, compact: true, block: 7680, chunk: 100 << 10, want: 7680, wantChunk: 2 * 61440},
		{base: 128 << 30, want: 4 << 10},
		{base: 128<<30 + 512, want: 8 << 10},
		{base: 1 << 40, want: 32 << 10},
		{base: 1 << 40, compact: true, want: 32 << 10, wantChunk: 1 << 20},
		{base: 1 << 40, compact: true, chunk: 100 << 10, want: 32 << 10, wantChunk: 128 << 10},
		{base: 1 << 40, compact: true, chunk: 20 << 10, want: 16 << 10, wantChunk: 32 << 10},
		{base: 64 << 40, compact: true, want: 1 << 20, wantChunk: 1 << 20}, // the rule asks for 2 MiB
		{base: 1 << 56, want: maxBlockSize},
	} {
		for _, size := range []int64{0, 2 * c.base} { // the base image counts, not the disk
			if c.compact && size > 64<<40 {
				continue
			}
			o := CreateOptions{Size: size, Compact: c.compact, BlockSize: c.block, ChunkSize: c.chunk, Base: sizedBase{size: c.base}, BaseImage: "base"}
			h, err := o.header()
			must(t, err)
			if h.BlockSize != uint64(c.want) || h.ChunkSize != uint64(c.wantChunk) {
				t.Errorf("%+v, disk of %d bytes: blocks of %d bytes, chunks of %d", c, size, h.BlockSize, h.ChunkSize)
			}
		}
	}
	o := CreateOptions{Size: 8 << 20, Base: sizedBase{size: 1 << 50}, BaseImage: "base"}
	h, err := o.header()
	must(t, err)
	if h.BlockSize != 4<<10 {
		t.Errorf("a disk that uses little of its base image has blocks of %d bytes", h.BlockSize)
	}
}

// TestUnknownMutant.
func TestUnknownMutant(t *testing.T) {
	if _, err := Open(made(t, smallCompact(0)), Options{Mutant: "x-ray"}); err == nil || !strings.Contains(err.Error(), `mutant "x-ray"`) {
		t.Errorf("open: %v", err)
	}
}
