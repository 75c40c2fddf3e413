package crashlab

import (
	"slices"
	"sync"

	"github.com/platter-disk/platter/storage"
)

// space is the set of states a crash may leave at one point: for each file a size and for each uncertain unit
// one of its candidates. A state is a list of picks: for each file first the index of its size, then one
// candidate index a unit, in the order of the units.
//
// What lies past the size that was picked is gone, so picks that differ only there are one state. The
// canonical form of such picks is 0 past the end, and in the unit that the end cuts the first candidate
// with the same remaining contents; only canonical picks are enumerated and counted.
type space struct {
	model Model
	at    point
	files []fileSpace
	picks int // length of a list of picks

	onceOps    sync.Once // sets ops, on demand: see uncertain
	ops        []*op
	onceOracle sync.Once // sets oracle, on demand
	oracle     *Oracle
}

// pick is the index of a candidate.
type pick uint32

// fileSpace is the part of a space that concerns one file.
type fileSpace struct {
	c      *content
	base   sectorTree // durable; frozen
	sum    uint64     // its fingerprint
	first  int        // where its picks start
	sizes  []sizeChoice
	steps  []step // of the sizes
	newest pick   // index of the size after everything
	units  []*unitChoice
}

// sizeChoice is a size that may survive, and what follows from it for the units.
type sizeChoice struct {
	size  int64
	op    *op    // who first gave the file this size; nil for the durable one
	whole int    // how many of the units lie entirely inside
	cut   *cut   // the uncertain unit that the end cuts, which follows them; nil when there is none
	skew  uint64 // correction of the fingerprint for durable contents past the end
	trims bool   // durable contents lie past the end
}

// cut is an uncertain unit of which only the beginning lies inside the file.
type cut struct {
	canon []pick     // the canonical candidates
	to    []pick     // canonical candidate for each candidate
	data  []unitData // what is left of each candidate
	sums  []uint64
	was   uint64 // contribution of what is left of the durable contents
}

// unitChoice is an uncertain unit: what a crash may leave in it. Immutable.
type unitChoice struct {
	unit   int64
	was    uint64 // contribution of the durable contents
	cands  []candidate
	all    []pick // their indices
	steps  []step
	newest pick // the candidate after everything
	zap    pick // the poison candidate, 0 when there is none
}

// step says which candidate an operation gave to a unit or a size.
type step struct {
	op   *op
	cand pick
}

// choice returns what a crash may leave in a unit; a single candidate means that nothing is uncertain.
func (f *fileCursor) choice(unit int64, u *unitState, m Model) *unitChoice {
	if u.choice != nil && u.chosen == len(u.later) {
		return u.choice
	}
	ch := &unitChoice{unit: unit, was: u.was, cands: []candidate{u.base}, all: []pick{0}}
	if u.choice == nil {
		u.chosen = 0
	} else {
		*ch = *u.choice // its slices grow in place; who holds the old choice does not see it
	}
	for ; u.chosen < len(u.later); u.chosen++ {
		v := u.later[u.chosen]
		ch.newest = ch.index(v, f.c.blank)
		ch.steps = append(ch.steps, step{v.op, ch.newest})
		if u.chosen == 0 && m.Zap {
			ch.zap = ch.index(f.zapped(unit, v.op, m), f.c.blank)
		}
	}
	u.choice = ch
	return ch
}

// index returns the index of a candidate, which is added when it is new.
func (ch *unitChoice) index(v candidate, blank *sector) pick {
	for i := range ch.cands {
		if ch.cands[i].sum == v.sum && ch.cands[i].data.same(&v.data, blank) {
			return pick(i)
		}
	}
	i := pick(len(ch.cands))
	ch.cands, ch.all = append(ch.cands, v), append(ch.all, i)
	return i
}

// zapped is a unit that was lost in the middle of being written by o.
func (f *fileCursor) zapped(unit int64, o *op, m Model) candidate {
	v := candidate{op: o}
	per := m.sectors()
	for i := range per {
		v.data[i] = &poisonSector
	}
	v.sum = v.data.contribution(f.c.index, unit*per, f.c.blank)
	return v
}

// space returns the states that are possible at the cursor's present point.
func (cur *cursor) space(at point) *space {
	s := &space{model: cur.model, at: at}
	for i := range cur.files {
		f := &cur.files[i]
		fs := fileSpace{c: f.c, base: f.durable.snapshot(), sum: f.sum, first: s.picks}
		for _, unit := range f.order {
			if ch := f.choice(unit, f.units[unit], cur.model); len(ch.cands) > 1 || ch.cands[0].sum != ch.was {
				fs.units = append(fs.units, ch)
			}
		}
		known := make(map[int64]pick, 1+len(f.sizes))
		fs.addSize(f.size, nil, cur.model, known)
		for _, st := range f.sizes {
			fs.newest = fs.addSize(st.size, st.op, cur.model, known)
			fs.steps = append(fs.steps, step{st.op, fs.newest})
		}
		s.picks += 1 + len(fs.units)
		s.files = append(s.files, fs)
	}
	return s
}

// addSize adds a size that may survive, unless it is known, and returns its index.
func (fs *fileSpace) addSize(size int64, o *op, m Model, known map[int64]pick) pick {
	if i, dup := known[size]; dup {
		return i
	}
	known[size] = pick(len(fs.sizes))
	sc := sizeChoice{size: size, op: o}
	end := size / m.Tear // the first unit that is not entirely inside
	sc.whole, _ = slices.BinarySearchFunc(fs.units, end, func(u *unitChoice, end int64) int {
		return int(min(max(u.unit-end, -1), 1))
	})
	if size%m.Tear != 0 && sc.whole < len(fs.units) && fs.units[sc.whole].unit == end {
		sc.cut = fs.cutAt(fs.units[sc.whole], size, m)
	}
	for i, data := fs.base.next(size / storage.SectorSize); data != nil; i, data = fs.base.next(i + 1) {
		left := clipSector(data, i*storage.SectorSize, size)
		if left != data {
			sc.trims = true
			sc.skew += contribution(fs.c.index, i, left, fs.c.blank) - contribution(fs.c.index, i, data, fs.c.blank)
		}
	}
	fs.sizes = append(fs.sizes, sc)
	return known[size]
}

// cutAt returns what is left of a unit's candidates when the file ends inside it.
func (fs *fileSpace) cutAt(ch *unitChoice, size int64, m Model) *cut {
	left := func(d unitData) (unitData, uint64) {
		d = d.clip(ch.unit*m.Tear, size)
		return d, d.contribution(fs.c.index, ch.unit*m.sectors(), fs.c.blank)
	}
	k := &cut{}
	_, k.was = left(readUnit(&fs.base, ch.unit*m.sectors(), m.sectors()))
	for i := range ch.cands {
		data, sum := left(ch.cands[i].data)
		to := pick(i)
		for _, j := range k.canon {
			if k.sums[j] == sum && k.data[j].same(&data, fs.c.blank) {
				to = j
				break
			}
		}
		if to == pick(i) {
			k.canon = append(k.canon, to)
		}
		k.to, k.data, k.sums = append(k.to, to), append(k.data, data), append(k.sums, sum)
	}
	return k
}

// uncertain lists the operations whose survival is uncertain and matters, in order.
func (s *space) uncertain() []*op {
	s.onceOps.Do(func() {
		seen := make(map[*op]bool)
		note := func(steps []step) {
			for _, st := range steps {
				if !seen[st.op] {
					seen[st.op] = true
					s.ops = append(s.ops, st.op)
				}
			}
		}
		for i := range s.files {
			note(s.files[i].steps)
			for _, ch := range s.files[i].units {
				note(ch.steps)
			}
		}
		slices.SortFunc(s.ops, func(a, b *op) int { return a.index - b.index })
	})
	return s.ops
}

// count is the number of states of the file; with a latest operation, of those that were possible before it.
func (fs *fileSpace) count(latest *op) Count {
	upTo := make([]Count, 1, len(fs.units)+1) // by number of units from the first
	upTo[0] = CountOf(1)
	for i, ch := range fs.units {
		upTo = append(upTo, upTo[i].mul(CountOf(uint64(older(ch.cands, ch.all, latest)))))
	}
	var total Count
	for i := range fs.sizes {
		sc := &fs.sizes[i]
		if latest != nil && sc.op == latest {
			continue
		}
		n := upTo[sc.whole]
		if sc.cut != nil {
			n = n.mul(CountOf(uint64(older(fs.units[sc.whole].cands, sc.cut.canon, latest))))
		}
		total = total.add(n)
	}
	return total
}

// fresh is the number of states that are possible at this point and were not before it.
func (s *space) fresh() Count {
	n := CountOf(1)
	for i := range s.files {
		fs := &s.files[i]
		all := fs.count(nil)
		if s.at.op != nil && s.at.op.file == i {
			all = all.sub(fs.count(s.at.op))
		}
		n = n.mul(all)
	}
	return n
}

// older returns how many of the canonical candidates were possible before o began; they come first. Without an
// operation it is all of them.
func older(cands []candidate, canon []pick, o *op) int {
	n := len(canon)
	for o != nil && n > 0 && cands[canon[n-1]].op == o {
		n--
	}
	return n
}

// eachFresh calls emit with the picks of every state that is possible at this point and was not before it,
// each once, until emit returns false. The slice is reused.
func (s *space) eachFresh(emit func(picks []pick) bool) bool {
	return s.eachOf(0, make([]pick, s.picks), emit)
}

// eachOf enumerates the states of files i and later.
func (s *space) eachOf(i int, picks []pick, emit func([]pick) bool) bool {
	if i == len(s.files) {
		return emit(picks)
	}
	fs := &s.files[i]
	var latest *op
	if s.at.op != nil && s.at.op.file == i {
		latest = s.at.op
	}
	mine := picks[fs.first : fs.first+1+len(fs.units)]
	return fs.each(mine, latest, func() bool { return s.eachOf(i+1, picks, emit) })
}

// each enumerates the canonical picks of a file: all of them, or only those in which something of the
// operation latest survived.
func (fs *fileSpace) each(picks []pick, latest *op, emit func() bool) bool {
	for k := range fs.sizes {
		sc := &fs.sizes[k]
		clear(picks)
		picks[0] = pick(k)
		inside := fs.units[:sc.whole]
		domains := make([][]pick, 0, sc.whole+1)
		for _, ch := range inside {
			domains = append(domains, ch.all)
		}
		if sc.cut != nil {
			inside = fs.units[:sc.whole+1]
			domains = append(domains, sc.cut.canon)
		}
		if latest == nil || sc.op == latest {
			if !odometer(picks[1:], domains, emit) {
				return false
			}
			continue
		}
		// Partition by the first unit in which latest survived: older candidates before it, any after it.
		for i, ch := range inside {
			all := domains[i]
			n := older(ch.cands, all, latest)
			if n < len(all) {
				domains[i] = all[n:]
				if !odometer(picks[1:], domains, emit) {
					return false
				}
				domains[i] = all[:n]
			}
		}
	}
	return true
}

// odometer sets picks to every combination of the domains in turn.
func odometer(picks []pick, domains [][]pick, emit func() bool) bool {
	pos := make([]int, len(domains))
	for i, d := range domains {
		picks[i] = d[0]
	}
	for {
		if !emit() {
			return false
		}
		i := 0
		for ; i < len(domains); i++ {
			if pos[i]++; pos[i] < len(domains[i]) {
				picks[i] = domains[i][pos[i]]
				break
			}
			pos[i] = 0
			picks[i] = domains[i][0]
		}
		if i == len(domains) {
			return true
		}
	}
}

// canonical puts picks into canonical form.
func (s *space) canonical(picks []pick) {
	for i := range s.files {
		fs := &s.files[i]
		mine := picks[fs.first : fs.first+1+len(fs.units)]
		sc := &fs.sizes[mine[0]]
		rest := mine[1+sc.whole:]
		if sc.cut != nil {
			rest[0] = sc.cut.to[rest[0]]
			rest = rest[1:]
		}
		clear(rest)
	}
}

// fingerprint identifies the contents of the state that canonical picks describe.
func (s *space) fingerprint(picks []pick) uint64 {
	var print uint64
	for i := range s.files {
		fs := &s.files[i]
		mine := picks[fs.first : fs.first+1+len(fs.units)]
		sc := &fs.sizes[mine[0]]
		sum := fs.sum + sc.skew
		for k, ch := range fs.units[:sc.whole] {
			sum += ch.cands[mine[1+k]].sum - ch.was
		}
		if sc.cut != nil {
			sum += sc.cut.sums[mine[1+sc.whole]] - sc.cut.was
		}
		print = mix(print ^ mix(sum^mix(uint64(sc.size)+uint64(i))))
	}
	return print
}
