package crashlab_test

import (
	"context"
	"testing"

	"github.com/platter-disk/platter/crashlab"
)

// BenchmarkStates reports how many states of the toy are opened and judged a second, with nothing sampled
// inside them and with everything.
func BenchmarkStates(b *testing.B) {
	for _, bench := range []struct {
		name string
		o    crashlab.Options
	}{
		{"plain", crashlab.Options{States: 20000, Recovery: crashlab.Sampling{Every: 1 << 30, States: 1}, Again: crashlab.Sampling{Every: 1 << 30, States: 1}}},
		{"default", crashlab.Options{States: 5000}},
	} {
		b.Run(bench.name, func(b *testing.B) {
			var states int64
			for b.Loop() {
				r, err := crashlab.Explore(context.Background(), toyScenario(noBug, 60), bench.o)
				if err != nil || len(r.Violations) > 0 {
					b.Fatal(err, r.Violations)
				}
				states += r.Explored
			}
			b.ReportMetric(float64(states)/b.Elapsed().Seconds(), "states/s")
		})
	}
}
