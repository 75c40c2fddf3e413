package prefetch

import (
	"testing"

	"github.com/platter-disk/platter/internal/testenv"
)

// TestTraceMaySteer: who is told of a step may ask and steer the Prefetcher.
func TestTraceMaySteer(t *testing.T) {
	d := newLayered(1<<20, 65536)
	var p *Prefetcher
	steps := 0
	p = New(Guard(d, GuardedOptions{BaseSize: d.Size()}), Options{Throttle: -1, Trace: func(e Event) {
		steps++
		if s := p.Status(); e.Kind == EventDone && s.State != StateDone {
			t.Errorf("told of the end in state %s", s.State)
		}
		p.Pause()
		p.Resume()
	}})
	done := make(chan error, 1)
	go func() { done <- p.Run(t.Context()) }()
	testenv.Until(t, "the end of prefetching", func() bool { return len(done) > 0 })
	must(t, <-done)
	if steps == 0 {
		t.Error("told of nothing")
	}
}
