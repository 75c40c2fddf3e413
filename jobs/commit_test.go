package jobs

import (
	"bytes"
	"errors"
	"testing"

	"pgregory.net/rapid"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
)

// TestCommit commits random overlays, one layer or two above the base, and empties them.
func TestCommit(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		base := layer(rt, drawLayer(rt, "base", "raw", "qcow2", "qcow2v2", "extended"), nil)
		top := base
		depth := rapid.IntRange(1, 2).Draw(rt, "depth")
		for i := range depth {
			formats := []string{"qcow2", "qcow2v2", "extended"}
			if i == depth-1 {
				formats = append(formats, "fvd", "flatfvd")
			}
			top = layer(rt, drawLayer(rt, "overlay", formats...), top)
		}
		want, before := contents(rt, top.dev), contents(rt, base.dev)
		if f, ok := top.dev.(*fvd.Image); ok {
			if err := f.ForgetBaseLength(); err != nil {
				rt.Fatal(err)
			}
		}
		var done, total int64
		err := Commit(t.Context(), top.dev, base.dev, CommitOptions{
			Depth: depth, Workers: 3, BufferSize: 64 << 10, Progress: func(d, n int64) { done, total = d, n },
		})
		if err != nil {
			rt.Fatal(err)
		}
		if done != total {
			rt.Errorf("progress ends at %d of %d", done, total)
		}
		if size := max(int64(len(want)), int64(len(before))); base.dev.Size() != size {
			rt.Fatalf("the base has %d bytes, want %d", base.dev.Size(), size)
		}
		after := contents(rt, base.dev)
		if !bytes.Equal(after[:len(want)], want) {
			rt.Fatal("the base does not hold what the overlay shows")
		}
		if len(before) > len(want) && !bytes.Equal(after[len(want):], before[len(want):]) {
			rt.Fatal("what lay past the end of the overlay changed")
		}
		if !bytes.Equal(contents(rt, top.dev), want) {
			rt.Fatal("the overlay changed")
		}
		if depth > 1 {
			return // the layers between no longer fit: emptying would show them
		}
		if err := top.dev.(interface{ Empty() error }).Empty(); err != nil {
			rt.Fatal(err)
		}
		if !bytes.Equal(contents(rt, top.dev), want) {
			rt.Fatal("the emptied overlay shows something else")
		}
		err = top.dev.Extents(0, int64(len(want)), func(e block.Extent) bool {
			if e.Depth == 0 && e.Data && (top.spec.Format != "fvd" && top.spec.Format != "flatfvd" || e.Offset+e.Length <= int64(len(before))) {
				rt.Errorf("the emptied overlay holds %+v", e)
			}
			return true
		})
		if err != nil {
			rt.Fatal(err)
		}
		reopened(rt, top, want)
	})
}

// reopened closes a disk, has its checker look at it, and reads it again.
func reopened(rt *rapid.T, c *chained, want []byte) {
	if err := c.dev.Close(); err != nil {
		rt.Fatal(err)
	}
	switch c.dev.(type) {
	case *qcow2.Image:
		res, err := qcow2.Check(c.file, qcow2.CheckOptions{})
		if err != nil || res.Corruptions+res.Leaks+res.CheckErrors > 0 {
			rt.Fatalf("check: %+v, %v", res, err)
		}
	case *fvd.Image:
		res, err := fvd.Check(c.file, fvd.CheckOptions{})
		if err != nil || len(res.Findings) > 0 {
			rt.Fatalf("check: %+v, %v", res, err)
		}
	}
	c.open(rt)
	if !bytes.Equal(contents(rt, c.dev), want) {
		rt.Fatal("the disk reads differently after it was opened again")
	}
	if err := c.dev.Close(); err != nil {
		rt.Fatal(err)
	}
}

// TestCommitFails: an error of the base leaves what the overlay shows alone, and is told.
func TestCommitFails(t *testing.T) {
	overlay, base := newFake(1<<20, 65536), newFake(1<<20, 65536)
	overlay.add(1<<19, dataRun, 1).add(1<<19, backingRun, 2)
	base.failWrite = errors.New("broken")
	var werr *WriteError
	if err := Commit(t.Context(), overlay, base, CommitOptions{Depth: 1}); !errors.As(err, &werr) || !errors.Is(err, base.failWrite) {
		t.Errorf("%v, want a *WriteError", err)
	}
	if base.flushes != 0 {
		t.Error("the base was flushed as if all were well")
	}
	if err := Commit(t.Context(), overlay, base, CommitOptions{}); err == nil {
		t.Error("a commit to the overlay itself was accepted")
	}
	base.failWrite = nil
	if err := Commit(t.Context(), overlay, base, CommitOptions{Depth: 1}); err != nil || base.writes != 1<<19 || base.flushes != 1 {
		t.Errorf("%v; wrote %d bytes, want the %d of the overlay; %d flushes", err, base.writes, 1<<19, base.flushes)
	}
}
