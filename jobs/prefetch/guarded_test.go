package prefetch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
)

// TestBitset compares with a slice of bools.
func TestBitset(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.Int64Range(1, 300).Draw(t, "n")
		b, want := newBitset(n), make([]bool, n)
		for _, i := range rapid.SliceOf(rapid.Int64Range(0, n-1)).Draw(t, "changes") {
			if want[i] = !want[i]; want[i] {
				b.set(i)
			} else {
				b.clear(i)
			}
		}
		from := rapid.Int64Range(0, n-1).Draw(t, "from")
		end := rapid.Int64Range(from, n).Draw(t, "end")
		for _, set := range []bool{false, true} {
			i := from
			for i < end && want[i] != set {
				i++
			}
			if got := b.next(from, end, set); got != i {
				t.Fatalf("the next %v in [%d, %d) is at %d, want %d", set, from, end, got, i)
			}
		}
	})
}

// TestUnitMap: what was found out while a guest changed a unit counts only if it can still be true.
func TestUnitMap(t *testing.T) {
	for _, found := range []place{placeBase, placeMixed, placeZero, placeOwn} {
		m := newUnitMap(2)
		m.learned(0, found)
		if m.in.get(0) != (found == placeBase) || m.zero.get(0) != (found == placeZero) || m.gone.get(0) != (found >= placeZero) {
			t.Errorf("found %d: in %v, zero %v, gone %v", found, m.in.get(0), m.zero.get(0), m.gone.get(0))
		}
		if gone := m.gone.get(0); m.settled(0, 1) != (found == placeOwn) {
			t.Errorf("found %d: settled %v", found, m.settled(0, 1))
		} else if m.changed(0); m.in.get(0) || m.zero.get(0) || m.gone.get(0) != gone {
			t.Errorf("found %d, then changed: in %v, zero %v, gone %v", found, m.in.get(0), m.zero.get(0), m.gone.get(0))
		}
		m.changed(1)
		m.learned(1, found) // asked before the change, told after it
		if m.in.get(1) || m.zero.get(1) || m.gone.get(1) != (found == placeOwn) {
			t.Errorf("changed, then found %d: in %v, zero %v, gone %v", found, m.in.get(1), m.zero.get(1), m.gone.get(1))
		}
	}
}

// TestBaseThatCannotTell: when the base image cannot say what lives there, nothing is given up. It is retried, and
// the base is detached only when every byte was copied.
func TestBaseThatCannotTell(t *testing.T) {
	defer goleak.VerifyNone(t)
	d := newLayered(1<<20, 65536)
	detached := false
	g := Guard(d, GuardedOptions{BaseSize: d.Size(), Detach: func() error { detached = true; return nil }})
	d.breakBase(errors.New("the base is gone"))
	if _, n := g.NextInBase(0); n == 0 || Remaining(g) != d.Size() {
		t.Errorf("nothing lives in a base that cannot be asked: %d of %d bytes remain", Remaining(g), d.Size())
	}
	if g.Learn(t.Context()) == nil {
		t.Error("Learn asked a base that cannot be asked")
	}
	if err := g.DetachBase(); err == nil || detached {
		t.Fatalf("detached from a base that cannot be asked: %v", err)
	}
	// The guest's own bytes need no base.
	_, err := g.WriteAt(bytes.Repeat([]byte{7}, 65536), 65536)
	must(t, err)
	p := make([]byte, 100)
	if _, err := g.ReadAt(p, 65536); err != nil || p[0] != 7 {
		t.Errorf("own bytes: %v %v", p[0], err)
	}
	clock := newFakeClock()
	var events []Event
	retried, enough := make(chan struct{}), make(chan struct{})
	p2 := New(g, Options{Clock: clock, Trace: func(e Event) {
		events = append(events, e)
		if e.Kind == EventRetry { // no time passes between two of them
			select {
			case retried <- struct{}{}:
			case <-enough:
			}
		}
	}})
	done := make(chan error)
	go func() { done <- p2.Run(t.Context()) }()
	for range 3 {
		<-retried
	}
	d.breakBase(nil)
	close(enough)
	must(t, <-done)
	if !detached || d.inBase() != 0 {
		t.Errorf("detached %v, %d bytes in the base", detached, d.inBase())
	}
	s := p2.Status()
	if s.State != StateDone || s.Retries < 3 || s.Error != "" {
		t.Errorf("status: %+v", s)
	}
	wait, seen := time.Duration(0), 0
	for _, e := range events {
		if e.Kind == EventRetry && seen < 3 { // those of a base that was gone all the time
			seen++
			if e.Err == nil || e.Wait < wait || e.Wait > maxRetry {
				t.Errorf("retry after %v: %v", e.Wait, e.Err)
			}
			wait = e.Wait
		}
	}
}

// TestNoRetry: with retrying off, the first failure of the base ends prefetching.
func TestNoRetry(t *testing.T) {
	d := newLayered(1<<20, 65536)
	d.breakBase(errors.New("the base is gone"))
	p := New(Guard(d, GuardedOptions{BaseSize: d.Size()}), Options{Retry: -1, Throttle: -1})
	if err := p.Run(t.Context()); !errors.Is(err, d.failBase) || p.Status().State != StateFailed {
		t.Errorf("%v, %+v", err, p.Status())
	}
}

// TestHoles: holes of the base read as zeros without asking the base, are not copied, and can be written.
func TestHoles(t *testing.T) {
	d := newLayered(1<<20, 65536)
	d.holes = true
	clear(d.base[131072:524288])
	g := Guard(d, GuardedOptions{BaseSize: d.Size()})
	if left := Remaining(g); left != 1<<20 {
		t.Errorf("before anybody asked, %d bytes live in the base", left)
	}
	must(t, g.Learn(t.Context()))
	if left := Remaining(g); left != 1<<20-393216 {
		t.Errorf("%d bytes live in the base", left)
	}
	asked := d.asked
	must(t, g.Learn(t.Context()))
	if d.asked != asked {
		t.Error("the base was asked again")
	}
	_, err := g.WriteAt([]byte{1, 2, 3}, 200_000)
	must(t, err)
	d.baseReads = nil
	want := bytes.Clone(d.base)
	copy(want[200_000:], []byte{1, 2, 3})
	got := make([]byte, 300_000)
	_, err = g.ReadAt(got, 140_000)
	must(t, err)
	if !bytes.Equal(got, want[140_000:440_000]) {
		t.Error("the holes read wrong")
	}
	if len(d.baseReads) > 0 {
		t.Errorf("the base was read at %v", d.baseReads)
	}
	must(t, g.TryReadAt(got[:1000], 140_000))
	if err := g.TryReadAt(got[:131072], 65536+100); !errors.Is(err, block.ErrWouldBlock) {
		t.Errorf("TryReadAt of data and holes: %v", err)
	}
	must(t, New(g, Options{Throttle: -1}).Run(t.Context()))
	got = make([]byte, 1<<20)
	_, err = g.ReadAt(got, 0)
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Error("the disk differs")
	}
	if left := d.inBase(); left != 393216-65536 {
		t.Errorf("%d bytes were left in the base, want the holes nobody wrote to", left)
	}
}

// TestHoleLeftAsItIs: a guest that zeroes or discards a part of a hole may leave it where it is. Prefetching ends all the
// same.
func TestHoleLeftAsItIs(t *testing.T) {
	d := newLayered(1<<20, 65536)
	d.holes = true
	clear(d.base[131072:524288])
	g := Guard(d, GuardedOptions{BaseSize: d.Size()})
	g.leave(g.enter(300_000, 10), false) // nothing changed
	ctx, cancel := context.WithTimeout(t.Context(), testenv.Patience)
	defer cancel()
	must(t, New(g, Options{Throttle: -1}).Run(ctx))
}

// huge is a device of which nothing is ever read.
type huge struct {
	block.Device
	size int64
}

func (h huge) Size() int64 { return h.size }

// TestLargeDisk: the memory for a disk is bounded.
func TestLargeDisk(t *testing.T) {
	for _, tc := range []struct{ size, unit, want int64 }{
		{1 << 40, 65536, 65536},
		{4 << 40, 65536, 131072},
		{1 << 62, 512, 1 << 37},
	} {
		g := Guard(huge{size: tc.size}, GuardedOptions{Unit: tc.unit, BaseSize: tc.size, Whole: true})
		if g.CopyUnit() != tc.want || g.units.n > maxUnits || g.whole != (tc.want == tc.unit) {
			t.Errorf("%d bytes in clusters of %d: %d units of %d, whole %v", tc.size, tc.unit, g.units.n, g.CopyUnit(), g.whole)
		}
	}
}

// TestOwnWrites: what a guest has written needs nobody to say that it has left the base.
func TestOwnWrites(t *testing.T) {
	for _, whole := range []bool{false, true} {
		d := newLayered(1<<20, 65536)
		g := Guard(d, GuardedOptions{BaseSize: d.Size(), Whole: whole})
		_, err := g.WriteAt(make([]byte, 131072+5), 65536)
		must(t, err)
		must(t, g.WriteZeroes(655360, 65536, 0))
		want := int64(14 * 65536)
		if whole {
			want -= 65536
		}
		if left := Remaining(g); left != want || d.asked > 0 {
			t.Errorf("whole %v: %d bytes remain, want %d; the base was asked %d times", whole, left, want, d.asked)
		}
	}
}

// TestMixedUnits: of a unit that is the disk's own in part, as clusters with subclusters are, only the rest is copied.
func TestMixedUnits(t *testing.T) {
	d := newLayered(1<<20, 32768)
	g := Guard(d, GuardedOptions{Unit: 65536, BaseSize: d.Size()})
	_, err := g.WriteAt(bytes.Repeat([]byte{9}, 1000), 100)
	must(t, err)
	want := bytes.Clone(d.base)
	copy(want[100:], bytes.Repeat([]byte{9}, 1000))
	if start, n := g.NextInBase(0); start != 0 || n == 0 {
		t.Errorf("the first run is %d bytes at %d", n, start)
	}
	if kept, err := g.Populate(bytes.Repeat([]byte{5}, 65536), 0); err != nil || kept != 65536 {
		t.Errorf("kept %d: %v", kept, err)
	}
	must(t, New(g, Options{Throttle: -1}).Run(t.Context()))
	if d.inBase() != 0 || !bytes.Equal(d.top, want) {
		t.Errorf("%d bytes in the base, or the disk differs", d.inBase())
	}
}

// atWork is an overlay for TestGuestsAtWork.
type atWork struct {
	name string
	make func(t *testing.T) (over Overlay, want []byte)
	// judge reads the disk again without the base image, once it is closed; nil: there is no way to.
	judge func(t *testing.T) []byte
}

// holed is a base image in memory that says where its zeros are.
type holed struct {
	*memoryDevice
	from, to int64
}

func newHoled(t *testing.T, size int64) holed {
	h := holed{newMemoryDevice(t, size), size / 4, size / 2}
	_, err := h.Memory.WriteAt(make([]byte, h.to-h.from), h.from)
	must(t, err)
	return h
}

func (h holed) Extents(off, n int64, fn func(block.Extent) bool) error {
	for _, part := range [][3]int64{{0, h.from, 0}, {h.from, h.to, 1}, {h.to, h.Size(), 0}} {
		from, to := max(off, part[0]), min(off+n, part[1])
		if from < to && !fn(block.Extent{Offset: from, Length: to - from, Allocated: true, Data: part[2] == 0, Zero: part[2] == 1, HostOffset: from}) {
			break
		}
	}
	return nil
}

func (h holed) bytes(t *testing.T) []byte {
	p := make([]byte, h.Size())
	_, err := h.Memory.ReadAt(p, 0)
	must(t, err)
	return p
}

func overlaysAtWork(size int64) (list []atWork) {
	list = append(list, atWork{name: "plain", make: func(t *testing.T) (Overlay, []byte) {
		d := newLayered(size, 4096)
		d.holes = true
		clear(d.base[size/4 : size/2])
		return Guard(d, GuardedOptions{BaseSize: size}), bytes.Clone(d.base)
	}})
	for _, compact := range []bool{false, true} {
		var f *storage.Memory
		list = append(list, atWork{
			name: fmt.Sprint("fvd, compact ", compact),
			make: func(t *testing.T) (Overlay, []byte) {
				base := newHoled(t, size)
				var im *fvd.Image
				f, im = fvdOverlay(t, base.memoryDevice, compact)
				return im, base.bytes(t)
			},
			judge: func(t *testing.T) []byte {
				im, err := fvd.Open(f, fvd.Options{})
				must(t, err)
				return readAndClose(t, im)
			},
		})
	}
	for _, o := range []qcow2.CreateOptions{{ClusterSize: 4096}, {ClusterSize: 16384, ExtendedL2: true}, {Version: 2, ClusterSize: 4096}} {
		for _, discipline := range qcow2.Disciplines() {
			if o.Version == 2 && (discipline == "lazy" || discipline == "journal") {
				continue // no feature bits in version 2
			}
			f := storage.NewMemory("image")
			list = append(list, atWork{
				name: fmt.Sprintf("qcow2 version %d, subclusters %v, %s", o.Version, o.ExtendedL2, discipline),
				make: func(t *testing.T) (Overlay, []byte) {
					base := newHoled(t, size)
					o.BackingFile, o.BackingFormat, o.BackingSize = "base", "raw", size
					must(t, qcow2.Create(f, o))
					im, err := qcow2.Open(f, qcow2.Options{Backing: base, Discipline: discipline, JournalCommitInterval: -1})
					must(t, err)
					return Guard(im, GuardedOptions{BaseSize: size, Whole: !o.ExtendedL2, Detach: func() error { return im.SetBacking("", "") }}), base.bytes(t)
				},
				judge: func(t *testing.T) []byte {
					res, err := qcow2.Check(f, qcow2.CheckOptions{})
					must(t, err)
					if res.Corruptions != 0 || res.Leaks != 0 {
						t.Errorf("check: %+v", res)
					}
					im, err := qcow2.Open(f, qcow2.Options{})
					must(t, err)
					return readAndClose(t, im)
				},
			})
		}
	}
	return list
}

func readAndClose(t *testing.T, d block.Device) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	_, err := d.ReadAt(p, 0)
	must(t, err)
	must(t, d.Close())
	return p
}

// TestGuestsAtWork: guests who write, zero, discard, flush and read neighbouring parts at the same time, over
// copy-on-read, a profile and prefetching, each see their own bytes and nothing else, and so does whoever reads it all
// afterwards, without the base image.
func TestGuestsAtWork(t *testing.T) {
	const size, guests, turns = 2 << 20, 6, 120
	for seed, over := range overlaysAtWork(size) {
		t.Run(over.name, func(t *testing.T) {
			defer goleak.VerifyNone(t)
			o, want := over.make(t)
			c := NewCopyOnRead(o, CopyOnReadOptions{MaxOutstanding: 300_000})
			p := New(c, Options{PerPrefetch: 50_000, Announce: c.Announce, Throttle: -1, MaxRead: 40e6, CheckpointEvery: 400_000,
				Order: Profile{{size / 2, 200_000}, {100_000, 400_000}, {0, size}}})
			var wg sync.WaitGroup
			wg.Go(func() {
				if err := p.Run(context.Background()); err != nil {
					t.Error(err)
				}
			})
			for guest := range guests {
				from, to := guest*size/guests, (guest+1)*size/guests
				wg.Go(func() {
					guestAtWork(t, c, want[from:to], int64(from), rand.New(rand.NewPCG(uint64(seed), uint64(guest))), turns)
				})
			}
			wg.Wait()
			if t.Failed() {
				return
			}
			got := make([]byte, size)
			_, err := c.ReadAt(got, 0)
			must(t, err)
			if !bytes.Equal(got, want) {
				t.Error("the disk differs from what was written")
			}
			if s := p.Status(); s.State != StateDone || c.BaseSize() != 0 {
				t.Errorf("status: %+v", s)
			}
			must(t, c.Close())
			if over.judge != nil && !bytes.Equal(over.judge(t), want) {
				t.Error("without the base image the disk differs from what was written")
			}
		})
	}
}

// guestAtWork changes and reads the part of a disk that begins at off, and keeps what it has to be in want. It is
// its alone, but units at its ends are not.
func guestAtWork(t *testing.T, d block.Device, want []byte, off int64, rng *rand.Rand, turns int) {
	for turn := range turns {
		at := rng.IntN(len(want) - 1)
		n := 1 + rng.IntN(min(len(want)-at, 1<<rng.IntN(17)))
		p := make([]byte, n)
		var err error
		switch rng.IntN(10) {
		case 0, 1:
			for i := range p {
				p[i] = byte(turn)
			}
			_, err = d.WriteAt(p, off+int64(at))
			copy(want[at:], p)
		case 2:
			err = d.WriteZeroes(off+int64(at), int64(n), block.MayUnmap)
			clear(want[at : at+n])
		case 3:
			err = d.Discard(off+int64(at), int64(n))
			if err == nil { // zeros or the old bytes, the device says which
				_, err = d.ReadAt(p, off+int64(at))
				for i := range p {
					if p[i] != 0 && p[i] != want[at+i] {
						t.Errorf("turn %d: after a discard byte %d is neither zero nor what it was", turn, off+int64(at+i))
						return
					}
				}
				copy(want[at:], p)
			}
		case 4:
			err = d.Flush()
		default:
			if d.TryReadAt(p, off+int64(at)) != nil {
				_, err = d.ReadAt(p, off+int64(at))
			}
			if err == nil && !bytes.Equal(p, want[at:at+n]) {
				t.Errorf("turn %d: %d bytes at %d are not what was written", turn, n, off+int64(at))
				return
			}
		}
		if err != nil {
			t.Error(err)
			return
		}
	}
}
