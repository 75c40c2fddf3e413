package prefetch

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/storage"
)

// The first operation at a maximum rate does not wait; it is not the whole disk.
func TestMaximumRateOfLargeReads(t *testing.T) {
	clock := newFakeClock()
	g := Guard(newLayered(2<<20, 65536), GuardedOptions{BaseSize: 2 << 20})
	start := clock.Now()
	p := New(slow{g, clock, 1e9, 1e9, nil}, Options{PerPrefetch: 64 << 20, MaxRead: 1e6, Clock: clock, Throttle: -1})
	must(t, p.Run(context.Background()))
	if took := clock.Now().Sub(start); took < 1900*time.Millisecond {
		t.Errorf("2 MiB took %v at 1 MB/s", took)
	}
	order := New(slow{Guard(newLayered(2<<20, 4096), GuardedOptions{Unit: 4096, BaseSize: 2 << 20}), clock, 1e9, 1e9, nil},
		Options{Order: Profile{{0, 2 << 20}}, OrderReads: 1, MaxWrite: 100e3, Clock: clock, Throttle: -1})
	start = clock.Now()
	must(t, order.Run(context.Background()))
	if took := clock.Now().Sub(start); took < 19*time.Second {
		t.Errorf("2 MiB of a profile took %v at 100 kB/s", took)
	}
}

// What a profile lists does not wait for the start of prefetching.
func TestProfileDoesNotWait(t *testing.T) {
	d := newLayered(1<<20, 65536)
	clock := newFakeClock()
	start := clock.Now()
	var reads []time.Duration
	p := New(Guard(d, GuardedOptions{BaseSize: d.Size()}), Options{
		Order: Profile{{0, 131072}}, OrderReads: 1, StartDelay: time.Minute, Clock: clock,
		Trace: func(e Event) {
			if e.Kind == EventRead {
				reads = append(reads, e.Time.Sub(start))
			}
		},
	})
	must(t, p.Run(context.Background()))
	if len(reads) < 2 || reads[0] >= time.Second || reads[1] < time.Minute {
		t.Errorf("read at %v", reads)
	}
}

// spotty is an Overlay whose base image cannot be read in some places.
type spotty struct {
	Overlay
	bad   []Run
	reads *int // of such places
}

var errSpot = errors.New("a bad spot")

func (s spotty) ReadBase(p []byte, off int64) error {
	for _, b := range s.bad {
		if off < b.Offset+b.Length && b.Offset < off+int64(len(p)) {
			*s.reads++
			return errSpot
		}
	}
	return s.Overlay.ReadBase(p, off)
}

// A place that cannot be read does not keep the rest from being fetched, a base image that is gone is not asked for
// all of it, and what was bad is tried again.
func TestBadSpots(t *testing.T) {
	defer goleak.VerifyNone(t)
	const unit = 4096
	for _, test := range []struct {
		name  string
		bad   []Run
		left  int64 // bytes, at least what is bad
		reads int   // of bad places, at most
	}{
		{"one", []Run{{100 * unit, 1}}, unit, 1},
		{"two", []Run{{0, unit}, {700 * unit, 2 * unit}}, 4 * unit, 3},
		{"a large one", []Run{{100 * unit, 200 * unit}}, 456 * unit, maxBad},
		{"gone", []Run{{0, 1 << 40}}, 1024 * unit, maxBad},
	} {
		for _, profile := range []Profile{nil, {{50 * unit, 100 * unit}}} {
			d := newLayered(1024*unit, unit)
			reads := 0
			over := spotty{Guard(d, GuardedOptions{Unit: unit, Whole: true, BaseSize: d.Size()}), test.bad, &reads}
			p := New(over, Options{PerPrefetch: unit, Order: profile, OrderReads: 1, Retry: -1, Clock: newFakeClock()})
			err := p.Run(context.Background())
			if !errors.Is(err, errSpot) || p.Status().State != StateFailed {
				t.Errorf("%s: %v, %+v", test.name, err, p.Status())
			}
			if left := d.inBase(); left > test.left || reads > test.reads+len(profile)*maxBad {
				t.Errorf("%s: %d bytes are left, want at most %d; %d reads of bad places", test.name, left, test.left, reads)
			}
		}
	}

	d := newLayered(1024*unit, unit)
	reads, detached := 0, false
	over := &spotty{Guard(d, GuardedOptions{Unit: unit, Whole: true, BaseSize: d.Size(), Detach: func() error { detached = true; return nil }}), []Run{{0, 1}}, &reads}
	var states []State
	var p *Prefetcher
	p = New(over, Options{PerPrefetch: unit, Clock: newFakeClock(), Trace: func(e Event) {
		if e.Kind == EventRetry {
			if over.bad = nil; d.inBase() != unit {
				t.Errorf("tried again with %d bytes left", d.inBase())
			}
			states = append(states, e.state(p))
		}
	}})
	must(t, p.Run(context.Background()))
	if s := p.Status(); !detached || s.Retries != 1 || s.Error != "" || s.State != StateDone || len(states) != 1 || states[0] != StateRetrying {
		t.Errorf("%v %+v, detached %v", states, s, detached)
	}
}

// state is what the prefetcher said it was doing when the event was told, which is told under its lock.
func (e Event) state(p *Prefetcher) State { return p.status.State }

// sparseDevice is a base image with a hole, which nobody has to read.
type sparseDevice struct {
	*memoryDevice
	hole Run
}

func (d *sparseDevice) Extents(off, n int64, f func(block.Extent) bool) error {
	end, hole := off+n, d.hole.Offset+d.hole.Length
	for off < end {
		e := block.Extent{Offset: off, Length: end - off, Allocated: true, Data: true, HostOffset: off}
		switch {
		case off < d.hole.Offset:
			e.Length = min(e.Length, d.hole.Offset-off)
		case off < hole:
			e.Length = min(1000, e.Length, hole-off) // in many pieces
			e.Allocated, e.Data, e.Zero, e.HostOffset = false, false, true, -1
		}
		if !f(e) {
			return nil
		}
		off += e.Length
	}
	return nil
}

// Holes of the base image are kept without being read, by formats that do not pass them over themselves.
func TestHolesAreNotRead(t *testing.T) {
	const size = 4 << 20
	for _, hole := range []Run{{1<<20 + 100, 2 << 20}, {3 << 20, 1 << 20}, {0, size}, {8192, 100}} {
		base := &sparseDevice{newMemoryDevice(t, size), hole}
		must(t, base.Memory.ZeroRange(hole.Offset, hole.Length))
		f := storage.NewMemory("image")
		must(t, fvd.Create(f, fvd.CreateOptions{Compact: true, BlockSize: 4096, BaseImage: "base", Base: base}))
		im, err := fvd.Open(f, fvd.Options{Base: base})
		must(t, err)
		want := make([]byte, size)
		_, err = im.ReadAt(want, 0)
		must(t, err)
		before := base.read()
		p := New(im, Options{PerPrefetch: 100_000, Throttle: -1})
		must(t, p.Run(t.Context()))
		whole := max(0, (hole.Offset+hole.Length)/4096*4096-(hole.Offset+4095)/4096*4096)
		if got := base.read() - before; got != size-whole || p.Status().Read != got || p.Status().Kept != size {
			t.Errorf("hole %v: %d bytes were read, want %d; %+v", hole, got, size-whole, p.Status())
		}
		got := make([]byte, size)
		_, err = im.ReadAt(got, 0)
		must(t, err)
		if !bytes.Equal(got, want) {
			t.Errorf("hole %v: the disk differs", hole)
		}
		must(t, im.Close())
	}
}

// A base image with more holes than are remembered is asked again.
func TestManyHoles(t *testing.T) {
	const unit, count = 512, 3 * holesRuns
	d := newLayered(2*count*unit, unit)
	d.holes = true
	for u := 0; u < 2*count; u += 2 {
		clear(d.base[u*unit : (u+1)*unit])
	}
	h := holes{over: Guard(d, GuardedOptions{Unit: unit, BaseSize: d.Size()}), unit: unit}
	for at := int64(0); at < d.Size(); {
		zeros, n := h.sameKind(at, d.Size()-at)
		if zeros != (at/unit%2 == 0) || n != unit {
			t.Fatalf("at %d: zeros %v, %d bytes", at, zeros, n)
		}
		at += n
	}
}

// A profile that lists much that cannot be read does not keep the rest from being fetched.
func TestBadProfile(t *testing.T) {
	defer goleak.VerifyNone(t)
	const unit = 4096
	d := newLayered(1024*unit, unit)
	reads := 0
	over := &spotty{Guard(d, GuardedOptions{Unit: unit, Whole: true, BaseSize: d.Size()}), []Run{{0, 128 * unit}}, &reads}
	var bad Profile
	for u := int64(0); u < 128; u += 2 {
		bad = append(bad, Run{u * unit, unit})
	}
	retries := 0
	p := New(over, Options{PerPrefetch: unit, Order: bad, OrderReads: 1, MaxRead: 1e9, Clock: newFakeClock(), Trace: func(e Event) {
		if e.Kind == EventRetry {
			if retries++; retries == 10 {
				over.bad = nil
				if left := d.inBase(); left > 256*unit {
					t.Errorf("%d bytes are left after %d tries", left, retries)
				}
			}
		}
	}})
	must(t, p.Run(context.Background()))
	if retries < 10 || d.inBase() != 0 {
		t.Errorf("%d tries, %d bytes left", retries, d.inBase())
	}
}
