package crashlab

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/platter-disk/platter/storage"
)

// Explore records the scenario's work, explores what crashes leave of it, and reports. The error is about the
// scenario itself (it cannot be prepared, or its work fails without any crash) or the context; what crashes
// reveal is in the report.
func Explore(ctx context.Context, sc Scenario, opts Options) (*Report, error) {
	opts, err := opts.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := sc.validate(); err != nil {
		return nil, err
	}
	lab, err := NewLab(sc.Files...)
	if err != nil {
		return nil, err
	}
	lab.Yield = true
	x := &explorer{sc: sc, opts: opts}
	if sc.Prepare != nil {
		if err := guard(func() error { return sc.Prepare(lab.Files()) }); err != nil {
			return nil, fmt.Errorf("crashlab: scenario %q: prepare: %w", sc.Name, err)
		}
	}
	lab.Settle()
	rec := &recording{x: x, lab: lab, work: sc.Work}
	if len(opts.Faults) > 0 {
		rec.faults = NewInjector(opts.Faults...)
	}
	found, err := rec.run()
	if err != nil {
		return nil, fmt.Errorf("crashlab: scenario %q: without any crash: %w", sc.Name, err)
	}
	r, err := x.explore(ctx, lab, rec.guest, found)
	if rec.faults != nil {
		r.FaultHits = rec.faults.Hits()
	}
	return r, err
}

// explorer is one exploration.
type explorer struct {
	sc    Scenario
	opts  Options
	views sync.Pool // *view
}

// view is what the watched sectors of a disk read as.
type view struct {
	size int64
	data []byte
}

func (x *explorer) newView(w *watch) *view {
	n := w.slots * storage.SectorSize
	if v, ok := x.views.Get().(*view); ok && cap(v.data) >= n {
		v.data = v.data[:n]
		return v
	}
	return &view{data: make([]byte, n)}
}

// explore explores the recorded work in every model.
// What was found while it was recorded is reported with the rest.
func (x *explorer) explore(ctx context.Context, lab *Lab, g *Guest, found *Violation) (*Report, error) {
	h := lab.history()
	r := newReport(&x.sc, &x.opts, h)
	if found != nil {
		found.Path = []Crash{}
		r.Violations = append(r.Violations, *found)
		if x.opts.Violations == 1 {
			return r, nil
		}
	}
	left := x.opts.States
	for i, m := range x.opts.Models {
		lv := &level{phase: PhaseWork, guest: g, h: h, depth: x.opts.Depth}
		run := &run{x: x, ctx: ctx, lv: lv, report: r}
		seed := x.opts.Seed ^ mix(uint64(i+1))
		cov := h.crashes(m, left/(len(x.opts.Models)-i), seed, lab.sites, run.add)
		run.finish()
		cov.explored = run.judged
		left -= cov.explored
		r.addModel(m, cov)
		if err := ctx.Err(); err != nil {
			return r, err
		}
		if run.done {
			break
		}
	}
	return r, nil
}

// run judges the states of one model in batches. Within a batch any worker takes any state; outcomes are merged
// in the order of the states, so that the report does not depend on the workers.
type run struct {
	x      *explorer
	ctx    context.Context
	lv     *level
	report *Report
	batch  []*State
	judged int
	done   bool
}

// batchSize is a compromise: the workers wait for each other at the end of a batch.
const batchSize = 512

// add takes a state; false when no more are wanted.
func (r *run) add(st *State) bool {
	r.batch = append(r.batch, st)
	if len(r.batch) == batchSize {
		r.finish()
	}
	return !r.done
}

// finish judges the states that were added.
func (r *run) finish() {
	batch := r.batch
	r.batch = nil
	if r.done || len(batch) == 0 {
		return
	}
	type outcome struct {
		tally tally
		v     *Violation
	}
	outcomes := make([]outcome, len(batch))
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(r.x.opts.Workers, len(batch)) {
		wg.Go(func() {
			for r.ctx.Err() == nil {
				i := int(next.Add(1)) - 1
				if i >= len(batch) {
					return
				}
				o := &outcomes[i]
				o.v = r.x.try(r.lv, batch[i], r.number(r.judged+i), &o.tally, false)
			}
		})
	}
	wg.Wait()
	if r.ctx.Err() != nil {
		r.done = true
		return
	}
	for i := range outcomes {
		r.judged++
		r.report.merge(&outcomes[i].tally, batch[i])
		if v := outcomes[i].v; v != nil {
			r.report.Violations = append(r.report.Violations, *r.x.shrink(r.lv, batch[i], v, r.number(r.judged-1)))
			if r.done = len(r.report.Violations) >= r.x.opts.Violations; r.done {
				break
			}
		}
	}
	if r.x.opts.Progress != nil {
		r.x.opts.Progress(int(r.report.Explored))
	}
}

// number is what seeds the choices made for the i-th state.
func (r *run) number(i int) uint64 {
	return mix(r.x.opts.Seed ^ mix(uint64(i)+1))
}

// tally counts what judging one state of the workload took, crashes inside it included.
type tally struct {
	phases [numPhases]PhaseCount
	hits   []*Site // where crashes inside it happened
}

func (t *tally) nested(p Phase, cov coverage) {
	t.phases[p].Explored += int64(cov.explored)
	t.phases[p].Possible = t.phases[p].Possible.add(cov.possible)
}

// level is a recorded history being crashed, and how its states are judged.
type level struct {
	phase Phase
	guest *Guest
	h     *history // of the guest
	depth int      // how often recovery from here on may be crashed

	// In PhaseRecovery: what the recovery showed that was not interrupted, and the crash it recovered from.
	want  *view
	event int
}

// moment is the instant of the guest's history after which the state was left.
func (lv *level) moment(st *State) int {
	if lv.phase == PhaseRecovery {
		return lv.event
	}
	return st.space.at.event
}

// judge compares what a recovered disk shows with what it may show.
func (lv *level) judge(st *State, got *view) error {
	if lv.phase == PhaseRecovery {
		if got.size != lv.want.size {
			return fmt.Errorf("the disk had %d bytes after the first recovery and now has %d", lv.want.size, got.size)
		}
		return lv.guest.sameView(lv.want.data, got.data)
	}
	st.space.onceOracle.Do(func() { st.space.oracle = lv.guest.oracle(st.space.at.event) })
	return st.space.oracle.Judge(got.data, got.size)
}

// try opens a state, judges it, and crashes it again where the seed says so. number identifies the state among
// its like; it decides what is sampled. shrink says whether a violation found in a crash inside this state is
// reduced.
func (x *explorer) try(lv *level, st *State, number uint64, t *tally, shrink bool) *Violation {
	lab := st.Lab()
	first := x.newView(lv.guest.watch)
	defer x.views.Put(first)
	v := x.reopen(lab, lv, st, first, lv.judge)
	if v == nil && lab.changed() {
		v = x.recovery(lab, lv, st, first, number, t, shrink)
	}
	if v == nil && x.sc.Again != nil && lv.phase != PhaseAgain && chosen(number^2, x.opts.Again) {
		v = x.again(lab, lv, number, t, st.space.model, shrink)
	}
	if v != nil {
		v.Path = slices.Insert(v.Path, 0, describe(lv.phase, st))
	}
	return v
}

// chosen decides by a state's number whether it gets a treatment.
func chosen(number uint64, s Sampling) bool {
	return s.Every > 0 && s.States > 0 && mix(number)%uint64(s.Every) == 0
}

// reopen opens the lab's files, lets the checker and judge look at the disk, and cuts the power.
func (x *explorer) reopen(lab *Lab, lv *level, st *State, got *view, judge func(*State, *view) error) *Violation {
	stage := StageOpen
	err := guard(func() error {
		s, err := x.sc.Open(lab.Files())
		if err != nil {
			return err
		}
		defer s.Close()
		defer lab.PowerOff()
		stage = StageCheck
		if err := s.Check(); err != nil {
			return err
		}
		stage = StageRead
		got.size = s.Size()
		if err := lv.guest.watch.read(s, got.size, got.data); err != nil {
			return err
		}
		stage = StageContents
		if err := judge(st, got); err != nil {
			return err
		}
		stage = StageJudge
		if x.sc.Judge == nil {
			return nil
		}
		return x.sc.Judge(s, Moment{Phase: lv.phase, h: lv.h, event: lv.moment(st)})
	})
	return violation(stage, err)
}

// recovery checks that a recovery that wrote something is idempotent, and crashes it.
func (x *explorer) recovery(lab *Lab, lv *level, st *State, first *view, number uint64, t *tally, shrink bool) *Violation {
	inner := &level{
		phase: PhaseRecovery, guest: lv.guest, h: lv.h, depth: lv.depth - 1,
		want: first, event: lv.moment(st),
	}
	second := x.newView(lv.guest.watch)
	defer x.views.Put(second)
	if v := x.reopen(lab.clone(), inner, st, second, inner.judge); v != nil {
		v.Stage = StageRepeat
		return v
	}
	if lv.depth == 0 || !chosen(number^1, x.opts.Recovery) {
		return nil
	}
	return x.nested(lab, inner, x.opts.Recovery.States, number^3, t, st.space.model, shrink)
}

// again uses a recovered disk and crashes that.
func (x *explorer) again(lab *Lab, lv *level, number uint64, t *tally, m Model, shrink bool) *Violation {
	used := lab.clone()
	rec := &recording{x: x, lab: used, work: x.sc.Again, before: lv.guest}
	found, err := rec.run()
	if err != nil {
		return violation(StageAgain, err)
	}
	if found != nil {
		return found
	}
	inner := &level{phase: PhaseAgain, guest: rec.guest, h: used.history(), depth: lv.depth}
	return x.nested(used, inner, x.opts.Again.States, number^4, t, m, shrink)
}

// nested crashes what the lab has recorded.
func (x *explorer) nested(lab *Lab, lv *level, budget int, number uint64, t *tally, m Model, shrink bool) *Violation {
	var found *Violation
	n := number
	cov := lab.history().crashes(m, budget, number, lab.sites, func(st *State) bool {
		n = mix(n + 1)
		if o := st.space.at.op; o != nil {
			t.hits = append(t.hits, o.site)
		}
		found = x.try(lv, st, n, t, false)
		if found != nil && shrink {
			found = x.shrink(lv, st, found, n)
		}
		return found == nil
	})
	t.nested(lv.phase, cov)
	return found
}
