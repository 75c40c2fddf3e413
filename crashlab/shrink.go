package crashlab

import "slices"

// maxTrials bounds the states that are judged to make one violation smaller.
const maxTrials = 1000

// shrinker reduces a failing state.
type shrinker struct {
	x      *explorer
	lv     *level
	number uint64
	stage  Stage
	trials int
}

// shrink returns the violation for a state that fails at the same stage and is as close as can be to one in
// which everything survived, or nothing: first the earliest point of the history that fails with a simple
// state, then the fewest units that deviate. Where it took several crashes in a row, one that takes fewer is
// preferred, whatever it fails at.
func (x *explorer) shrink(lv *level, st *State, v *Violation, number uint64) *Violation {
	sh := &shrinker{x: x, lv: lv, number: number, stage: v.Stage}
	// The simplest first: one crash, then one more in the middle of the recovery.
	for crashes, recovery := range []Sampling{{}, {Every: 1, States: max(x.opts.Recovery.States, 1)}} {
		if len(v.Path) <= crashes+1 {
			break
		}
		if simple, st, v := sh.simpler(st, recovery); v != nil {
			return simple.shrink(lv, st, v, number)
		}
	}
	if early := sh.earlier(st); early != nil {
		st = early
	}
	lost := sh.reduce(st, st.space.newest())
	kept := sh.reduce(st, make([]pick, st.space.picks))
	best := lost
	if deviations(kept.picks, make([]pick, len(kept.picks))) < deviations(lost.picks, st.space.newest()) {
		best = kept
	}
	if final := x.try(lv, best, number, &tally{}, true); final != nil {
		return final
	}
	return v
}

// fails says whether a state fails in the same way.
func (sh *shrinker) fails(st *State) bool {
	if sh.trials >= maxTrials {
		return false
	}
	sh.trials++
	v := sh.x.try(sh.lv, st, sh.number, &tally{}, false)
	return v != nil && v.Stage == sh.stage
}

// simpler looks for a violation in the history of st with an explorer that uses no disk again and crashes
// recoveries as told.
func (sh *shrinker) simpler(st *State, recovery Sampling) (simple *explorer, at *State, v *Violation) {
	simple = &explorer{sc: sh.x.sc, opts: sh.x.opts}
	simple.sc.Again = nil
	simple.opts.Recovery = recovery
	st.h.crashes(st.space.model, maxTrials/2, sh.number, st.sites, func(st *State) bool {
		at, v = st, simple.try(sh.lv, st, sh.number, &tally{}, false)
		return v == nil
	})
	return simple, at, v
}

// earlier looks for a failing corner state at an earlier point of the history.
func (sh *shrinker) earlier(st *State) *State {
	if st.space.at.event < 0 {
		return nil
	}
	var found *State
	before := &history{files: st.h.files, events: st.h.events[:st.space.at.event]}
	budget := min(maxTrials/2, corners*st.space.at.event)
	before.crashes(st.space.model, budget, sh.number, st.sites, func(early *State) bool {
		if sh.fails(early) {
			found = early
		}
		return found == nil
	})
	return found
}

// newest returns the picks of the state in which everything survived.
func (s *space) newest() []pick {
	picks := make([]pick, s.picks)
	for i := range s.files {
		fs := &s.files[i]
		picks[fs.first] = fs.newest
		for k, ch := range fs.units {
			picks[fs.first+1+k] = ch.newest
		}
	}
	s.canonical(picks)
	return picks
}

func deviations(picks, target []pick) int {
	n := 0
	for i := range picks {
		if picks[i] != target[i] {
			n++
		}
	}
	return n
}

// reduce brings a failing state closer to target: it gives up deviations in halves, quarters and so on down to
// single ones, as long as the state still fails.
func (sh *shrinker) reduce(st *State, target []pick) *State {
	var open []int // positions that deviate
	for i := range st.picks {
		if st.picks[i] != target[i] {
			open = append(open, i)
		}
	}
	for size := len(open); size > 0; size /= 2 {
		for from := 0; from < len(open); {
			part := open[from:min(from+size, len(open))]
			trial := *st
			trial.picks = slices.Clone(st.picks)
			for _, i := range part {
				trial.picks[i] = target[i]
			}
			st.space.canonical(trial.picks)
			if sh.fails(&trial) {
				st = &trial
				open = slices.Delete(open, from, from+len(part))
			} else {
				from += size
			}
		}
	}
	return st
}
