package crashcases

import (
	"bytes"
	"context"
	"flag"
	"testing"

	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
)

var (
	budget  = flag.Int("crash.states", fewStates, "crash states to explore in each case")
	hunting = flag.Int("crash.mutant-states", 600, "crash states to explore in each workload until a mutant is caught")
	seed    = flag.Uint64("crash.seed", 1, "seed of workloads and explorations")
)

// TestNoViolations explores every workload under every discipline.
func TestNoViolations(t *testing.T) {
	for _, f := range Formats() {
		for _, w := range f.Workloads {
			for _, d := range f.Disciplines {
				if !w.runsUnder(d) {
					continue
				}
				c := Case{Format: f.Name, Discipline: d, Workload: w.Name, Seed: *seed}
				t.Run(c.String(), func(t *testing.T) {
					r := explore(t, c, *budget)
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

// TestEveryMutantIsListed: what a format can do wrong is tried.
func TestEveryMutantIsListed(t *testing.T) {
	want := map[string]int{"qcow2": len(qcow2.Mutants()), "fvd": len(fvd.Mutants())}
	for _, f := range Formats() {
		names := map[string]bool{}
		for _, m := range f.Mutants {
			names[m.Name] = true
			for _, d := range m.Disciplines {
				if _, _, err := Scenario(Case{Format: f.Name, Discipline: d, Workload: m.Workload, Mutant: m.Name}); err != nil {
					t.Error(err)
				}
			}
		}
		if len(names) != want[f.Name] {
			t.Errorf("%s: %d mutants are listed, the format has %d", f.Name, len(names), want[f.Name])
		}
	}
}

// catch explores a few workloads of the kind that is to catch a mutant, until one does.
func catch(t *testing.T, c Case) {
	const workloads = 8
	explored := int64(0)
	for range workloads {
		r := explore(t, c, *hunting)
		explored += r.Explored
		if len(r.Violations) > 0 {
			t.Logf("caught after %d states: %s", explored, r.Violations[0].Message)
			return
		}
		c.Seed++
	}
	t.Errorf("not caught in %d states of %d workloads", explored, workloads)
}

func explore(t *testing.T, c Case, states int) *crashlab.Report {
	t.Helper()
	sc, models, err := Scenario(c)
	if err != nil {
		t.Fatal(err)
	}
	r, err := crashlab.Explore(context.Background(), sc, crashlab.Options{States: states, Seed: *seed, Models: models})
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
