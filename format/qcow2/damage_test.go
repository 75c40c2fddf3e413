package qcow2

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
)

// verdict is what a checker says of an image, in a form that two checkers can be compared by.
type verdict struct {
	failed bool // the check was not completed
	result CheckResult
	lines  []string // sorted, each once
}

// exitCode is that of qemu-img check.
func (v verdict) exitCode() int {
	switch r := v.result; {
	case v.failed || r.CheckErrors > 0:
		return 1
	case r.Corruptions > 0:
		return 2
	case r.Leaks > 0:
		return 3
	}
	return 0
}

// ourVerdict runs Check. Collisions, which QEMU does not know, are taken out of lines and counters and
// returned separately.
func ourVerdict(t testing.TB, f storage.File, repair Repair) (v verdict, collisions []string) {
	t.Helper()
	var lines []string
	res, err := Check(f, CheckOptions{Repair: repair, Report: func(f Finding) {
		if strings.Contains(f.Message, " has two owners: ") {
			collisions = append(collisions, f.Message)
			return
		}
		lines = append(lines, strings.Split(f.Message, "\n")...)
	}})
	var failure *CheckFailure
	var invalid *FormatError
	switch {
	case errors.As(err, &invalid): // cannot even be opened
		return verdict{failed: true, lines: []string{invalid.Problem}}, nil
	case errors.As(err, &failure):
		v.failed = true
		lines = append(lines, "Check failed: "+failure.Reason)
	case err != nil:
		t.Fatal(err)
	default:
		v.result = *res
		v.result.Corruptions -= v.result.Collisions
		v.result.Collisions = 0
	}
	v.result.Filename, v.result.Format = "", ""
	v.lines = unique(lines)
	return v, collisions
}

// qemuVerdict runs qemu-img check on a copy of the image.
func qemuVerdict(t testing.TB, f storage.File, options ...string) verdict {
	t.Helper()
	testenv.Need(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	saveImage(t, f, path)
	return qemuVerdictOf(t, path, options...)
}

func qemuVerdictOf(t testing.TB, path string, options ...string) verdict {
	t.Helper()
	args := append([]string{"check", "--output=json"}, options...)
	if len(options) == 0 || options[0] != "--image-opts" {
		args = append(args, "-f", "qcow2")
	}
	code, out, errs := qemu(t, "qemu-img", append(args, path)...)
	var v verdict
	if err := json.Unmarshal([]byte(out), &v.result); err != nil {
		v.failed = true
	}
	v.result.Filename, v.result.Format = "", ""
	var lines []string
	for line := range strings.Lines(errs) {
		line = strings.TrimPrefix(strings.TrimSuffix(line, "\n"), "qemu-img: ")
		// What starts with "qcow2: " comes from the driver that reads for the checker, in its own words.
		if line != "" && line != "Check failed" && !strings.HasPrefix(line, "qcow2: ") {
			lines = append(lines, line)
		}
	}
	v.lines = unique(lines)
	if code != v.exitCode() {
		t.Fatalf("qemu-img check exits with %d, which its output does not say\n%s%s", code, out, errs)
	}
	return v
}

func unique(lines []string) []string {
	slices.Sort(lines)
	return slices.Compact(lines)
}

// diffVerdicts describes how two verdicts differ; "" if they do not.
func diffVerdicts(ours, theirs verdict) string {
	var b strings.Builder
	if ours.failed && theirs.failed && strings.Contains(strings.Join(theirs.lines, ""), "Could not open ") {
		return "" // the header's own test compares the words
	}
	if ours.failed != theirs.failed || ours.result != theirs.result {
		b.WriteString("ours   " + strconv.FormatBool(ours.failed) + " " + mustJSON(ours.result) + "\n")
		b.WriteString("theirs " + strconv.FormatBool(theirs.failed) + " " + mustJSON(theirs.result) + "\n")
	}
	for _, l := range ours.lines {
		if !slices.Contains(theirs.lines, l) {
			b.WriteString("only ours:   " + l + "\n")
		}
	}
	for _, l := range theirs.lines {
		if !slices.Contains(ours.lines, l) {
			b.WriteString("only theirs: " + l + "\n")
		}
	}
	return b.String()
}

func mustJSON(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// scenarios are healthy images with something of everything.
func scenarios(t testing.TB) map[string]*storage.Memory {
	t.Helper()
	var paths map[string]string
	images := make(map[string]*storage.Memory)
	for _, name := range []string{"plain", "small", "big", "extended", "v2", "snapshots", "bitmaps", "full"} {
		images[name] = madeByQEMU.copyOf(t, "scenario "+name, func() string {
			if paths == nil {
				paths = makeScenarios(t)
			}
			return paths[name]
		})
	}
	return images
}

// makeScenarios has QEMU make the scenarios and returns where they are.
func makeScenarios(t testing.TB) map[string]string {
	t.Helper()
	busy := []string{"write -P 1 0 70k", "write -P 2 200k 8k", "write -c -P 3 320k 64k", "write -z 400k 64k", "write -P 4 900k 1k", "write -zu 0 2k"}
	plain := qemuCreate(t, "cluster_size=4096", "1M", busy...)
	small := qemuCreate(t, "cluster_size=512,refcount_bits=8", "1M", busy...)
	big := qemuCreate(t, "refcount_bits=1", "16M", "write -P 1 0 70k", "write -P 2 5M 8k")
	ext := qemuCreate(t, "cluster_size=16384,extended_l2=on", "2M", append(busy, "write -P 5 600k 512", "write -z 601k 1k", "write -P 5 700k 40k", "write -z 702k 4k")...)
	v2 := qemuCreate(t, "cluster_size=1024,compat=0.10", "1M", "write -P 1 0 70k", "write -c -P 3 320k 64k")
	snap := qemuCreate(t, "cluster_size=4096", "1M", busy...)
	testenv.Run(t, "qemu-img", "snapshot", "-c", "first", snap)
	qemuIO(t, snap, "write -P 7 0 20k", "write -P 7 500k 20k")
	testenv.Run(t, "qemu-img", "snapshot", "-c", "second", snap)
	qemuIO(t, snap, "write -P 8 4k 12k", "discard 200k 8k")
	bitmaps := qemuCreate(t, "cluster_size=4096", "1M", "write 0 1k")
	testenv.Run(t, "qemu-img", "bitmap", "--add", "-g", "512", bitmaps, "fine")
	testenv.Run(t, "qemu-img", "bitmap", "--add", bitmaps, "coarse")
	qemuIO(t, bitmaps, "write -P 1 0 200k")
	full := qemuCreate(t, "cluster_size=2048,preallocation=metadata", "512k", "write 0 64k", "write -zu 16k 64k")
	return map[string]string{"plain": plain, "small": small, "big": big, "extended": ext, "v2": v2, "snapshots": snap, "bitmaps": bitmaps, "full": full}
}

func TestCheckHealthy(t *testing.T) {
	for name, f := range scenarios(t) {
		ours, collisions := ourVerdict(t, f, RepairNone)
		if diff := diffVerdicts(ours, qemuVerdict(t, f)); diff != "" || len(collisions) > 0 || ours.exitCode() != 0 {
			t.Errorf("%s: %s%q", name, diff, collisions)
		}
	}
}

// TestCheckRandomDamage damages table words at random and compares the verdict with qemu-img's. The number of
// rounds comes from PLATTER_CHECK_ROUNDS, the seed from PLATTER_CHECK_SEED.
func TestCheckRandomDamage(t *testing.T) {
	rounds, seed := envInt(t, "PLATTER_CHECK_ROUNDS", fewer(60)), envInt(t, "PLATTER_CHECK_SEED", 1)
	images := scenarios(t)
	names := make([]string, 0, len(images))
	for name := range images {
		names = append(names, name)
	}
	slices.Sort(names)
	bad := 0
	for round := range rounds {
		r := rand.New(rand.NewPCG(uint64(seed), uint64(round)))
		name := names[r.IntN(len(names))]
		f := copyImage(t, images[name])
		edits := randomDamage(t, r, f)
		apply(t, f, edits...)
		ours, collisions := ourVerdict(t, f, RepairNone)
		theirs := qemuVerdict(t, f)
		if readsGarbage(theirs, collisions) {
			continue
		}
		if sharesTables(t, f) {
			ours.result.AllocatedClusters, theirs.result.AllocatedClusters = 0, 0
			ours.result.Fragmented, theirs.result.Fragmented = 0, 0
			ours.result.Compressed, theirs.result.Compressed = 0, 0
		}
		if diff := diffVerdicts(ours, theirs); diff != "" {
			t.Errorf("seed %d round %d: %s with %x\n%s", seed, round, name, edits, diff)
			if bad++; bad > 5 {
				break
			}
		}
	}
}

// readsGarbage reports that QEMU interpreted bytes as an L2 table that are none: where an L1 entry is not
// cluster-aligned it says so and goes on at that offset, and where one has flags and no offset it takes the
// header for a table. Check stops there. Nor does QEMU open an image with a damaged bitmap, or read
// L1 tables beyond 2^63.
func readsGarbage(v verdict, collisions []string) bool {
	if strings.Contains(strings.Join(collisions, "\n"), "two owners: header, ") {
		return true
	}
	return slices.ContainsFunc(v.lines, func(l string) bool {
		return strings.Contains(l, "Could not read bitmap_table") || strings.Contains(l, "I/O error in check_refcounts") ||
			strings.Contains(l, "overflow cluster offset=0x0") || strings.Contains(l, "Table is not cluster aligned")
	})
}

// sharesTables reports that the active L1 table has two entries with one L2 table. QEMU takes its statistics
// once for each; Check reads no table twice.
func sharesTables(t testing.TB, f storage.File) bool {
	t.Helper()
	h, err := readHeader(f, forCheck)
	if err != nil {
		return false
	}
	seen := make(map[hostOff]bool)
	l1 := make([]byte, h.L1Size*8)
	if err := storage.ReadFull(f, l1, int64(h.L1Offset)); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(l1); i += 8 {
		at := l1Entry(binary.BigEndian.Uint64(l1[i:])).offset()
		if at != 0 && seen[at] {
			return true
		}
		seen[at] = true
	}
	return false
}

func envInt(t testing.TB, name string, def int) int {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return def
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// randomDamage picks one to three words of the tables of a healthy image and what to put there.
func randomDamage(t testing.TB, r *rand.Rand, f storage.File) []edit {
	t.Helper()
	words := tableWords(t, f)
	h, err := ReadHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	clusters := size / h.ClusterSize()
	var edits []edit
	switch r.IntN(10) {
	case 0: // a field of the header that places a table
		edits = append(edits, at64([]int64{40, 48, 64}[r.IntN(3)], uint64(r.Int64N(clusters+3))<<h.ClusterBits))
	case 1: // a field that sizes one
		edits = append(edits, at32([]int64{36, 56, 60}[r.IntN(3)], r.Uint32N(5)))
	case 2:
		if err := f.Truncate(r.Int64N(size-h.ClusterSize()) + h.ClusterSize()); err != nil {
			t.Fatal(err)
		}
	}
	for range 1 + r.IntN(3) {
		at := words[r.IntN(len(words))]
		var b [8]byte
		if err := storage.ReadFull(f, b[:], at); err != nil {
			t.Fatal(err)
		}
		old := binary.BigEndian.Uint64(b[:])
		v := old
		switch r.IntN(6) {
		case 0:
			v ^= 1 << r.IntN(64)
		case 1:
			v = 0
		case 2:
			v = uint64(r.Int64N(clusters+3)) << h.ClusterBits
		case 3:
			v = entryCopied | uint64(r.Int64N(clusters+3))<<h.ClusterBits
		case 4: // another word of the tables
			if err := storage.ReadFull(f, b[:], words[r.IntN(len(words))]); err != nil {
				t.Fatal(err)
			}
			v = binary.BigEndian.Uint64(b[:])
		case 5:
			v ^= 1 | entryCopied
		}
		edits = append(edits, at64(at, v))
	}
	return edits
}

// tableWords lists where the words of L1, L2 and refcount tables, refcount blocks and the snapshot table are
// that hold something, and some that hold nothing.
func tableWords(t testing.TB, f storage.File) []int64 {
	t.Helper()
	h, err := ReadHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	var words []int64
	add := func(off, n int64, fn func(w uint64)) {
		buf := make([]byte, n)
		if err := storage.ReadFull(f, buf, off); err != nil {
			t.Fatal(err)
		}
		spare := 2
		for i := int64(0); i+8 <= n; i += 8 {
			w := binary.BigEndian.Uint64(buf[i:])
			if w == 0 {
				if spare--; spare < 0 {
					continue
				}
			}
			words = append(words, off+i)
			if w != 0 && fn != nil {
				fn(w)
			}
		}
	}
	addL1 := func(off, n int64) {
		add(off, n*8, func(w uint64) { add(int64(l1Entry(w).offset()), h.ClusterSize(), nil) })
	}
	addL1(int64(h.L1Offset), int64(h.L1Size))
	add(int64(h.RefcountTableOffset), int64(h.RefcountTableClusters)<<h.ClusterBits, func(w uint64) { add(int64(w), h.ClusterSize(), nil) })
	snapshots, size, err := readSnapshots(f, h)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range snapshots {
		addL1(int64(s.L1Offset), int64(s.L1Size))
	}
	if b := h.Bitmaps; b != nil {
		add(int64(b.DirectoryOffset), int64(b.DirectorySize), nil)
		err := forEachBitmap(f, h, func(m Bitmap) error {
			add(int64(m.TableOffset), int64(m.TableSize)*8, nil)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if size > 0 {
		for off := int64(h.SnapshotsOffset); off < int64(h.SnapshotsOffset)+size-8; off += 64 {
			words = append(words, off) // the L1 offset of an entry, sometimes
		}
	}
	return words
}

// TestCheckRandomDamageDataFile is TestCheckRandomDamage for images with an external data file.
func TestCheckRandomDamageDataFile(t *testing.T) {
	rounds, seed := envInt(t, "PLATTER_CHECK_ROUNDS", fewer(30)), envInt(t, "PLATTER_CHECK_SEED", 1)
	testenv.Need(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	path, data := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "data.raw")
	testenv.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096,data_file="+data, path, "1M")
	qemuIO(t, path, "write -P 1 0 70k", "write -z 400k 64k", "write -P 2 300k 8k")
	bad := 0
	for round := range rounds {
		r := rand.New(rand.NewPCG(uint64(seed), uint64(round)))
		f := loadImage(t, path)
		edits := randomDamage(t, r, f)
		apply(t, f, edits...)
		ours, collisions := ourVerdict(t, f, RepairNone)
		damaged := filepath.Join(dir, "damaged.qcow2")
		saveImage(t, f, damaged)
		theirs := qemuVerdictOf(t, "driver=qcow2,file.filename="+damaged+",data-file.driver=file,data-file.filename="+data, "--image-opts")
		if readsGarbage(theirs, collisions) {
			continue
		}
		if diff := diffVerdicts(ours, theirs); diff != "" {
			t.Errorf("seed %d round %d: %x\n%s", seed, round, edits, diff)
			if bad++; bad > 5 {
				break
			}
		}
	}
}
