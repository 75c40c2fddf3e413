package qcow2

import (
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
)

// asked runs a function when it is first asked for its extents, and has none once it is closed.
type asked struct {
	block.Device
	first  func()
	closed bool
}

func (a *asked) Extents(off, n int64, fn func(block.Extent) bool) error {
	if first := a.first; first != nil {
		a.first = nil
		first()
	}
	if a.closed {
		return block.ErrClosed
	}
	return a.Device.Extents(off, n, fn)
}

func (a *asked) Close() error {
	a.closed = true
	return a.Device.Close()
}

// TestExtentsWhileDetached: what moved from the backing file into the image before the backing file was taken away is
// not reported to be zeros.
func TestExtentsWhileDetached(t *testing.T) {
	const size = 64 << 10
	f := storage.NewMemory("image")
	if err := Create(f, CreateOptions{Size: size, ClusterSize: 4096, BackingFile: "base", BackingFormat: "raw", BackingSize: size}); err != nil {
		t.Fatal(err)
	}
	backing := &asked{Device: newBacking(1, size)}
	im, err := Open(f, Options{Backing: backing})
	if err != nil {
		t.Fatal(err)
	}
	backing.first = func() {
		p := make([]byte, 8192)
		if _, err := im.ReadAt(p, 4096); err != nil {
			t.Error(err)
		}
		if _, err := im.WriteAt(p, 4096); err != nil {
			t.Error(err)
		}
		if err := im.SetBacking("", ""); err != nil {
			t.Error(err)
		}
	}
	at := int64(0)
	err = im.Extents(0, size, func(e block.Extent) bool {
		if e.Offset != at {
			t.Errorf("a run at %d, want one at %d", e.Offset, at)
		}
		for ; at < e.Offset+e.Length; at += 4096 {
			if moved := at == 4096 || at == 8192; e.Zero == moved {
				t.Errorf("at %d: %+v", at, e)
			}
		}
		return true
	})
	if err != nil || at != size {
		t.Errorf("the runs end at %d: %v", at, err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
}
