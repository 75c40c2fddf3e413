package crashlab

import (
	"errors"
	"fmt"

	"github.com/platter-disk/platter/storage"
)

// recording is one use of a disk on a lab, from Open to Close.
type recording struct {
	x      *explorer
	lab    *Lab
	work   func(*Guest) error
	before *Guest    // of the time before a crash, nil at first
	faults *Injector // nil: nothing is made to fail

	guest *Guest // who did the work
}

// run does the work. The error says that it failed, though nothing was made to; a violation, that a disk in use
// or the files it left are not as promised.
func (rec *recording) run() (*Violation, error) {
	if rec.faults != nil { // Open may fail, and yet there has to be somebody who knows what was promised
		if err := guard(rec.witness); err != nil {
			return nil, err
		}
	}
	var v *Violation
	err := guard(func() error {
		s, err := rec.x.sc.Open(rec.files())
		if err != nil {
			return fmt.Errorf("open: %w", err)
		}
		defer func() { // to no effect after Close has succeeded
			rec.lab.PowerOff()
			s.Close()
		}()
		if err := rec.meet(s); err != nil {
			return err
		}
		err = rec.work(rec.guest)
		if v = rec.afterWork(s); v != nil || err != nil {
			return err
		}
		return rec.guest.FlushWith("close", s.Close)
	})
	var panicked *panicError
	switch {
	case errors.As(err, &panicked) && rec.faults != nil:
		return violation(StagePanic, panicked), nil
	case err != nil && (rec.faults == nil || rec.faults.Hits() == 0):
		return nil, err
	case v != nil || err != nil || rec.x.sc.Closed == nil:
		return v, nil
	}
	return violation(StageClosed, guard(func() error { return rec.x.sc.Closed(rec.lab.clone().Files()) })), nil
}

func (rec *recording) files() []storage.File {
	files := rec.lab.Files()
	if rec.faults != nil {
		for i, f := range files {
			files[i] = rec.faults.Wrap(f)
		}
	}
	return files
}

// witness makes a guest that has seen the disk before anything fails.
func (rec *recording) witness() error {
	lab := rec.lab.clone()
	s, err := rec.x.sc.Open(lab.Files())
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer s.Close()
	defer lab.PowerOff()
	return rec.meet(s)
}

// meet reads the disk and makes the guest that uses it, unless a witness has.
func (rec *recording) meet(s Subject) error {
	if rec.guest != nil {
		rec.guest.sub = s
		return nil
	}
	w, err := newWatch(rec.x.sc.Watch, s.Size())
	if err != nil {
		return err
	}
	initial := make([]byte, w.slots*storage.SectorSize)
	if err := w.read(s, s.Size(), initial); err != nil {
		return err
	}
	rec.guest = newGuest(rec.lab, s, w, rec.x.sc.DiscardUnit, initial, rec.before)
	return nil
}

// afterWork judges the disk in use, with no more faults: reads show what they should, and after a failed sync
// nothing is promised any more.
func (rec *recording) afterWork(s Subject) *Violation {
	failed := false
	if rec.faults != nil {
		failed = rec.faults.stop()
	}
	if err := rec.guest.Check(); err != nil {
		return violation(StageLive, err)
	}
	if failed && s.Flush() == nil {
		return violation(StageSticky, errors.New("a flush was answered without an error after a sync had failed"))
	}
	return nil
}
