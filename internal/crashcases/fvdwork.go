package crashcases

import (
	"errors"
	"runtime"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/crashlab"
)

// fixedWork is a workload that does not depend on a seed.
func fixedWork(steps func(g *crashlab.Guest, s *fvdSubject) error) func(uint64) func(*crashlab.Guest) error {
	return func(uint64) func(*crashlab.Guest) error {
		return func(g *crashlab.Guest) error { return steps(g, g.Subject().(*fvdSubject)) }
	}
}

// script runs steps until one fails.
func script(steps ...func() error) error {
	for _, s := range steps {
		if err := s(); err != nil {
			return err
		}
	}
	return nil
}

// writes returns write, to be used as a step.
func writes(g *crashlab.Guest) func(off, n int64) func() error {
	return func(off, n int64) func() error { return func() error { return g.Write(off, n) } }
}

// mixedSteps allocate, overwrite, zero, discard and use again, with flushes between.
func mixedSteps(g *crashlab.Guest, _ *fvdSubject) error {
	w := writes(g)
	return script(
		w(0, 512), w(70*kib, 1024), g.Flush,
		w(512, 1024), w(3*kib, 20*kib), g.Flush,
		func() error { return g.WriteZeroes(16*kib, 24*kib, true) },
		w(20*kib, 512), g.Flush,
		func() error { return g.Discard(64*kib, 32*kib) },
		g.Flush,
		w(200*kib, 512), w(64*kib, 2048), g.Flush,
		w(201*kib, 8*kib), func() error { return g.WriteZeroes(0, 4*kib, false) },
	)
}

// softSteps mix copies from the base image into the writes.
func softSteps(g *crashlab.Guest, s *fvdSubject) error {
	w := writes(g)
	soft := func(off, n int64) func() error { return func() error { return s.copyUp(off, n) } }
	return script(
		soft(0, 16*kib), w(1*kib, 512), g.Flush,
		soft(16*kib, 16*kib), w(40*kib, 512), soft(32*kib, 32*kib), g.Flush,
		s.im.Checkpoint, w(18*kib, 512), w(64*kib, 1024), g.Flush,
		soft(64*kib, 64*kib), w(100*kib, 512),
	)
}

// holeSteps copy a hole of the base image that is worth one in the image, and write into it before and after.
func holeSteps(g *crashlab.Guest, s *fvdSubject) error {
	w := writes(g)
	soft := func(off, n int64) func() error { return func() error { return s.copyUp(off, n) } }
	return script(
		w(20*kib, 4*kib), w(64*kib, 5*kib),
		soft(0, 100*kib), w(9*kib, 512), g.Flush,
		w(30*kib, 6*kib), s.im.Checkpoint,
		w(50*kib, 512), soft(100*kib, 64*kib), g.Flush,
		func() error { return g.WriteZeroes(8*kib, 80*kib, true) },
		w(60*kib, 1024), g.Flush, s.im.Checkpoint,
	)
}

// zeroCopySteps zero blocks of chunks without a place, and have copies give these chunks one.
func zeroCopySteps(g *crashlab.Guest, s *fvdSubject) error {
	zero := func(off, n int64) func() error {
		return func() error { return g.WriteZeroes(off, n, true) }
	}
	return script(
		zero(36*kib, 4*kib), zero(72*kib, 12*kib), g.Flush,
		func() error { return s.copyUp(32*kib, 16*kib) },
		func() error { return s.copyUp(64*kib, 32*kib) },
		s.im.Checkpoint,
		func() error { return g.Write(33*kib, 512) },
		g.Flush,
		func() error { return g.Discard(32*kib, 32*kib) },
		s.im.Checkpoint,
	)
}

// manySteps allocate enough to turn a small journal over several times.
func manySteps(g *crashlab.Guest, _ *fvdSubject) error {
	for i := range int64(24) {
		if err := g.Write(i*12*kib, 512); err != nil {
			return err
		}
		if i%4 == 3 {
			if err := g.Flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

const (
	resizedFirst = 1 << 20 // the table has room for that
	resizedTo    = 5 << 20 // and not for that
)

// resizeSteps let a disk grow in its table's place, and then outgrow that.
func resizeSteps(how block.Preallocation) func(g *crashlab.Guest, s *fvdSubject) error {
	return func(g *crashlab.Guest, s *fvdSubject) error {
		w := writes(g)
		resize := func(size int64) func() error {
			return func() error { return g.Resize(size, func() error { return s.im.Resize(size, how) }) }
		}
		return script(
			w(0, 512), w(30*kib, 8*kib), g.Flush,
			w(8*kib, 512),
			resize(resizedFirst),
			w(resizedFirst-512, 512), g.Flush, w(resizedFirst-8*kib, 8*kib),
			resize(resizedTo),
			w(resizedTo-512, 512), g.Flush,
			w(16*kib, 8*kib),
		)
	}
}

// stirredWork puts copies from the base image, and checkpoints, between bursts of requests.
func stirredWork(m crashlab.Mix) func(uint64) func(*crashlab.Guest) error {
	return func(seed uint64) func(*crashlab.Guest) error {
		return func(g *crashlab.Guest) error {
			s := g.Subject().(*fvdSubject)
			r := newRand(seed)
			for range 6 {
				burst := m
				burst.Seed = r.Uint64()
				if err := burst.Run(g); err != nil {
					return err
				}
				if err := s.copyUp(r.Int64N(fvdSize/512)*512, r.Int64N(48)*kib); err != nil {
					return err
				}
				if r.IntN(3) > 0 {
					continue
				}
				if err := s.im.Checkpoint(); err != nil {
					return err
				}
			}
			return nil
		}
	}
}

// writethroughWork takes every answer for a promise.
func writethroughWork(seed uint64) func(*crashlab.Guest) error {
	return func(g *crashlab.Guest) error {
		r := newRand(seed)
		for range 30 {
			off, n := r.Int64N(fvdSize/512-16)*512, (1+r.Int64N(16))*512
			var err error
			switch r.IntN(6) {
			case 0:
				err = g.WriteZeroes(off, n, true)
			case 1:
				err = g.Discard(off/(16*kib)*(16*kib), 16*kib)
			default:
				err = g.Write(off, n)
			}
			if err == nil {
				err = g.FlushWith("being written through", func() error { return nil })
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
}

// dirtyWork flushes without taking it for a promise: without a journal there is none until the image is closed.
func dirtyWork(seed uint64) func(*crashlab.Guest) error {
	return func(g *crashlab.Guest) error {
		s := g.Subject().(*fvdSubject)
		r := newRand(seed)
		for i := range 6 {
			m := crashlab.Mix{Requests: 8, MaxLength: 24 * kib, Write: 8, Unmap: 1, Discard: 1, Check: 1, Seed: r.Uint64()}
			next := s.im.Flush
			if i%3 == 2 {
				next = s.im.Checkpoint
			}
			err := script(
				func() error { return m.Run(g) },
				func() error { return s.copyUp(int64(i)*32*kib, 32*kib) },
				next,
			)
			if err != nil {
				return err
			}
		}
		return nil
	}
}

// errProvoked is the failure of failureSteps.
var errProvoked = errors.New("failure provoked by the workload")

// failureSteps write, each with a flush, until a checkpoint cannot write the table, and then go on: nothing that was
// answered may be lost, whatever is answered from then on.
func failureSteps(g *crashlab.Guest, s *fvdSubject) error {
	h := s.im.Header()
	inTable := func(e fileEvent) bool {
		return e.write && e.off >= int64(h.TableOffset) && e.off < int64(h.TableOffset+h.TableSize)
	}
	s.hook.set(inTable, func() error {
		s.run.broken.Store(true)
		return errProvoked
	})
	for i := range int64(fvdSize / (16 * kib)) {
		// In one request: what was answered before a flush failed would be nobody's promise.
		err := g.WriteWith("write with a flush", i*16*kib, 512, func(p []byte) error {
			if _, err := s.WriteAt(p, i*16*kib); err != nil {
				return err
			}
			return s.Flush()
		})
		if err == nil {
			err = g.FlushWith("the flush of that", func() error { return nil })
		}
		if err != nil && !errors.Is(err, errProvoked) {
			return err
		}
	}
	return nil
}

// inFlightSteps have a checkpoint copy the mapping of a write that is still under way, and let that write end and a
// flush pass before the copy is written.
func inFlightSteps(g *crashlab.Guest, s *fvdSubject) error {
	if err := script(func() error { return g.Write(0, 512) }, g.Flush); err != nil {
		return err
	}
	h := s.im.Header()
	inTable := func(e fileEvent) bool {
		return e.write && e.off >= int64(h.TableOffset) && e.off < int64(h.TableOffset+h.TableSize)
	}
	inData := func(e fileEvent) bool { return e.write && e.off >= int64(h.DataOffset) }
	copied, flushed, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	s.hook.set(inData, func() error {
		s.hook.set(inTable, func() error {
			close(copied)
			<-flushed
			return nil
		})
		go func() { done <- s.im.Checkpoint() }()
		<-copied
		return nil
	})
	err := script(func() error { return g.Write(100*kib, 512) }, g.Flush)
	close(flushed)
	return errors.Join(err, <-done)
}

// lateCopySteps set bits in the moment between a checkpoint's data barrier and its bitmap write.
func lateCopySteps(g *crashlab.Guest, s *fvdSubject) error {
	const at = 100 * kib
	if err := g.Write(0, 512); err != nil {
		return err
	}
	done := make(chan error, 1)
	s.hook.set(func(e fileEvent) bool { return !e.write }, func() error {
		go func() { done <- g.Write(at, 512) }()
		for start, n := s.im.NextInBase(at); n > 0 && start == at; start, n = s.im.NextInBase(at) {
			runtime.Gosched()
		}
		return nil
	})
	return errors.Join(s.im.Checkpoint(), <-done, g.Flush())
}

// reuseSteps take a chunk from one place of the disk and need one for another before a flush.
func reuseSteps(g *crashlab.Guest, _ *fvdSubject) error {
	return script(
		func() error { return g.Write(0, 16*kib) },
		g.Flush,
		func() error { return g.WriteZeroes(0, 16*kib, true) },
		func() error { return g.Write(128*kib, 512) },
		g.Flush,
	)
}

// settlingSteps write to a block that a checkpoint is just about to make recoverable, and flush.
func settlingSteps(g *crashlab.Guest, s *fvdSubject) error {
	const at = 100 * kib
	if err := s.copyUp(at, 64*kib); err != nil {
		return err
	}
	copied, flushed, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	bitmap := int64(s.im.Header().BitmapOffset)
	s.hook.set(func(e fileEvent) bool { return e.write && e.off == bitmap }, func() error {
		close(copied)
		<-flushed
		return nil
	})
	go func() { done <- s.im.Checkpoint() }()
	<-copied
	err := script(func() error { return g.Write(at+1024, 512) }, g.Flush)
	close(flushed)
	return errors.Join(err, <-done)
}
