package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"

	"github.com/platter-disk/platter/block"
)

// kept is what a snapshot must hold.
type kept struct {
	Snapshot
	bytes []byte
}

// snapshotStep takes, applies, deletes or reads a snapshot.
func (w *world) snapshotStep(f fataler, r *rand.Rand, list []kept) []kept {
	pick := func() int { return r.IntN(len(list)) }
	switch op := r.IntN(6); {
	case op < 2 || len(list) == 0:
		s, err := w.im.CreateSnapshot(fmt.Sprint("s", r.IntN(3)), SnapshotOptions{})
		if errors.Is(err, errRefcountWidth) && w.cfg.create.RefcountBits < 8 {
			return list
		}
		if err != nil {
			f.Fatalf("%v: create snapshot: %v", w.cfg, err)
		}
		list = append(list, kept{s, bytes.Clone(w.want)})
	case op == 2:
		i := pick()
		err := w.im.ApplySnapshot(list[i].ID)
		if w.im.geo.version < 3 && len(list[i].bytes) != len(w.want) {
			if err == nil {
				f.Fatalf("a version 2 image with snapshots changed its size")
			}
			return list
		}
		if errors.Is(err, errRefcountWidth) && w.cfg.create.RefcountBits < 8 {
			return list
		}
		if err != nil {
			f.Fatalf("%v: apply snapshot: %v", w.cfg, err)
		}
		w.want = bytes.Clone(list[i].bytes)
		if w.im.Size() != int64(len(w.want)) {
			f.Fatalf("the disk has %d bytes, had %d", w.im.Size(), len(w.want))
		}
		w.verify(f, 0, int64(len(w.want)))
	case op == 3:
		i := pick()
		if err := w.im.DeleteSnapshot(list[i].ID); err != nil {
			f.Fatalf("%v: delete snapshot: %v", w.cfg, err)
		}
		list = append(list[:i:i], list[i+1:]...)
	default:
		w.verifySnapshot(f, list[pick()])
	}
	return list
}

func (w *world) verifySnapshot(f fataler, k kept) {
	d, err := w.im.SnapshotDevice(k.ID)
	if err != nil {
		f.Fatalf("%v: snapshot device: %v", w.cfg, err)
	}
	defer d.Close()
	got := make([]byte, d.Size())
	if _, err := d.ReadAt(got, 0); err != nil && len(got) > 0 {
		f.Fatalf("read snapshot: %v", err)
	}
	if !bytes.Equal(got, k.bytes) {
		f.Fatalf("%v: snapshot %s holds something else (%d bytes, want %d)", w.cfg, k.ID, len(got), len(k.bytes))
	}
	if _, err := d.WriteAt([]byte{1}, 0); !errors.Is(err, block.ErrReadOnly) {
		f.Fatalf("a write to a snapshot: %v", err)
	}
	if err := w.im.DeleteSnapshot(k.ID); !errors.Is(err, ErrSnapshotInUse) {
		f.Fatalf("deleting a snapshot in use: %v", err)
	}
}

// TestSnapshotModel mixes snapshots with everything else, against byte arrays.
func TestSnapshotModel(t *testing.T) {
	fewerChecks(t)
	rapid.Check(t, func(rt *rapid.T) {
		cfg := drawConfig(rt)
		if cfg.create.DataFileName != "" {
			cfg.create.DataFileName, cfg.create.DataFileRaw = "", false
		}
		seed := rapid.Uint64().Draw(rt, "seed")
		steps := rapid.IntRange(1, 80).Draw(rt, "steps")
		w := newWorld(t, rt, cfg, seed)
		r := rand.New(rand.NewPCG(seed, 3))
		var list []kept
		for range steps {
			w.step(rt, r)
			if r.IntN(3) == 0 {
				list = w.snapshotStep(rt, r, list)
			}
		}
		w.verify(rt, 0, int64(len(w.want)))
		w.reopen(rt)
		w.verify(rt, 0, int64(len(w.want)))
		for _, k := range list {
			w.verifySnapshot(rt, k)
		}
		if err := w.im.Close(); err != nil {
			rt.Fatalf("close: %v", err)
		}
		w.judge(t, rt)
	})
}
