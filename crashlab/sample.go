package crashlab

import "math/rand/v2"

// fate is what a sample lets become of one operation.
type fate uint8

const (
	lost fate = iota
	kept
	torn // each of its units survives or not on its own
)

// sampler draws states from a space that is too large to enumerate: first the corners that are most telling
// (everything survived, nothing did, one operation alone did or did not), between them random ones of
// several shapes.
type sampler struct {
	s     *space
	rng   *rand.Rand
	perm  []int       // the order in which single operations get their turn
	slot  map[*op]int // position among the uncertain operations
	fates []fate      // by position
	n     int         // samples drawn
	one   int         // corners with a single operation drawn
	first int         // the corner to begin with
}

// corners is the number of corners that stand for themselves, before those of single operations.
const corners = 4

// newSampler returns a sampler. Where only few samples will be drawn, points begin with different corners.
func newSampler(s *space, rng *rand.Rand, few bool) *sampler {
	ops := s.uncertain()
	sm := &sampler{s: s, rng: rng, perm: rng.Perm(len(ops)), slot: make(map[*op]int, len(ops)), fates: make([]fate, len(ops))}
	for i, o := range ops {
		sm.slot[o] = i
	}
	if few {
		sm.first = rng.IntN(corners)
	}
	return sm
}

// skip makes the next sample any of those that might have come later: a quarter corners, the others single
// operations and random ones alike.
func (sm *sampler) skip() {
	sm.n = sm.rng.IntN(4 * corners)
	if len(sm.fates) > 0 {
		sm.one = sm.rng.IntN(2 * len(sm.fates))
	}
}

// draw fills picks with the next sample, in canonical form.
func (sm *sampler) draw(picks []pick) {
	n := sm.n
	sm.n++
	switch {
	case n < corners:
		sm.corner((n + sm.first) % corners)
		sm.resolve(picks)
	case n%2 == 0 && sm.one < 2*len(sm.fates):
		sm.single()
		sm.resolve(picks)
	default:
		sm.random(picks)
	}
	sm.s.canonical(picks)
}

func (sm *sampler) fill(f fate) {
	for i := range sm.fates {
		sm.fates[i] = f
	}
}

func (sm *sampler) corner(n int) {
	last := len(sm.fates) - 1
	if o := sm.s.at.op; o != nil {
		if i, ok := sm.slot[o]; ok {
			last = i
		}
	}
	switch n {
	case 0:
		sm.fill(kept)
	case 1:
		sm.fill(lost)
	case 2:
		sm.fill(lost)
		if last >= 0 {
			sm.fates[last] = kept
		}
	case 3:
		sm.fill(kept)
		if last >= 0 {
			sm.fates[last] = lost
		}
	}
}

// single lets one operation alone survive or be lost, each operation in turn.
func (sm *sampler) single() {
	alone := sm.one%2 == 0
	if alone {
		sm.fill(lost)
		sm.fates[sm.perm[sm.one/2]] = kept
	} else {
		sm.fill(kept)
		sm.fates[sm.perm[sm.one/2]] = lost
	}
	sm.one++
}

func (sm *sampler) random(picks []pick) {
	rng := sm.rng
	ops := len(sm.fates)
	switch shape := rng.IntN(6); {
	case shape == 0 && ops > 0: // everything up to an operation, which is torn
		sm.fill(lost)
		k := rng.IntN(ops)
		for i := range k {
			sm.fates[i] = kept
		}
		sm.fates[k] = torn
	case shape <= 2 && ops > 0: // some operations, perhaps some torn
		p := []float64{0.1, 0.5, 0.9}[rng.IntN(3)]
		for i := range sm.fates {
			sm.fates[i] = lost
			if rng.Float64() < p {
				sm.fates[i] = kept
			}
		}
		for range shape {
			sm.fates[rng.IntN(ops)] = torn
		}
	case shape == 3: // every unit on its own
		for i := range sm.s.files {
			fs := &sm.s.files[i]
			picks[fs.first] = pick(rng.IntN(len(fs.sizes)))
			for k, ch := range fs.units {
				picks[fs.first+1+k] = pick(rng.IntN(len(ch.cands)))
			}
		}
		return
	default: // all or nothing but for one unit
		sm.fill(kept)
		if shape == 4 {
			sm.fill(lost)
		}
		sm.resolve(picks)
		sm.deviate(picks)
		return
	}
	sm.resolve(picks)
}

// deviate changes the pick of one unit; where nothing else survived the growth of the file may have.
func (sm *sampler) deviate(picks []pick) {
	fs := &sm.s.files[sm.rng.IntN(len(sm.s.files))]
	if sm.rng.IntN(2) == 0 {
		picks[fs.first] = fs.newest
	}
	if n := len(fs.units); n > 0 {
		k := sm.rng.IntN(n)
		picks[fs.first+1+k] = pick(sm.rng.IntN(len(fs.units[k].cands)))
	}
}

// resolve turns the fates of the operations into picks: of the surviving steps of each unit the last counts.
func (sm *sampler) resolve(picks []pick) {
	for i := range sm.s.files {
		fs := &sm.s.files[i]
		picks[fs.first] = sm.last(fs.steps)
		for k, ch := range fs.units {
			p := sm.last(ch.steps)
			if ch.zap != 0 && p != 0 && sm.rng.IntN(8) == 0 {
				p = ch.zap
			}
			picks[fs.first+1+k] = p
		}
	}
}

func (sm *sampler) last(steps []step) pick {
	for i := len(steps) - 1; i >= 0; i-- {
		switch f := sm.fates[sm.slot[steps[i].op]]; {
		case f == kept, f == torn && sm.rng.IntN(2) == 0:
			return steps[i].cand
		}
	}
	return 0
}
