package qcow2

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
)

// plainDamage damages an image made by damagedImage.
func plainDamage(edits ...edit) func(testing.TB) *storage.Memory {
	return func(t testing.TB) *storage.Memory { return damagedImage(t, edits...) }
}

// qemuDamage damages an image that QEMU makes with the given options and qemu-io script; 4 KiB clusters give
// it the layout of damagedImage.
func qemuDamage(options, script string, edits ...edit) func(testing.TB) *storage.Memory {
	return func(t testing.TB) *storage.Memory {
		f := loadImage(t, qemuCreate(t, options, "1M", script))
		apply(t, f, edits...)
		return f
	}
}

// snapshotEdits damages an image made by snapshotImage; offsets are relative to the snapshot table.
func snapshotEdits(edits ...edit) func(testing.TB) *storage.Memory {
	return func(t testing.TB) *storage.Memory {
		f, table := snapshotImage(t)
		for _, e := range edits {
			e.off += table
			apply(t, f, e)
		}
		return f
	}
}

func headerEdits(build func(testing.TB) *storage.Memory, edits ...edit) func(testing.TB) *storage.Memory {
	return func(t testing.TB) *storage.Memory {
		f := build(t)
		apply(t, f, edits...)
		return f
	}
}

const (
	l1At = 3 * 4096
	l2At = 4 * 4096
	fat  = 1 << 63 // COPIED
)

// damage has one image for every class of inconsistency in the qcow2 notes (section 21.4).
var damage = []struct {
	name string
	make func(testing.TB) *storage.Memory
	want []string // lines that an examination prints
	exit int      // of an examination

	leaks, all int    // exit codes of the repairs
	ours       string // why a repair differs from QEMU's; then only the exit code is compared with the table
}{
	{name: "leak", make: plainDamage(setCount(20, 1)), want: []string{"Leaked cluster 20 refcount=1 reference=0"}, exit: 3},
	{name: "leaked share", make: plainDamage(setCount(6, 3)), want: []string{"Leaked cluster 6 refcount=3 reference=1", "ERROR OFLAG_COPIED data cluster: l2_entry=8000000000006000 refcount=3"}, exit: 2},
	{
		name: "count too low", make: plainDamage(at64(l2At+8, 7*4096)), exit: 2, leaks: 2,
		want: []string{"ERROR cluster 7 refcount=1 reference=2", "Leaked cluster 6 refcount=1 reference=0", "ERROR OFLAG_COPIED data cluster: l2_entry=7000 refcount=1"},
		ours: "QEMU repairs and counts a flag once for each pass",
	},
	{name: "count zero", make: plainDamage(setCount(5, 0)), want: []string{"ERROR cluster 5 refcount=0 reference=1"}, exit: 2, leaks: 1, ours: "QEMU rebuilds all blocks for it"},
	{name: "COPIED of a table", make: plainDamage(at64(l1At, l2At)), want: []string{"ERROR OFLAG_COPIED L2 cluster: l1_index=0 l1_entry=4000 refcount=1"}, exit: 2},
	{name: "COPIED of data", make: plainDamage(at64(l2At+8, 6*4096)), want: []string{"ERROR OFLAG_COPIED data cluster: l2_entry=6000 refcount=1"}, exit: 2},
	{
		name: "data unaligned", make: plainDamage(at64(l2At+56, fat|5*4096+512)), exit: 2, leaks: 2, all: 2,
		want: []string{"ERROR offset=5200: Data cluster is not properly aligned; L2 entry corrupted.", "ERROR cluster 6 refcount=1 reference=2"},
		ours: "QEMU repairs and counts a flag once for each pass",
	},
	{
		name: "zeros unaligned", make: plainDamage(at64(l2At+8, 6*4096+513)), exit: 2, leaks: 2,
		want: []string{"ERROR offset=6200: Preallocated cluster is not properly aligned; L2 entry corrupted."},
	},
	{name: "L2 reserved bits", make: plainDamage(at64(l2At+8, fat|6*4096|4)), want: []string{"ERROR found l2 entry with reserved bits set: 8000000000006004"}, exit: 2, leaks: 2, all: 2},
	{name: "L1 reserved bits", make: plainDamage(at64(l1At, fat|l2At|4)), want: []string{"ERROR found L1 entry with reserved bits set: 8000000000004004"}, exit: 2, leaks: 2, all: 2},
	{
		name: "L1 unaligned", make: plainDamage(at64(l1At, fat|22*4096+512), setCount(22, 1), setCount(23, 1)), exit: 2, leaks: 2, all: 2,
		want: []string{"ERROR l2_offset=16200: Table is not cluster aligned; L1 entry corrupted"}, ours: "QEMU reads a table there all the same",
	},
	{
		name: "compressed and COPIED", make: qemuDamage("cluster_size=4096", "write -c -P 1 0 4k", at64(l2At, fat|entryCompressed|5*4096)), exit: 2, leaks: 2, all: 2,
		want: []string{"ERROR: coffset=0x5000: copied flag must never be set for compressed clusters"},
	},
	{
		name: "compressed with bitmap", make: qemuDamage("cluster_size=16384,extended_l2=on", "write -c -P 1 0 16k", at64(4*16384+8, 1)), exit: 2, leaks: 2, all: 2,
		want: []string{"ERROR compressed cluster 0 with non-zero subcluster allocation bitmap, entry=0x4000000000014000"},
	},
	{
		name: "allocated and zero", make: qemuDamage("cluster_size=16384,extended_l2=on", "write -P 1 0 16k", at64(4*16384+8, 1<<32|0xffffffff)), exit: 2, leaks: 2, all: 2,
		want: []string{"ERROR offset=14000: Allocated cluster has corrupted subcluster allocation bitmap"},
	},
	{
		name: "allocated without cluster", make: qemuDamage("cluster_size=16384,extended_l2=on", "write -P 1 0 16k", at64(4*16384+16+8, 1)), exit: 2, leaks: 2, all: 2,
		want: []string{"ERROR: Unallocated cluster has non-zero subcluster allocation map"},
	},
	{
		name: "past the end", make: plainDamage(at64(l2At+8, fat|100*4096)), exit: 2, leaks: 2, all: 2,
		want: []string{"ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset 0x64000 size 0x1000"},
	},
	{
		name: "count overflow", make: qemuDamage("cluster_size=4096,refcount_bits=1", "write -P 1 0 8k", at64(l2At+8, 5*4096)), exit: 2, leaks: 2, all: 2,
		want: []string{"ERROR: overflow cluster offset=0x5000"},
	},
	{
		name: "table entry reserved bits", make: plainDamage(at64(4096, 2*4096|1)), exit: 2, leaks: 1,
		want: []string{"ERROR refcount table entry 0 has reserved bits set"}, ours: "QEMU 7.2 gives up and marks the image corrupt",
	},
	{
		name: "block unaligned", make: plainDamage(at64(4096, 2*4096+512)), exit: 1, leaks: 1,
		want: []string{"ERROR refcount block 0 is not cluster aligned; refcount table entry corrupted", "Can't get refcount for cluster 0: Input/output error"},
		ours: "QEMU 7.2 gives up and marks the image corrupt",
	},
	{
		name: "block outside", make: plainDamage(at64(4096, 100*4096)), exit: 2, leaks: 1,
		want: []string{"ERROR refcount block 0 is outside image"}, ours: "QEMU extends the file before it rebuilds",
	},
	{
		name: "block used twice", make: plainDamage(at64(4096+8, 2*4096)), exit: 2, leaks: 1,
		want: []string{"ERROR refcount block 1 refcount=2"}, ours: "QEMU 7.2 gives up and marks the image corrupt",
	},
	{
		name: "no refcount table", make: plainDamage(at32(56, 0)), exit: 2, leaks: 1,
		want: []string{"ERROR cluster 0 refcount=0 reference=1", "ERROR cluster 12 refcount=0 reference=1"}, ours: "the counters differ",
	},
	{
		name: "snapshot L1 unaligned", make: snapshotEdits(at64(0, 0x123400)), exit: 2, leaks: 2, all: 2,
		want: []string{"ERROR snapshot 1 (a) l1_offset=0x123400: L1 table is not cluster aligned; snapshot table entry corrupted"},
		ours: "QEMU repairs and counts a flag once for each pass",
	},
	{
		name: "snapshot L1 too large", make: snapshotEdits(at32(8, 4194305)), exit: 2, leaks: 2, all: 2,
		want: []string{"ERROR snapshot 1 (a) l1_size=0x400001: L1 table is too large; snapshot table entry corrupted"},
		ours: "QEMU repairs and counts a flag once for each pass",
	},
	{
		name: "snapshot incomplete", make: snapshotDamage, exit: 2, leaks: 2,
		want: []string{"ERROR snapshot table entry 0 is incomplete"}, ours: "a new table always comes with new reference counts",
	},
	{
		name: "snapshot extra data", make: snapshotEdits(at32(72+36, 2000)), exit: 1, leaks: 1,
		want: []string{
			"ERROR failed to read the snapshot table: Too much extra metadata in snapshot table entry 1",
			"You can force-remove this extra metadata with qemu-img check -r all", "Check failed: File too large",
		},
		ours: "a new table always comes with new reference counts",
	},
	{
		name: "too many snapshots", make: headerEdits(snapshotEdits(), at32(60, 65540)), exit: 1, leaks: 1,
		want: []string{
			"ERROR snapshot table too large", "Check failed: File too large",
			"You can force-remove all 4 overhanging snapshots with qemu-img check -r all",
		},
		ours: "QEMU 7.2 gives up and marks the image corrupt",
	},
	{
		name: "snapshot table too big", make: manySnapshots, exit: 1, leaks: 1,
		want: []string{
			"ERROR failed to read the snapshot table: Snapshot table is too big", "Check failed: File too large",
			"You can force-remove all 1 overhanging snapshots with qemu-img check -r all",
		},
		ours: "a new table always comes with new reference counts",
	},
	{
		name: "snapshot table unaligned", make: headerEdits(snapshotEdits(), at64(64, 0x12345)), exit: 1, leaks: 1, all: 1,
		want: []string{"ERROR snapshot table offset invalid", "Check failed: Invalid argument"},
	},
	{name: "dirty and corrupt", make: plainDamage(at64(72, 3))},
}

// manySnapshots makes an image whose 1024 snapshots have names so long that the last one ends past 64 MiB.
func manySnapshots(t testing.TB) *storage.Memory {
	f := damagedImage(t)
	const table, n = 64 << 12, 1024
	entry := appendSnapshot(nil, &Snapshot{ID: "1", Name: strings.Repeat("n", 65535)})
	pos := int64(0)
	for range n {
		pos = (pos + 7) &^ 7
		apply(t, f, edit{table + pos, entry[:snapshotFixedSize]}) // the names may as well be NULs
		pos += int64(len(entry))
	}
	apply(t, f, at32(60, n), at64(64, table))
	if err := f.Truncate(table + pos); err != nil {
		t.Fatal(err)
	}
	return f
}

func TestCheckDamage(t *testing.T) {
	for i, d := range damage {
		if !sampled(i) {
			continue
		}
		t.Run(d.name, func(t *testing.T) {
			f := d.make(t)
			pristine := &writeCounter{Memory: f}
			ours, collisions := ourVerdict(t, pristine, RepairNone)
			if pristine.n > 0 {
				t.Error("an examination writes")
			}
			if len(collisions) > 0 {
				t.Logf("%q", collisions)
			}
			for _, w := range d.want {
				if !slices.Contains(ours.lines, w) {
					t.Errorf("%q is not among %q", w, ours.lines)
				}
			}
			if got := ours.exitCode(); got != d.exit {
				t.Errorf("exit code %d, want %d: %+v", got, d.exit, ours)
			}
			theirs := qemuVerdict(t, f)
			if diff := diffVerdicts(ours, theirs); diff != "" && !readsGarbage(theirs, collisions) {
				t.Error(diff)
			}
			for mode, want := range map[Repair]int{RepairLeaks: d.leaks, RepairAll: d.all} {
				t.Run(mode.String(), func(t *testing.T) { compareRepairs(t, f, mode, want, d.ours != "") })
			}
		})
	}
}

// compareRepairs repairs copies of an image with Check and with qemu-img.
func compareRepairs(t *testing.T, damaged *storage.Memory, mode Repair, exit int, differs bool) {
	t.Helper()
	f := copyImage(t, damaged)
	ours, _ := ourVerdict(t, f, mode)
	if got := ours.exitCode(); got != exit {
		t.Errorf("exit code %d, want %d: %+v", got, exit, ours)
	}
	if snapshots := headerWord32(t, f, 60); (exit == 0 || exit == 3) && snapshots < 1000 { // QEMU is slow with more
		path := filepath.Join(t.TempDir(), "repaired.qcow2")
		saveImage(t, f, path)
		if code, _, errs := qemu(t, "qemu-img", "check", "-f", "qcow2", path); code != exit {
			t.Errorf("qemu-img check says of the repaired image: exit %d, %s", code, errs)
		}
	}
	if exit == 0 {
		if h, err := ReadHeader(f); err != nil || h.Incompatible&(IncompatDirty|IncompatCorrupt) != 0 {
			t.Errorf("header after the repair: %+v, %v", h, err)
		}
	}
	if differs {
		return
	}
	theirs := qemuVerdict(t, damaged, "-r", mode.String())
	if ours.failed != theirs.failed || ours.result != theirs.result {
		t.Errorf("ours   %s\ntheirs %s", mustJSON(ours.result), mustJSON(theirs.result))
	}
}

func headerWord32(t *testing.T, f storage.File, off int64) uint32 {
	t.Helper()
	var b [4]byte
	if err := storage.ReadFull(f, b[:], off); err != nil {
		t.Fatal(err)
	}
	return binary.BigEndian.Uint32(b[:])
}

func TestCheckDataFile(t *testing.T) {
	testenv.Need(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	path, data := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "data.raw")
	testenv.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096,data_file="+data, path, "1M")
	qemuIO(t, path, "write -P 1 0 32k")
	for _, d := range []struct {
		name  string
		edits []edit
		want  string
	}{
		{"compressed", []edit{at64(l2At+8, entryCompressed|5*4096)}, "ERROR compressed cluster 1 with data file, entry=0x4000000000005000"},
		{"snapshots", []edit{at32(60, 1), at64(64, 4096)}, "ERROR 1 snapshots in image with data file"},
		{"not COPIED", []edit{at64(l2At+8, 4096)}, "ERROR OFLAG_COPIED data cluster: l2_entry=1000 refcount=1"},
	} {
		t.Run(d.name, func(t *testing.T) {
			f := loadImage(t, path)
			apply(t, f, d.edits...)
			ours, _ := ourVerdict(t, f, RepairNone)
			if !slices.Contains(ours.lines, d.want) {
				t.Errorf("%q is not among %q", d.want, ours.lines)
			}
			damaged := filepath.Join(t.TempDir(), "damaged.qcow2")
			saveImage(t, f, damaged)
			theirs := qemuVerdictOf(t, "driver=qcow2,file.filename="+damaged+",data-file.driver=file,data-file.filename="+data, "--image-opts")
			if diff := diffVerdicts(ours, theirs); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// Two owners of one cluster are named, counted, and not made to look intended.
func TestCheckCollisions(t *testing.T) {
	dataOnBitmap := func(t testing.TB) *storage.Memory {
		path := qemuCreate(t, "cluster_size=4096", "1M", "write -P 1 0 32k")
		testenv.Run(t, "qemu-img", "bitmap", "--add", "-g", "512", path, "b")
		qemuIO(t, path, "write -P 1 0 4k")
		f := loadImage(t, path)
		h, err := ReadHeader(f)
		if err != nil {
			t.Fatal(err)
		}
		err = forEachBitmap(f, h, func(b Bitmap) error {
			apply(t, f, at64(l2At+8, fat|b.TableOffset))
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	sharedL1 := func(t testing.TB) *storage.Memory {
		f, table := snapshotImage(t)
		var first [8]byte
		if err := storage.ReadFull(f, first[:], table); err != nil {
			t.Fatal(err)
		}
		apply(t, f, edit{table + 72, first[:]})
		return f
	}
	for _, d := range []struct {
		name string
		make func(testing.TB) *storage.Memory
		want string
		all  int // exit code of a repair
	}{
		{"data on the header", plainDamage(at64(l2At+8, fat|entryZero)), "", 0}, // offset 0 is plain zeros, no collision
		{"data on the refcount table", plainDamage(at64(l2At+8, fat|4096)), "ERROR cluster 1 has two owners: data cluster, refcount table", 2},
		{"data on a refcount block", plainDamage(at64(l2At+8, fat|2*4096)), "ERROR cluster 2 has two owners: data cluster, refcount block", 0},
		{"data on the L1 table", plainDamage(at64(l2At+8, fat|l1At)), "ERROR cluster 3 has two owners: active L1 table, data cluster", 2},
		{"data on its L2 table", plainDamage(at64(l2At+8, fat|l2At)), "ERROR cluster 4 has two owners: L2 table, data cluster", 2},
		{"L2 on the header", plainDamage(at64(l1At, fat)), "ERROR cluster 0 has two owners: header, L2 table", 2},
		{"L2 on data", headerEdits(plainDamage(at64(l1At+8, fat|6*4096)), at32(36, 2)), "ERROR cluster 6 has two owners: L2 table, data cluster", 2},
		{"compressed on data", plainDamage(at64(l2At+8, entryCompressed|7*4096)), "ERROR cluster 7 has two owners: compressed data, data cluster", 2},
		{"L1 on data", headerEdits(plainDamage(), at64(40, 7*4096)), "", 2},
		{"snapshot table on data", headerEdits(plainDamage(), at32(60, 1), at64(64, 20*4096), at64(l2At+8, fat|20*4096)), "ERROR cluster 20 has two owners: data cluster, snapshot table", 0}, // it gets a new snapshot table
		{"one L1 for two snapshots", sharedL1, "snapshot L1 table, snapshot L1 table", 2},
		{"data on a bitmap table", dataOnBitmap, "data cluster, bitmap table", 2},
	} {
		t.Run(d.name, func(t *testing.T) {
			f := d.make(t)
			ours, collisions := ourVerdict(t, f, RepairNone)
			if !strings.Contains(strings.Join(collisions, "\n"), d.want) {
				t.Errorf("%q is not among %q (%q)", d.want, collisions, ours.lines)
			}
			before := *mustCheck(t, f, RepairNone)
			res := mustCheck(t, f, RepairAll)
			code := verdict{result: *res}.exitCode()
			if code != d.all {
				t.Errorf("repair: %+v", res)
			}
			if d.all == 2 && res.Collisions < before.Collisions {
				t.Errorf("collisions went from %d to %d", before.Collisions, res.Collisions)
			}
		})
	}
}

func mustCheck(t testing.TB, f storage.File, mode Repair) *CheckResult {
	t.Helper()
	res, err := Check(f, CheckOptions{Repair: mode})
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func TestCheckBitmaps(t *testing.T) {
	path := qemuCreate(t, "cluster_size=4096", "1M", "write -P 1 0 32k")
	for _, name := range []string{"first", "second"} {
		testenv.Run(t, "qemu-img", "bitmap", "--add", "-g", "512", path, name)
	}
	qemuIO(t, path, "write -P 1 0 4k")
	f := loadImage(t, path)
	h, err := ReadHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	var bitmaps []Bitmap
	if err := forEachBitmap(f, h, func(b Bitmap) error { bitmaps = append(bitmaps, b); return nil }); err != nil {
		t.Fatal(err)
	}
	if len(bitmaps) != 2 || bitmaps[0].Name != "first" || !bitmaps[1].Auto() || bitmaps[1].InUse() || bitmaps[1].GranularityBits != 9 {
		t.Fatalf("%+v", bitmaps)
	}
	dir, table := int64(h.Bitmaps.DirectoryOffset), int64(bitmaps[0].TableOffset)
	for _, d := range []struct {
		name   string
		edits  []edit
		want   string
		failed bool
	}{
		{"table entry", []edit{at64(table, 0x123)}, "ERROR bitmap first: bitmap table entry is 0x123, expected a multiple of 4096 below 2^56, 0 or 1", false},
		{"data past the end", []edit{at64(table, 1<<40)}, "ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset 0x10000000000 size 0x1000", false},
		{"granularity", []edit{atBytes(dir+17, 8)}, "granularity_bits is 8, expected 9 to 31", true},
		{"type", []edit{atBytes(dir+16, 2)}, "type is 2, expected 1", true},
		{"flags", []edit{at32(dir+12, 8)}, "flags is 0x8, expected no bits but 0x7", true},
		{"table size", []edit{at32(dir+8, 1<<20)}, "table_size is 1048576, expected 1 to 131072", true},
		{"table offset", []edit{at64(dir, 0x1234)}, "table_offset is 0x1234, expected a multiple of 4096 below 2^56, not 0", true},
		{"name", []edit{atBytes(dir+18, 0, 0)}, "name_size is 0, expected 1 to 1023", true},
		{"entry size", []edit{at32(dir+20, 1<<31)}, "at most 64, where the directory ends", true},
		{"end", []edit{atBytes(dir+32+18, 0, 255)}, "where the directory ends", true},
	} {
		t.Run(d.name, func(t *testing.T) {
			f := loadImage(t, path)
			apply(t, f, d.edits...)
			v, _ := ourVerdict(t, f, RepairNone)
			if !strings.Contains(strings.Join(v.lines, "\n"), d.want) {
				t.Errorf("%q is not among %q", d.want, v.lines)
			}
			if v.failed != d.failed {
				t.Errorf("%+v", v)
			}
		})
	}
}

// A file can claim to be far larger than it is; neither time nor memory may follow the claim.
func TestCheckSparse(t *testing.T) {
	f := newImage(t, CreateOptions{Size: 64 << 20})
	if err := f.Truncate(100 << 40); err != nil {
		t.Fatal(err)
	}
	// An L2 table, full of entries, in the middle of nowhere, and a refcount block likewise.
	apply(t, f, at64(0x30000, fat|50<<40), at64(0x10000+8000, 60<<40))
	if v, _ := ourVerdict(t, f, RepairNone); v.exitCode() != 2 {
		t.Errorf("%+v", v)
	}
	if _, err := Check(f, CheckOptions{Memory: 1}); !errors.Is(err, ErrCheckMemory) {
		t.Errorf("with a byte of memory: %v", err)
	}
	if err := f.Truncate(1 << 50); err != nil {
		t.Fatal(err)
	}
	var failure *CheckFailure
	if _, err := Check(f, CheckOptions{}); !errors.As(err, &failure) || failure.Reason != reasonTooLarge {
		t.Errorf("2^34 clusters: %v", err)
	}
}

func TestRepairNames(t *testing.T) {
	for mode, want := range map[Repair]string{RepairNone: "none", RepairLeaks: "leaks", RepairAll: "all"} {
		if mode.String() != want {
			t.Errorf("%d is %q", mode, mode)
		}
	}
}

// A failed read of a table is an error, not a verdict.
func TestCheckReadErrors(t *testing.T) {
	f, _ := snapshotImage(t)
	for n := 0; ; n++ {
		r := &failingReads{Memory: f, left: n}
		res, err := Check(r, CheckOptions{})
		if err == nil && res.CheckErrors > 0 {
			continue // counts that could not be read
		}
		if err == nil {
			if n < 10 || !res.Clean() {
				t.Errorf("%d reads, then %+v", n, res)
			}
			return
		}
		if !errors.Is(err, errInjected) {
			t.Fatalf("read %d: %v", n, err)
		}
	}
}

var errInjected = errors.New("injected")

// failingReads fails after left reads.
type failingReads struct {
	*storage.Memory
	left int
}

func (f *failingReads) ReadAt(p []byte, off int64) (int, error) {
	if f.left--; f.left < 0 {
		return 0, fmt.Errorf("read at %d: %w", off, errInjected)
	}
	return f.Memory.ReadAt(p, off)
}

func FuzzCheck(f *testing.F) {
	for _, o := range []CreateOptions{
		{Size: 16 << 10, ClusterSize: 512, Preallocation: 1},
		{Size: 16 << 10, ClusterSize: 512, Preallocation: 1, RefcountBits: 1},
		{Size: 64 << 10, ClusterSize: 512, Version: 2},
	} {
		m := newImage(f, o)
		size, err := m.Size()
		if err != nil {
			f.Fatal(err)
		}
		b := make([]byte, min(size, 4096))
		if err := storage.ReadFull(m, b, 0); err != nil {
			f.Fatal(err)
		}
		f.Add(b, uint16(size>>9), false)
		f.Add(b, uint16(size>>9), true)
	}
	f.Fuzz(func(t *testing.T, b []byte, sectors uint16, repair bool) {
		m := storage.NewMemory("fuzz")
		if _, err := m.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		if int64(sectors)<<9 > int64(len(b)) {
			if err := m.Truncate(int64(sectors) << 9); err != nil {
				t.Fatal(err)
			}
		}
		o := CheckOptions{Memory: 64 << 20}
		if repair {
			o.Repair = RepairAll
		}
		res, err := Check(m, o)
		if err != nil || !repair {
			return
		}
		again := &writeCounter{Memory: m}
		second, err := Check(again, o)
		if err != nil {
			t.Fatalf("the second repair fails: %v", err)
		}
		if second.Corruptions > res.Corruptions || res.Clean() && again.n > 0 {
			t.Fatalf("the second repair is not idempotent (%d writes): %+v after %+v", again.n, second, res)
		}
	})
}

// The header of an encrypted image is counted like any other table, and no key is needed for that.
func TestCheckEncrypted(t *testing.T) {
	withoutRace(t)
	testenv.Need(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	secret := "secret,id=key,data=secret"
	create := []string{"create", "-q", "-f", "qcow2", "--object", secret,
		"-o", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=100", path, "1M"}
	// qemu-img measures how fast it derives keys, and on a busy machine it may fail to.
	for tries := 1; ; tries++ {
		code, _, stderr := qemu(t, "qemu-img", create...)
		if code == 0 {
			break
		}
		if tries == 20 || !strings.Contains(stderr, "accurate CPU usage") {
			t.Fatalf("qemu-img %q: exit %d\n%s", create, code, stderr)
		}
	}
	f := loadImage(t, path)
	ours, collisions := ourVerdict(t, f, RepairNone)
	theirs := qemuVerdictOf(t, "driver=qcow2,file.filename="+path+",encrypt.key-secret=key", "--image-opts", "--object", secret)
	if diff := diffVerdicts(ours, theirs); diff != "" || ours.exitCode() != 0 || len(collisions) > 0 {
		t.Errorf("%+v %q\n%s", ours, collisions, diff)
	}
	h, err := readHeader(f, forInfo)
	if err != nil || h.Crypto == nil || h.Crypto.Offset == 0 {
		t.Fatalf("%+v, %v", h, err)
	}
	out, err := h.Encode()
	if err != nil {
		t.Fatal(err)
	}
	again, err := decodeHeader("again", out, forInfo)
	if err != nil || *again.Crypto != *h.Crypto {
		t.Errorf("after a rewrite: %+v, %v", again, err)
	}
	ext := int64(headerLengthOut) // the encryption extension comes first, here
	for name, e := range map[string]edit{
		"Missing CRYPTO header for crypt method 2":    at32(ext, 0x12345678),
		"Invalid CRYPTO header extension length":      at32(ext+4, 8),
		"Encryption header offset invalid":            at64(ext+8, 513),
		"Encryption header too large":                 at64(ext+16, 1<<50),
		"Encrypted images are not supported":          at32(ext+400, 0), // nothing is wrong, but for use
		"Duplicate header extension 0x0537be77":       at32(ext+24, extCrypto),
		"CRYPTO header extension only expected":       at32(32, 3),
		"Image does not contain a reference count ta": at32(56, 0),
	} {
		f := loadImage(t, path)
		apply(t, f, e)
		why := forInfo
		if strings.HasPrefix(name, "Encrypted") {
			why = forUse
		}
		if strings.HasPrefix(name, "Duplicate") {
			apply(t, f, at32(ext+28, 16))
		}
		if _, err := readHeader(f, why); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("got %v, want %s", err, name)
		}
	}
}

// A repair clears autoclear bits that nobody here maintains; an examination leaves them alone.
func TestRepairAutoclear(t *testing.T) {
	f := plainDamage(at64(88, 1<<40))(t)
	for mode, want := range map[Repair]uint64{RepairNone: 1 << 40, RepairLeaks: 0} {
		g := copyImage(t, f)
		mustCheck(t, g, mode)
		if h, err := ReadHeader(g); err != nil || h.Autoclear != want {
			t.Errorf("%v: %+v, %v", mode, h, err)
		}
	}
}

func TestCheckFailureSays(t *testing.T) {
	err := &CheckFailure{File: "disk.qcow2", Reason: reasonTooLarge}
	if got := err.Error(); got != "disk.qcow2: Check failed: File too large" {
		t.Error(got)
	}
}

// A finding says in JSON what it is, as those of FVD do.
func TestFindingJSON(t *testing.T) {
	for kind, want := range map[FindingKind]string{
		FindingCorruption: "corruption", FindingLeak: "leak", FindingError: "error", FindingNote: "note",
	} {
		text, err := json.Marshal(Finding{Kind: kind, Message: "Leaked cluster 3", Fixed: kind == FindingLeak, Named: true})
		full := fmt.Sprintf(`{"kind":"%s","text":"Leaked cluster 3","fixed":%t}`, want, kind == FindingLeak)
		if err != nil || string(text) != full || kind.String() != want {
			t.Errorf("%s %v, want %s", text, err, full)
		}
	}
}
