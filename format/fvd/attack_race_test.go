package fvd

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/crashlab"
	"go.uber.org/goleak"
)

// TestTryReadNeverWaits: neither for those who have the image to themselves, nor for storage or base image.
func TestTryReadNeverWaits(t *testing.T) {
	im := opened(t, made(t, smallCompact(64<<10)), Options{})
	if !im.m.guard.pause() {
		t.Fatal("closed")
	}
	result := make(chan error, 1)
	go func() { result <- im.TryReadAt(make([]byte, 512), 0) }()
	select {
	case err := <-result:
		if err != block.ErrWouldBlock {
			t.Errorf("while the image is paused: %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("a try waits for the end of a pause")
	}
	im.m.guard.resume(false)
	must(t, im.TryReadAt(make([]byte, 512), 0))
	must(t, im.Close())
	if err := im.TryReadAt(make([]byte, 512), 0); !errors.Is(err, block.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}

	base := newBase(64 << 10)
	base.reads = func(int64, int64) error { return nil } // TryReadAt would block
	o := smallCompact(64 << 10)
	o.Base, o.BaseImage = base, "base"
	im = opened(t, made(t, o), Options{Base: base})
	if err := im.TryReadAt(make([]byte, 512), 0); err != block.ErrWouldBlock {
		t.Errorf("over a base image that blocks: %v", err)
	}
	must(t, im.Close())
}

// TestOneRequestForNeighbours: what lies side by side in the storage, or in the base image, is one read or write.
func TestOneRequestForNeighbours(t *testing.T) {
	o := CreateOptions{Size: 1 << 20, Compact: true, BlockSize: 4096, ChunkSize: 4096, GrowUnit: 1 << 20}
	baseReads := 0
	base := newBase(512 << 10)
	base.reads = func(int64, int64) error { baseReads++; return nil }
	o.Base, o.BaseImage = base, "base"
	counter := crashlab.NewCounter(made(t, o), false)
	im := opened(t, counter, Options{Base: base})
	put(t, im, 512<<10, filled(1, 128<<10))
	put(t, im, 0, filled(1, 128<<10))
	must(t, im.Flush())
	for _, c := range []struct {
		what                 string
		op                   func()
		reads, writes, bases int
	}{
		{"read of 32 chunks", func() { get(t, im, 512<<10, 128<<10) }, 1, 0, 0},
		{"overwrite of 32 chunks", func() { put(t, im, 512<<10+100, filled(2, 100<<10)) }, 0, 1, 0},
		{"read of 32 blocks of the base image", func() { get(t, im, 256<<10, 128<<10) }, 0, 0, 1},
		{"read of both", func() { get(t, im, 0, 256<<10) }, 1, 0, 1},
		{"first write of 16 chunks", func() { put(t, im, 768<<10, filled(3, 64<<10)) }, 0, 1, 0},
	} {
		counter.Reset()
		baseReads = 0
		c.op()
		r, w := counter.Count(crashlab.KindRead).Ops, counter.Count(crashlab.KindWrite).Ops
		if r != int64(c.reads) || w != int64(c.writes) || baseReads != c.bases {
			t.Errorf("%s: %d reads, %d writes, %d of the base image; want %d, %d, %d", c.what, r, w, baseReads, c.reads, c.writes, c.bases)
		}
	}
	must(t, im.Close())
}

// stress is an image under everything at once. Each worker has sectors of its own, sector s belonging to worker
// s mod workers, so that it knows what they hold.
type stress struct {
	im    *Image
	stop  atomic.Bool
	fails chan error
}

const stressWorkers = 3

func (s *stress) check(err error) bool {
	if err == nil {
		return true
	}
	if !errors.Is(err, block.ErrClosed) {
		select {
		case s.fails <- err:
		default:
		}
	}
	return false
}

// worker changes and reads its sectors of the first size bytes; want is what they hold.
func (s *stress) worker(k int, rng *rand.Rand, want []byte) {
	p := make([]byte, 512)
	for i := 0; !s.stop.Load(); i++ {
		off := (rng.Int64N(int64(len(want))/512/stressWorkers)*stressWorkers + int64(k)) * 512
		var err error
		switch rng.IntN(8) {
		case 0, 1, 2:
			tag := byte(i) | 1
			if _, err = s.im.WriteAt(bytes.Repeat([]byte{tag}, 512), off); err == nil {
				copy(want[off:], bytes.Repeat([]byte{tag}, 512))
			}
		case 3:
			if err = s.im.WriteZeroes(off, 512, block.MayUnmap); err == nil {
				clear(want[off : off+512])
			}
		case 4:
			err = s.im.Flush()
		case 5:
			if err = s.im.TryReadAt(p, off); err == block.ErrWouldBlock {
				continue
			}
			if err == nil {
				err = diff(p, want[off:off+512])
			}
		default:
			if _, err = s.im.ReadAt(p, off); err == nil {
				err = diff(p, want[off:off+512])
			}
		}
		if !s.check(err) {
			return
		}
	}
}

// around does all that a guest does not see, except for the part of the disk beyond size, which it discards.
func (s *stress) around(rng *rand.Rand, size int64) {
	p := make([]byte, 16<<10)
	for !s.stop.Load() {
		var err error
		switch rng.IntN(9) {
		case 0:
			err = s.im.Checkpoint()
		case 1:
			if err = s.im.Resize(s.im.Size()+4096, 0); errors.Is(err, errors.ErrUnsupported) {
				err = nil // another was faster
			}
		case 2:
			if err = s.im.DetachBase(); errors.Is(err, ErrStillNeeded) {
				err = nil
			}
		case 3:
			err = s.im.Extents(0, size, func(block.Extent) bool { return true })
		case 4:
			off := size + rng.Int64N(s.im.Size()-size)
			err = s.im.Discard(off, min(64<<10, s.im.Size()-off))
		case 5:
			off := size + rng.Int64N(s.im.Size()-size)
			_, err = s.im.WriteAt(p[:min(16<<10, s.im.Size()-off)], off)
		default:
			s.im.Limits()
			unit := s.im.CopyUnit()
			off, n := s.im.NextInBase(rng.Int64N(size))
			n = min(n, int64(len(p)))
			if n == 0 || s.im.ReadBase(p[:n], off/unit*unit) != nil {
				continue
			}
			_, err = s.im.Populate(p[:n], off/unit*unit)
		}
		if !s.check(err) {
			return
		}
	}
}

// TestEverythingAtOnce runs writers that know what their sectors hold beside checkpoints, copies, discards, growth
// and detaching, and closes the image in the midst of it. The disk, reopened, holds what each writer was told.
func TestEverythingAtOnce(t *testing.T) {
	defer goleak.VerifyNone(t)
	const size = 144 << 10
	compact := CreateOptions{Size: size + 64<<10, Compact: true, BlockSize: 2 << 10, ChunkSize: 8 << 10, GrowUnit: 32 << 10, JournalSize: 512 << 10}
	overlay := CreateOptions{Size: size + 64<<10, BlockSize: 2 << 10, JournalSize: 16 << 10}
	for i, sh := range []shape{
		{create: compact, base: 100 << 10},
		{create: compact, base: 100 << 10, data: "file", open: Options{Journal: JournalImmediate}},
		{create: compact, base: -1},
		{create: overlay, base: 100 << 10, open: Options{Journal: JournalImmediate}},
		{create: overlay, base: 100 << 10, data: "file"},
	} {
		t.Run(sh.String(), func(t *testing.T) {
			r := newRig(t, sh)
			s := &stress{im: r.im, fails: make(chan error, 1)}
			var workers [stressWorkers][]byte
			var wg sync.WaitGroup
			for k := range workers {
				workers[k] = bytes.Clone(r.want[:size])
				wg.Go(func() { s.worker(k, rand.New(rand.NewPCG(uint64(i), uint64(k))), workers[k]) })
			}
			for k := range 2 {
				wg.Go(func() { s.around(rand.New(rand.NewPCG(uint64(i), uint64(10+k))), size) })
			}
			time.Sleep(150 * time.Millisecond)
			must(t, r.im.Close())
			s.stop.Store(true)
			wg.Wait()
			select {
			case err := <-s.fails:
				t.Fatal(err)
			default:
			}
			must(t, r.reopen())
			got := get(t, r.im, 0, size)
			for off := int64(0); off < size; off += 512 {
				if err := diff(got[off:off+512], workers[off/512%stressWorkers][off:off+512]); err != nil {
					t.Fatalf("sector %d: %v", off/512, err)
				}
			}
			must(t, r.im.Audit())
			must(t, r.im.Close())
			must(t, checkClean(r))
		})
	}
}

// TestEmptyBesideCopies: the bitmap is emptied while others look for what is left to copy.
func TestEmptyBesideCopies(t *testing.T) {
	base := newBase(256 << 10)
	o := smallCompact(64 << 10)
	o.Base, o.BaseImage = base, "base"
	im := opened(t, made(t, o), Options{Base: base})
	s := &stress{im: im, fails: make(chan error, 1)}
	var wg sync.WaitGroup
	wg.Go(func() {
		p := make([]byte, 4096)
		for off := int64(0); !s.stop.Load(); off = (off + 4096) % (256 << 10) {
			start, n := im.NextInBase(off)
			if n < 4096 {
				continue
			}
			if !s.check(im.ReadBase(p, start)) {
				return
			}
			if _, err := im.Populate(p, start); !s.check(err) {
				return
			}
		}
	})
	for range 10 {
		must(t, im.Empty())
	}
	s.stop.Store(true)
	wg.Wait()
	select {
	case err := <-s.fails:
		t.Error(err)
	default:
	}
	want := make([]byte, im.Size())
	if _, err := base.f.ReadAt(want, 0); err != nil {
		t.Fatal(err)
	}
	must(t, diff(get(t, im, 0, im.Size()), want))
	must(t, im.Audit())
	must(t, im.Close())
}

// TestCopyOlderThanEmpty: what was read of the base image before the image was committed to it and emptied is not kept.
func TestCopyOlderThanEmpty(t *testing.T) {
	base := newBase(256 << 10)
	o := smallCompact(64 << 10)
	o.Base, o.BaseImage = base, "base"
	im := opened(t, made(t, o), Options{Base: base})
	p := make([]byte, 64<<10)
	must(t, im.ReadBase(p, 0))
	put(t, im, 8192, filled(0xDB, 4096))
	want := get(t, im, 0, 256<<10)
	_, err := base.WriteAt(want, 0) // commits
	must(t, err)
	must(t, im.Empty())
	if kept, err := im.Populate(p, 0); err != nil || kept != 0 {
		t.Errorf("kept %d bytes, %v", kept, err)
	}
	must(t, diff(get(t, im, 0, 256<<10), want))
	must(t, im.ReadBase(p, 0))
	if kept, err := im.Populate(p, 0); err != nil || kept != 64<<10 {
		t.Errorf("kept %d bytes of what was read now, %v", kept, err)
	}
	must(t, diff(get(t, im, 0, 256<<10), want))
	base.reads = func(int64, int64) error { return errors.New("gone") }
	if kept, err := im.Populate(p, 64<<10); err == nil || kept != 0 {
		t.Errorf("kept %d bytes that cannot be compared, %v", kept, err)
	}
	must(t, im.Close())
}

// TestAuditBesideChanges: an audit is right at any moment, also while the disk grows and its table moves.
func TestAuditBesideChanges(t *testing.T) {
	o := smallCompact(64 << 10)
	o.Size = 4096
	im := opened(t, made(t, o), Options{})
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for !stop.Load() {
			if err := im.Audit(); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for size := int64(4096); size < 4<<20; size *= 2 {
		put(t, im, size-512, filled(1, 512))
		must(t, im.Resize(2*size, 0))
	}
	stop.Store(true)
	wg.Wait()
	must(t, im.Close())
	if err := im.Audit(); !errors.Is(err, block.ErrClosed) {
		t.Errorf("audit after Close: %v", err)
	}
}

// TestQuestionsBesideChanges: what prefetching and servers ask of an image needs no permission, also while the disk
// grows, moves its table, and is emptied.
func TestQuestionsBesideChanges(t *testing.T) {
	base := newBase(256 << 10)
	o := smallCompact(256 << 10)
	o.Base, o.BaseImage = base, "base"
	im := opened(t, made(t, o), Options{Base: base})
	var wg sync.WaitGroup
	var stop atomic.Bool
	for k := range int64(2) {
		wg.Go(func() {
			for !stop.Load() {
				if start, n := im.NextInBase(k * 4096); n > 0 && start < k*4096 {
					t.Errorf("%d bytes from %d on in the base image", n, start)
				}
				if im.CopyUnit() != 4096 || im.BaseSize() != 256<<10 || im.Limits().Preferred != 4096 || im.Size()%512 != 0 {
					t.Error("wrong answers")
				}
			}
		})
	}
	put(t, im, 0, filled(1, 4096))
	for i := range int64(8) {
		must(t, im.Empty())
		must(t, im.Resize(im.Size()+i<<19, 0))
	}
	stop.Store(true)
	wg.Wait()
	must(t, im.Close())
}

// TestHotPathsAllocateNothing: what a warm image does for a request costs no memory, whatever its shape; only what
// lies in the base image, and allocates, may.
func TestHotPathsAllocateNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	for _, data := range []string{"", "file", "device"} {
		for _, mode := range []JournalMode{JournalImmediate, JournalBuffered} {
			r := newRig(t, shape{create: CreateOptions{Size: 8 << 20, Compact: true, BlockSize: 64 << 10, ChunkSize: 64 << 10}, base: 8 << 20, data: data, open: Options{Journal: mode}})
			im := r.im
			p := filled(1, 128<<10)
			put(t, im, 1<<20, p)
			must(t, im.Flush())
			next := int64(2 << 20)
			for name, op := range map[string]func() error{
				"read":                   func() error { _, err := im.ReadAt(p, 1<<20); return err },
				"read of the base image": func() error { _, err := im.ReadAt(p[:4096], 7<<20); return err },
				"try read":               func() error { return im.TryReadAt(p, 1<<20) },
				"overwrite":              func() error { _, err := im.WriteAt(p, 1<<20); return err },
				"zeroes in place":        func() error { return im.WriteZeroes(1<<20, 4096, 0) },
				"copy on write": func() error {
					_, err := im.WriteAt(p[:4096], next)
					next += 64 << 10
					return err
				},
				"flush": im.Flush,
			} {
				most := 0.0
				if name == "copy on write" || name == "zeroes in place" { // memory that stands for a file allocates its pages, and drops them
					most = 20
				}
				if n := testing.AllocsPerRun(30, func() { must(t, op()) }); n > most {
					t.Errorf("data %q, mode %d: %s allocates %v times", data, mode, name, n)
				}
			}
			must(t, im.Close())
		}
	}
}
