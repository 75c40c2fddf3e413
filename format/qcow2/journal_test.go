package qcow2

import (
	"bytes"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"

	"github.com/platter-disk/platter/storage"
)

func journalWorld(t *testing.T, cfg modelConfig) *world {
	t.Helper()
	cfg.how = Journal
	cfg.create.Version = 3
	if cfg.create.RefcountBits == 0 {
		cfg.create.RefcountBits = 16
	}
	if cfg.backing > 0 {
		cfg.create.BackingFile, cfg.create.BackingFormat = "base", "raw"
	}
	return newWorld(t, t, cfg, 11)
}

// TestJournalCrash leaves an image with its journal pending: QEMU refuses it by our feature's name, a
// read-only open and a check see through the journal and write nothing, and a writable open replays it
// without a leak.
func TestJournalCrash(t *testing.T) {
	w := journalWorld(t, modelConfig{create: CreateOptions{Size: 4 << 20, ClusterSize: 65536}, backing: 4 << 20})
	r := rand.New(rand.NewPCG(3, 3))
	for range 200 {
		w.step(t, r)
	}
	if err := w.im.Flush(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "crashed.qcow2")
	saveImage(t, w.file, path)
	code, _, stderr := qemu(t, "qemu-img", "info", path)
	if code != 1 || !strings.Contains(stderr, "Unsupported qcow2 feature(s): "+journalFeatureName) {
		t.Errorf("qemu-img info: exit %d, %q; want a refusal by the feature's name", code, stderr)
	}

	notes := ""
	res, err := Check(w.file, CheckOptions{Report: func(f Finding) { notes += f.Message + "\n" }})
	if err != nil || !res.Clean() || !strings.Contains(notes, "transactions pending") {
		t.Errorf("check of the crashed image: %+v, %v, %q; want nothing wrong and the pending transactions named", res, err, notes)
	}

	before := loadImage(t, path)
	ro, err := Open(keepOpen{before}, Options{ReadOnly: true, Backing: w.backing})
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(w.want))
	if _, err := ro.ReadAt(got, 0); err != nil || !bytes.Equal(got, w.want) {
		t.Errorf("a read-only open of the crashed image reads something else (%v)", err)
	}
	if err := ro.Close(); err != nil {
		t.Error(err)
	}
	if !sameFile(t, before, w.file) {
		t.Error("the read-only open changed the file")
	}

	w.open(t) // the crashed image is abandoned
	w.verify(t, 0, int64(len(w.want)))
	if err := w.im.Close(); err != nil {
		t.Fatal(err)
	}
	w.judge(t, t)
}

func sameFile(t *testing.T, a, b storage.File) bool {
	t.Helper()
	var bytesOf [2][]byte
	for i, f := range []storage.File{a, b} {
		size, err := f.Size()
		if err != nil {
			t.Fatal(err)
		}
		bytesOf[i] = make([]byte, size)
		if err := storage.ReadFull(f, bytesOf[i], 0); err != nil {
			t.Fatal(err)
		}
	}
	return bytes.Equal(bytesOf[0], bytesOf[1])
}

// TestJournalWraps runs many commits through the smallest ring, so that it wraps and checkpoints all the time.
func TestJournalWraps(t *testing.T) {
	w := journalWorld(t, modelConfig{create: CreateOptions{Size: 2 << 20, ClusterSize: 512}})
	d := w.im.discipline.(*journal)
	d.ext.PreferredSize = minJournalBlocks * 512
	r := rand.New(rand.NewPCG(4, 4))
	p := make([]byte, 3*512)
	for range 400 {
		off := r.Int64N(int64(len(w.want)-len(p))/512) * 512
		for i := range p {
			p[i] = byte(r.Uint32())
		}
		if r.IntN(3) == 0 {
			clear(w.want[off : off+1024])
			if err := w.im.Discard(off, 1024); err != nil {
				t.Fatal(err)
			}
		} else {
			copy(w.want[off:], p)
			if _, err := w.im.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.im.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	if d.head < 3*d.ext.ringBlocks() {
		t.Errorf("the ring of %d blocks got %d: it should have wrapped", d.ext.ringBlocks(), d.head)
	}
	w.verify(t, 0, int64(len(w.want)))
	if err := w.im.Flush(); err != nil {
		t.Fatal(err)
	}
	d.inPlace.Wait() // a crash would have stopped the checkpoint; here it must not write later
	w.open(t)
	w.verify(t, 0, int64(len(w.want)))
	if err := w.im.Close(); err != nil {
		t.Fatal(err)
	}
	w.judge(t, t)
}

// TestJournalCost: an allocating write and a flush are one barrier, copied-up data owes one more.
func TestJournalCost(t *testing.T) {
	im, f := costImage(t, CreateOptions{Size: 1 << 30}, Options{Discipline: Journal})
	r := rand.New(rand.NewPCG(1, 1))
	writeFlush(t, im, r, 200, 1)
	f.reset()
	const n = 1000
	writeFlush(t, im, r, n, 1)
	syncs := float64(f.syncs.Load()) / n
	t.Logf("journal: an allocating write and a flush: %.4f syncs, %.3f writes, %d bytes", syncs, float64(f.writes.Load())/n, f.bytes.Load()/n)
	if syncs > 1.05 {
		t.Errorf("%.4f syncs an allocating write and flush, want 1", syncs)
	}
}

// TestJournalRepaired: check -r replays the journal; one that cannot be read is refused unless it is discarded.
func TestJournalRepaired(t *testing.T) {
	for _, broken := range []bool{false, true} {
		w := journalWorld(t, modelConfig{create: CreateOptions{Size: 1 << 20, ClusterSize: 4096}})
		r := rand.New(rand.NewPCG(8, 8))
		for range 60 {
			w.step(t, r)
		}
		if err := w.im.Flush(); err != nil {
			t.Fatal(err)
		}
		h, err := ReadHeader(w.file)
		if err != nil {
			t.Fatal(err)
		}
		if broken {
			if _, err := w.file.WriteAt(make([]byte, 2<<h.Journal.BlockOrder), int64(h.Journal.Offset)); err != nil {
				t.Fatal(err)
			}
			if _, err := Check(w.file, CheckOptions{Repair: RepairAll}); err == nil {
				t.Error("a journal without a superblock was repaired")
			}
		}
		res, err := Check(w.file, CheckOptions{Repair: RepairAll, DiscardJournal: broken})
		if err != nil || !res.Clean() {
			t.Fatalf("repair: %+v, %v", res, err)
		}
		if broken {
			continue // what the journal held is lost
		}
		w.open(t)
		w.verify(t, 0, int64(len(w.want)))
		if err := w.im.Close(); err != nil {
			t.Fatal(err)
		}
		w.judge(t, t)
	}
}

// TestJournalNeedsRoom: a header without room for the journal's extension is refused at open, not at a flush.
func TestJournalNeedsRoom(t *testing.T) {
	f := storage.NewMemory("image")
	err := Create(f, CreateOptions{Size: 1 << 20, ClusterSize: 512, BackingFile: strings.Repeat("b", 320), BackingFormat: "raw"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(f, Options{Discipline: Journal, NoBacking: true}); err == nil || !strings.Contains(err.Error(), "no room") {
		t.Errorf("open: %v; want a refusal for lack of room", err)
	}
}

// The name of the journal's feature is in the header of every image that has room for it: it is what other programs
// show when they refuse a crashed one.
func TestJournalIsNamed(t *testing.T) {
	for _, c := range []struct {
		cluster int64
		backed  bool
		named   bool
	}{
		{512, false, false}, {1024, false, true}, {1024, true, false}, {2048, true, false},
		{4096, false, true}, {4096, true, true}, {65536, false, true}, {65536, true, true},
	} {
		cfg := modelConfig{create: CreateOptions{Size: 1 << 20, ClusterSize: c.cluster}}
		if c.backed {
			cfg.backing = 1 << 20
		}
		w := journalWorld(t, cfg)
		if _, err := w.im.WriteAt([]byte("x"), 0); err != nil {
			t.Fatal(err)
		}
		if err := w.im.Flush(); err != nil {
			t.Fatal(err)
		}
		h, err := ReadHeader(w.file)
		if err != nil {
			t.Fatal(err)
		}
		named := false
		for _, e := range h.Extensions {
			if e.Type == extFeatureNames {
				for _, n := range decodeFeatureNames(e.Data) {
					named = named || n == featureName{featureIncompatible, journalFeatureBit, journalFeatureName}
				}
			}
		}
		if named != c.named {
			t.Errorf("clusters of %d bytes, backing file %v: the feature is named: %v, want %v", c.cluster, c.backed, named, c.named)
		}
	}
}
