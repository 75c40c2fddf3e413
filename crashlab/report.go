package crashlab

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"slices"
	"strings"
)

// Phase is what a crash interrupted.
type Phase uint8

// The phases of an exploration.
const (
	PhaseWork     Phase = iota // the recorded work
	PhaseRecovery              // the opening after a crash
	PhaseAgain                 // the use of a disk that was recovered
	numPhases
)

var phaseNames = [numPhases]string{"work", "recovery", "again"}

// String returns work, recovery or again.
func (p Phase) String() string {
	if p < numPhases {
		return phaseNames[p]
	}
	return fmt.Sprintf("Phase(%d)", uint8(p))
}

// MarshalText is String, for JSON.
func (p Phase) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// Stage is the judgement that a state failed.
type Stage string

// The judgements, in the order in which they are passed.
const (
	StageOpen     Stage = "open"     // the disk did not open
	StageCheck    Stage = "check"    // the format's checker found something
	StageRead     Stage = "read"     // the disk could not be read
	StageContents Stage = "contents" // a sector, or the size, is not what the history allows
	StageJudge    Stage = "judge"    // the scenario's own judgement
	StageRepeat   Stage = "repeat"   // a second recovery showed something else
	StageAgain    Stage = "again"    // the recovered disk did not work
	StageLive     Stage = "live"     // the disk in use showed, before it was closed, what it must not
	StageSticky   Stage = "sticky"   // it went on after a failed sync as if nothing had happened
	StageClosed   Stage = "closed"   // the files of a closed disk are not what they should be
	StagePanic    Stage = "panic"    // the engine panicked
)

// Violation is a crash after which a promise did not hold.
type Violation struct {
	Stage   Stage  `json:"stage"`
	Message string `json:"message"`
	// Path lists the crashes that lead to it: one, or one after the other when a recovery, or a disk used
	// again, was crashed as well. It is empty when the files were wrong without any crash.
	Path []Crash `json:"path"`
	// Stack is where the engine panicked.
	Stack string `json:"stack,omitempty"`
}

// panicError is a panic of the engine under test.
type panicError struct {
	value any
	stack string
}

func (e *panicError) Error() string { return fmt.Sprintf("panic: %v", e.value) }

// guard calls fn and turns a panic into an error.
func guard(fn func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &panicError{v, string(debug.Stack())}
		}
	}()
	return fn()
}

// violation returns what failed at a stage; nil when err is nil.
func violation(stage Stage, err error) *Violation {
	if err == nil {
		return nil
	}
	v := &Violation{Stage: stage, Message: err.Error()}
	if p := (*panicError)(nil); errors.As(err, &p) {
		v.Stage, v.Stack = StagePanic, p.stack
	}
	return v
}

// PhaseCount counts states of one phase.
type PhaseCount struct {
	Phase    Phase `json:"phase"`
	Explored int64 `json:"states_explored"`
	Possible Count `json:"states_possible"`
}

// ModelCount says how much of the recorded work was crashed in one model.
type ModelCount struct {
	Model      string `json:"model"`
	Points     int    `json:"points"`            // instants with crash states of their own
	Exhaustive int    `json:"points_exhaustive"` // those of which every state was explored
	Explored   int    `json:"states_explored"`
	Possible   Count  `json:"states_possible"`
}

// SiteCount says how often the engine was crashed at one place of its source that changes a file.
type SiteCount struct {
	Site       Site  `json:"site"`
	Operations int   `json:"operations"` // recorded in the work
	Crashes    int64 `json:"crashes"`    // states in which the operation last begun came from here
}

// Report is the outcome of an exploration. States are counted as often as they were judged under different
// promises, and once for each model.
type Report struct {
	Scenario     string       `json:"scenario"`
	Seed         uint64       `json:"seed"`
	Faults       []string     `json:"faults,omitempty"`
	FaultHits    int          `json:"fault_hits,omitempty"` // operations that were made to fail
	Explored     int64        `json:"states_explored"`
	Possible     Count        `json:"states_possible"`
	PossibleLog2 float64      `json:"states_possible_log2"`
	Phases       []PhaseCount `json:"phases"`
	Models       []ModelCount `json:"models"`
	Operations   int          `json:"operations"` // recorded in the work, barriers included
	Barriers     int          `json:"barriers"`
	Sites        []SiteCount  `json:"sites"`
	Violations   []Violation  `json:"violations"`

	sites map[Site]int // index in Sites
}

func newReport(sc *Scenario, o *Options, h *history) *Report {
	r := &Report{Scenario: sc.Name, Seed: o.Seed, Violations: []Violation{}, sites: make(map[Site]int)}
	for _, f := range o.Faults {
		r.Faults = append(r.Faults, f.String())
	}
	for p := range numPhases {
		r.Phases = append(r.Phases, PhaseCount{Phase: p})
	}
	for _, e := range h.events {
		if e.op != nil && !e.ends {
			r.Operations++
			if e.op.kind == KindSync {
				r.Barriers++ // a crash inside one leaves what a crash just before it may leave
			} else {
				r.site(*e.op.site).Operations++
			}
		}
	}
	return r
}

func (r *Report) site(s Site) *SiteCount {
	i, known := r.sites[s]
	if !known {
		i = len(r.Sites)
		r.sites[s] = i
		r.Sites = append(r.Sites, SiteCount{Site: s})
	}
	return &r.Sites[i]
}

// merge adds what judging one state of the work took.
func (r *Report) merge(t *tally, st *State) {
	r.Explored++
	r.Phases[PhaseWork].Explored++
	if o := st.space.at.op; o != nil {
		r.site(*o.site).Crashes++
	}
	for _, s := range t.hits {
		r.site(*s).Crashes++
	}
	for p := range t.phases {
		r.Explored += t.phases[p].Explored
		r.Phases[p].Explored += t.phases[p].Explored
		r.addPossible(Phase(p), t.phases[p].Possible)
	}
}

func (r *Report) addPossible(p Phase, n Count) {
	r.Phases[p].Possible = r.Phases[p].Possible.add(n)
	r.Possible = r.Possible.add(n)
	r.PossibleLog2 = max(r.Possible.Log2(), 0)
}

func (r *Report) addModel(m Model, cov coverage) {
	r.Models = append(r.Models, ModelCount{
		Model: m.String(), Points: cov.points, Exhaustive: cov.exhaustive, Explored: cov.explored, Possible: cov.possible,
	})
	r.addPossible(PhaseWork, cov.possible)
}

// WriteJSON writes the report as one JSON object.
func (r *Report) WriteJSON(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(r)
}

// WriteText writes the report for people.
func (r *Report) WriteText(w io.Writer) error {
	b := &strings.Builder{}
	fmt.Fprintf(b, "%s: explored %d of %s crash states (seed %d), %d violations\n",
		r.Scenario, r.Explored, r.Possible, r.Seed, len(r.Violations))
	if len(r.Faults) > 0 {
		fmt.Fprintf(b, "with faults %s, which %d operations met\n", strings.Join(r.Faults, ", "), r.FaultHits)
	}
	fmt.Fprintf(b, "recorded: %d operations, %d of them barriers\n", r.Operations, r.Barriers)
	for _, m := range r.Models {
		fmt.Fprintf(b, "model %q: %d of %s states; %d of %d points exhaustively\n",
			m.Model, m.Explored, m.Possible, m.Exhaustive, m.Points)
	}
	for _, p := range r.Phases {
		fmt.Fprintf(b, "phase %s: %d of %s states\n", p.Phase, p.Explored, p.Possible)
	}
	sites := slices.Clone(r.Sites)
	slices.SortStableFunc(sites, func(a, b SiteCount) int { return cmp.Compare(b.Crashes, a.Crashes) })
	for _, s := range sites {
		fmt.Fprintf(b, "crashed %d times at %s (%d operations in the work)\n", s.Crashes, s.Site, s.Operations)
	}
	for i := range r.Violations {
		fmt.Fprintf(b, "\nviolation %d: ", i+1)
		r.Violations[i].writeText(b)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (v *Violation) writeText(b *strings.Builder) {
	fmt.Fprintf(b, "%s: %s\n", v.Stage, v.Message)
	for i, c := range v.Path {
		fmt.Fprintf(b, "  crash %d, of %s, %s\n", i+1, c.phaseName(), c.Summary())
		for _, row := range c.Timeline {
			fmt.Fprintf(b, "    %s\n", row)
		}
	}
	if v.Stack != "" {
		fmt.Fprintf(b, "%s\n", v.Stack)
	}
}
