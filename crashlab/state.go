package crashlab

import (
	"iter"
	"math/rand/v2"
	"slices"
	"sort"

	"github.com/platter-disk/platter/storage"
)

// State is what the files of a lab may hold after a crash at one point of its history. Safe for concurrent use.
type State struct {
	h     *history
	space *space
	picks []pick // canonical
	sites *siteTable
}

// Event is the number of the event of the history that the crash came after; -1: before the first.
func (st *State) Event() int { return st.space.at.event }

// Lab returns a new lab whose files hold the state, with an empty history.
func (st *State) Lab() *Lab {
	l := &Lab{sites: st.sites}
	for i := range st.space.files {
		fs := &st.space.files[i]
		l.files = append(l.files, fs.build(st.picks[fs.first:], st.space.model))
	}
	return l
}

// Files returns the files of a new lab that hold the state.
func (st *State) Files() []storage.File { return st.Lab().Files() }

// build makes the file that picks describe.
func (fs *fileSpace) build(picks []pick, m Model) *content {
	sc := &fs.sizes[picks[0]]
	tree := fs.base.fork()
	if sc.trims {
		for i, data := tree.next(sc.size / storage.SectorSize); data != nil; i, data = tree.next(i + 1) {
			tree.set(i, clipSector(data, i*storage.SectorSize, sc.size))
		}
	}
	put := func(unit int64, data *unitData) {
		for k := range m.sectors() {
			tree.set(unit*m.sectors()+k, data[k])
		}
	}
	for i, ch := range fs.units[:sc.whole] {
		if p := picks[1+i]; p != 0 || ch.cands[0].sum != ch.was {
			put(ch.unit, &ch.cands[p].data)
		}
	}
	if sc.cut != nil {
		put(fs.units[sc.whole].unit, &sc.cut.data[picks[1+sc.whole]])
	}
	return newContent(fs.c.spec, fs.c.index, tree, sc.size)
}

// coverage says how much of a history was explored.
type coverage struct {
	points     int   // instants with states of their own
	exhaustive int   // those of which every state was explored
	explored   int   // states
	possible   Count // states
}

// crashes calls emit for crash states of the history, at most about budget of them, until emit returns false.
// A state is emitted at the first point where it is possible, and again after a promise to the guest. Points
// with few states are explored exhaustively; the rest of the budget is shared evenly among the others.
// The states, and their order, follow from the history, the model, the budget and the seed alone.
func (h *history) crashes(m Model, budget int, seed uint64, sites *siteTable, emit func(*State) bool) coverage {
	var counts []Count
	for cur := newCursor(h, m); ; {
		at, ok := cur.advance()
		if !ok {
			break
		}
		counts = append(counts, cur.space(at).fresh())
	}
	limit := share(counts, budget)
	cov := coverage{points: len(counts)}
	for _, n := range counts {
		cov.possible = cov.possible.add(n)
	}
	seen := make(map[uint64]struct{})
	cur := newCursor(h, m)
	for i := range counts {
		at, _ := cur.advance()
		if at.promise != nil {
			clear(seen)
		}
		n, exact := counts[i].Exact()
		complete := exact && n <= limit
		if limit == 0 && !turn(i, len(counts), budget) || n == 0 && exact {
			if n == 0 && exact {
				cov.exhaustive++
			}
			continue
		}
		s := cur.space(at)
		visit := func(picks []pick) (fresh, more bool) {
			print := s.fingerprint(picks)
			if _, dup := seen[print]; dup {
				return false, true
			}
			seen[print] = struct{}{}
			cov.explored++
			return true, emit(&State{h: h, space: s, picks: slices.Clone(picks), sites: sites})
		}
		goOn := true
		if complete {
			cov.exhaustive++
			s.eachFresh(func(picks []pick) bool {
				fresh, more := visit(picks)
				if !fresh { // the same contents by another way
					cov.possible = cov.possible.sub(CountOf(1))
				}
				goOn = more
				return more
			})
		} else {
			goOn = s.draw(int(max(limit, 1)), rand.New(rand.NewPCG(seed, uint64(at.event))), visit)
		}
		if !goOn {
			break
		}
	}
	return cov
}

// draw visits up to n different states of the space.
func (s *space) draw(n int, rng *rand.Rand, visit func([]pick) (fresh, more bool)) bool {
	sm := newSampler(s, rng, n < corners)
	picks := make([]pick, s.picks)
	for tries := 3*n + 16; n > 0 && tries > 0; tries-- {
		sm.draw(picks)
		fresh, more := visit(picks)
		if !more {
			return false
		}
		if fresh {
			n--
		}
	}
	return true
}

// share returns how many states each point may have so that together they stay within the budget: the
// largest limit with sum(min(count, limit)) <= budget. 0 when there are more points than budget.
func share(counts []Count, budget int) uint64 {
	spent := func(limit uint64) uint64 {
		var sum uint64
		for _, c := range counts {
			if n, exact := c.Exact(); exact && n < limit {
				sum += n
			} else {
				sum += limit
			}
		}
		return sum
	}
	most := uint64(max(budget, 0))
	// The first limit that costs too much, minus one.
	return uint64(max(sort.Search(int(most)+1, func(l int) bool { return spent(uint64(l)+1) > most }), 0))
}

// turn spreads budget visits evenly over n points.
func turn(i, n, budget int) bool {
	return (i+1)*budget/n != i*budget/n
}

// Crashes returns crash states of what the lab has recorded so far, at most about budget of them, in the
// order of the history. The states follow from the history, the model, the budget and the seed alone. For
// callers with a purpose of their own; Explore judges states and reports.
func (l *Lab) Crashes(m Model, budget int, seed uint64) (iter.Seq[*State], error) {
	if err := m.validate(); err != nil {
		return nil, err
	}
	h := l.history()
	return func(yield func(*State) bool) {
		h.crashes(m, budget, seed, l.sites, yield)
	}, nil
}

// RandomCrashes returns n crash states of what the lab has recorded so far, in the order of the history, each at a
// point of its own drawing and of a shape of its own: a corner, a single operation, torn ones, any subset. Where
// the states that one can afford are fewer than the points, Crashes would show corners alone. One state may
// come twice. They follow from the history, the model, n and the seed alone.
func (l *Lab) RandomCrashes(m Model, n int, seed uint64) (iter.Seq[*State], error) {
	if err := m.validate(); err != nil {
		return nil, err
	}
	h := l.history()
	return func(yield func(*State) bool) {
		points := 0
		for cur, more := newCursor(h, m), true; more; {
			if _, more = cur.advance(); more {
				points++
			}
		}
		rng := rand.New(rand.NewPCG(seed, uint64(n)))
		turns := make([]int, n)
		for i := range turns {
			turns[i] = rng.IntN(points)
		}
		slices.Sort(turns)
		cur := newCursor(h, m)
		for point := 0; len(turns) > 0; point++ {
			at, _ := cur.advance()
			for ; len(turns) > 0 && turns[0] == point; turns = turns[1:] {
				s := cur.space(at)
				picks := make([]pick, s.picks)
				sm := newSampler(s, rng, false)
				sm.skip()
				sm.draw(picks)
				if !yield(&State{h: h, space: s, picks: picks, sites: l.sites}) {
					return
				}
			}
		}
	}, nil
}
