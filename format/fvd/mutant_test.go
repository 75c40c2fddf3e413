package fvd

import (
	"context"
	"errors"
	"runtime"
	"testing"

	"github.com/platter-disk/platter/crashlab"
)

// mutantCase is a wrong order and the work that gives it away.
type mutantCase struct {
	name   string
	mutant Mutant
	c      crashCase
}

// inFlightWork has a checkpoint copy the mapping of a write that is still under way, and lets that write end and a
// flush pass before the copy is written.
func inFlightWork(g *crashlab.Guest, d crashDisk) error {
	if err := script(func() error { return g.Write(0, 512) }, g.Flush); err != nil {
		return err
	}
	table := int64(d.m.g.tableStart)
	copied, flushed, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	inTable := func(_ string, write bool, off int64) bool { return write && off >= table && off < table+pageSize }
	inData := func(_ string, write bool, off int64) bool { return write && off >= int64(d.m.g.dataStart) }
	d.hook.set(inData, func() {
		d.hook.set(inTable, func() {
			close(copied)
			<-flushed
		})
		go func() { done <- d.Checkpoint() }()
		<-copied
	})
	err := script(func() error { return g.Write(100<<10, 512) }, g.Flush)
	close(flushed)
	return errors.Join(err, <-done)
}

// lateCopyWork sets bits in the moment between a checkpoint's data barrier and its bitmap write.
func lateCopyWork(g *crashlab.Guest, d crashDisk) error {
	const at = 100 << 10
	if err := g.Write(0, 512); err != nil {
		return err
	}
	done := make(chan error, 1)
	d.hook.set(func(_ string, write bool, _ int64) bool { return !write }, func() {
		go func() { done <- g.Write(at, 512) }()
		for start, n := d.NextInBase(at); n > 0 && start == at; start, n = d.NextInBase(at) {
			runtime.Gosched()
		}
	})
	return errors.Join(d.Checkpoint(), <-done, g.Flush())
}

// reuseWork takes a chunk from one place of the disk and needs one for another before a flush.
func reuseWork(g *crashlab.Guest, _ crashDisk) error {
	return script(
		func() error { return g.Write(0, 16<<10) },
		g.Flush,
		func() error { return g.WriteZeroes(0, 16<<10, true) },
		func() error { return g.Write(128<<10, 512) },
		g.Flush,
	)
}

// staleWork writes to a block that a checkpoint is just about to make recoverable, and flushes.
func staleWork(g *crashlab.Guest, d crashDisk) error {
	const at = 100 << 10
	p := make([]byte, 64<<10)
	if err := d.ReadBase(p, at); err != nil {
		return err
	}
	if _, err := d.Populate(p, at); err != nil {
		return err
	}
	copied, flushed, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	bitmap := int64(d.m.g.bitmapAt)
	d.hook.set(func(_ string, write bool, off int64) bool { return write && off == bitmap }, func() {
		close(copied)
		<-flushed
	})
	go func() { done <- d.Checkpoint() }()
	<-copied
	err := script(func() error { return g.Write(at+1024, 512) }, g.Flush)
	close(flushed)
	return errors.Join(err, <-done)
}

func mutantCases() []mutantCase {
	compact := CreateOptions{Compact: true, BlockSize: 4 << 10, ChunkSize: 16 << 10, GrowUnit: 64 << 10, JournalSize: 8 << 10, JournalBuffer: -1}
	halves := compact // of two blocks each, so that a record outlives the commit that sealed its half
	halves.JournalSize = 16 << 10
	roomy := compact
	roomy.JournalSize = 64 << 10
	overlay := CreateOptions{BlockSize: 4 << 10, JournalSize: 64 << 10, JournalBuffer: -1}
	const base = 300 << 10
	return []mutantCase{
		{"D-01", MutantNoTableBarrier, crashCase{create: halves, work: manyWork}},
		{"D-03", MutantClearDirtyEarly, crashCase{create: roomy, once: true, work: inFlightWork}},
		{"D-04", MutantStaleEarly, crashCase{create: overlay, base: base, once: true, work: staleWork}},
		{"D-06", MutantNoDataBarrier, crashCase{create: overlay, base: base, work: mixedWork}},
		{"D-07", MutantMetadataFirst, crashCase{create: overlay, base: base, data: true, work: mixedWork}},
		{"D-09", MutantStraddle, crashCase{create: roomy, base: base, work: mixedWork}},
		{"D-10", MutantReuseUnzeroed, crashCase{create: roomy, data: true, fixed: true, work: mixedWork}},
		{"reuse early", MutantReuseEarly, crashCase{create: roomy, work: reuseWork}},
		{"late snapshot", MutantLateSnapshot, crashCase{create: overlay, base: base, once: true, work: lateCopyWork}},
	}
}

// TestMutantWork: the work that gives mutants away does no harm to the right order.
func TestMutantWork(t *testing.T) {
	for _, mc := range mutantCases() {
		t.Run(mc.name, func(t *testing.T) { explore(t, mc.c, crashStates(t)/3) })
	}
}

// TestMutants: crash exploration catches every wrong order. D-02, D-05 and D-08 need more than a crash: see
// TestD02, TestD05 and TestD08.
func TestMutants(t *testing.T) {
	for _, mc := range mutantCases() {
		t.Run(mc.name, func(t *testing.T) {
			mc.c.name = "mutant " + mc.name
			mc.c.open.Mutant = mc.mutant
			rep, err := crashlab.Explore(context.Background(), mc.c.scenario(), crashlab.Options{
				States: 6000, Seed: 1, Models: crashModels(), // crashes of the work itself are enough
				Recovery: crashlab.Sampling{Every: 1000, States: 1}, Again: crashlab.Sampling{Every: 1000, States: 1},
			})
			if err != nil {
				t.Logf("caught at once: %v", err)
				return
			}
			if len(rep.Violations) > 0 {
				t.Logf("caught after %d states: %s: %s", rep.Explored, rep.Violations[0].Stage, rep.Violations[0].Message)
				return
			}
			t.Errorf("not caught in %d states", rep.Explored)
		})
	}
}
