package bench

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sort"
)

// ErrNoSpace is wrapped when a disk holds too little of what a workload works on: data to read, or space
// that nothing was written to yet.
var ErrNoSpace = errors.New("the disk does not suit the workload")

// Span is a range of the disk, in bytes, with one kind of contents.
type Span struct {
	Offset, Length int64
	Kind           Space
}

// Survey reports the contents of a disk as consecutive runs until fn returns false.
type Survey func(fn func(Span) bool) error

// plan says where each operation goes.
type plan struct {
	block int64

	// Random and sequential work on existing data: blocks counted through all runs.
	runs   []Span
	before []int64 // blocks in the runs before each
	blocks int64
	seed   uint64
	linear bool

	places []int64 // work on fresh space: every operation has a place of its own
}

// maxRuns bounds the memory of a plan; a disk with more pieces of data is used in part.
const maxRuns = 1 << 20

// spread is over how many times the space it fills a random allocating workload is scattered.
const spread = 8

// newPlan lays out operations of a workload. unit is the disk's unit of allocation in bytes.
func newPlan(w Workload, survey Survey, unit int64, operations int, seed uint64) (*plan, error) {
	p := &plan{block: int64(w.Block), seed: seed, linear: w.Sequential}
	if w.Writes && w.on != OwnData {
		return p, p.takeFresh(w, survey, max(unit, p.block), operations)
	}
	err := survey(func(s Span) bool {
		first := (s.Offset + p.block - 1) / p.block * p.block
		if n := (s.Offset + s.Length - first) / p.block; s.Kind == w.on && n > 0 {
			p.runs = append(p.runs, Span{first, n * p.block, s.Kind})
			p.before = append(p.before, p.blocks)
			p.blocks += n
		}
		return len(p.runs) < maxRuns
	})
	if err != nil {
		return nil, err
	}
	if p.blocks == 0 {
		return nil, fmt.Errorf("%w %s: no %d bytes of data in one piece", ErrNoSpace, w.Name, p.block)
	}
	return p, nil
}

// takeFresh finds a place for each operation that shares its unit of allocation with no other.
func (p *plan) takeFresh(w Workload, survey Survey, unit int64, operations int) error {
	want := operations
	if !w.Sequential {
		want *= spread
	}
	err := survey(func(s Span) bool {
		if s.Kind != w.on {
			return true
		}
		for at := (s.Offset + unit - 1) / unit * unit; at+unit <= s.Offset+s.Length && len(p.places) < want; at += unit {
			p.places = append(p.places, at)
		}
		return len(p.places) < want
	})
	if err != nil {
		return err
	}
	if len(p.places) < operations {
		what := "never written"
		if w.on == BelowData {
			what = "with data in a backing file and none in the image itself"
		}
		return fmt.Errorf("%w %s: %d operations need as many pieces of %d bytes %s, the disk has %d",
			ErrNoSpace, w.Name, operations, unit, what, len(p.places))
	}
	if !w.Sequential {
		rng := rand.New(rand.NewPCG(p.seed, 0))
		rng.Shuffle(len(p.places), func(i, j int) { p.places[i], p.places[j] = p.places[j], p.places[i] })
		for i := range p.places { // somewhere in the unit, not always at its start
			p.places[i] += rng.Int64N(unit/p.block) * p.block
		}
	}
	p.places = p.places[:operations]
	return nil
}

// offset is where operation i goes. It allocates nothing.
func (p *plan) offset(i int64) int64 {
	if p.places != nil {
		return p.places[i]
	}
	n := i % p.blocks
	if !p.linear {
		n = int64(mix(p.seed+uint64(i)) % uint64(p.blocks))
	}
	r := sort.Search(len(p.before), func(k int) bool { return p.before[k] > n }) - 1
	return p.runs[r].Offset + (n-p.before[r])*p.block
}

// mix is the finalizer of SplitMix64: it turns consecutive numbers into independent ones.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
