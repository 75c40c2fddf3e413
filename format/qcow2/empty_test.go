package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
)

// TestEmpty: an image that was emptied shows its backing file, its space is free, and snapshots stay what they were.
func TestEmpty(t *testing.T) {
	for _, how := range Disciplines() {
		for _, version := range []uint32{2, 3} {
			if version == 2 && (how == Lazy || how == Journal) {
				continue
			}
			for _, snapshot := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s-v%d-%v", how, version, snapshot), func(t *testing.T) {
					cfg := modelConfig{how: how, backing: 200 << 10, discard: true, create: CreateOptions{
						Size: 256 << 10, Version: version, ClusterSize: 1024, BackingFile: "base", BackingFormat: "raw",
					}}
					w := newWorld(t, t, cfg, 1)
					r := rand.New(rand.NewPCG(3, 4))
					fill := func() {
						for range 30 {
							w.step(t, r)
						}
					}
					fill()
					var held []byte
					if snapshot {
						if _, err := w.im.CreateSnapshot("s", SnapshotOptions{}); err != nil {
							t.Fatal(err)
						}
						held = bytes.Clone(w.want)
						fill()
					}
					if err := w.im.Empty(); err != nil {
						t.Fatal(err)
					}
					clear(w.want)
					copy(w.want, w.backing.bytes)
					all := int64(len(w.want))
					w.verify(t, 0, all)
					err := w.im.Extents(0, all, func(e block.Extent) bool {
						if e.Depth == 0 && e.Allocated {
							t.Errorf("the image still holds %+v", e)
						}
						return true
					})
					if err != nil {
						t.Fatal(err)
					}
					fill()
					w.verify(t, 0, int64(len(w.want)))
					if snapshot {
						s, err := w.im.SnapshotDevice("s")
						if err != nil {
							t.Fatal(err)
						}
						got := make([]byte, len(held))
						if _, err := s.ReadAt(got, 0); err != nil || !bytes.Equal(got, held) {
							t.Errorf("the snapshot changed: %v", err)
						}
						if err := s.Close(); err != nil {
							t.Error(err)
						}
					}
					if err := w.im.Close(); err != nil {
						t.Fatal(err)
					}
					w.judge(t, t)
				})
			}
		}
	}
}

// TestEmptyDataFile: the entries go, and the space of the data file with them.
func TestEmptyDataFile(t *testing.T) {
	const size = 64 << 10
	f, data, base := storage.NewMemory("image"), storage.NewMemory("data"), newBacking(1, size)
	create := CreateOptions{
		Size: size, ClusterSize: 4096, BackingFile: "base", BackingFormat: "raw", BackingSize: size, DataFileName: "data", DataFile: keepOpen{data},
	}
	if err := Create(f, create); err != nil {
		t.Fatal(err)
	}
	im, err := Open(keepOpen{f}, Options{Backing: base, DataFile: keepOpen{data}, Discard: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := im.WriteAt(bytes.Repeat([]byte{1}, 20<<10), 5000); err != nil {
		t.Fatal(err)
	}
	if err := im.Empty(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, size)
	if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, base.bytes) {
		t.Errorf("the emptied image does not show its backing file: %v", err)
	}
	err = data.DataExtents(0, size, func(e storage.Extent) bool {
		if e.Data {
			t.Errorf("the data file still holds %+v", e)
		}
		return true
	})
	if err != nil {
		t.Error(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if res, err := Check(f, CheckOptions{}); err != nil || res.Corruptions+res.Leaks+res.CheckErrors > 0 {
		t.Errorf("check: %+v, %v", res, err)
	}
}

func TestEmptyRefuses(t *testing.T) {
	f := storage.NewMemory("image")
	if err := Create(f, CreateOptions{Size: 1 << 20, ClusterSize: 4096}); err != nil {
		t.Fatal(err)
	}
	ro, err := Open(keepOpen{f}, Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := ro.Empty(); !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("%v, want %v", err, block.ErrReadOnly)
	}
	f = storage.NewMemory("image")
	data := storage.NewMemory("data")
	if err := Create(f, CreateOptions{Size: 1 << 20, DataFileName: "data", DataFile: data, DataFileRaw: true}); err != nil {
		t.Fatal(err)
	}
	im, err := Open(f, Options{DataFile: data})
	if err != nil {
		t.Fatal(err)
	}
	if err := im.Empty(); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("%v, want %v", err, errors.ErrUnsupported)
	}
	if err := errors.Join(ro.Close(), im.Close()); err != nil {
		t.Error(err)
	}
}

// TestHoldZeroes: zeros that were recorded stay when the image gets something else underneath.
func TestHoldZeroes(t *testing.T) {
	const size = 64 << 10
	for _, o := range []CreateOptions{
		{Size: size, ClusterSize: 4096},
		{Size: size, ClusterSize: 4096, Version: 2},
		{Size: size, ClusterSize: 16 << 10, ExtendedL2: true},
	} {
		t.Run(fmt.Sprintf("%d-%v-%d", o.ClusterSize, o.ExtendedL2, o.Version), func(t *testing.T) {
			f := storage.NewMemory("image")
			if err := Create(f, o); err != nil {
				t.Fatal(err)
			}
			im, err := Open(keepOpen{f}, Options{})
			if err != nil {
				t.Fatal(err)
			}
			want := bytes.Clone(newBacking(1, size).bytes)
			for _, r := range [][2]int64{{0, 4096}, {10000, 30000}, {size - 5000, 5000}} {
				if err := im.HoldZeroes(r[0], r[1]); err != nil {
					t.Fatal(err)
				}
				clear(want[r[0] : r[0]+r[1]])
			}
			if err := im.SetBacking("base", "raw"); err != nil {
				t.Fatal(err)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			if im, err = Open(keepOpen{f}, Options{Backing: newBacking(1, size)}); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, size)
			if _, err := im.ReadAt(got, 0); err != nil {
				t.Fatal(err)
			}
			// What shares a sector, or in an image without subclusters a cluster, with held zeros is held, too.
			for i := range got {
				if got[i] != want[i] && got[i] != 0 || want[i] == 0 && got[i] != 0 {
					t.Fatalf("byte %d is %#x, want %#x or 0", i, got[i], want[i])
				}
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}
