package prefetch

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/storage"
	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

// TestMeter follows the averages of FVD specification 2.4 by hand.
func TestMeter(t *testing.T) {
	m := newMeter(100*time.Millisecond, 80)
	for i, step := range []struct {
		bytes   int64
		took    time.Duration
		sampled bool
		average float64
	}{
		{1000, 50 * time.Millisecond, false, -1},
		{1000, 50 * time.Millisecond, false, -1},    // 100 ms are not more than 100 ms
		{2000, 100 * time.Millisecond, true, 20000}, // 4000 bytes in 200 ms
		{3000, 200 * time.Millisecond, true, 0.8*20000 + 0.2*15000},
		{0, 99 * time.Millisecond, false, 19000},
	} {
		if got := m.add(step.bytes, step.took); got != step.sampled || m.average != step.average {
			t.Fatalf("step %d: sampled %v, average %v; want %v and %v", i, got, m.average, step.sampled, step.average)
		}
	}
	never := func() bool { t.Fatal("the coin was flipped"); return false }
	if m.judge(19000, never) != carryOn {
		t.Error("at the minimum it does not carry on")
	}
	if m.judge(19001, func() bool { return true }) != pause || m.average != 19000 {
		t.Error("below the minimum, heads: want a pause and the average kept")
	}
	if m.judge(19001, func() bool { return false }) != carryOn || m.average != -1 {
		t.Error("below the minimum, tails: want to carry on and measure anew")
	}
}

func TestPacer(t *testing.T) {
	p := pacer{rate: 1000}
	now := time.Unix(0, 0)
	for i, step := range []struct {
		passed time.Duration
		bytes  int64
		wait   time.Duration
	}{
		{0, 500, 0},
		{0, 100, 500 * time.Millisecond},
		{0, 100, 600 * time.Millisecond},
		{650 * time.Millisecond, 0, 50 * time.Millisecond},
		{10 * time.Second, 1000, 0}, // the time that passed is not saved up
		{0, 1, time.Second},
	} {
		now = now.Add(step.passed)
		if d := p.reserve(now, step.bytes); d != step.wait {
			t.Errorf("step %d: wait %v, want %v", i, d, step.wait)
		}
	}
	if d := (&pacer{}).reserve(now, 1<<40); d != 0 {
		t.Errorf("without a rate: %v", d)
	}
}

// TestPrefetchAll moves everything over, in order, through few slots, and detaches.
func TestPrefetchAll(t *testing.T) {
	defer goleak.VerifyNone(t)
	d := newLayered(1<<20+5000, 4096)
	detached := false
	g := Guard(d, GuardedOptions{BaseSize: d.Size(), Detach: func() error { detached = true; return nil }})
	clock := newFakeClock()
	var order []int64
	var events []Event
	p := New(slow{g, clock, 50e6, 50e6, &order}, Options{PerPrefetch: 100_000, Clock: clock, Trace: func(e Event) { events = append(events, e) }})
	must(t, p.Run(context.Background()))
	if d.inBase() != 0 || !detached || g.BaseSize() != 0 || !bytes.Equal(d.top, d.base) {
		t.Errorf("%d bytes in the base, detached %v", d.inBase(), detached)
	}
	want := int64(0)
	for _, at := range order {
		if at != want {
			t.Fatalf("read at %d, want %d", at, want)
		}
		want += 102400 // rounded up to units
	}
	s := p.Status()
	if s.State != StateDone || s.Kept != d.Size() || s.Read != d.Size() || s.Remaining != 0 || s.Pauses != 0 {
		t.Errorf("status: %+v", s)
	}
	if last := events[len(events)-1]; last.Kind != EventDone {
		t.Errorf("last event: %+v", last)
	}
}

// TestThrottle: with a base slower than the minimum rate, heads pauses and tails measures anew, and every pause is
// 1 ms to the throttle time long.
func TestThrottle(t *testing.T) {
	d := newLayered(4<<20, 65536)
	g := Guard(d, GuardedOptions{BaseSize: d.Size()})
	clock := newFakeClock()
	var b strings.Builder
	trace := NewTrace(&b)
	pauses, resumes := 0, 0
	coins := rand.New(rand.NewPCG(1, 2))
	p := New(slow{g, clock, 1e6, 1e9, nil}, Options{
		PerPrefetch: 65536, Throttle: 10 * time.Second, Clock: clock, Rand: coins.Float64,
		Trace: func(e Event) {
			trace.Add(e)
			switch e.Kind {
			case EventPause:
				pauses++
				if e.Wait < time.Millisecond || e.Wait > 10*time.Second+time.Millisecond {
					t.Errorf("pause of %v", e.Wait)
				}
			case EventResume:
				resumes++
				if e.ReadAverage >= 0 {
					t.Error("the statistics survive a pause")
				}
			}
		},
	})
	must(t, p.Run(context.Background()))
	must(t, trace.Flush())
	// 64 reads of 65.5 ms: a sample every other read, each a coin: about 16 pauses.
	if pauses < 8 || pauses > 24 || resumes != pauses || p.Status().Pauses != pauses {
		t.Errorf("%d pauses, %d resumes", pauses, resumes)
	}
	lines := strings.Split(strings.TrimSpace(b.String()), "\n")
	if !strings.HasPrefix(lines[0], "time,event,") || !strings.Contains(lines[len(lines)-1], ",done,") {
		t.Errorf("trace begins %q and ends %q", lines[0], lines[len(lines)-1])
	}

	fast := New(slow{Guard(newLayered(4<<20, 65536), GuardedOptions{BaseSize: 4 << 20}), clock, 1e6, 1e9, nil}, Options{PerPrefetch: 65536, Throttle: -1, Clock: clock})
	must(t, fast.Run(context.Background()))
	if n := fast.Status().Pauses; n != 0 {
		t.Errorf("%d pauses with throttling off", n)
	}
}

// TestMaximumRate: the caps are kept.
func TestMaximumRate(t *testing.T) {
	for _, o := range []Options{{MaxRead: 1e6}, {MaxWrite: 1e6}} {
		clock := newFakeClock()
		g := Guard(newLayered(2<<20, 65536), GuardedOptions{BaseSize: 2 << 20})
		o.PerPrefetch, o.Clock, o.Throttle = 65536, clock, -1
		start := clock.Now()
		must(t, New(slow{g, clock, 1e9, 1e9, nil}, o).Run(context.Background()))
		if took := clock.Now().Sub(start); took < 1900*time.Millisecond {
			t.Errorf("%+v: 2 MiB took %v", o, took)
		}
	}
}

// TestOrder: what a profile lists is fetched first, the rest after it, nothing twice.
func TestOrder(t *testing.T) {
	d := newLayered(1<<20, 65536)
	var order []int64
	clock := newFakeClock()
	p := New(slow{Guard(d, GuardedOptions{BaseSize: d.Size()}), clock, 1e9, 1e9, &order}, Options{
		PerPrefetch: 65536, Clock: clock,
		OrderReads: 1, Order: Profile{{Offset: 600_000, Length: 100_000}, {Offset: 5, Length: 10}, {Offset: 1 << 40, Length: 5}, {Offset: -3, Length: 1}},
	})
	must(t, p.Run(context.Background()))
	// The first run is one read of two units.
	if len(order) < 3 || order[0] != 589824 || order[1] != 0 || order[2] != 65536 || len(order) != 15 {
		t.Fatalf("order: %v", order)
	}
	seen := map[int64]bool{}
	for _, at := range order {
		if seen[at] {
			t.Errorf("%d was read twice", at)
		}
		seen[at] = true
	}
}

// TestPauseAndStop: the user's pause holds until he resumes; a context that ends leaves what was kept, made durable,
// and another Prefetcher goes on from there.
func TestPauseAndStop(t *testing.T) {
	defer goleak.VerifyNone(t)
	d := newLayered(1<<20, 65536)
	g := Guard(d, GuardedOptions{BaseSize: d.Size()})
	paused := make(chan struct{}, 1)
	reads := 0
	var p *Prefetcher
	p = New(g, Options{PerPrefetch: 65536, Throttle: -1, Trace: func(e Event) {
		switch e.Kind {
		case EventRead:
			if reads++; reads == 4 {
				p.Pause()
			}
		case EventPause:
			paused <- struct{}{}
		}
	}})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- p.Run(ctx) }()
	<-paused
	for p.Status().State != StateStopped {
		time.Sleep(time.Millisecond)
	}
	if s := p.Status(); s.Kept != 4*65536 || s.Remaining != 12*65536 {
		t.Errorf("status: %+v", s)
	}
	p.Resume()
	p.Pause()
	cancel()
	err := <-done
	if err == nil && d.inBase() > 0 {
		t.Error("Run ended without an error before its time")
	}
	if err != nil && (!errors.Is(err, context.Canceled) || d.flushes == 0) {
		t.Errorf("%v, %d flushes", err, d.flushes)
	}
	again := New(g, Options{PerPrefetch: 65536, Throttle: -1})
	left := d.inBase()
	must(t, again.Run(context.Background()))
	if s := again.Status(); s.Read != left {
		t.Errorf("the second run read %d bytes, %d were left", s.Read, left)
	}
}

// TestPauseEndsWithItsContext: what waits for the user wakes when its own context ends, which may be after the context
// of Run ended (an image in a user's pause once never closed).
func TestPauseEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newLayered(1<<20, 65536)
		p := New(Guard(d, GuardedOptions{BaseSize: d.Size()}), Options{})
		p.Pause()
		ctx, cancel := context.WithCancel(t.Context())
		var err error
		go func() { err = p.awaitResume(ctx) }()
		synctest.Wait()
		must(t, err)
		cancel()
		synctest.Wait()
		if !errors.Is(err, context.Canceled) {
			t.Errorf("still waiting: %v", err)
			p.Resume()
		}
	})
}

// TestResumeEndsWaiting: Resume starts it before its delay is over, and Pause holds it before it began.
func TestResumeEndsWaiting(t *testing.T) {
	defer goleak.VerifyNone(t)
	d := newLayered(1<<20, 65536)
	p := New(Guard(d, GuardedOptions{BaseSize: d.Size()}), Options{StartDelay: time.Hour})
	if s := p.Status(); s.State != StateWaiting || s.Remaining != d.Size() {
		t.Errorf("status: %+v", s)
	}
	p.Pause()
	if s := p.Status(); s.State != StateStopped {
		t.Errorf("status: %+v", s)
	}
	done := make(chan error)
	go func() { done <- p.Run(t.Context()) }()
	for {
		p.Resume()
		select {
		case err := <-done:
			must(t, err)
			if s := p.Status(); s.State != StateDone {
				t.Errorf("status: %+v", s)
			}
			return
		case <-time.After(time.Millisecond):
		}
	}
}

// TestErrorsEndPrefetching.
func TestErrorsEndPrefetching(t *testing.T) {
	defer goleak.VerifyNone(t)
	d := newLayered(1<<20, 65536)
	d.failWrites = errors.New("no space")
	p := New(Guard(d, GuardedOptions{BaseSize: d.Size()}), Options{})
	err := p.Run(context.Background())
	if !errors.Is(err, d.failWrites) || !strings.Contains(err.Error(), "prefetching is off") {
		t.Errorf("error: %v", err)
	}
	if s := p.Status(); s.State != StateFailed || !strings.Contains(s.Error, "no space") || d.closed {
		t.Errorf("status: %+v", s)
	}
}

// TestGuardedWritesWin: whatever the interleaving, a copy never covers what the guest wrote.
func TestGuardedWritesWin(t *testing.T) {
	for seed := range uint64(20) {
		d := newLayered(64<<10, 4096)
		g := Guard(d, GuardedOptions{BaseSize: d.Size()})
		want := bytes.Clone(d.base)
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := New(g, Options{PerPrefetch: 8192, Throttle: -1}).Run(context.Background()); err != nil {
				t.Error(err)
			}
		})
		rng := rand.New(rand.NewPCG(seed, 0))
		for i := range 200 {
			off := rng.Int64N(64<<10 - 2048)
			p := bytes.Repeat([]byte{byte(i)}, int(1+rng.Int64N(2048)))
			_, err := g.WriteAt(p, off)
			must(t, err)
			copy(want[off:], p)
		}
		wg.Wait()
		got := make([]byte, len(want))
		_, err := g.ReadAt(got, 0)
		must(t, err)
		if !bytes.Equal(got, want) {
			t.Fatalf("seed %d: the disk differs from what was written", seed)
		}
	}
}

// TestCopyOnRead: a first read touches the base, a second one does not; the limit and Close are kept.
func TestCopyOnRead(t *testing.T) {
	defer goleak.VerifyNone(t)
	d := newLayered(1<<20, 65536)
	rec := NewRecorder(d.Size())
	c := NewCopyOnRead(Guard(d, GuardedOptions{BaseSize: d.Size()}), CopyOnReadOptions{Recorder: rec})
	p := make([]byte, 5000)
	read := func(off int64) {
		t.Helper()
		_, err := c.ReadAt(p, off)
		must(t, err)
		if !bytes.Equal(p, d.base[off:off+5000]) {
			t.Fatalf("read at %d is wrong", off)
		}
	}
	if err := c.TryReadAt(p, 300_000); err == nil {
		t.Error("TryReadAt reads the base image")
	}
	read(300_000)
	read(63_000) // two blocks
	for c.Stats().Kept < 3*65536 {
		time.Sleep(time.Millisecond)
	}
	d.mu.Lock()
	d.baseReads = nil
	d.mu.Unlock()
	read(300_000)
	read(63_000)
	must(t, c.TryReadAt(p, 300_000))
	if len(d.baseReads) > 0 {
		t.Errorf("the second time the base was read at %v", d.baseReads)
	}
	if s := c.Stats(); s.BaseRead != 3*65536 || s.Dropped != 0 {
		t.Errorf("stats: %+v", s)
	}
	want := Profile{{294912, 16384}, {49152, 32768}}
	if got := rec.Profile(); len(got) != 2 || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("profile: %v, want %v", got, want)
	}
	p = make([]byte, 1<<20)
	if n, err := c.ReadAt(p, 1<<20-100); n != 100 || err == nil {
		t.Errorf("read across the end: %d %v", n, err)
	}
	must(t, c.Close())
	if !d.closed {
		t.Error("the overlay is open")
	}
}

// TestCopyOnReadLimits: with a copy under way that is over the limit, and after one failed, reads are answered and
// nothing more is kept.
func TestCopyOnReadLimits(t *testing.T) {
	d := newLayered(1<<20, 65536)
	var failed []error
	c := NewCopyOnRead(Guard(d, GuardedOptions{BaseSize: d.Size()}), CopyOnReadOptions{MaxOutstanding: 1, Failed: func(err error) { failed = append(failed, err) }})
	p := make([]byte, 4096)
	c.outstanding.Store(65536)
	_, err := c.ReadAt(p, 0)
	must(t, err)
	if s := c.Stats(); s.Kept != 0 || s.Dropped != 4096 || s.BaseRead != 4096 {
		t.Errorf("over the limit: %+v", s)
	}
	c.outstanding.Store(0)
	d.failWrites = errors.New("no space")
	_, err = c.ReadAt(p, 65536)
	must(t, err)
	must(t, c.Close())
	if len(failed) != 1 || !errors.Is(failed[0], d.failWrites) || c.Stats().Kept != 0 {
		t.Errorf("failures: %v, %+v", failed, c.Stats())
	}
	if !bytes.Equal(p, d.base[65536:65536+4096]) {
		t.Error("the read is wrong")
	}
}

// fvdOverlay is an FVD disk over a base image in memory.
const fvdBlock = 16 << 10

func fvdOverlay(t *testing.T, base *memoryDevice, compact bool) (*storage.Memory, *fvd.Image) {
	f := storage.NewMemory("image")
	must(t, fvd.Create(f, fvd.CreateOptions{Compact: compact, BlockSize: fvdBlock, JournalSize: 64 << 10, BaseImage: "base", Base: base}))
	im, err := fvd.Open(f, fvd.Options{Base: base})
	must(t, err)
	return f, im
}

// TestFVD: an FVD disk in use moves over, is detached, and reads the same without its base image.
func TestFVD(t *testing.T) {
	defer goleak.VerifyNone(t)
	for _, compact := range []bool{false, true} {
		base := newMemoryDevice(t, 3<<20+1000)
		f, im := fvdOverlay(t, base, compact)
		c := NewCopyOnRead(im, CopyOnReadOptions{})
		want := make([]byte, c.Size())
		_, err := c.ReadAt(want[:base.Size()], 0)
		must(t, err)
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := New(c, Options{PerPrefetch: 100_000, CheckpointEvery: 500_000, Throttle: -1}).Run(context.Background()); err != nil {
				t.Error(err)
			}
		})
		rng := rand.New(rand.NewPCG(1, 1))
		for i := range 300 {
			off := rng.Int64N(c.Size() - 4096)
			p := bytes.Repeat([]byte{byte(i)}, int(1+rng.Int64N(4096)))
			_, err := c.WriteAt(p, off)
			must(t, err)
			copy(want[off:], p)
			_, err = c.ReadAt(p, off)
			must(t, err)
			if i%20 == 0 {
				must(t, c.Flush())
			}
		}
		wg.Wait()
		must(t, c.Close())
		im, err = fvd.Open(f, fvd.Options{})
		must(t, err)
		got := make([]byte, len(want))
		_, err = im.ReadAt(got, 0)
		must(t, err)
		if !bytes.Equal(got, want) {
			t.Fatalf("compact %v: the disk differs", compact)
		}
		must(t, im.Close())
		// Once by the guest, once by prefetching, and what writes copy up at both ends before the copies are there.
		if most := 2*base.Size() + 300*2*fvdBlock; base.read() > most {
			t.Errorf("%d bytes of base image read, want at most %d", base.read(), most)
		}
	}
}

func TestProfile(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var p Profile
		for range rapid.IntRange(0, 20).Draw(t, "runs") {
			p = append(p, Run{rapid.Int64Range(0, 1<<62).Draw(t, "off"), rapid.Int64Range(1, 1<<62).Draw(t, "len")})
		}
		var b bytes.Buffer
		n, err := p.WriteTo(&b)
		if err != nil || n != int64(b.Len()) {
			t.Fatal(n, err)
		}
		got, err := ReadProfile(&b)
		if err != nil || len(got) != len(p) {
			t.Fatal(got, err)
		}
		for i := range p {
			if got[i] != p[i] {
				t.Fatalf("run %d is %v, want %v", i, got[i], p[i])
			}
		}
	})
	for _, bad := range []string{"", "something else\n", profileHead + "\n1\n", profileHead + "\n-1 5\n", profileHead + "\n1 0\n", profileHead + "\n1 2 3\n"} {
		if _, err := ReadProfile(strings.NewReader(bad)); err == nil || !strings.Contains(err.Error(), "line") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestRecorderEnds(t *testing.T) {
	r := NewRecorder(100_000)
	for _, touch := range [][2]int64{{-1, 5}, {0, 0}, {0, 1}, {0, 1}, {99_999, 1 << 62}} {
		r.Touch(touch[0], touch[1])
	}
	if p := r.Profile(); len(p) != 2 || p[0] != (Run{0, recordUnit}) || p[1].Offset != 99_999/recordUnit*recordUnit {
		t.Errorf("profile: %v", p)
	}
}

func FuzzProfile(f *testing.F) {
	f.Add(profileHead + "\n0 65536\n131072 5\n")
	f.Fuzz(func(t *testing.T, text string) {
		p, err := ReadProfile(strings.NewReader(text))
		if err != nil {
			return
		}
		for _, r := range p {
			if r.Offset < 0 || r.Length <= 0 || r.Offset+r.Length < 0 {
				t.Fatalf("run %v", r)
			}
		}
	})
}
