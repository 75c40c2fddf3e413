package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"pgregory.net/rapid"

	"github.com/platter-disk/platter/storage"
)

// cleanAfter closes an image and has it checked: nothing may be wrong with it, leaks included.
func (w *world) cleanAfter(t *testing.T) {
	t.Helper()
	if err := w.im.Close(); err != nil {
		t.Fatal(err)
	}
	res, err := Check(w.file, CheckOptions{Report: func(f Finding) { t.Log(f.Message) }})
	if err != nil || res.Corruptions+res.CheckErrors+res.Leaks > 0 {
		t.Errorf("check: %v, %+v", err, res)
	}
}

// written is an image with a disk that is written all over.
func written(t *testing.T, cfg modelConfig) *world {
	t.Helper()
	w := newWorld(t, t, cfg, 1)
	w.fill(t, 1)
	return w
}

func (w *world) fill(t *testing.T, b byte) {
	t.Helper()
	w.want = bytes.Repeat([]byte{b}, int(w.im.Size()))
	if _, err := w.im.WriteAt(w.want, 0); err != nil {
		t.Fatal(err)
	}
}

// TestSnapshotNarrowCounts: where a count cannot be raised, taking or applying a snapshot fails and leaves
// nothing behind.
func TestSnapshotNarrowCounts(t *testing.T) {
	for _, how := range Disciplines() {
		for _, bits := range []int{1, 2} {
			t.Run(fmt.Sprintf("%s/%d", how, bits), func(t *testing.T) {
				w := written(t, modelConfig{how: how, create: CreateOptions{Size: 256 << 10, ClusterSize: 512, RefcountBits: bits, Version: 3}})
				room := 1<<bits - 2 // snapshots that fit, with the active tree
				for i := range room {
					if _, err := w.im.CreateSnapshot(fmt.Sprint(i), SnapshotOptions{}); err != nil {
						t.Fatal(err)
					}
				}
				if _, err := w.im.CreateSnapshot("too many", SnapshotOptions{}); !errors.Is(err, errRefcountWidth) {
					t.Fatalf("one snapshot too many: %v", err)
				}
				if room > 0 {
					if err := w.im.ApplySnapshot("0"); !errors.Is(err, errRefcountWidth) {
						t.Fatalf("apply without room for one more reference: %v", err)
					}
				}
				w.verify(t, 0, int64(len(w.want)))
				// The counts of the first half have room again: what is raised there has to be undone.
				half := w.want[:len(w.want)/2+512]
				for i := range half {
					half[i] = 3
				}
				if _, err := w.im.WriteAt(half, 0); err != nil {
					t.Fatal(err)
				}
				if _, err := w.im.CreateSnapshot("too many", SnapshotOptions{}); !errors.Is(err, errRefcountWidth) {
					t.Fatalf("one snapshot too many for the second half: %v", err)
				}
				w.verify(t, 0, int64(len(w.want)))
				w.reopen(t)
				w.verify(t, 0, int64(len(w.want)))
				w.fill(t, 2)
				w.verify(t, 0, int64(len(w.want)))
				if list, err := w.im.Snapshots(); err != nil || len(list) != room {
					t.Fatalf("%d snapshots (%v), want %d", len(list), err, room)
				}
				w.cleanAfter(t)
			})
		}
	}
}

// TestSnapshotNames: ids count up, are looked for first, and dates are kept.
func TestSnapshotNames(t *testing.T) {
	w := written(t, modelConfig{create: CreateOptions{Size: 64 << 10}})
	date := time.Unix(1234567890, 987)
	for _, name := range []string{"one", "3", "x", "x"} {
		if _, err := w.im.CreateSnapshot(name, SnapshotOptions{Date: date}); err != nil {
			t.Fatal(err)
		}
	}
	list, err := w.im.Snapshots()
	if err != nil || len(list) != 4 || list[1].Name != "3" || list[3].ID != "4" || !list[0].Date().Equal(date) {
		t.Fatalf("%+v, %v", list, err)
	}
	for _, c := range []struct{ which, gone string }{{"3", "3"}, {"3", "2"}, {"x", "4"}} {
		if err := w.im.DeleteSnapshot(c.which); err != nil {
			t.Fatal(err)
		}
		if list, err = w.im.Snapshots(); err != nil {
			t.Fatal(err)
		}
		for _, s := range list {
			if s.ID == c.gone {
				t.Errorf("deleting %q left snapshot %s", c.which, c.gone)
			}
		}
	}
	for what, err := range map[string]error{
		"apply": w.im.ApplySnapshot("none"), "delete": w.im.DeleteSnapshot("none"),
		"open": func() error { _, err := w.im.SnapshotDevice("none"); return err }(),
	} {
		if !errors.Is(err, ErrNoSnapshot) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := w.im.CreateSnapshot(strings.Repeat("n", 1<<16), SnapshotOptions{}); err == nil {
		t.Error("a name of 65536 bytes was accepted")
	}
	if got := nextSnapshotID([]Snapshot{{ID: "7x"}, {ID: "abc"}, {ID: ""}}); got != "8" {
		t.Errorf("the id after 7x is %q, want 8", got)
	}
	w.cleanAfter(t)
}

// TestSnapshotRefused: what cannot have snapshots says so.
func TestSnapshotRefused(t *testing.T) {
	w := newWorld(t, t, modelConfig{create: CreateOptions{Size: 64 << 10, DataFileName: "data"}}, 1)
	if _, err := w.im.CreateSnapshot("x", SnapshotOptions{}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("with a data file: %v", err)
	}
	w.cleanAfter(t)
	if err := w.im.ApplySnapshot("x"); err == nil {
		t.Error("a closed image applied a snapshot")
	}
	if _, err := w.im.Snapshots(); err == nil {
		t.Error("a closed image listed snapshots")
	}
}

// TestSnapshotVMState: what a snapshot holds past the end of the disk is a virtual machine's saved state. It stays
// with the snapshot, does not come to light when the disk grows, and goes with it.
func TestSnapshotVMState(t *testing.T) {
	for _, how := range Disciplines() {
		t.Run(how, func(t *testing.T) {
			w := written(t, modelConfig{how: how, create: CreateOptions{Size: 64 << 10, ClusterSize: 512, Version: 3}})
			if _, err := w.im.CreateSnapshot("vm", SnapshotOptions{}); err != nil {
				t.Fatal(err)
			}
			if err := w.im.Close(); err != nil {
				t.Fatal(err)
			}
			const disk = 32 << 10 // one L1 entry; the rest becomes the state
			w.editSnapshot(t, func(s *Snapshot) { s.DiskSize, s.VMStateSize = disk, 100 })
			w.open(t)
			if err := w.im.ApplySnapshot("vm"); err != nil {
				t.Fatal(err)
			}
			if w.im.Size() != disk {
				t.Fatalf("the disk has %d bytes, want %d", w.im.Size(), disk)
			}
			w.want = w.want[:disk]
			if err := w.im.Resize(64<<10, 0); err != nil {
				t.Fatal(err)
			}
			w.want = append(w.want, make([]byte, 32<<10)...)
			w.verify(t, 0, int64(len(w.want)))
			w.reopen(t)
			w.verify(t, 0, int64(len(w.want)))
			list, err := w.im.Snapshots()
			if err != nil || list[0].VMStateSize != 100 || list[0].L1Size != 2 {
				t.Fatalf("%+v, %v", list, err)
			}
			if err := w.im.DeleteSnapshot("vm"); err != nil {
				t.Fatal(err)
			}
			w.cleanAfter(t)
		})
	}
}

// editSnapshot changes the first entry of the snapshot table of a closed image.
func (w *world) editSnapshot(t *testing.T, change func(*Snapshot)) {
	t.Helper()
	h, err := ReadHeader(w.file)
	if err != nil {
		t.Fatal(err)
	}
	list, _, err := readSnapshots(w.file, h)
	if err != nil {
		t.Fatal(err)
	}
	change(&list[0])
	raw, err := encodeSnapshots(list)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.file.WriteAt(raw, int64(h.SnapshotsOffset)); err != nil {
		t.Fatal(err)
	}
}

// TestSnapshotDamaged: damaged snapshots are refused with an error, and the disk goes on.
func TestSnapshotDamaged(t *testing.T) {
	for name, change := range map[string]func(w *world, s *Snapshot){
		"unaligned L1 table":     func(_ *world, s *Snapshot) { s.L1Offset++ },
		"L1 table past the end":  func(_ *world, s *Snapshot) { s.L1Offset = 1 << 50 },
		"huge L1 table":          func(_ *world, s *Snapshot) { s.L1Size = 1<<32 - 1 },
		"huge disk":              func(_ *world, s *Snapshot) { s.DiskSize = 1 << 63 },
		"reserved bits":          func(w *world, s *Snapshot) { w.poke(int64(s.L1Offset), 1<<60|0x400) },
		"uncounted L2 table":     func(w *world, s *Snapshot) { w.poke(int64(s.L1Offset), 1<<40) },
		"data as an L2 table":    func(w *world, s *Snapshot) { w.poke(int64(s.L1Offset), uint64(w.peek(w.peek(int64(s.L1Offset))))) },
		"L1 table in the header": func(_ *world, s *Snapshot) { s.L1Offset = 0 },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, t, modelConfig{create: CreateOptions{Size: 32 << 10, ClusterSize: 512, Version: 3}}, 1)
			r := rand.New(rand.NewPCG(1, 1))
			for i := range w.want {
				w.want[i] = byte(r.Uint32()) | 1 // no valid entry
			}
			if _, err := w.im.WriteAt(w.want, 0); err != nil {
				t.Fatal(err)
			}
			if _, err := w.im.CreateSnapshot("s", SnapshotOptions{}); err != nil {
				t.Fatal(err)
			}
			if err := w.im.Close(); err != nil {
				t.Fatal(err)
			}
			w.editSnapshot(t, func(s *Snapshot) { change(w, s) })
			w.open(t)
			if err := w.im.ApplySnapshot("s"); err == nil {
				t.Error("the snapshot was applied")
			}
			w.verify(t, 0, int64(len(w.want)))
			if err := w.im.DeleteSnapshot("s"); err == nil && name != "huge disk" {
				t.Error("the snapshot was deleted without a complaint")
			}
			w.verify(t, 0, int64(len(w.want)))
			w.reopen(t)
			w.verify(t, 0, int64(len(w.want)))
			if err := w.im.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func (w *world) poke(at int64, word uint64) {
	if _, err := w.file.WriteAt(binary.BigEndian.AppendUint64(nil, word), at); err != nil {
		w.t.Fatal(err)
	}
}

// peek returns the offset in a table word.
func (w *world) peek(at int64) int64 {
	var p [8]byte
	if err := storage.ReadFull(w.file, p[:], at); err != nil {
		w.t.Fatal(err)
	}
	return int64(binary.BigEndian.Uint64(p[:]) & entryOffsetMask)
}

// TestOperation: the state of an operation survives its encoding, and nothing that makes no sense is taken for one.
func TestOperation(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h := &Header{Version: 3, ClusterBits: uint32(rapid.IntRange(9, 21).Draw(t, "cluster_bits")), RefcountOrder: 4}
		g := newGeometry(h)
		entries := rapid.Int64Range(0, maxL1Bytes/8).Draw(t, "entries")
		o := operation{
			kind: opKind(rapid.IntRange(1, 3).Draw(t, "kind")), tree: hostOff(rapid.Int64Range(0, 1<<56).Draw(t, "tree")), entries: entries,
			next: treePos{rapid.Int64Range(0, entries).Draw(t, "entry"), rapid.Int64Range(0, g.tableChunks()-1).Draw(t, "chunk")},
		}
		raw := o.encode()
		if got, ok := decodeOperation(raw, &g); !ok || got != o {
			t.Fatalf("%+v became %+v, %v", o, got, ok)
		}
		raw[rapid.IntRange(32, 63).Draw(t, "byte")] = 1
		if got, ok := decodeOperation(raw, &g); ok {
			t.Fatalf("%x was taken for %+v", raw, got)
		}
	})
}

// TestCostSnapshot: copying what a snapshot shares costs no more barriers than any copy-on-write, however many
// clusters a flush covers.
func TestCostSnapshot(t *testing.T) {
	withoutRace(t)
	for how, most := range map[string]float64{Ordered: 4, Journal: 2, Lazy: 4} {
		im, f := costImage(t, CreateOptions{Size: 1 << 30}, Options{Discipline: how})
		data := bytes.Repeat([]byte{1}, 1<<20)
		for off := int64(0); off < im.Size(); off += 8 << 20 {
			if _, err := im.WriteAt(data, off); err != nil {
				t.Fatal(err)
			}
		}
		f.reset()
		if _, err := im.CreateSnapshot("s", SnapshotOptions{}); err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: taking a snapshot of 2048 clusters: %d syncs, %d writes, %d bytes", how, f.syncs.Load(), f.writes.Load(), f.bytes.Load())
		for round := range 4 {
			f.reset()
			for i := range int64(64) {
				at := (i*2+int64(round)*2*64)%2048/16*(8<<20) + i%16*65536
				if _, err := im.WriteAt(data[:4096], at); err != nil {
					t.Fatal(err)
				}
			}
			if err := im.Flush(); err != nil {
				t.Fatal(err)
			}
			t.Logf("%s: 64 copy-on-writes and a flush: %d syncs, %d writes", how, f.syncs.Load(), f.writes.Load())
			if syncs := float64(f.syncs.Load()); syncs > most {
				t.Errorf("%s: 64 copy-on-writes and a flush cost %.0f syncs, want at most %.0f", how, syncs, most)
			}
		}
	}
}

// TestSnapshotConcurrent takes, reads, applies and deletes snapshots while requests are under way: what a
// snapshot shows never changes.
func TestSnapshotConcurrent(t *testing.T) {
	for _, how := range Disciplines() {
		t.Run(how, func(t *testing.T) {
			w := written(t, modelConfig{how: how, discard: true, cache: 1, create: CreateOptions{Size: 128 << 10, ClusterSize: 512, Version: 3}})
			ctx, stop := context.WithCancel(t.Context())
			var eg errgroup.Group
			for i := range uint64(3) {
				eg.Go(func() error {
					r, p := rand.New(rand.NewPCG(i, 4)), make([]byte, 3000)
					for ctx.Err() == nil {
						off, n := r.Int64N(w.im.Size()-3000), 1+r.IntN(3000)
						var err error
						switch r.IntN(6) {
						case 0:
							err = w.im.Flush()
						case 1:
							err = w.im.Discard(off, int64(n))
						case 2:
							_, err = w.im.ReadAt(p[:n], off)
						default:
							p[0]++
							_, err = w.im.WriteAt(p[:n], off)
						}
						if err != nil {
							return err
						}
					}
					return nil
				})
			}
			for range 8 {
				s, err := w.im.CreateSnapshot("s", SnapshotOptions{})
				if err != nil {
					t.Fatal(err)
				}
				d, err := w.im.SnapshotDevice(s.ID)
				if err != nil {
					t.Fatal(err)
				}
				var seen [3][]byte
				for k := range seen {
					seen[k] = make([]byte, d.Size())
					if _, err := d.ReadAt(seen[k], 0); err != nil {
						t.Fatal(err)
					}
					if k == 1 {
						if err := w.im.ApplySnapshot(s.ID); err != nil {
							t.Fatal(err)
						}
					}
				}
				if !bytes.Equal(seen[0], seen[1]) || !bytes.Equal(seen[0], seen[2]) {
					t.Fatal("the snapshot changed")
				}
				if err := errors.Join(d.Close(), w.im.DeleteSnapshot(s.ID)); err != nil {
					t.Fatal(err)
				}
			}
			stop()
			if err := eg.Wait(); err != nil {
				t.Fatal(err)
			}
			w.cleanAfter(t)
		})
	}
}

// TestLazyMarksHeaderChanges: under lazy the dirty bit is durable before the header points to what is not counted
// on the disk, even if no table changed yet.
func TestLazyMarksHeaderChanges(t *testing.T) {
	for name, change := range map[string]func(im *Image) error{
		"grow":     func(im *Image) error { return im.Resize(1<<20, 0) },
		"snapshot": func(im *Image) error { _, err := im.CreateSnapshot("s", SnapshotOptions{}); return err },
	} {
		w := newWorld(t, t, modelConfig{how: Lazy, create: CreateOptions{Size: 32 << 10, ClusterSize: 512, Version: 3}}, 1)
		if err := change(w.im); err != nil {
			t.Fatal(err)
		}
		if h, err := ReadHeader(w.file); err != nil || h.Incompatible&IncompatDirty == 0 {
			t.Errorf("%s: the image is not marked dirty (%v)", name, err)
		}
		w.cleanAfter(t)
	}
}
