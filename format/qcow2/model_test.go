package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"pgregory.net/rapid"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
)

// modelConfig is one configuration of the engine; the same operations must have the same effect under all.
type modelConfig struct {
	create  CreateOptions
	backing int64 // bytes; 0: none
	cache   int64
	discard bool
	how     string // discipline
}

func (c modelConfig) String() string {
	o := c.create
	return fmt.Sprintf("v%d cluster=%d refcount=%d ext=%v zip=%s backing=%d cache=%d discard=%v data-file=%v raw=%v discipline=%s",
		o.Version, o.ClusterSize, o.RefcountBits, o.ExtendedL2, o.CompressionType, c.backing, c.cache, c.discard, o.DataFileName != "", o.DataFileRaw, c.how)
}

func drawConfig(t *rapid.T) modelConfig {
	var c modelConfig
	bits := rapid.SampledFrom([]int{9, 10, 12, 14, 16}).Draw(t, "cluster_bits")
	c.create.ClusterSize = 1 << bits
	c.create.Version = rapid.SampledFrom([]uint32{3, 3, 3, 2}).Draw(t, "version")
	c.create.RefcountBits = 16
	if c.create.Version == 3 {
		c.create.RefcountBits = 1 << rapid.IntRange(0, 6).Draw(t, "refcount_order")
		c.create.ExtendedL2 = bits >= 14 && rapid.Bool().Draw(t, "extended_l2")
		c.create.CompressionType = rapid.SampledFrom([]string{"zlib", "zstd"}).Draw(t, "compression_type")
		if rapid.IntRange(0, 7).Draw(t, "data_file") == 0 {
			c.create.DataFileName = "data"
			c.create.DataFileRaw = rapid.Bool().Draw(t, "data_file_raw")
		}
	}
	c.create.Size = int64(rapid.IntRange(1, 60).Draw(t, "clusters"))<<bits + int64(rapid.IntRange(0, 3).Draw(t, "sectors"))*512
	if !c.create.DataFileRaw && rapid.Bool().Draw(t, "backed") {
		c.backing = max(c.create.Size+int64(rapid.IntRange(-20, 20).Draw(t, "backing_sectors"))*512, 512)
		c.create.BackingFile, c.create.BackingFormat = "base", "raw"
	}
	c.cache = rapid.SampledFrom([]int64{1, 64 << 10, 0}).Draw(t, "cache")
	c.discard = rapid.Bool().Draw(t, "discard")
	c.how = rapid.SampledFrom(Disciplines()).Draw(t, "discipline")
	if c.create.Version < 3 {
		c.how = Ordered
	}
	return c
}

// memDevice is the plainest backing device: bytes in memory, zeros known as such in whole KiB.
type memDevice struct {
	block.Device
	bytes []byte
}

func (d *memDevice) Size() int64 { return int64(len(d.bytes)) }
func (d *memDevice) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(d.bytes).ReadAt(p, off)
}
func (d *memDevice) TryReadAt(p []byte, off int64) error {
	copy(p, d.bytes[off:])
	return nil
}
func (d *memDevice) Close() error { return nil }
func (d *memDevice) Extents(off, n int64, fn func(block.Extent) bool) error {
	for end := off + n; off < end; {
		step := min(1024-off%1024, end-off)
		zero := len(bytes.Trim(d.bytes[off:off+step], "\x00")) == 0
		if !fn(block.Extent{Offset: off, Length: step, Allocated: !zero, Data: !zero, Zero: zero, HostOffset: off}) {
			return nil
		}
		off += step
	}
	return nil
}

// newBacking makes a backing disk with data in some places.
func newBacking(seed uint64, size int64) *memDevice {
	d := &memDevice{bytes: make([]byte, size)}
	r := rand.New(rand.NewPCG(seed, 1))
	for off := int64(0); off < size; off += 1024 {
		if r.IntN(3) > 0 {
			p := d.bytes[off:min(off+1024, size)]
			fillRandom(r, p)
			for i := range p {
				p[i] |= 1
			}
		}
	}
	return d
}

// fillRandom fills p with random bytes.
func fillRandom(r *rand.Rand, p []byte) {
	var b [8]byte
	for len(p) > 0 {
		binary.NativeEndian.PutUint64(b[:], r.Uint64())
		p = p[copy(p, b[:]):]
	}
}

// world is an image, its files and the bytes it should hold.
type world struct {
	t       testing.TB
	cfg     modelConfig
	file    *storage.Memory
	data    *storage.Memory
	backing *memDevice
	im      *Image
	want    []byte
}

// fataler is what *testing.T and *rapid.T have in common for this test.
type fataler interface {
	Fatalf(format string, args ...any)
	Helper()
}

func newWorld(t testing.TB, f fataler, cfg modelConfig, seed uint64) *world {
	w := &world{t: t, cfg: cfg, file: storage.NewMemory("image"), want: make([]byte, cfg.create.Size)}
	if cfg.create.DataFileName != "" {
		w.data = storage.NewMemory("data")
		w.cfg.create.DataFile = keepOpen{w.data}
	}
	if cfg.backing > 0 {
		w.backing = newBacking(seed, cfg.backing)
		w.cfg.create.BackingSize = cfg.backing
		copy(w.want, w.backing.bytes)
	}
	if err := Create(w.file, w.cfg.create); err != nil {
		f.Fatalf("create %v: %v", cfg, err)
	}
	w.open(f)
	return w
}

// keepOpen lets a file outlive the image that owns it.
type keepOpen struct{ storage.File }

func (keepOpen) Close() error { return nil }

func (w *world) open(f fataler) {
	f.Helper()
	o := Options{L2CacheSize: w.cfg.cache, RefcountCacheSize: w.cfg.cache, Discard: w.cfg.discard, Discipline: w.cfg.how}
	o.JournalCommitInterval = -1 // an image that is abandoned, as after a crash, must not write later
	if w.backing != nil {
		o.Backing = w.backing
	}
	if w.data != nil {
		o.DataFile = keepOpen{w.data}
	}
	im, err := Open(keepOpen{w.file}, o)
	if err != nil {
		f.Fatalf("open %v: %v", w.cfg, err)
	}
	w.im = im
}

func (w *world) reopen(f fataler) {
	f.Helper()
	if err := w.im.Close(); err != nil {
		f.Fatalf("close: %v", err)
	}
	w.open(f)
}

func (w *world) verify(f fataler, off, n int64) {
	f.Helper()
	got := make([]byte, n)
	if _, err := w.im.ReadAt(got, off); err != nil {
		f.Fatalf("read %d at %d: %v", n, off, err)
	}
	want := w.want[off : off+n]
	if !bytes.Equal(got, want) {
		for i := range got {
			if got[i] != want[i] {
				f.Fatalf("%v: byte %d is %#x, want %#x (read %d at %d)", w.cfg, off+int64(i), got[i], want[i], n, off)
			}
		}
	}
	if err := w.im.TryReadAt(got, off); err == nil && !bytes.Equal(got, want) {
		f.Fatalf("TryReadAt of %d at %d differs", n, off)
	} else if err != nil && !errors.Is(err, block.ErrWouldBlock) {
		f.Fatalf("TryReadAt: %v", err)
	}
}

// discarded updates the expectation after a discard, whose effect on the parts of clusters is the image's.
func (w *world) discarded(f fataler, off, n int64) {
	got := make([]byte, n)
	if _, err := w.im.ReadAt(got, off); err != nil {
		f.Fatalf("read after discard: %v", err)
	}
	for i, b := range got {
		if b != 0 && b != w.want[off+int64(i)] {
			f.Fatalf("byte %d is %#x after a discard, want 0 or %#x", off+int64(i), b, w.want[off+int64(i)])
		}
	}
	copy(w.want[off:], got)
}

// step does one random operation.
func (w *world) step(f fataler, r *rand.Rand) {
	size := int64(len(w.want))
	unit := int64(1)
	switch r.IntN(4) {
	case 0, 1:
		unit = 512
	case 2:
		unit = min(4096, w.cfg.create.ClusterSize)
	}
	off := r.Int64N(size) / unit * unit
	n := min((1+r.Int64N(max(4*w.cfg.create.ClusterSize/unit, 1)))*unit, size-off)
	if r.IntN(3) == 0 {
		n = min(unit, size-off)
	}
	switch op := r.IntN(16); op {
	case 0, 1, 2, 3, 4, 5:
		p := make([]byte, n)
		fillRandom(r, p)
		if got, err := w.im.WriteAt(p, off); err != nil || got != len(p) {
			f.Fatalf("%v: write %d at %d: %d, %v", w.cfg, n, off, got, err)
		}
		copy(w.want[off:], p)
	case 6, 7, 8:
		w.verify(f, off, n)
	case 9:
		if err := w.im.Flush(); err != nil {
			f.Fatalf("flush: %v", err)
		}
	case 10, 11:
		flags := block.ZeroFlags(r.IntN(4))
		err := w.im.WriteZeroes(off, n, flags)
		if errors.Is(err, errors.ErrUnsupported) && flags&block.FastOnly != 0 {
			w.verify(f, off, n)
			return
		}
		if err != nil {
			f.Fatalf("write zeroes %d at %d: %v", n, off, err)
		}
		clear(w.want[off : off+n])
	case 12:
		if err := w.im.Discard(off, n); err != nil {
			f.Fatalf("discard %d at %d: %v", n, off, err)
		}
		w.discarded(f, off, n)
	case 13:
		cs := w.cfg.create.ClusterSize
		off = off / cs * cs
		n = min(cs, size-off)
		p := bytes.Repeat([]byte(fmt.Sprint(r.Uint32())), int(cs))[:n]
		err := w.im.WriteCompressed(p, off)
		if w.data != nil && errors.Is(err, errors.ErrUnsupported) {
			return
		}
		if err != nil {
			f.Fatalf("compressed write at %d: %v", off, err)
		}
		copy(w.want[off:], p)
	case 14:
		if r.IntN(4) == 0 {
			w.reopen(f)
		}
	case 15:
		if r.IntN(6) == 0 && size < 8<<20 {
			now := size + 512*r.Int64N(3*w.cfg.create.ClusterSize/512+40)
			if r.IntN(3) == 0 {
				now = size - 512*r.Int64N(size/1024+1)
			}
			err := w.im.Resize(now, block.PreallocOff)
			if h := w.im.Header(); h.Version == 2 && h.NbSnapshots > 0 {
				if err == nil {
					f.Fatalf("a version 2 image with snapshots changed its size")
				}
				return
			}
			if err != nil {
				f.Fatalf("resize from %d to %d: %v", size, now, err)
			}
			w.want = append(w.want[:min(now, size)], make([]byte, max(now-size, 0))...)
		}
	}
	if n = min(n, int64(len(w.want))-off); n > 0 {
		w.extentsAgree(f, off, n)
	}
}

// extentsAgree compares what Extents says with what is there.
func (w *world) extentsAgree(f fataler, off, n int64) {
	f.Helper()
	next := off
	err := w.im.Extents(off, n, func(e block.Extent) bool {
		if e.Offset != next || e.Length <= 0 {
			f.Fatalf("extent %+v, want one at %d", e, next)
		}
		next += e.Length
		if e.Zero && len(bytes.Trim(w.want[e.Offset:next], "\x00")) != 0 {
			f.Fatalf("%v: extent %+v is not all zeros", w.cfg, e)
		}
		return true
	})
	if err != nil || next != off+n {
		f.Fatalf("extents of %d at %d end at %d, %v", n, off, next, err)
	}
}

// TestModel runs random operations against a byte array over random configurations. The image each leaves is
// clean for both checkers, and stock QEMU reads the same bytes.
func TestModel(t *testing.T) {
	fewerChecks(t)
	rapid.Check(t, func(rt *rapid.T) {
		cfg := drawConfig(rt)
		seed := rapid.Uint64().Draw(rt, "seed")
		steps := rapid.IntRange(1, 120).Draw(rt, "steps")
		w := newWorld(t, rt, cfg, seed)
		r := rand.New(rand.NewPCG(seed, 2))
		for range steps {
			w.step(rt, r)
		}
		w.verify(rt, 0, int64(len(w.want)))
		w.reopen(rt)
		w.verify(rt, 0, int64(len(w.want)))
		if err := w.im.Close(); err != nil {
			rt.Fatalf("close: %v", err)
		}
		w.judge(t, rt)
	})
}

// judge has the closed image checked, and read by QEMU where it is installed.
func (w *world) judge(t testing.TB, f fataler) {
	dir, err := os.MkdirTemp(t.TempDir(), "model")
	if err != nil {
		f.Fatalf("%v", err)
	}
	defer os.RemoveAll(dir)
	testenv.Need(t, "qemu-img")
	path := filepath.Join(dir, "image.qcow2")
	saveImage(t, w.file, path)
	if w.data != nil {
		saveImage(t, w.data, filepath.Join(dir, "data"))
	}
	if w.backing != nil {
		if err := os.WriteFile(filepath.Join(dir, "base"), w.backing.bytes, 0o644); err != nil {
			f.Fatalf("%v", err)
		}
	}
	if out, err := qemuImg(dir, "check", "image.qcow2"); err != nil {
		f.Fatalf("%v: qemu-img check: %v\n%s", w.cfg, err, out)
	}
	if out, err := qemuImg(dir, "convert", "-O", "raw", "image.qcow2", "out.raw"); err != nil {
		f.Fatalf("qemu-img convert: %v\n%s", err, out)
	}
	got, err := os.ReadFile(filepath.Join(dir, "out.raw"))
	if err != nil || !bytes.Equal(got, w.want) {
		f.Fatalf("%v: qemu-img reads something else (%d bytes, want %d): %v", w.cfg, len(got), len(w.want), err)
	}
}

// qemuImg runs qemu-img in a directory and returns everything it printed.
func qemuImg(dir string, args ...string) (string, error) {
	cmd := exec.Command("qemu-img", args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	return string(out), err
}
