package crashcases

import (
	"bytes"
	"context"
	"flag"
	"slices"
	"testing"

	"github.com/platter-disk/platter/crashlab"
)

var (
	budget = flag.Int("crash.states", 600, "crash states to explore in each case")
	seed   = flag.Uint64("crash.seed", 1, "seed of workloads and explorations")
)

// TestNoViolations explores every workload under every discipline.
func TestNoViolations(t *testing.T) {
	for _, f := range Formats() {
		for _, w := range f.Workloads {
			for _, d := range f.Disciplines {
				if len(w.Disciplines) > 0 && !slices.Contains(w.Disciplines, d) {
					continue
				}
				c := Case{Format: f.Name, Discipline: d, Workload: w.Name, Seed: *seed}
				t.Run(c.String(), func(t *testing.T) {
					r := explore(t, c)
					if len(r.Violations) > 0 {
						t.Errorf("violations:\n%s", text(t, r))
					}
					t.Logf("explored %d of %s states", r.Explored, r.Possible)
				})
			}
		}
	}
}

// TestMutantsAreCaught: a checker that cannot fail proves nothing.
func TestMutantsAreCaught(t *testing.T) {
	for _, f := range Formats() {
		for _, m := range f.Mutants {
			for _, d := range m.Disciplines {
				c := Case{Format: f.Name, Discipline: d, Workload: m.Workload, Mutant: m.Name, Seed: *seed}
				t.Run(c.String(), func(t *testing.T) { catch(t, c) })
			}
		}
	}
}

// catch explores a few workloads of the kind that is to catch a mutant, until one does.
func catch(t *testing.T, c Case) {
	const workloads = 8
	explored := int64(0)
	for range workloads {
		r := explore(t, c)
		explored += r.Explored
		if len(r.Violations) > 0 {
			t.Logf("caught after %d states: %s", explored, r.Violations[0].Message)
			return
		}
		c.Seed++
	}
	t.Errorf("not caught in %d states of %d workloads", explored, workloads)
}

func explore(t *testing.T, c Case) *crashlab.Report {
	t.Helper()
	sc, err := Scenario(c)
	if err != nil {
		t.Fatal(err)
	}
	r, err := crashlab.Explore(context.Background(), sc, crashlab.Options{States: *budget, Seed: *seed})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func text(t *testing.T, r *crashlab.Report) string {
	t.Helper()
	var b bytes.Buffer
	if err := r.WriteText(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}
