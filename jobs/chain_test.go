package jobs

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"

	"pgregory.net/rapid"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/format/raw"
	"github.com/platter-disk/platter/storage"
)

// fataler is what *testing.T and *rapid.T have in common for these tests.
type fataler interface {
	Fatalf(format string, args ...any)
	Helper()
}

// layerSpec describes a layer of a chain that a test lays out in memory.
type layerSpec struct {
	Format  string // raw, qcow2, qcow2v2, extended, fvd, flatfvd
	Size    int64
	Cluster int64
	Writes  int
	Seed    uint64
}

func (s layerSpec) String() string {
	return fmt.Sprintf("%s of %d (%d), %d writes", s.Format, s.Size, s.Cluster, s.Writes)
}

func drawLayer(t *rapid.T, label string, formats ...string) layerSpec {
	s := layerSpec{
		Format:  rapid.SampledFrom(formats).Draw(t, label+"_format"),
		Size:    int64(rapid.IntRange(1, 600).Draw(t, label+"_sectors")) * 512,
		Cluster: 512 << rapid.IntRange(0, 7).Draw(t, label+"_cluster"),
		Writes:  rapid.IntRange(0, 12).Draw(t, label+"_writes"),
		Seed:    rapid.Uint64().Draw(t, label+"_seed"),
	}
	if s.Format == "extended" {
		s.Cluster = max(s.Cluster, 16<<10)
	}
	return s
}

// chained is a layer of a chain, open.
type chained struct {
	spec  layerSpec
	file  *storage.Memory
	dev   block.Device
	below *chained
}

// kept lets a file outlive the device that closes it.
type kept struct{ storage.File }

func (kept) Close() error { return nil }

// layer makes and fills a layer over another one, nil for none.
func layer(t fataler, s layerSpec, below *chained) *chained {
	c := &chained{spec: s, file: storage.NewMemory(s.Format), below: below}
	var err error
	name, format, size := "", "", int64(0)
	var base block.Device
	if below != nil {
		name, format, base = "below", "raw", below.dev
		size = base.Size()
	}
	switch s.Format {
	case "raw":
		err = c.file.Truncate(s.Size)
	case "qcow2", "qcow2v2", "extended":
		o := qcow2.CreateOptions{Size: s.Size, ClusterSize: s.Cluster, BackingFile: name, BackingFormat: format, BackingSize: size}
		if s.Format == "qcow2v2" {
			o.Version = 2
		}
		o.ExtendedL2 = s.Format == "extended"
		err = qcow2.Create(c.file, o)
	default:
		o := fvd.CreateOptions{
			Size: s.Size, BaseImage: name, BaseFormat: format, Base: base, BlockSize: 1024, DetectSparseHole: 1024,
			JournalSize: 64 << 10, Compact: s.Format == "fvd",
		}
		if o.Compact {
			o.ChunkSize, o.GrowUnit = 4096, 8192
		}
		err = fvd.Create(c.file, o)
	}
	if err != nil {
		t.Fatalf("create %v: %v", s, err)
	}
	c.open(t)
	r := rand.New(rand.NewPCG(s.Seed, 7))
	for range s.Writes {
		off := r.Int64N(s.Size/512) * 512
		n := min((1+r.Int64N(40))*512, s.Size-off)
		switch r.IntN(5) {
		case 0:
			err = c.dev.WriteZeroes(off, n, block.MayUnmap)
		case 1:
			_, err = c.dev.WriteAt(make([]byte, n), off)
		default:
			_, err = c.dev.WriteAt(bytes.Repeat([]byte{byte(1 + r.IntN(3))}, int(n)), off) // equal bytes in several layers are wanted
		}
		if err != nil {
			t.Fatalf("fill %v: %v", s, err)
		}
	}
	return c
}

func (c *chained) open(t fataler) {
	t.Helper()
	var err error
	var base block.Device
	if c.below != nil {
		base = lent{c.below.dev}
	}
	switch c.spec.Format {
	case "raw":
		c.dev, err = raw.Open(kept{c.file}, raw.Options{})
	case "qcow2", "qcow2v2", "extended":
		c.dev, err = qcow2.Open(kept{c.file}, qcow2.Options{Backing: base, Discard: true})
	default:
		c.dev, err = fvd.Open(kept{c.file}, fvd.Options{Base: base})
	}
	if err != nil {
		t.Fatalf("open %v: %v", c.spec, err)
	}
}

// lent is a device that does not end with the one above it.
type lent struct{ block.Device }

func (lent) Close() error { return nil }

// contents reads a whole disk.
func contents(t fataler, d block.Device) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	if n, err := d.ReadAt(p, 0); n != len(p) || err != nil && err != io.EOF {
		t.Fatalf("read: %d bytes, %v", n, err)
	}
	return p
}
