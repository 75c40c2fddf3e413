package qcow2

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
)

// TestSnapshotsSurvive works on images whose snapshots QEMU made: whatever is done to the active disk, the
// snapshots keep their contents, and both checkers find nothing.
func TestSnapshotsSurvive(t *testing.T) {
	testenv.Need(t, "qemu-img", "qemu-io")
	for i, options := range []string{
		"cluster_size=65536", "cluster_size=512,refcount_bits=8", "cluster_size=4096,refcount_bits=8",
		"cluster_size=65536,extended_l2=on", "cluster_size=16384,extended_l2=on,compression_type=zstd",
		"cluster_size=4096,compat=0.10",
	} {
		t.Run(options, func(t *testing.T) {
			const size = 3 << 20
			dir := t.TempDir()
			path := filepath.Join(dir, "image.qcow2")
			testenv.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, fmt.Sprint(size))
			testenv.Run(t, "qemu-io", "-c", "write -P 0x11 0 1500k", "-c", "write -c -P 0x22 1536k 64k", "-c", "write -z 1700k 100k", path)
			testenv.Run(t, "qemu-img", "snapshot", "-c", "one", path)
			testenv.Run(t, "qemu-io", "-c", "write -P 0x33 700k 300k", "-c", "discard 100k 200k", path)
			testenv.Run(t, "qemu-img", "snapshot", "-c", "two", path)
			snapshots := map[string][]byte{}
			for _, name := range []string{"one", "two"} {
				snapshots[name] = readAs(t, dir, "-l", name, path)
			}

			w := &world{t: t, file: loadImage(t, path)}
			w.want = readAs(t, dir, path)
			h, err := ReadHeader(w.file)
			if err != nil {
				t.Fatal(err)
			}
			w.cfg.create = CreateOptions{Size: size, ClusterSize: h.ClusterSize(), Version: h.Version}
			w.cfg.cache = 1
			if w.cfg.how = Disciplines()[i%len(Disciplines())]; h.Version < 3 {
				w.cfg.how = Ordered
			}
			w.open(t)
			r := rand.New(rand.NewPCG(uint64(i), 9))
			for range fewer(300) {
				w.step(t, r)
			}
			if n := w.im.Size(); n < size { // QEMU reads a snapshot at the size the disk has now
				if err := w.im.Resize(size, 0); err != nil {
					t.Fatal(err)
				}
				w.want = append(w.want, make([]byte, size-n)...)
			}
			w.verify(t, 0, int64(len(w.want)))
			if err := w.im.Close(); err != nil {
				t.Fatal(err)
			}
			w.judge(t, t)
			saveImage(t, w.file, path)
			for name, want := range snapshots {
				if got := readAs(t, dir, "-l", name, path); !bytes.Equal(got[:size], want) {
					t.Errorf("snapshot %s changed", name)
				}
			}
		})
	}
}

// readAs returns the bytes that qemu-img convert reads.
func readAs(t *testing.T, dir string, args ...string) []byte {
	t.Helper()
	out := filepath.Join(dir, "out.raw")
	args = append([]string{"convert", "-O", "raw"}, args...)
	testenv.Run(t, "qemu-img", append(args, out)...)
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestStructuresGrow makes the refcount table, the L1 table and many refcount blocks grow.
func TestStructuresGrow(t *testing.T) {
	testenv.Need(t, "qemu-img")
	cfg := modelConfig{create: CreateOptions{Size: 1 << 20, ClusterSize: 512, RefcountBits: 64, Version: 3}}
	w := newWorld(t, t, cfg, 1)
	h := w.im.Header()
	if err := w.im.Resize(12<<20, 0); err != nil {
		t.Fatal(err)
	}
	w.want = make([]byte, 12<<20)
	r := rand.New(rand.NewPCG(5, 5))
	for off := int64(0); off < int64(len(w.want)); off += 64 << 10 {
		p := w.want[off : off+64<<10]
		fillRandom(r, p)
		if _, err := w.im.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
		if r.IntN(4) == 0 {
			if err := w.im.Flush(); err != nil {
				t.Fatal(err)
			}
		}
	}
	grown := w.im.Header()
	if grown.RefcountTableClusters <= h.RefcountTableClusters || grown.L1Size <= h.L1Size {
		t.Errorf("refcount table %d -> %d clusters, L1 table %d -> %d entries: both should have grown",
			h.RefcountTableClusters, grown.RefcountTableClusters, h.L1Size, grown.L1Size)
	}
	w.verify(t, 0, int64(len(w.want)))
	w.reopen(t)
	w.verify(t, 0, int64(len(w.want)))
	if err := w.im.Close(); err != nil {
		t.Fatal(err)
	}
	w.judge(t, t)
}

// TestCloseGivesBack: what was counted ahead and not used leaves no trace.
func TestCloseGivesBack(t *testing.T) {
	w := newWorld(t, t, modelConfig{create: CreateOptions{Size: 8 << 20, ClusterSize: 65536, RefcountBits: 16, Version: 3}}, 1)
	for i := range int64(40) {
		if _, err := w.im.WriteAt([]byte{1}, i<<17); err != nil {
			t.Fatal(err)
		}
		if err := w.im.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.im.Close(); err != nil {
		t.Fatal(err)
	}
	// Header, refcount table and block, L1, one L2 table and 40 data clusters.
	if size, err := storage.File(w.file).Size(); err != nil || size != 45*65536 {
		t.Errorf("the file has %d bytes (%v), want %d", size, err, 45*65536)
	}
	w.want = make([]byte, 8<<20)
	for i := range 40 {
		w.want[i<<17] = 1
	}
	w.judge(t, t)
}
