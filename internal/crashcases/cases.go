// Package crashcases names what the crash lab can explore: formats, disciplines, workloads and mutants. It
// stands above the formats, because the lab itself knows none.
package crashcases

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/platter-disk/platter/crashlab"
)

// Case names an exploration.
type Case struct {
	Format     string
	Discipline string // "": the format's default
	Workload   string
	Mutant     string // "": none
	Seed       uint64 // of the workload
}

func (c Case) String() string {
	s := c.Format
	for _, part := range []string{c.Discipline, c.Workload, c.Mutant} {
		if part != "" {
			s += "/" + part
		}
	}
	return s
}

// Format is what a format offers for exploration.
type Format struct {
	Name        string
	Disciplines []string
	Default     string // discipline
	Workloads   []Workload
	Mutants     []Mutant

	models   []crashlab.Model // of a crash that the format has to survive; nil: those of crashlab
	scenario func(c Case) (crashlab.Scenario, error)
}

// Workload is a named use of a disk.
type Workload struct {
	Name        string
	Description string
	Disciplines []string // empty: all
}

// runsUnder reports whether the workload is one of a discipline.
func (w *Workload) runsUnder(discipline string) bool {
	return len(w.Disciplines) == 0 || slices.Contains(w.Disciplines, discipline)
}

// Mutant is a named wrong order, and the cases that are to catch it.
type Mutant struct {
	Name        string
	Description string // "": the name says it
	Disciplines []string
	Workload    string // that catches it
}

// Formats lists what can be explored.
func Formats() []Format {
	return []Format{qcow2Format(), fvdFormat(), chainFormat(), fvdChainFormat()}
}

// Scenario builds the scenario of a case, and says which crashes its format has to survive (crashlab.Options.Models).
func Scenario(c Case) (crashlab.Scenario, []crashlab.Model, error) {
	f, err := find("format", c.Format, Formats(), func(f Format) string { return f.Name })
	if err != nil {
		return crashlab.Scenario{}, nil, err
	}
	c.Discipline = cmp.Or(c.Discipline, f.Default)
	if _, err := find("discipline", c.Discipline, f.Disciplines, func(s string) string { return s }); err != nil {
		return crashlab.Scenario{}, nil, err
	}
	w, err := find("workload", c.Workload, f.Workloads, func(w Workload) string { return w.Name })
	if err != nil {
		return crashlab.Scenario{}, nil, err
	}
	if !w.runsUnder(c.Discipline) {
		return crashlab.Scenario{}, nil, fmt.Errorf("workload %q is for %s only", w.Name, strings.Join(w.Disciplines, ", "))
	}
	if c.Mutant != "" {
		m, err := find("mutant", c.Mutant, f.Mutants, func(m Mutant) string { return m.Name })
		if err != nil {
			return crashlab.Scenario{}, nil, err
		}
		if !slices.Contains(m.Disciplines, c.Discipline) {
			return crashlab.Scenario{}, nil, fmt.Errorf("mutant %q is one of %s only", m.Name, strings.Join(m.Disciplines, ", "))
		}
	}
	sc, err := f.scenario(c)
	return sc, f.models, err
}

func find[T any](what, name string, all []T, nameOf func(T) string) (T, error) {
	names := make([]string, len(all))
	for i, v := range all {
		if names[i] = nameOf(v); names[i] == name {
			return v, nil
		}
	}
	var none T
	return none, fmt.Errorf("%s %q: want one of %s", what, name, strings.Join(names, ", "))
}
