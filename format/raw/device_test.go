package raw_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/raw"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
	"pgregory.net/rapid"
)

var all = raw.Options{Discard: true}

func memory(t testing.TB, size int64) *storage.Memory {
	t.Helper()
	m := storage.NewMemory("disk.raw")
	if err := m.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return m
}

func open(t testing.TB, f storage.File, o raw.Options) *raw.Device {
	t.Helper()
	d, err := raw.Open(f, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// limited is a Memory without some capabilities, with counted and failing Syncs.
type limited struct {
	*storage.Memory
	noPunch, noZero, noTruncate bool
	punched, zeroed, syncs      atomic.Int64
	written                     atomic.Int64
	syncing                     func() error
}

func (l *limited) PunchHole(off, length int64) error {
	if l.noPunch {
		return errors.ErrUnsupported
	}
	l.punched.Add(length)
	return l.Memory.PunchHole(off, length)
}

func (l *limited) ZeroRange(off, length int64) error {
	if l.noZero {
		return errors.ErrUnsupported
	}
	l.zeroed.Add(length)
	return l.Memory.ZeroRange(off, length)
}

func (l *limited) WriteAt(p []byte, off int64) (int, error) {
	l.written.Add(int64(len(p)))
	return l.Memory.WriteAt(p, off)
}

func (l *limited) Truncate(size int64) error {
	if l.noTruncate {
		return errors.ErrUnsupported
	}
	return l.Memory.Truncate(size)
}

func (l *limited) Sync() error {
	l.syncs.Add(1)
	if l.syncing != nil {
		return l.syncing()
	}
	return nil
}

// TestModel runs random operations on a device and on a byte slice.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		length := rapid.Int64Range(0, 50000).Draw(t, "file length")
		f := &limited{Memory: storage.NewMemory("disk.raw")}
		f.noPunch, f.noZero = rapid.Bool().Draw(t, "no punch"), rapid.Bool().Draw(t, "no zero")
		if err := f.Memory.Truncate(length); err != nil {
			t.Fatal(err)
		}
		o := raw.Options{Discard: rapid.Bool().Draw(t, "discard"), Writethrough: rapid.Bool().Draw(t, "writethrough")}
		d, err := raw.Open(f, o)
		if err != nil {
			t.Fatal(err)
		}
		model := make([]byte, (length+511)/512*512)
		draw := func(t *rapid.T) (off, n int64) {
			off = rapid.Int64Range(0, int64(len(model))).Draw(t, "off")
			return off, rapid.Int64Range(0, int64(len(model))-off).Draw(t, "len")
		}
		must := func(err error) {
			if err != nil {
				t.Fatal(err)
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"write": func(t *rapid.T) {
				off, n := draw(t)
				p := bytes.Repeat([]byte{rapid.Byte().Draw(t, "byte")}, int(n))
				_, err := d.WriteAt(p, off)
				must(err)
				copy(model[off:], p)
			},
			"zeroes": func(t *rapid.T) {
				off, n := draw(t)
				flags := block.ZeroFlags(rapid.IntRange(0, 3).Draw(t, "flags"))
				before := f.written.Load()
				err := d.WriteZeroes(off, n, flags)
				if flags&block.FastOnly != 0 && errors.Is(err, errors.ErrUnsupported) {
					if f.written.Load() != before {
						t.Fatal("a refused fast zero wrote")
					}
					return
				}
				must(err)
				clear(model[off : off+n])
			},
			"discard": func(t *rapid.T) {
				off, n := draw(t)
				must(d.Discard(off, n))
				got := make([]byte, n)
				must(storage.ReadFull(f, got, off))
				for i, b := range got {
					if b != 0 && b != model[off+int64(i)] {
						t.Fatalf("byte %d is %#x after discard: neither old nor zero", off+int64(i), b)
					}
				}
				copy(model[off:], got)
			},
			"resize": func(t *rapid.T) {
				size := rapid.Int64Range(0, 50000).Draw(t, "size")
				must(d.Resize(size, block.PreallocOff))
				grown := make([]byte, (size+511)/512*512)
				copy(grown, model[:min(int64(len(model)), size)])
				model = grown
			},
			"flush": func(*rapid.T) { must(d.Flush()) },
			"reopen": func(t *rapid.T) {
				must(d.Close())
				d, err = raw.Open(f, o)
				must(err)
			},
			"": func(t *rapid.T) {
				if d.Size() != int64(len(model)) {
					t.Fatalf("size %d, want %d", d.Size(), len(model))
				}
				got := make([]byte, len(model)+10)
				n, err := d.ReadAt(got, 0)
				if n != len(model) || err != io.EOF || !bytes.Equal(got[:n], model) {
					t.Fatalf("read %d of %d bytes, %v, or they differ", n, len(model), err)
				}
				must(d.TryReadAt(got[:n], 0))
				if !bytes.Equal(got[:n], model) {
					t.Fatal("TryReadAt differs")
				}
				pos := int64(0)
				must(d.Extents(0, d.Size(), func(e block.Extent) bool {
					if e.Offset != pos || e.Length <= 0 || !e.Allocated || e.Zero == e.Data || e.HostOffset != e.Offset || e.Depth != 0 {
						t.Fatalf("extent %+v at %d", e, pos)
					}
					if e.Zero && !bytes.Equal(model[pos:pos+e.Length], make([]byte, e.Length)) {
						t.Fatalf("extent %+v is not zero", e)
					}
					pos += e.Length
					return true
				}))
				if pos != d.Size() {
					t.Fatalf("extents end at %d of %d", pos, d.Size())
				}
			},
		})
	})
}

func TestRanges(t *testing.T) {
	d := open(t, memory(t, 1000), all)
	if d.Size() != 1024 {
		t.Fatalf("size %d, want 1024", d.Size())
	}
	for name, call := range map[string]func() error{
		"write":       func() error { _, err := d.WriteAt(make([]byte, 2), 1023); return err },
		"write neg":   func() error { _, err := d.WriteAt(make([]byte, 2), -1); return err },
		"read neg":    func() error { _, err := d.ReadAt(make([]byte, 2), -1); return err },
		"try":         func() error { return d.TryReadAt(make([]byte, 2), 1023) },
		"zero":        func() error { return d.WriteZeroes(0, 1025, 0) },
		"zero huge":   func() error { return d.WriteZeroes(math.MaxInt64, math.MaxInt64, 0) },
		"discard":     func() error { return d.Discard(1024, 1) },
		"extents":     func() error { return d.Extents(0, 1025, func(block.Extent) bool { return true }) },
		"extents neg": func() error { return d.Extents(-1, 5, func(block.Extent) bool { return true }) },
	} {
		if err := call(); !errors.Is(err, block.ErrOutOfRange) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n, err := d.ReadAt(make([]byte, 5), 1024); n != 0 || err != io.EOF {
		t.Errorf("read at the end: %d, %v", n, err)
	}
	if err := d.WriteCompressed(make([]byte, 512), 0); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("compressed: %v", err)
	}
}

func TestReadOnlyAndClosed(t *testing.T) {
	f := &limited{Memory: memory(t, 4096)}
	d := open(t, f, raw.Options{ReadOnly: true})
	changes := map[string]func() error{
		"write":   func() error { _, err := d.WriteAt(make([]byte, 2), 0); return err },
		"zero":    func() error { return d.WriteZeroes(0, 10, 0) },
		"discard": func() error { return d.Discard(0, 10) },
		"resize":  func() error { return d.Resize(8192, block.PreallocOff) },
	}
	for name, call := range changes {
		if err := call(); !errors.Is(err, block.ErrReadOnly) {
			t.Errorf("%s of a read-only device: %v", name, err)
		}
	}
	if err := d.Flush(); err != nil || f.syncs.Load() != 0 || !d.Limits().ReadOnly {
		t.Errorf("flush: %v, %d syncs", err, f.syncs.Load())
	}
	for range 2 {
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	changes["read"] = func() error { _, err := d.ReadAt(make([]byte, 1), 0); return err }
	changes["try"] = func() error { return d.TryReadAt(make([]byte, 1), 0) }
	changes["flush"] = d.Flush
	changes["extents"] = func() error { return d.Extents(0, 1, func(block.Extent) bool { return true }) }
	for name, call := range changes {
		if err := call(); !errors.Is(err, block.ErrClosed) {
			t.Errorf("%s after close: %v", name, err)
		}
	}
}

func TestZeroAndDiscardUseTheFile(t *testing.T) {
	for _, test := range []struct {
		name                     string
		o                        raw.Options
		noPunch, noZero          bool
		call                     func(*raw.Device) error
		punched, zeroed, written int64
	}{
		{"unmap", all, false, false, func(d *raw.Device) error { return d.WriteZeroes(100, 50000, block.MayUnmap) }, 50000, 0, 0},
		{"unmap without discard", raw.Options{}, false, false, func(d *raw.Device) error { return d.WriteZeroes(100, 50000, block.MayUnmap) }, 0, 50000, 0},
		{"keep", all, false, false, func(d *raw.Device) error { return d.WriteZeroes(100, 50000, 0) }, 0, 50000, 0},
		{"unmap, no holes", all, true, false, func(d *raw.Device) error { return d.WriteZeroes(100, 50000, block.MayUnmap) }, 0, 50000, 0},
		{"nothing helps", all, true, true, func(d *raw.Device) error { return d.WriteZeroes(100, 50000, block.MayUnmap) }, 0, 0, 50000},
		{"discard", all, false, false, func(d *raw.Device) error { return d.Discard(100, 50000) }, 45056, 0, 0},
		{"discard to the end", all, false, false, func(d *raw.Device) error { return d.Discard(100, 4<<20-100) }, 4<<20 - 4096, 0, 0},
		{"small discard", all, false, false, func(d *raw.Device) error { return d.Discard(100, 5000) }, 0, 0, 0},
		{"discard off", raw.Options{}, false, false, func(d *raw.Device) error { return d.Discard(0, 50000) }, 0, 0, 0},
		{"discard, no holes", all, true, false, func(d *raw.Device) error { return d.Discard(0, 50000) }, 0, 0, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := &limited{Memory: memory(t, 4<<20), noPunch: test.noPunch, noZero: test.noZero}
			d := open(t, f, test.o)
			if err := test.call(d); err != nil {
				t.Fatal(err)
			}
			if p, z, w := f.punched.Load(), f.zeroed.Load(), f.written.Load(); p != test.punched || z != test.zeroed || w != test.written {
				t.Errorf("punched %d, zeroed %d, wrote %d; want %d, %d, %d", p, z, w, test.punched, test.zeroed, test.written)
			}
		})
	}
}

func TestProbedGuard(t *testing.T) {
	qcow2 := append([]byte("QFI\xfb\x00\x00\x00\x03"), make([]byte, 504)...)
	guarded := raw.Options{ProbedGuard: true, Discard: true}
	f := memory(t, 4096)
	d := open(t, f, guarded)
	refused := func(p []byte, off int64) {
		t.Helper()
		before := make([]byte, 4096)
		if _, err := f.ReadAt(before, 0); err != nil {
			t.Fatal(err)
		}
		n, err := d.WriteAt(p, off)
		if n != 0 || !errors.Is(err, fs.ErrPermission) {
			t.Errorf("write of %q at %d: %d, %v; want it refused", p[:min(8, len(p))], off, n, err)
		}
		after := make([]byte, 4096)
		if _, err := f.ReadAt(after, 0); err != nil || !bytes.Equal(before, after) {
			t.Errorf("a refused write changed the disk (%v)", err)
		}
	}
	allowed := func(p []byte, off int64) {
		t.Helper()
		if _, err := d.WriteAt(p, off); err != nil {
			t.Errorf("write of %q at %d: %v", p[:min(8, len(p))], off, err)
		}
	}
	refused(qcow2, 0)
	refused(append(bytes.Clone(qcow2), make([]byte, 3000)...), 0)
	allowed(qcow2, 512)
	allowed([]byte("QF"), 0)
	allowed([]byte("\xfb"), 3)
	refused([]byte("I"), 2) // completes the magic number
	allowed([]byte("FVDx"), 0)
	if err := d.WriteZeroes(3, 1, 0); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("zeroing the byte that completes a magic number: %v", err)
	}
	refused([]byte("\x7f\x10\xda\xbe"), 64)
	allowed([]byte("harmless"), 0)
	if err := d.WriteZeroes(0, 4096, block.MayUnmap); err != nil {
		t.Error(err)
	}
	if err := d.Discard(0, 4096); err != nil {
		t.Error(err)
	}
	d = open(t, f, all)
	allowed(qcow2, 0)
	d = open(t, f, guarded) // the sector looks foreign already
	allowed(make([]byte, 512), 0)
}

// TestForeignAgreesWithQEMU: what qemu-img creates in another format is recognised.
func TestForeignAgreesWithQEMU(t *testing.T) {
	testenv.Need(t, "qemu-img")
	for _, format := range []string{"qcow2", "qcow", "vmdk", "vdi", "vhdx", "vpc", "qed", "parallels", "raw"} {
		path := filepath.Join(t.TempDir(), "disk")
		if out, err := exec.Command("qemu-img", "create", "-q", "-f", format, path, "10M").CombinedOutput(); err != nil {
			t.Logf("qemu-img cannot create %s: %s", format, out)
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		expect := format
		if format == "raw" {
			expect = ""
		}
		if got := raw.Foreign(b[:512]); got != expect {
			t.Errorf("%s is recognised as %q, want %q", format, got, expect)
		}
	}
}

func TestFlushesAreCombined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		f := &limited{Memory: memory(t, 4096), syncing: func() error { <-release; return nil }}
		d := open(t, f, all)
		var wg sync.WaitGroup
		flush := func() {
			if err := d.Flush(); err != nil {
				t.Error(err)
			}
		}
		wg.Go(flush)
		synctest.Wait()
		for range 20 {
			wg.Go(flush) // too late for the Sync that is running
		}
		synctest.Wait()
		close(release)
		wg.Wait()
		if n := f.syncs.Load(); n != 2 {
			t.Errorf("21 flushes took %d syncs, want 2", n)
		}
	})
}

func TestFailedFlushSticks(t *testing.T) {
	broken := errors.New("the disk is gone")
	f := &limited{Memory: memory(t, 4096), syncing: func() error { return broken }}
	d := open(t, f, all)
	if _, err := d.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	f.syncing = nil // it would work again, and must not be asked
	for name, call := range map[string]func() error{
		"flush":   d.Flush,
		"write":   func() error { _, err := d.WriteAt([]byte("y"), 0); return err },
		"zero":    func() error { return d.WriteZeroes(0, 1, 0) },
		"discard": func() error { return d.Discard(0, 1) },
		"resize":  func() error { return d.Resize(1<<20, block.PreallocOff) },
	} {
		if err := call(); !errors.Is(err, broken) {
			t.Errorf("%s: %v", name, err)
		}
	}
	b := make([]byte, 1)
	if _, err := d.ReadAt(b, 0); err != nil || b[0] != 'x' {
		t.Errorf("read: %q, %v", b, err)
	}
	if err := d.Close(); !errors.Is(err, broken) {
		t.Errorf("close: %v", err)
	}
}

func TestWritethrough(t *testing.T) {
	f := &limited{Memory: memory(t, 8192)}
	d := open(t, f, raw.Options{Writethrough: true, Discard: true})
	for i, call := range []func() error{
		func() error { _, err := d.WriteAt([]byte("x"), 0); return err },
		func() error { return d.WriteZeroes(0, 10, 0) },
		func() error { return d.Discard(0, 4096) },
		func() error { return d.Resize(1<<20, block.PreallocOff) },
	} {
		if err := call(); err != nil || f.syncs.Load() != int64(i+1) {
			t.Errorf("change %d: %v, %d syncs", i, err, f.syncs.Load())
		}
	}
}

func TestResizeAndCreate(t *testing.T) {
	const seesHoles = runtime.GOOS != "windows"
	for _, prealloc := range []block.Preallocation{block.PreallocOff, block.PreallocFalloc, block.PreallocFull} {
		path := filepath.Join(t.TempDir(), "disk.raw")
		f, err := storage.Open(path, storage.OpenOptions{Create: true})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		if _, err := f.WriteAt([]byte("rubbish"), 0); err != nil {
			t.Fatal(err)
		}
		err = raw.Create(f, 100000, prealloc)
		if errors.Is(err, errors.ErrUnsupported) {
			testenv.Missing(t, "a temporary directory on a file system with fallocate")
		}
		if err != nil {
			t.Fatal(err)
		}
		d := open(t, f, all)
		if d.Size() != 100352 || d.Limits().ZeroInit != (prealloc != block.PreallocFull && seesHoles) {
			t.Errorf("%v: size %d, limits %+v", prealloc, d.Size(), d.Limits())
		}
		if err := d.Resize(1<<20, prealloc); err != nil {
			t.Fatal(err)
		}
		got := bytes.Repeat([]byte{1}, 1<<20)
		if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, make([]byte, 1<<20)) {
			t.Errorf("%v: not zero, %v", prealloc, err)
		}
		if err := d.Resize(1<<19, block.PreallocFull); err == nil {
			t.Errorf("shrinking with preallocation: no error")
		}
		if err := d.Resize(1<<19, block.PreallocOff); err != nil || d.Size() != 1<<19 {
			t.Errorf("shrink: %v, size %d", err, d.Size())
		}
	}
	d := open(t, memory(t, 4096), all)
	for _, bad := range []func() error{
		func() error { return d.Resize(8192, block.PreallocMetadata) },
		func() error { return d.Resize(-1, block.PreallocOff) },
		func() error { return d.Resize(math.MaxInt64, block.PreallocOff) },
		func() error { return raw.Create(storage.NewMemory("m"), 1, block.PreallocMetadata) },
		func() error { return raw.Create(storage.NewMemory("m"), -1, block.PreallocOff) },
		func() error {
			return raw.Create(&limited{Memory: storage.NewMemory("m"), noTruncate: true}, 1, block.PreallocOff)
		},
	} {
		if err := bad(); err == nil {
			t.Error("no error")
		}
	}
	if d.Size() != 4096 {
		t.Errorf("refused resizes left size %d", d.Size())
	}
	if err := raw.Create(&limited{Memory: memory(t, 8192), noTruncate: true}, 8000, block.PreallocOff); err != nil {
		t.Errorf("create in a container of fixed size: %v", err)
	}
}

func TestWindow(t *testing.T) {
	f := memory(t, 8192)
	d := open(t, f, raw.Options{Offset: 1000, Size: 2048})
	if d.Size() != 2048 {
		t.Errorf("size %d", d.Size())
	}
	if _, err := d.WriteAt([]byte("x"), 2047); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, 3047); err != nil || b[0] != 'x' {
		t.Errorf("%q, %v", b, err)
	}
	if err := d.Resize(4096, block.PreallocOff); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("resize: %v", err)
	}
	if d := open(t, f, raw.Options{Offset: 4096}); d.Size() != 4096 {
		t.Errorf("size of the rest: %d", d.Size())
	}
	for _, test := range []struct {
		o    raw.Options
		want string
	}{
		{raw.Options{Offset: 9000}, "offset (9000) cannot be greater"},
		{raw.Options{Offset: 512, Size: 8192}, "the sum of offset (512) and size (8192)"},
		{raw.Options{Size: 1000}, "not multiple of 512"},
		{raw.Options{Offset: -1}, "must not be negative"},
		{raw.Options{Offset: 1, Size: math.MaxInt64}, "the sum of offset"},
	} {
		if _, err := raw.Open(f, test.o); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: %v", test.o, err)
		}
	}
}

func TestNoAllocations(t *testing.T) {
	f, err := storage.Open(filepath.Join(t.TempDir(), "disk.raw"), storage.OpenOptions{Create: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	d := open(t, f, raw.Options{ProbedGuard: true, Discard: true})
	p := make([]byte, 4096)
	for name, call := range map[string]func() error{
		"WriteAt":         func() error { _, err := d.WriteAt(p, 8192); return err },
		"guarded WriteAt": func() error { _, err := d.WriteAt(p, 0); return err },
		"ReadAt":          func() error { _, err := d.ReadAt(p, 8192); return err },
		"TryReadAt": func() error {
			if err := d.TryReadAt(p, 8192); err != block.ErrWouldBlock {
				return err
			}
			return nil
		},
	} {
		if err := call(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if n := testing.AllocsPerRun(50, func() { call() }); n != 0 && !raceEnabled {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func TestConcurrentUse(t *testing.T) {
	d := open(t, memory(t, 1<<20), raw.Options{ProbedGuard: true, Discard: true})
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			p := make([]byte, 1024)
			for i := range 50 {
				off := int64((w*50 + i) * 1024)
				for _, err := range []error{
					second(d.WriteAt(p, off)), second(d.ReadAt(p, off)), d.WriteZeroes(off, 1024, block.MayUnmap),
					d.Discard(off, 1024), d.Flush(), d.Resize(1<<20+int64(w), block.PreallocOff),
				} {
					if err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
}

func second(n int, err error) error {
	if err != nil {
		return fmt.Errorf("after %d bytes: %w", n, err)
	}
	return nil
}
