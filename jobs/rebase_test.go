package jobs

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"pgregory.net/rapid"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
)

// TestRebase moves random overlays from one random base, or none, to another, or none: a disk opened over the new
// one reads as before.
func TestRebase(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		bases := [2]*chained{}
		for i, label := range []string{"old", "new"} {
			if rapid.IntRange(0, 5).Draw(rt, label+"_none") > 0 {
				bases[i] = layer(rt, drawLayer(rt, label, "raw", "qcow2"), nil)
			}
		}
		formats := []string{"qcow2", "qcow2v2", "extended"}
		if bases[0] != nil && bases[1] != nil && bases[1].spec.Size >= bases[0].spec.Size {
			formats = append(formats, "fvd")
		}
		top := layer(rt, drawLayer(rt, "overlay", formats...), bases[0])
		want := contents(rt, top.dev)
		o := RebaseOptions{Workers: 3, BufferSize: 64 << 10}
		switch im := top.dev.(type) {
		case *qcow2.Image:
			o.HoldZeroes = im.HoldZeroes
		case *fvd.Image:
			o.Backed = im.BaseSize()
			if err := im.ForgetBaseLength(); err != nil {
				rt.Fatal(err)
			}
		}
		var done, total int64
		o.Progress = func(d, n int64) { done, total = d, n }
		var newBase block.Device
		if bases[1] != nil {
			newBase = bases[1].dev
		}
		if err := Rebase(t.Context(), top.dev, newBase, o); err != nil {
			rt.Fatal(err)
		}
		if done != total {
			rt.Errorf("progress ends at %d of %d", done, total)
		}
		if !bytes.Equal(contents(rt, top.dev), want) {
			rt.Fatal("the disk changed before it had another base")
		}
		if im, ok := top.dev.(*qcow2.Image); ok {
			name, format := "", ""
			if bases[1] != nil {
				name, format = "new", "raw"
			}
			if err := im.SetBacking(name, format); err != nil {
				if errors.Is(err, qcow2.ErrHeaderFull) {
					rt.Skip("no room for a name")
				}
				rt.Fatal(err)
			}
		}
		top.below = bases[1]
		reopened(rt, top, want)
	})
}

// TestRebaseCopiesWhatDiffers: nothing that both bases agree on is written, and what is known to be zero in both is
// not even read.
func TestRebaseCopiesWhatDiffers(t *testing.T) {
	const mib = 1 << 20
	overlay, base := newFake(6*mib, 65536), newFake(4*mib, 65536)
	deep := block.Extent{Allocated: true, Data: true, Depth: 2}
	overlay.add(mib, dataRun, 9).add(mib, backingRun, 1).add(mib, backingRun, 2).add(mib, unallocatedRun, 0).add(mib, backingRun, 3).add(mib, deep, 4)
	base.add(mib, dataRun, 8).add(mib, dataRun, 1).add(mib, dataRun, 7).add(mib, unallocatedRun, 0)
	want := bytes.Clone(overlay.content)
	if err := Rebase(t.Context(), overlay, base, RebaseOptions{SameDepth: 2}); err != nil {
		t.Fatal(err)
	}
	if overlay.writes != 2*mib || overlay.zeroed != 0 || overlay.flushes != 1 || !bytes.Equal(overlay.content, want) {
		t.Errorf("wrote %d, zeroed %d bytes, %d flushes; want %d, 0, 1", overlay.writes, overlay.zeroed, overlay.flushes, 2*mib)
	}
	if base.reads != 2*mib || overlay.reads != 3*mib {
		t.Errorf("read %d bytes of the new base and %d of the overlay, want %d and %d", base.reads, overlay.reads, 2*mib, 3*mib)
	}
}

func TestRebaseFails(t *testing.T) {
	overlay, base := newFake(1<<20, 65536), newFake(1<<20, 65536)
	overlay.add(1<<20, backingRun, 1)
	base.badSectors = map[int64]bool{100: true}
	var baseErr *BaseError
	if err := Rebase(t.Context(), overlay, base, RebaseOptions{}); !errors.As(err, &baseErr) {
		t.Errorf("%v, want a *BaseError", err)
	}
	base.badSectors = nil
	overlay.failWrite = errors.New("broken")
	var werr *WriteError
	if err := Rebase(t.Context(), overlay, base, RebaseOptions{}); !errors.As(err, &werr) {
		t.Errorf("%v, want a *WriteError", err)
	}
	if overlay.flushes != 0 {
		t.Error("flushed as if all were well")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	overlay.failWrite = nil
	if err := Rebase(ctx, overlay, base, RebaseOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want %v", err, context.Canceled)
	}
}
