package prefetch

import (
	"context"
	"testing"
	"time"
)

func TestActivity(t *testing.T) {
	clock := newFakeClock()
	a := newActivity(clock)
	expect := func(busy, quiet time.Duration) {
		t.Helper()
		if a.Busy() != busy || a.Quiet() != quiet {
			t.Fatalf("busy for %v, quiet for %v; want %v, %v", a.Busy(), a.Quiet(), busy, quiet)
		}
	}
	expect(0, lull)
	clock.advance(time.Second)
	expect(0, time.Second+lull)
	a.begin()
	clock.advance(time.Second)
	expect(time.Second, 0)
	a.begin() // two at a time are one wait
	clock.advance(time.Second)
	a.end()
	clock.advance(time.Second)
	expect(3*time.Second, 0)
	a.end()
	clock.advance(lull / 2)
	expect(3*time.Second+lull/2, lull/2)
	a.begin()
	a.end()
	clock.advance(2 * time.Second)
	expect(3*time.Second+lull/2+lull, 2*time.Second)
	a.begin()
	expect(3*time.Second+lull/2+lull, 0)
}

// guestTime is a clock on which a guest has a request under way during the given part of each period.
type guestTime struct {
	*fakeClock
	guest        *Activity
	busy, period time.Duration
	at           time.Duration // in the period
	on           bool
}

func (g *guestTime) Sleep(ctx context.Context, d time.Duration) error {
	for d > 0 {
		if on := g.at < g.busy; on != g.on {
			if g.on = on; on {
				g.guest.begin()
			} else {
				g.guest.end()
			}
		}
		next := g.period
		if g.on {
			next = g.busy
		}
		step := min(d, next-g.at)
		g.advance(step)
		d -= step
		g.at = (g.at + step) % g.period
	}
	return ctx.Err()
}

// worked is an Overlay whose operations take a while, in which the guest goes on.
type worked struct {
	Overlay
	clock *guestTime
	took  time.Duration
	total time.Duration // that the guest was busy meanwhile
}

func (w *worked) work() {
	before := w.clock.guest.Busy()
	_ = w.clock.Sleep(context.Background(), w.took)
	w.total += w.clock.guest.Busy() - before
}

func (w *worked) ReadBase(p []byte, off int64) error {
	w.work()
	return w.Overlay.ReadBase(p, off)
}

func TestGuestKeepsItsTime(t *testing.T) {
	const ms = time.Millisecond
	for _, test := range []struct {
		name         string
		busy, period time.Duration
		share        int
		most         float64       // of the time, that passes while guest and prefetching are both at work
		least        time.Duration // that it all takes
		longest      time.Duration
	}{
		{"always busy", 1000 * ms, 1000 * ms, 5, 0.05, 19 * 64 * 20 * ms, 21 * 64 * 20 * ms},
		{"always busy, a larger share", 1000 * ms, 1000 * ms, 20, 0.20, 4 * 64 * 20 * ms, 6 * 64 * 20 * ms},
		{"whatever it takes", 1000 * ms, 1000 * ms, 100, 1, 64 * 20 * ms, 64 * 20 * ms},
		{"computes half of the time", 5 * ms, 10 * ms, 5, 0.05, 19 * 64 * 20 * ms, 21 * 64 * 20 * ms},
		{"busy half of the time", 10 * ms, 37 * ms, 5, 0.05, 9 * 64 * 20 * ms, 16 * 64 * 20 * ms},
		{"comes and goes", 200 * ms, 2000 * ms, 5, 0.05, 64 * 20 * ms, 2 * 64 * 20 * ms},
	} {
		t.Run(test.name, func(t *testing.T) {
			disk := newLayered(64*4096, 4096)
			clock := &guestTime{fakeClock: newFakeClock(), busy: test.busy, period: test.period}
			clock.guest = newActivity(clock.fakeClock)
			over := &worked{Overlay: Guard(disk, GuardedOptions{Unit: 4096, Whole: true, BaseSize: disk.Size()}), clock: clock, took: 20 * ms}
			p := New(over, Options{PerPrefetch: 4096, Slots: 1, Clock: clock, Guest: clock.guest, SharePercent: test.share, MinRead: -1, MinWrite: -1})
			start := clock.Now()
			must(t, p.Run(context.Background()))
			took := clock.Now().Sub(start)
			if part := over.total.Seconds() / took.Seconds(); part > test.most*1.06 {
				t.Errorf("of %v the guest was busy for %v while prefetching was at work: %.3f, want at most %.2f", took, over.total, part, test.most)
			}
			if took < test.least || took > test.longest {
				t.Errorf("it took %v, want %v to %v", took, test.least, test.longest)
			}
			if yielded := p.Status().Yielded; yielded > took.Seconds() || (yielded > 0) != (test.share < 100) {
				t.Errorf("it says it kept still for %v s", yielded)
			}
		})
	}
}

// What a guest has to fetch anyway is not held back, nor what comes after it on that account.
func TestProfileDoesNotYield(t *testing.T) {
	var parts Profile // every second block; the rest is left to the pass
	for b := int64(0); b < 64; b += 2 {
		parts = append(parts, Run{b * 4096, 4096})
	}
	for _, test := range []struct {
		order Profile
		reads int
	}{{Profile{{0, 64 * 4096}}, 1}, {Profile{{0, 63 * 4096}}, 2}, {parts[:1], 2}, {append(parts, Run{4096, 62 * 4096}), 32 + 31 + 1}} {
		disk := newLayered(64*4096, 4096)
		clock := &guestTime{fakeClock: newFakeClock(), busy: time.Second, period: time.Second}
		clock.guest = newActivity(clock.fakeClock)
		over := &worked{Overlay: Guard(disk, GuardedOptions{Unit: 4096, Whole: true, BaseSize: disk.Size()}), clock: clock, took: 20 * time.Millisecond}
		p := New(over, Options{Order: test.order, OrderReads: 1, Clock: clock, Guest: clock.guest, MinRead: -1, MinWrite: -1})
		start := clock.Now()
		must(t, p.Run(context.Background()))
		if took, want := clock.Now().Sub(start), time.Duration(test.reads)*20*time.Millisecond; took != want {
			t.Errorf("%d parts: it took %v, want %v", len(test.order), took, want)
		}
	}
}

// Copies that a guest's flush would have to write are durable before it comes.
func TestCopiesWaitForNoFlush(t *testing.T) {
	for _, busy := range []bool{false, true} {
		disk := newLayered(64*4096, 4096)
		clock := &guestTime{fakeClock: newFakeClock(), period: time.Second}
		if busy {
			clock.busy = time.Second
		}
		clock.guest = newActivity(clock.fakeClock)
		clock.advance(time.Minute)
		over := &worked{Overlay: Guard(disk, GuardedOptions{Unit: 4096, Whole: true, BaseSize: disk.Size()}), clock: clock, took: time.Millisecond}
		p := New(over, Options{PerPrefetch: 8 * 4096, Clock: clock, Guest: clock.guest, CheckpointEvery: -1, MinRead: -1, MinWrite: -1})
		must(t, p.Run(context.Background()))
		want := 1 // when the base image is let go of
		if busy {
			want += 8
		}
		if disk.flushes != want {
			t.Errorf("guest busy: %v: %d flushes, want %d", busy, disk.flushes, want)
		}
	}
}

// Every request of a guest counts, and nothing that prefetching does.
func TestRequestsOfTheGuest(t *testing.T) {
	disk := newLayered(1<<20, 4096)
	c := NewCopyOnRead(Guard(disk, GuardedOptions{Unit: 4096, BaseSize: disk.Size()}), CopyOnReadOptions{})
	defer c.Close()
	clock := newFakeClock()
	c.guest.Store(newActivity(clock))
	disk.beforeRead = func() { clock.advance(time.Second) }
	p := make([]byte, 4096)
	_, err := c.ReadAt(p, 0)
	must(t, err)
	if c.Guest().Busy() < time.Second {
		t.Errorf("a read: busy for %v", c.Guest().Busy())
	}
	clock.advance(time.Second)
	before := c.Guest().Busy()
	must(t, c.Overlay.ReadBase(p, 8192))
	if c.Guest().Busy() != before {
		t.Error("prefetching's read counts")
	}
	for name, request := range map[string]func() error{
		"write":            func() error { _, err := c.WriteAt(p, 0); return err },
		"write zeroes":     func() error { return c.WriteZeroes(0, 4096, 0) },
		"discard":          func() error { return c.Discard(0, 4096) },
		"flush":            c.Flush,
		"write compressed": func() error { _ = c.WriteCompressed(p, 0); return nil },
	} {
		clock.advance(time.Minute)
		must(t, request())
		if q := c.Guest().Quiet(); q != 0 {
			t.Errorf("after a %s: quiet for %v", name, q)
		}
	}
}
