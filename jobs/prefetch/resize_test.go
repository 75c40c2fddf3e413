package prefetch

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
)

func overBase(t *testing.T, size int64) (*qcow2.Image, *qcow2.Image) {
	t.Helper()
	mem := storage.NewMemory("base")
	if err := qcow2.Create(mem, qcow2.CreateOptions{Size: size}); err != nil {
		t.Fatal(err)
	}
	base, err := qcow2.Open(mem, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := base.WriteAt(bytes.Repeat([]byte{1}, int(size/2)), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := base.WriteAt(bytes.Repeat([]byte{1}, int(size/4)), size/4*3); err != nil {
		t.Fatal(err)
	}
	top := storage.NewMemory("top")
	if err := qcow2.Create(top, qcow2.CreateOptions{Size: size, BackingFile: "base", BackingFormat: "qcow2", BackingSize: size}); err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.Open(top, qcow2.Options{Backing: base})
	if err != nil {
		t.Fatal(err)
	}
	return im, base
}

// TestCopiesBesideShrink: what a smaller disk cut off does not come back with a copy that was under way.
func TestCopiesBesideShrink(t *testing.T) {
	const size, small = 4 << 20, 1<<20 + 512
	im, _ := overBase(t, size)
	g := Guard(im, GuardedOptions{Unit: 65536, Whole: true, BaseSize: size, Detach: func() error { return im.SetBacking("", "") }})
	defer g.Close()
	if err := g.Learn(context.Background()); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, size)
	if err := g.ReadBase(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(g.Resize(small, block.PreallocOff), g.Resize(size, block.PreallocOff)); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Populate(p, 0); err != nil {
		t.Fatal(err)
	}
	want := append(bytes.Repeat([]byte{1}, small), make([]byte, size-small)...)
	got := make([]byte, size)
	if _, err := g.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("what was cut off came back (%v)", err)
	}
	if err := g.DetachBase(); err != nil {
		t.Error(err)
	}
	if _, err := g.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("what was cut off came back (%v)", err)
	}
}

// TestSmallerDisk: a disk that became smaller becomes independent of its base image, and knows its end.
func TestSmallerDisk(t *testing.T) {
	const size, small = 4 << 20, 1<<20 + 512
	im, _ := overBase(t, size)
	g := Guard(im, GuardedOptions{Unit: 65536, Whole: true, BaseSize: size, Detach: func() error { return im.SetBacking("", "") }})
	c := NewCopyOnRead(g, CopyOnReadOptions{})
	defer c.Close()
	if err := g.Learn(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := c.Resize(small, block.PreallocOff); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 1024)
	for _, off := range []int64{small, small + 512, size / 2, size / 4 * 3} {
		if n, err := c.ReadAt(p, off); n != 0 || err == nil {
			t.Errorf("read at %d: %d, %v", off, n, err)
		}
		if err := c.TryReadAt(p, off); err == nil {
			t.Errorf("read at %d", off)
		}
	}
	if n, err := c.ReadAt(p, small-512); n != 512 || err != io.EOF {
		t.Errorf("%d, %v", n, err)
	}
	q := make([]byte, small)
	if err := g.ReadBase(q, 0); err != nil {
		t.Fatal(err)
	}
	testenv.Until(t, "nothing lives in the base image", func() bool { // what was read above is being copied, and passed over
		if _, err := g.Populate(q, 0); err != nil {
			t.Fatal(err)
		}
		_, n := g.NextInBase(0)
		return n == 0
	})
	if err := g.DetachBase(); err != nil {
		t.Error(err)
	}
	got := make([]byte, small)
	if _, err := g.ReadAt(got, 0); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{1}, small)) {
		t.Error("other contents", err)
	}
}
