package qcow2

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/storage"
)

// writeCounter counts changes.
type writeCounter struct {
	*storage.Memory
	n int
}

func (w *writeCounter) WriteAt(p []byte, off int64) (int, error) {
	w.n++
	return w.Memory.WriteAt(p, off)
}

func (w *writeCounter) Truncate(size int64) error {
	w.n++
	return w.Memory.Truncate(size)
}

// copyImage returns a copy of an image.
func copyImage(t testing.TB, f storage.File) *storage.Memory {
	t.Helper()
	m := storage.NewMemory(f.Name())
	copyInto(t, m, f)
	return m
}

func copyInto(t testing.TB, to, from storage.File) {
	t.Helper()
	size, err := from.Size()
	if err != nil {
		t.Fatal(err)
	}
	if err := to.Truncate(size); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 512)
	for off := int64(0); off < size; off += 512 {
		p := buf[:min(512, size-off)]
		if err := storage.ReadFull(from, p, off); err != nil {
			t.Fatal(err)
		}
		if bytes.Count(p, []byte{0}) < len(p) {
			apply(t, to, edit{off, p})
		}
	}
}

// TestRepairRandomDamage repairs what TestCheckRandomDamage damages. Our own second examination, QEMU's
// examination of the repaired image and a second repair must all agree, and no byte of the disk may change.
func TestRepairRandomDamage(t *testing.T) {
	rounds, seed := envInt(t, "PLATTER_CHECK_ROUNDS", fewer(60)), envInt(t, "PLATTER_CHECK_SEED", 1)
	images := scenarios(t)
	names := slices.Sorted(func(yield func(string) bool) {
		for name := range images {
			if !yield(name) {
				return
			}
		}
	})
	bad := 0
	repaired, left := 0, 0
	for round := range rounds {
		r := rand.New(rand.NewPCG(uint64(seed)+1000, uint64(round)))
		name := names[r.IntN(len(names))]
		f := copyImage(t, images[name])
		edits := randomDamage(t, r, f)
		apply(t, f, edits...)
		damaged := copyImage(t, f)
		mode := RepairAll
		if round%4 == 3 {
			mode = RepairLeaks
		}
		problem, clean := repairProblem(t, damaged, f, mode)
		if problem != "" {
			t.Errorf("seed %d round %d: %s of %s with %x\n%s", seed, round, mode, name, edits, problem)
			if bad++; bad > 5 {
				break
			}
		}
		if clean {
			repaired++
		} else {
			left++
		}
	}
	t.Logf("%d images repaired, %d damaged beyond that", repaired, left)
	if repaired == 0 || left == 0 {
		t.Error("one of the outcomes never happened")
	}
}

// repairProblem repairs f and says what is wrong with the outcome; clean tells whether nothing is left to do.
func repairProblem(t *testing.T, damaged, f *storage.Memory, mode Repair) (problem string, clean bool) {
	t.Helper()
	before, _ := ourVerdict(t, f, RepairNone)
	result, _ := ourVerdict(t, f, mode)
	if result.failed {
		return "", false
	}
	after, collisions := ourVerdict(t, f, RepairNone)
	fixed := result.result.CorruptionsFixed + result.result.LeaksFixed
	result.result.CorruptionsFixed, result.result.LeaksFixed = 0, 0
	if result.result != after.result {
		return "the repair says " + mustJSON(result.result) + ", an examination " + mustJSON(after.result), false
	}
	if size, err := f.Size(); err != nil || size > 1<<43 {
		return "", false // a repair made it larger than a local file can be
	}
	theirs := qemuVerdict(t, f)
	if !readsGarbage(theirs, collisions) {
		if diff := diffVerdicts(after, theirs); diff != "" {
			return "after the repair:\n" + diff, false
		}
	}
	// Leaks given back leave COPIED flags that are clear and could be set; only "all" sets them, and not in
	// tables that are something else as well.
	if after.result.Corruptions > before.result.Corruptions && !before.failed && mode == RepairAll && len(collisions) == 0 {
		return fmt.Sprintf("%d corruptions before, %d after", before.result.Corruptions, after.result.Corruptions), false
	}
	if fixed == 0 && before.exitCode() == 0 && after.exitCode() != 0 {
		return "an image in order was damaged", false
	}
	again := &writeCounter{Memory: f}
	if _, err := Check(again, CheckOptions{Repair: mode}); err != nil || again.n > 0 {
		return fmt.Sprintf("a second repair writes %d times (%v)", again.n, err), false
	}
	if mode == RepairAll && len(collisions) == 0 && after.result.Leaks > 0 {
		return fmt.Sprintf("%d leaks left", after.result.Leaks), false
	}
	dir := t.TempDir()
	a, b := filepath.Join(dir, "before"), filepath.Join(dir, "after")
	saveImage(t, damaged, a)
	saveImage(t, f, b)
	if code, out, _ := qemu(t, "qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", a, b); code == 1 {
		return "the disk reads differently: " + out, false
	}
	return "", after.exitCode() == 0 && len(collisions) == 0
}

// TestRepairCrash crashes repairs between and in the middle of their writes. From every state a repair must
// reach the same outcome as the one that was not interrupted, and none may be worse than the damage was.
func TestRepairCrash(t *testing.T) {
	budget := envInt(t, "PLATTER_CRASH_STATES", 150)
	for _, d := range []struct {
		name string
		make func(t testing.TB) *storage.Memory
	}{
		{"leaks", func(t testing.TB) *storage.Memory { return damagedImage(t, setCount(20, 1), setCount(6, 3)) }},
		{"counts too low, dirty", func(t testing.TB) *storage.Memory {
			return damagedImage(t, setCount(5, 0), setCount(20, 1), at64(72, IncompatDirty|IncompatCorrupt))
		}},
		{"COPIED", func(t testing.TB) *storage.Memory {
			return damagedImage(t, at64(4*4096+8, 6*4096), at64(3*4096, 4*4096))
		}},
		{"refcount table entry", func(t testing.TB) *storage.Memory { return damagedImage(t, at64(4096, 2*4096|1)) }},
		{"no refcount block", func(t testing.TB) *storage.Memory { return damagedImage(t, at64(4096, 0)) }},
		{"unaligned zeros", func(t testing.TB) *storage.Memory { return damagedImage(t, at64(4*4096+8, 6*4096+513)) }},
		{"snapshot table", snapshotDamage},
	} {
		t.Run(d.name, func(t *testing.T) {
			damaged := d.make(t)
			before, _ := ourVerdict(t, damaged, RepairNone)
			if before.exitCode() == 0 {
				t.Fatal("nothing is wrong with the image")
			}
			lab, err := crashlab.NewLab(crashlab.FileSpec{Name: "disk"})
			if err != nil {
				t.Fatal(err)
			}
			copyInto(t, lab.Files()[0], damaged)
			lab.Settle()
			if _, err := Check(lab.Files()[0], CheckOptions{Repair: RepairAll}); err != nil {
				t.Fatal(err)
			}
			if after, _ := ourVerdict(t, lab.Files()[0], RepairNone); after.exitCode() != 0 {
				t.Fatalf("not repaired: %+v", after)
			}
			n := 0
			for _, model := range []crashlab.Model{{Tear: 512}, {Tear: 4096, Poison: true}} {
				states, err := lab.Crashes(model, budget, 1)
				if err != nil {
					t.Fatal(err)
				}
				for state := range states {
					n++
					f := state.Files()[0]
					now, _ := ourVerdict(t, f, RepairNone)
					if !before.failed && (now.failed || now.result.Corruptions > before.result.Corruptions) {
						t.Fatalf("worse after a crash: %+v\nbefore %+v", now, before)
					}
					if _, err := Check(f, CheckOptions{Repair: RepairAll}); err != nil {
						t.Fatal(err)
					}
					if again, _ := ourVerdict(t, f, RepairNone); again.exitCode() != 0 {
						t.Fatalf("not repaired after a crash: %+v", again)
					}
					h, err := ReadHeader(f)
					if err != nil || h.Incompatible != 0 {
						t.Fatalf("%+v, %v", h, err)
					}
				}
			}
			t.Logf("%d crash states", n)
			if n < 2 {
				t.Error("nothing was explored")
			}
		})
	}
}

// damagedImage makes an image with clusters of 4 KiB: header, refcount table, refcount block, L1 table, L2
// table, and data in clusters 5 to 12; then it applies the edits.
func damagedImage(t testing.TB, edits ...edit) *storage.Memory {
	t.Helper()
	f := madeByQEMU.copyOf(t, "damagedImage", func() string {
		return qemuCreate(t, "cluster_size=4096", "1M", "write -P 1 0 32k")
	})
	if err := f.Truncate(24 * 4096); err != nil { // room for clusters that belong to nobody
		t.Fatal(err)
	}
	apply(t, f, edits...)
	return f
}

// setCount sets the count of a cluster of damagedImage.
func setCount(cluster int64, v uint16) edit {
	return atBytes(2*4096+2*cluster, byte(v>>8), byte(v))
}

// snapshotDamage makes an image with two snapshots, the first of which lacks extra data that version 3 demands.
func snapshotDamage(t testing.TB) *storage.Memory {
	f, snapshots := snapshotImage(t)
	// Move the id and the name, which follow the extra data, forward.
	tail := snapshots + snapshotFixedSize
	var text [8]byte
	if err := storage.ReadFull(f, text[:], tail+snapshotKnown); err != nil {
		t.Fatal(err)
	}
	apply(t, f, at32(snapshots+36, 0), edit{tail, text[:]}, at32(60, 1))
	return f
}

// snapshotImage makes an image with the snapshots "a" and "b" and returns where its snapshot table is.
func snapshotImage(t testing.TB) (f *storage.Memory, table int64) {
	t.Helper()
	f = madeByQEMU.copyOf(t, "snapshotImage", func() string {
		path := qemuCreate(t, "cluster_size=4096", "1M", "write -P 1 0 32k")
		for _, name := range []string{"a", "b"} {
			if code, _, errs := qemu(t, "qemu-img", "snapshot", "-c", name, path); code != 0 {
				t.Fatal(errs)
			}
			qemuIO(t, path, "write -P 2 8k 4k")
		}
		return path
	})
	h, err := ReadHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	return f, int64(h.SnapshotsOffset)
}

// A failing file leaves an error and an image that can be repaired later.
func TestRepairFaults(t *testing.T) {
	for _, d := range [][]edit{
		{setCount(5, 0), setCount(20, 1), at64(72, IncompatDirty)},
		{at64(4096, 2*4096|1)},
	} {
		for n := 1; ; n++ {
			f := &faulty{Memory: damagedImage(t, d...), left: n}
			_, err := Check(f, CheckOptions{Repair: RepairAll})
			if err == nil && f.left > 0 {
				break // the fault lies past the end of the repair
			}
			if err == nil || !strings.Contains(err.Error(), "injected") {
				t.Fatalf("change %d fails, the repair says %v", n, err)
			}
			if _, err := Check(f.Memory, CheckOptions{Repair: RepairAll}); err != nil {
				t.Fatal(err)
			}
			if v, _ := ourVerdict(t, f.Memory, RepairNone); v.exitCode() != 0 {
				t.Fatalf("change %d failed; later: %+v", n, v)
			}
			if n > 100 {
				t.Fatal("the repair does not come to an end")
			}
		}
	}
}

// faulty fails the left-th change.
type faulty struct {
	*storage.Memory
	left int
}

func (f *faulty) hit() error {
	if f.left--; f.left == 0 {
		return fmt.Errorf("injected fault")
	}
	return nil
}

func (f *faulty) WriteAt(p []byte, off int64) (int, error) {
	if err := f.hit(); err != nil {
		return 0, err
	}
	return f.Memory.WriteAt(p, off)
}

func (f *faulty) Sync() error {
	if err := f.hit(); err != nil {
		return err
	}
	return f.Memory.Sync()
}

func TestRepairDirty(t *testing.T) {
	f := damagedImage(t, setCount(5, 0), setCount(6, 7), at64(72, IncompatDirty))
	h, err := ReadHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	if err := repairDirty(f, h); err != nil {
		t.Fatal(err)
	}
	if h.Incompatible != 0 {
		t.Errorf("the header in memory still says %#x", h.Incompatible)
	}
	if v, _ := ourVerdict(t, f, RepairNone); v.exitCode() != 0 {
		t.Errorf("left: %+v", v)
	}
	if h, err = ReadHeader(f); err != nil || h.Incompatible != 0 {
		t.Errorf("%+v, %v", h, err)
	}
	// Beyond repair: an L2 table that is data as well.
	f = damagedImage(t, setCount(5, 0), at64(4*4096+8, 1<<63|4*4096), at64(72, IncompatDirty))
	if h, err = ReadHeader(f); err != nil {
		t.Fatal(err)
	}
	if err := repairDirty(f, h); err == nil || !strings.Contains(err.Error(), "two owners: L2 table, data cluster") {
		t.Errorf("got %v, want the collision", err)
	}
	if h, err = ReadHeader(f); err != nil || h.Incompatible != IncompatDirty {
		t.Errorf("%+v, %v", h, err)
	}
}
