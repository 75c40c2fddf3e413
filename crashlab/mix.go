package crashlab

import (
	"fmt"
	"math/rand/v2"

	"golang.org/x/sync/errgroup"

	"github.com/platter-disk/platter/storage"
)

// Mix is a random workload, as data. The weights say how often each request comes relative to the others.
type Mix struct {
	Requests  int   // by each worker
	Workers   int   // goroutines that issue requests at the same time; 0: 1
	Align     int64 // bytes, a multiple of 512: offsets and lengths are multiples of it; 0: 512
	MaxLength int64 // bytes: the longest request; 0: Align
	Ranges    []Range
	Seed      uint64

	Write, Zero, Unmap, Discard, Flush, Check int
}

// Run issues the requests through g, all inside Ranges, or inside the whole disk where there are none.
func (m Mix) Run(g *Guest) error {
	if m.Align == 0 {
		m.Align = storage.SectorSize
	}
	m.MaxLength = max(m.MaxLength, m.Align)
	if len(m.Ranges) == 0 {
		m.Ranges = []Range{{0, g.Subject().Size()}}
	}
	if m.Align < 0 || m.Align%storage.SectorSize != 0 {
		return fmt.Errorf("crashlab: mix: align is %d bytes: want a multiple of %d", m.Align, storage.SectorSize)
	}
	for _, r := range m.Ranges {
		if r.Length < m.Align {
			return fmt.Errorf("crashlab: mix: range of %d bytes at %d: want %d bytes or more", r.Length, r.Offset, m.Align)
		}
	}
	var eg errgroup.Group
	for i := range max(m.Workers, 1) {
		eg.Go(func() error {
			return guard(func() error { return m.work(g, rand.New(rand.NewPCG(m.Seed, uint64(i)))) })
		})
	}
	return eg.Wait()
}

// work is one worker.
func (m *Mix) work(g *Guest, rng *rand.Rand) error {
	verbs := []struct {
		weight int
		do     func(off, length int64) error
	}{
		{m.Write, g.Write},
		{m.Zero, func(off, length int64) error { return g.WriteZeroes(off, length, false) }},
		{m.Unmap, func(off, length int64) error { return g.WriteZeroes(off, length, true) }},
		{m.Discard, g.Discard},
		{m.Flush, func(int64, int64) error { return g.Flush() }},
		{m.Check, func(int64, int64) error { return g.Check() }},
	}
	total := 0
	for _, v := range verbs {
		if v.weight < 0 {
			return fmt.Errorf("crashlab: mix: a weight is %d: want 0 or more", v.weight)
		}
		total += v.weight
	}
	if total == 0 {
		return fmt.Errorf("crashlab: mix: every weight is 0")
	}
	for range m.Requests {
		r := m.Ranges[rng.IntN(len(m.Ranges))]
		slots := r.Length / m.Align
		length := 1 + rng.Int64N(min(m.MaxLength/m.Align, slots))
		off := rng.Int64N(slots - length + 1)
		pick := rng.IntN(total)
		for _, v := range verbs {
			if pick -= v.weight; pick < 0 {
				if err := v.do(r.Offset+off*m.Align, length*m.Align); err != nil {
					return err
				}
				break
			}
		}
	}
	return nil
}
