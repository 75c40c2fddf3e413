package fvd

import (
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/platter-disk/platter/storage"
)

// onFile is a compact image on a real file with its first 64 MiB allocated.
func onFile(b *testing.B, o CreateOptions) *Image {
	b.Helper()
	f, err := storage.Open(filepath.Join(b.TempDir(), "disk"), storage.OpenOptions{Create: true})
	must(b, err)
	o.Size, o.Compact = 1<<40, true
	must(b, Create(f, o))
	im := opened(b, f, Options{})
	for off := int64(0); off < 64<<20; off += 1 << 20 {
		put(b, im, off, make([]byte, 1<<20))
	}
	must(b, im.Flush())
	return im
}

func BenchmarkRead4K(b *testing.B) {
	im := onFile(b, CreateOptions{})
	p := make([]byte, 4096)
	for b.Loop() {
		_, err := im.ReadAt(p, rand.Int64N(16384)*4096)
		must(b, err)
	}
	must(b, im.Close())
}

func BenchmarkOverwrite4K(b *testing.B) {
	im := onFile(b, CreateOptions{})
	p := make([]byte, 4096)
	for b.Loop() {
		_, err := im.WriteAt(p, rand.Int64N(16384)*4096)
		must(b, err)
	}
	must(b, im.Close())
}

// BenchmarkAllocate4K writes to chunks that are not there yet, a flush after each.
func BenchmarkAllocate4K(b *testing.B) {
	im := onFile(b, CreateOptions{ChunkSize: 64 << 10})
	p := make([]byte, 4096)
	off := int64(64 << 20)
	for b.Loop() {
		put(b, im, off, p)
		must(b, im.Flush())
		off += 64 << 10
	}
	must(b, im.Close())
}
