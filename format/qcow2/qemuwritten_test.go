package qcow2

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/platter-disk/platter/internal/testenv"
)

// TestReadsWhatQEMUWrites has qemu-io write random sequences to images of every shape; we read the same bytes as
// qemu-img, and our checker finds nothing.
func TestReadsWhatQEMUWrites(t *testing.T) {
	testenv.Need(t, "qemu-img", "qemu-io")
	cases := 0
	for _, compat := range []string{"0.10", "1.1"} {
		for _, cluster := range []int64{512, 4096, 65536, 2 << 20} {
			for _, bits := range []int{1, 16, 64} {
				for _, extended := range []bool{false, true} {
					for _, backed := range []bool{false, true} {
						if compat == "0.10" && (bits != 16 || extended) || extended && cluster < 16384 {
							continue
						}
						options := fmt.Sprintf("compat=%s,cluster_size=%d", compat, cluster)
						if compat == "1.1" {
							options += fmt.Sprintf(",refcount_bits=%d,extended_l2=%t", bits, extended)
						}
						if cases++; !sampled(cases) {
							continue
						}
						t.Run(fmt.Sprintf("%s,backed=%t", options, backed), func(t *testing.T) {
							t.Parallel() // it waits for QEMU most of the time
							readQEMUImage(t, options, cluster, bits, backed)
						})
					}
				}
			}
		}
	}
}

func readQEMUImage(t *testing.T, options string, cluster int64, bits int, backed bool) {
	dir := t.TempDir()
	path, base := filepath.Join(dir, "image"), filepath.Join(dir, "base")
	clusters := int64(40)
	if cluster > 1<<20 {
		clusters = 12 // that are enough bytes to write, convert and compare
	}
	size := max(clusters*cluster, 1<<20) + 1536
	var backing *memDevice
	args := []string{"create", "-q", "-f", "qcow2", "-o", options}
	if backed {
		backing = newBacking(uint64(cluster), min(size, 1<<20)-512)
		if err := os.WriteFile(base, backing.bytes, 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "-b", base, "-F", "raw")
	}
	testenv.Run(t, "qemu-img", append(args, path, fmt.Sprint(size))...)
	r := rand.New(rand.NewPCG(uint64(cluster), uint64(bits)))
	var script []string
	// qemu-io compresses only into clusters that are not allocated. Streams share host clusters, which counts of
	// one bit cannot say.
	for i := int64(0); i < 8 && bits > 1; i++ {
		script = append(script, fmt.Sprintf("write -c -P %d %d %d", i+1, i*(clusters/12)*cluster, cluster))
	}
	for range 40 {
		n := min((1+r.Int64N(3*cluster/512))*512, 3<<20)
		off := r.Int64N((size-n)/512) * 512
		verb := fmt.Sprintf("write -P %d", 1+r.IntN(255))
		switch r.IntN(6) {
		case 0:
			verb = "write -z"
		case 1:
			verb = "write -z -u"
		case 2:
			verb = "discard"
		}
		script = append(script, fmt.Sprintf("%s %d %d", verb, off, n))
	}
	qemuIO(t, path, script...)
	want := readAs(t, dir, path)

	f := loadImage(t, path)
	o := Options{ReadOnly: true, L2CacheSize: 1}
	if backed {
		o.Backing = backing
	}
	im, err := Open(keepOpen{f}, o)
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	got := make([]byte, im.Size())
	if _, err := im.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want[:len(got)]) {
		t.Errorf("after %q we read something else than qemu-img", script)
	}
	if res, err := Check(f, CheckOptions{}); err != nil || !res.Clean() {
		t.Errorf("check: %+v, %v", res, err)
	}
}
