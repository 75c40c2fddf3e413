package prefetch

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/platter-disk/platter/block"
)

// midWrite is a device whose writes take effect some time before they return.
type midWrite struct {
	*layered
	inExtents    func()
	done, ending chan struct{}
}

func (d *midWrite) WriteAt(p []byte, off int64) (int, error) {
	n, err := d.layered.WriteAt(p, off)
	close(d.done)
	<-d.ending
	return n, err
}

func (d *midWrite) Extents(off, n int64, fn func(block.Extent) bool) error {
	err := d.layered.Extents(off, n, fn)
	d.inExtents()
	return err
}

// TestHoleUnderWrite: a hole that is being written when it is found does not read as zeros again once what is written
// has been seen.
func TestHoleUnderWrite(t *testing.T) {
	d := &midWrite{layered: newLayered(1<<20, 65536), done: make(chan struct{}), ending: make(chan struct{})}
	d.holes = true
	clear(d.base[131072:524288])
	g := Guard(d, GuardedOptions{BaseSize: d.Size(), Whole: true})
	var wg sync.WaitGroup
	read := func() byte {
		p := make([]byte, 1)
		_, err := g.ReadAt(p, 140_000)
		must(t, err)
		return p[0]
	}
	d.inExtents = func() {
		wg.Go(func() {
			if _, err := g.WriteAt([]byte{7}, 140_000); err != nil {
				t.Error(err)
			}
		})
		<-d.done
		if got := read(); got != 7 {
			t.Errorf("during the write: %d", got)
		}
	}
	must(t, g.Learn(t.Context()))
	if got := read(); got != 7 {
		t.Errorf("later during the write: %d, want 7, which was read before", got)
	}
	close(d.ending)
	wg.Wait()
	if got := read(); got != 7 {
		t.Errorf("after the write: %d", got)
	}
}

// pacedClock runs a function when somebody sleeps.
type pacedClock struct {
	*fakeClock
	sleeping func(time.Duration)
}

func (c pacedClock) Sleep(ctx context.Context, d time.Duration) error {
	c.sleeping(d)
	return c.fakeClock.Sleep(ctx, d)
}

// TestNobodyWaitsForTheRate: what is announced keeps reads waiting, so nothing is announced while it waits for the
// maximum rates.
func TestNobodyWaitsForTheRate(t *testing.T) {
	for _, o := range []Options{{MaxRead: 1e5}, {MaxWrite: 1e5}} {
		d := newLayered(1<<20, 65536)
		announced, slept := 0, time.Duration(0)
		o.Order, o.OrderReads, o.Throttle, o.PerPrefetch = Profile{{Offset: 0, Length: 1 << 20}}, 1, -1, 65536
		o.Clock = pacedClock{newFakeClock(), func(d time.Duration) {
			slept += d
			if announced > 0 {
				t.Errorf("reads wait for the rate, %v", d)
			}
		}}
		o.Announce = func(int64, int64) (func(), bool) {
			announced++
			return func() { announced-- }, true
		}
		must(t, New(Guard(d, GuardedOptions{BaseSize: d.Size()}), o).Run(t.Context()))
		if slept < 5*time.Second {
			t.Errorf("it slept %v, too little for the maximum rate", slept)
		}
	}
}
