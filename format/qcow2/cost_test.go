package qcow2

import (
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
)

// countingFile counts what an image asks of its file.
type countingFile struct {
	storage.File
	writes, syncs, bytes atomic.Int64
}

func (c *countingFile) WriteAt(p []byte, off int64) (int, error) {
	c.writes.Add(1)
	c.bytes.Add(int64(len(p)))
	return c.File.WriteAt(p, off)
}

func (c *countingFile) Sync() error {
	c.syncs.Add(1)
	return c.File.Sync()
}

func (c *countingFile) reset() {
	c.writes.Store(0)
	c.syncs.Store(0)
	c.bytes.Store(0)
}

func costImage(t testing.TB, o CreateOptions, open Options) (*Image, *countingFile) {
	t.Helper()
	f := &countingFile{File: storage.NewMemory("image")}
	if err := Create(f, o); err != nil {
		t.Fatal(err)
	}
	im, err := Open(f, open)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := im.Close(); err != nil {
			t.Error(err)
		}
	})
	return im, f
}

// writeFlush writes 4 KiB at n random places in distinct clusters, with a flush after every batch.
func writeFlush(t testing.TB, im *Image, r *rand.Rand, n, batch int) {
	t.Helper()
	buf := make([]byte, 4096)
	for i := range buf {
		buf[i] = byte(i) | 1
	}
	clusters := r.Perm(int(im.Size() / im.geo.clusterSize))
	for i, c := range clusters[:n] {
		if _, err := im.WriteAt(buf, int64(c)*im.geo.clusterSize+int64(r.IntN(16))*4096); err != nil {
			t.Fatal(err)
		}
		if (i+1)%batch == 0 {
			if err := im.Flush(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestCostAllocatingWrite holds the ordered discipline to its promise: an allocating write and a flush are
// one barrier, the data, and the table word.
func TestCostAllocatingWrite(t *testing.T) {
	withoutRace(t)
	im, f := costImage(t, CreateOptions{Size: 10 << 30}, Options{})
	r := rand.New(rand.NewPCG(1, 1))
	writeFlush(t, im, r, 500, 1) // L2 tables come into being
	f.reset()
	const n = 4000
	writeFlush(t, im, r, n, 1)
	syncs, writes := float64(f.syncs.Load())/n, float64(f.writes.Load())/n
	t.Logf("an allocating 4 KiB write and a flush: %.4f syncs, %.4f writes, %.0f bytes", syncs, writes, float64(f.bytes.Load())/n)
	if syncs > 1.05 || writes > 2.2 {
		t.Errorf("%.4f syncs and %.4f writes an operation, want at most 1.05 and 2.2", syncs, writes)
	}
}

// TestCostCopyOnWrite: copied-up data owes one barrier more, however many clusters a flush covers, and one write a
// cluster.
func TestCostCopyOnWrite(t *testing.T) {
	withoutRace(t)
	for _, batch := range []int{1, 64} {
		im, f := costImage(t, CreateOptions{Size: 1 << 30, BackingFile: "base", BackingFormat: "raw", BackingSize: 1 << 30},
			Options{Backing: fullDevice{size: 1 << 30}})
		r := rand.New(rand.NewPCG(2, 2))
		writeFlush(t, im, r, 128, batch)
		f.reset()
		const flushes = 20
		writeFlush(t, im, r, flushes*batch, batch)
		syncs, writes := float64(f.syncs.Load())/flushes, float64(f.writes.Load())/flushes
		t.Logf("%d copy-on-writes and a flush: %.3f syncs, %.2f writes", batch, syncs, writes)
		if most := 3.05 * float64(batch); syncs > 2.1 || writes > most {
			t.Errorf("%d copy-on-writes and a flush cost %.3f syncs and %.2f writes, want at most 2.1 and %.1f", batch, syncs, writes, most)
		}
	}
}

// fullDevice is a backing device without zeros.
type fullDevice struct {
	block.Device
	size int64
}

func (d fullDevice) Size() int64  { return d.size }
func (d fullDevice) Close() error { return nil }
func (d fullDevice) ReadAt(p []byte, off int64) (int, error) {
	const period = 256
	for i := range min(len(p), period) {
		p[i] = byte(off+int64(i)) | 1
	}
	for done := period; done < len(p); done *= 2 {
		copy(p[done:], p[:done])
	}
	return len(p), nil
}
func (d fullDevice) Extents(off, n int64, fn func(block.Extent) bool) error {
	fn(block.Extent{Offset: off, Length: n, Allocated: true, Data: true, HostOffset: off})
	return nil
}

// TestNoAllocations: an engine read or overwrite of allocated data allocates nothing.
func TestNoAllocations(t *testing.T) {
	im, _ := costImage(t, CreateOptions{Size: 1 << 30}, Options{})
	buf := make([]byte, 4096)
	if _, err := im.WriteAt(buf, 0); err != nil {
		t.Fatal(err)
	}
	for name, op := range map[string]func() error{
		"ReadAt":    func() error { _, err := im.ReadAt(buf, 0); return err },
		"TryReadAt": func() error { return im.TryReadAt(buf, 0) },
		"WriteAt":   func() error { _, err := im.WriteAt(buf, 0); return err },
	} {
		if n := testing.AllocsPerRun(100, func() {
			if err := op(); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations an operation, want none", name, n)
		}
	}
}
