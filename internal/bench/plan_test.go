package bench

import (
	"errors"
	"testing"

	"pgregory.net/rapid"
)

// drawDisk draws a disk: consecutive runs of every kind, with lengths that are no multiples of anything.
func drawDisk(t *rapid.T) []Span {
	var spans []Span
	at := int64(0)
	for range rapid.IntRange(0, 12).Draw(t, "runs") {
		n := rapid.Int64Range(1, 2<<20).Draw(t, "length")
		spans = append(spans, Span{at, n, Space(rapid.IntRange(0, 2).Draw(t, "kind"))})
		at += n
	}
	return spans
}

func survey(spans []Span) Survey {
	return func(fn func(Span) bool) error {
		for _, s := range spans {
			if !fn(s) {
				break
			}
		}
		return nil
	}
}

// inside tells whether [off, off+n) lies in one run of a kind.
func inside(spans []Span, off, n int64, kind Space) bool {
	for _, s := range spans {
		if s.Kind == kind && off >= s.Offset && off+n <= s.Offset+s.Length {
			return true
		}
	}
	return false
}

func TestPlan(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := rapid.SampledFrom(Workloads()).Draw(t, "workload")
		spans := drawDisk(t)
		unit := int64(4096) << rapid.IntRange(0, 6).Draw(t, "unit")
		operations := rapid.IntRange(1, 60).Draw(t, "operations")
		p, err := newPlan(w, survey(spans), unit, operations, rapid.Uint64().Draw(t, "seed"))
		if err != nil {
			if !errors.Is(err, ErrNoSpace) {
				t.Fatal(err)
			}
			return
		}
		unit = max(unit, int64(w.Block))
		fresh := w.on != OwnData
		used := map[int64]bool{}
		last := int64(-1)
		for i := range int64(operations) {
			off := p.offset(i)
			if off%int64(w.Block) != 0 || !inside(spans, off, int64(w.Block), w.on) {
				t.Fatalf("operation %d goes to %d, which is not a block in a run of kind %d of %v", i, off, w.on, spans)
			}
			if fresh {
				u := off / unit
				if used[u] || !inside(spans, u*unit, unit, w.on) {
					t.Fatalf("operation %d goes to %d: the unit is not whole or used before", i, off)
				}
				used[u] = true
			}
			if w.Sequential && off <= last && (fresh || i < p.blocks) {
				t.Fatalf("operation %d goes to %d after %d", i, off, last)
			}
			last = off
		}
	})
}

// TestPlanUsesAllOfTheData: random reads reach the first and the last block, and about all between.
func TestPlanUsesAllOfTheData(t *testing.T) {
	w, err := Select([]string{"read-4k"})
	if err != nil {
		t.Fatal(err)
	}
	spans := []Span{{0, 40960, OwnData}, {40960, 4096, NoData}, {45056, 20480, OwnData}}
	p, err := newPlan(w[0], survey(spans), 65536, 1, 5)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[int64]int{}
	for i := range int64(1500) {
		seen[p.offset(i)]++
	}
	if len(seen) != 15 {
		t.Errorf("1500 reads went to %d of 15 blocks: %v", len(seen), seen)
	}
	for off, n := range seen {
		if n < 50 || n > 170 {
			t.Errorf("block at %d was read %d times of 1500, expected about 100", off, n)
		}
	}
	if n := testing.AllocsPerRun(100, func() { p.offset(77) }); n != 0 {
		t.Errorf("offset allocates %v times", n)
	}
}

func TestPlanWithoutSpace(t *testing.T) {
	for name, spans := range map[string][]Span{
		"read-4k":    {{0, 4095, OwnData}, {4095, 1 << 30, NoData}},
		"alloc-4k":   {{0, 9 * 65536, NoData}},
		"overlay-4k": {{0, 1 << 30, NoData}, {1 << 30, 1 << 30, OwnData}},
	} {
		w, err := Select([]string{name})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := newPlan(w[0], survey(spans), 65536, 10, 1); !errors.Is(err, ErrNoSpace) {
			t.Errorf("%s: error %v, want ErrNoSpace", name, err)
		}
	}
}
