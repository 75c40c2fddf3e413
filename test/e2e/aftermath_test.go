//go:build unix

package e2e

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/test/e2e/guestlog"
)

// disciplines are those of qcow2 metadata (docs/disciplines.md).
var disciplines = []string{"synchronous", "ordered", "lazy", "journal"}

// guestDisk is the size in MiB of the disks that guests crash.
const guestDisk = 96

// layout is one way to keep a disk in a qcow2 image.
type layout struct {
	name     string
	options  string // of platter create
	clusters int64  // bytes of a cluster
	overlay  bool   // over a raw file that holds the file system
	snapshot bool   // an internal snapshot shares all clusters when the guest begins
}

// layouts take turns, one for each guest.
var layouts = []layout{
	{name: "64k clusters", options: "cluster_size=64k", clusters: 64 << 10},
	{name: "snapshot, 4k clusters", options: "cluster_size=4k", clusters: 4 << 10, snapshot: true},
	{name: "overlay", options: "cluster_size=64k", clusters: 64 << 10, overlay: true},
	{name: "subclusters, 16k clusters", options: "cluster_size=16k,extended_l2=on,refcount_bits=64", clusters: 16 << 10},
	{name: "snapshot, 64k clusters", options: "cluster_size=64k,refcount_bits=8", clusters: 64 << 10, snapshot: true},
	{name: "overlay with subclusters", options: "cluster_size=64k,extended_l2=on", clusters: 64 << 10, overlay: true},
	{name: "4k clusters", options: "cluster_size=4k,refcount_bits=1", clusters: 4 << 10},
	{name: "2M clusters, overlay", options: "cluster_size=2M", clusters: 2 << 20, overlay: true},
}

// snapshotName is that of the internal snapshot of a layout.
const snapshotName = "before"

// template holds the disks that guests begin with: an empty ext4 file system, in every layout.
type template struct {
	raw    string
	images map[string]string // by name of the layout, when it was asked for
}

// newTemplate makes the file system.
func newTemplate(t *testing.T) *template {
	t.Helper()
	t.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	testenv.Need(t, "mke2fs", "e2fsck", "debugfs", "qemu-img")
	tm := &template{raw: filepath.Join(t.TempDir(), "base.raw"), images: map[string]string{}}
	// Everything random is fixed, and the time, so that all disks are the same as the one that the saved machine had.
	cmd := exec.Command("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-J", "size=4", "-U", "9f0f5e6a-1f55-4a6b-8a43-6c1f0b7e2d11",
		"-E", "hash_seed=3d5f0b8e-7a64-4a0c-9a5e-0c7c1c1d2e3f,lazy_itable_init=1", tm.raw, strconv.Itoa(guestDisk)+"M")
	cmd.Env = append(os.Environ(), "E2FSPROGS_FAKE_TIME=1600000000")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%q: %v\n%s", cmd.Args, err, out)
	}
	return tm
}

// disk makes a new disk in dir and returns its image.
func (tm *template) disk(t *testing.T, dir string, l layout) string {
	t.Helper()
	made := tm.images[l.name]
	if made == "" {
		made = filepath.Join(filepath.Dir(tm.raw), fmt.Sprintf("template%d.qcow2", len(tm.images)))
		if l.overlay {
			testenv.Run(t, platter(t), "create", "-q", "-f", "qcow2", "-o", l.options, "-b", tm.raw, "-F", "raw", made)
		} else {
			testenv.Run(t, platter(t), "convert", "-f", "raw", "-O", "qcow2", "-o", l.options, tm.raw, made)
		}
		if l.snapshot {
			testenv.Run(t, platter(t), "snapshot", "-q", "-c", snapshotName, made)
		}
		tm.images[l.name] = made
	}
	image := filepath.Join(dir, "disk.qcow2")
	copyFile(t, made, image)
	return image
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}

// aftermath judges an image after a crash.
type aftermath struct {
	template   *template
	layout     layout
	discipline string
	dir        string // for files of its own
	image      string // as the crash left it
	log        *guestlog.Log
	promises   int // how many promises of the log were made before the crash
}

// Bits of incompatible_features in the header (qcow2 specification, docs/qcow2-journal.md).
const (
	featureDirty   = 1 << 0
	featureJournal = 1 << 63
)

// judge expects everything that was promised of the image: what it may look like before it is recovered, that it
// can be recovered, and what is then on the disk. It returns the number of clusters that leaked.
func (a *aftermath) judge(t *testing.T) (leaks int) {
	t.Helper()
	ours := platter(t)
	features := incompatible(t, a.image)
	switch {
	case a.discipline == "journal" && features&featureJournal != 0:
		_, stderr, code := output(t, "qemu-img", "check", "-f", "qcow2", a.image)
		if code == 0 || !strings.Contains(stderr, "Unsupported qcow2 feature(s): metadata journal needs replay") {
			t.Errorf("qemu-img check does not refuse the image by the name of the feature: exit status %d\n%s", code, stderr)
		}
		if stdout, stderr, code := output(t, ours, "check", "-f", "qcow2", a.image); code != 0 {
			t.Errorf("platter check of an image that needs replay: exit status %d\n%s%s", code, stdout, stderr)
		}
	case a.discipline == "lazy" && features&featureDirty != 0:
		// Counts are not valid until the image is opened for writing.
	case a.discipline == "lazy" || a.discipline == "journal":
		mustBeClean(t, a.image)
	default:
		leaks = a.leaks(t)
	}

	testenv.Run(t, ours, "io", "-f", "qcow2", "--discipline", a.discipline, "-c", "read -q 0 4k", "-c", "flush", a.image)
	if features := incompatible(t, a.image); features&(featureDirty|featureJournal) != 0 {
		t.Errorf("the image was recovered and closed, and its incompatible features are %#x", features)
	}
	switch a.discipline {
	case "synchronous", "ordered":
		a.leaks(t)
		if _, stderr, code := output(t, ours, "check", "-f", "qcow2", "-r", "leaks", a.image); code != 0 {
			t.Errorf("platter check -r leaks: exit status %d\n%s", code, stderr)
		}
	}
	mustBeClean(t, a.image)

	raw := a.export(t)
	testenv.Run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", a.image, raw)
	if a.layout.snapshot {
		old := filepath.Join(a.dir, "snapshot.raw")
		testenv.Run(t, ours, "convert", "-f", "qcow2", "-l", snapshotName, "-O", "raw", a.image, old)
		testenv.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", a.template.raw, old)
	}
	if err := a.fileSystem(t, raw); err != nil {
		t.Error(err)
	}
	t.Logf("%d promises kept, %d clusters leaked of %d that may", a.promises, leaks, a.maxLeaks())
	return leaks
}

// export copies the disk into a raw file.
func (a *aftermath) export(t *testing.T) string {
	t.Helper()
	raw := filepath.Join(a.dir, "disk.raw")
	testenv.Run(t, platter(t), "convert", "-f", "qcow2", "-O", "raw", a.image, raw)
	return raw
}

// leaks expects both checkers to find nothing but as many leaked clusters as the discipline allows.
func (a *aftermath) leaks(t *testing.T) int {
	t.Helper()
	n := checkAfterKill(t, platter(t), a.image)
	if theirs := checkAfterKill(t, "qemu-img", a.image); n != theirs {
		t.Errorf("platter check finds %d leaks, qemu-img check %d", n, theirs)
	}
	if most := a.maxLeaks(); n > most {
		t.Errorf("%d clusters leaked, at most %d may", n, most)
	}
	return n
}

// maxLeaks is how many clusters a crash may leak (docs/disciplines.md).
func (a *aftermath) maxLeaks() int {
	if a.discipline == "lazy" || a.discipline == "journal" {
		return 0
	}
	// What the guest's operations between two flushes free.
	most := int64(8<<20) / a.layout.clusters
	if a.discipline == "ordered" {
		most += 2 * min(1024, 64<<20/a.layout.clusters)
	}
	return int(most + 16)
}

// incompatible reads the incompatible features from the header of a qcow2 image.
func incompatible(t *testing.T, image string) uint64 {
	t.Helper()
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [8]byte
	if _, err := f.ReadAt(b[:], 72); err != nil {
		t.Fatal(err)
	}
	return binary.BigEndian.Uint64(b[:])
}

// fileSystem lets ext4 replay its journal. It returns an error unless that leaves a file system without a fault
// that holds what the guest was promised.
func (a *aftermath) fileSystem(t *testing.T, raw string) error {
	t.Helper()
	// Replaying may do no more than the next mount would: the journal, and files that were deleted while open.
	stdout, stderr, code := output(t, "e2fsck", "-p", raw)
	if code > 1 || !strings.Contains(stdout, ": clean, ") {
		return fmt.Errorf("e2fsck -p: exit status %d\n%s%s", code, stdout, stderr)
	}
	if stdout, stderr, code := output(t, "e2fsck", "-f", "-n", raw); code != 0 {
		return fmt.Errorf("e2fsck -f -n after the journal was replayed: exit status %d\n%s%s", code, stdout, stderr)
	}
	files := filepath.Join(a.dir, "files")
	if err := os.MkdirAll(files, 0o700); err != nil {
		return err
	}
	if _, stderr, code := output(t, "debugfs", "-R", "rdump / "+files, raw); code != 0 {
		return fmt.Errorf("debugfs rdump: exit status %d\n%s", code, stderr)
	}
	if err := a.log.Judge(os.DirFS(files), a.promises, "files", "fixed"); err != nil {
		return fmt.Errorf("the files are not what fsync promised (%d promises):\n%w", a.promises, err)
	}
	return nil
}

// crashDir is a directory for one crash. It stays when the test fails.
func crashDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "platter-crash-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the files of the crash are in %s", dir)
			return
		}
		os.RemoveAll(dir)
	})
	return dir
}

// budget is a small number of rounds, unless an environment variable says otherwise.
func budget(t *testing.T, variable string, small int) int {
	t.Helper()
	v := os.Getenv(variable)
	if v == "" {
		return small
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 {
		t.Fatalf("%s is %q, want a positive number", variable, v)
	}
	return n
}

// firstSeed is the seed of the first round: 1, or what PLATTER_GUEST_SEED says to repeat another one.
func firstSeed(t *testing.T) uint64 { return uint64(budget(t, "PLATTER_GUEST_SEED", 1)) }

// spread summarises how many clusters leaked.
func spread(leaks []int) string {
	if len(leaks) == 0 {
		return "none"
	}
	slices.Sort(leaks)
	return fmt.Sprintf("median %d, most %d", leaks[len(leaks)/2], leaks[len(leaks)-1])
}

// roundLayout is the layout of the disk of a guest: that of its seed, and no two disciplines begin with the same.
func roundLayout(discipline string, seed uint64) layout {
	return layouts[(seed+2*uint64(slices.Index(disciplines, discipline)))%uint64(len(layouts))]
}

// roundRand draws what is random about a round besides the guest's own work.
func roundRand(discipline string, seed uint64) *rand.Rand {
	return rand.New(rand.NewPCG(seed, uint64(slices.Index(disciplines, discipline))))
}
