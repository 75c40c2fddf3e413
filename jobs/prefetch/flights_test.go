package prefetch

import (
	"bytes"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// stuck is an Overlay whose copies wait for free, and which notes reads of the base.
type stuck struct {
	Overlay
	free chan struct{}

	mu    sync.Mutex
	reads []Run
	fail  error
}

func (s *stuck) ReadBase(p []byte, off int64) error {
	s.mu.Lock()
	s.reads = append(s.reads, Run{off, int64(len(p))})
	err := s.fail
	s.mu.Unlock()
	if err != nil {
		return err
	}
	return s.Overlay.ReadBase(p, off)
}

func (s *stuck) Populate(p []byte, off int64) (int64, error) {
	<-s.free
	return s.Overlay.Populate(p, off)
}

func (s *stuck) took() []Run {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() { s.reads = nil }()
	return s.reads
}

// TestFlights: what is on its way is read from there, and not from the base image again.
func TestFlights(t *testing.T) {
	defer goleak.VerifyNone(t)
	d := newLayered(1<<20, 65536)
	over := &stuck{Overlay: Guard(d, GuardedOptions{BaseSize: d.Size()}), free: make(chan struct{})}
	c := NewCopyOnRead(over, CopyOnReadOptions{})
	read := func(off, n int64, want ...Run) {
		t.Helper()
		p := make([]byte, n)
		_, err := c.ReadAt(p, off)
		must(t, err)
		if !bytes.Equal(p, d.base[off:off+n]) {
			t.Errorf("%d bytes at %d are wrong", n, off)
		}
		if got := over.took(); !slices.Equal(got, want) {
			t.Errorf("%d bytes at %d: the base was read at %v, want %v", n, off, got, want)
		}
	}
	read(70_000, 100, Run{65536, 65536})
	read(66_000, 50_000)
	read(10_000, 190_000, Run{0, 65536}, Run{131072, 131072})
	read(0, 262144)
	close(over.free)
	must(t, c.Close())
	if s := c.Stats(); s.BaseRead != 262144 || s.Kept != 262144 || s.Dropped != 0 {
		t.Errorf("stats: %+v", s)
	}
}

// TestFlightsEnd: a read that begins after a guest's change does not get the bytes that were on their way before,
// even if the unit lives in the base image in part.
func TestFlightsEnd(t *testing.T) {
	d := newLayered(1<<20, 32768)
	over := &stuck{Overlay: Guard(d, GuardedOptions{Unit: 65536, BaseSize: d.Size()}), free: make(chan struct{})}
	c := NewCopyOnRead(over, CopyOnReadOptions{})
	p := make([]byte, 1000)
	changes := []func(off int64) error{
		func(off int64) error { _, err := c.WriteAt(make([]byte, 1000), off); return err },
		func(off int64) error { return c.WriteZeroes(off, 1000, 0) },
		func(off int64) error { return c.Discard(off, 1000) },
	}
	for i, change := range changes {
		off := int64(i) * 65536
		_, err := c.ReadAt(p, off)
		must(t, err)
		if p[0] == 0 {
			t.Fatal("the base reads as zeros")
		}
		must(t, change(off))
		if _, n := c.NextInBase(off); n == 0 {
			t.Fatal("nothing of the unit lives in the base any more: this tests nothing")
		}
		_, err = c.ReadAt(p, off)
		must(t, err)
		if !bytes.Equal(p, make([]byte, 1000)) {
			t.Errorf("change %d: old bytes after it", i)
		}
	}
	close(over.free)
	must(t, c.Close())
}

// TestAnnounce: reads wait for what others fetch, and ask themselves when those gave up.
func TestAnnounce(t *testing.T) {
	d := newLayered(1<<20, 65536)
	over := &stuck{Overlay: Guard(d, GuardedOptions{BaseSize: d.Size()}), free: make(chan struct{})}
	close(over.free)
	c := NewCopyOnRead(over, CopyOnReadOptions{})
	for i, gaveUp := range []bool{false, true} {
		off := int64(i) * 65536
		finished, ok := c.Announce(off, 65536)
		if !ok {
			t.Fatal("refused")
		}
		if _, ok := c.Announce(off+65535, 10); ok {
			t.Error("announced twice")
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			p := make([]byte, 65536)
			if _, err := c.ReadAt(p, off); err != nil || !bytes.Equal(p, d.base[off:off+65536]) {
				t.Errorf("the read is wrong: %v", err)
			}
		})
		for joined := false; !joined; time.Sleep(time.Millisecond) {
			c.flights.mu.Lock()
			joined = c.flights.all[0].refs == 2
			c.flights.mu.Unlock()
		}
		over.took()
		if !gaveUp {
			if kept, err := over.Populate(bytes.Clone(d.base[off:off+65536]), off); kept != 65536 || err != nil {
				t.Fatal(kept, err)
			}
		}
		finished()
		wg.Wait()
		if c.flights.n.Load() != 0 || len(over.took()) != 0 {
			t.Error("what is finished is still on its way, or was read once more by way of ReadBase")
		}
	}
	must(t, c.Close())
}

// TestFailedFlight: a read that was rounded out to whole blocks and failed is made again as the guest asked for it.
func TestFailedFlight(t *testing.T) {
	d := newLayered(1<<20, 65536)
	over := &stuck{Overlay: Guard(d, GuardedOptions{BaseSize: d.Size()}), fail: errors.New("bad sector")}
	c := NewCopyOnRead(over, CopyOnReadOptions{})
	p := make([]byte, 1000)
	_, err := c.ReadAt(p, 5000)
	must(t, err)
	if s := c.Stats(); !bytes.Equal(p, d.base[5000:6000]) || s.Kept != 0 || s.BaseRead != 1000 || s.Dropped != 1000 {
		t.Errorf("stats: %+v, or the bytes are wrong", s)
	}
	must(t, c.Close())
}

// TestKeepNothing: reads are counted and recorded, and nothing is kept.
func TestKeepNothing(t *testing.T) {
	d := newLayered(1<<20, 65536)
	rec := NewRecorder(d.Size())
	c := NewCopyOnRead(Guard(d, GuardedOptions{BaseSize: d.Size()}), CopyOnReadOptions{MaxOutstanding: -1, Recorder: rec})
	p := make([]byte, 1000)
	for range 2 {
		_, err := c.ReadAt(p, 70_000)
		must(t, err)
	}
	must(t, c.Close())
	if s := c.Stats(); s.BaseRead != 2000 || s.Kept != 0 || d.inBase() != d.Size() {
		t.Errorf("stats: %+v, %d bytes in the base", s, d.inBase())
	}
	if p := rec.Profile(); len(p) != 1 || p[0] != (Run{65536, recordUnit}) {
		t.Errorf("profile: %v", p)
	}
}
