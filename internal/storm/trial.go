package storm

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/storage"
)

// Trial is the story of an image that lives several times: a storm goes over it, then it is closed, or its process is
// killed, or the power fails; what the files may hold afterwards is opened again and compared with what was promised.
type Trial struct {
	Seed      uint64
	Files     []string // their names
	Most      int64    // bytes that the disk may grow to
	First     *Claim   // what it holds at first
	Weather   Weather
	Tolerated []error // that requests may fail with, besides what the weather brings

	Create func(files []storage.File) error
	Open   func(files []storage.File) (*Life, error)
	// Check looks at files that nobody has open. crashed: a crash may have left behind what one may leave behind.
	Check func(files []storage.File, crashed bool) error
	// Between changes files that nobody has open; nil: nobody does.
	Between func(files []storage.File, r *rand.Rand) error
	// Fragile says that nothing is promised of an image that was not closed.
	Fragile bool
}

// Life is an image from Open to Close.
type Life struct {
	Device       block.Device
	Cluster      int64        // bytes, as of a Storm
	Discarded    int64        // bytes, as of a Storm
	Writethrough bool         // every change is durable when it returns
	Base         *Base        // nil: none
	Failed       func() error // as of a Storm
	// Steward does something besides what guests do; nil: nobody does.
	Steward func(*Storm, *rand.Rand) error
	// Rest is called when nothing is under way any more and nothing failed for good; nil: nothing is to be seen then.
	Rest func(*Storm) error
	// Judge compares more than the disk, after a crash at a time of the Model, in an image that was opened again; nil:
	// there is no more.
	Judge func(again *Life, at uint64) error
}

const (
	lives   = 3 // of a trial
	crashes = 3 // that are looked at, of a life
)

// Run returns what is not as promised, and how many operations on the files failed.
func (t *Trial) Run() (struck int, _ error) {
	specs := make([]crashlab.FileSpec, len(t.Files))
	for i, name := range t.Files {
		specs[i].Name = name
	}
	lab, err := crashlab.NewLab(specs...)
	if err != nil {
		return 0, err
	}
	_, files, err := t.files(lab)
	if err == nil {
		err = t.Create(files)
	}
	if err != nil {
		return 0, err
	}
	first, crashed := t.First, false
	for n := range uint64(lives) {
		l := life{t: t, lab: lab, first: first, crashed: crashed, r: rand.New(rand.NewPCG(t.Seed, 1000+n))}
		err := l.live(n)
		for _, d := range l.disks {
			struck += d.Struck()
		}
		if err != nil {
			return struck, fmt.Errorf("life %d, %s: %w", n, &l, err)
		}
		if l.next == nil {
			break
		}
		lab, first, crashed = l.next, &Claim{Bytes: l.holds}, l.crashed
	}
	return struck, nil
}

// files are the files of a lab, on disks of their own.
func (t *Trial) files(lab *crashlab.Lab) (disks []*Disk, files []storage.File, err error) {
	lab.Yield = true
	for i, f := range lab.Files() {
		d, err := OnFile(f, t.Seed+uint64(i))
		if err != nil {
			return nil, nil, err
		}
		disks, files = append(disks, d), append(files, d)
	}
	return disks, files, nil
}

// life is one life of a trial.
type life struct {
	t       *Trial
	r       *rand.Rand
	lab     *crashlab.Lab
	first   *Claim
	crashed bool // there may be leaks
	disks   []*Disk
	files   []storage.File
	storm   *Storm
	w       Weather
	how     string

	next  *crashlab.Lab // the files to go on with; nil: none
	holds []byte        // the disk on them
}

func (l *life) String() string { return fmt.Sprintf("%s, weather %+v, %v", l.how, l.w, l.storm) }

// live is a life.
func (l *life) live(n uint64) error {
	var err error
	if l.disks, l.files, err = l.t.files(l.lab); err != nil {
		return err
	}
	if l.t.Between != nil && n > 0 {
		if err := l.t.Between(l.files, l.r); err != nil {
			return fmt.Errorf("between two lives: %w", err)
		}
	}
	l.lab.Settle()
	image, err := l.t.Open(l.files)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer func() { // to no effect after Close has succeeded
		if l.next != l.lab {
			l.lab.PowerOff()
		}
		image.Device.Close()
	}()
	m := NewModel(l.t.Most, l.first, func() uint64 { return uint64(l.lab.Note("", false)) })
	m.Writethrough = image.Writethrough
	m.Grown(image.Device.Size())
	l.w = l.t.Weather
	l.storm = &Storm{
		Device: image.Device, Cluster: image.Cluster, Discarded: image.Discarded, Model: m, Unaligned: true, Failed: image.Failed,
		MayFail: l.w.Reads > 0 || l.w.Writes > 0 || l.w.Syncs > 0, Tolerated: append([]error{syscall.ENOSPC, syscall.EIO, errors.ErrUnsupported}, l.t.Tolerated...),
	}
	if err := m.Read(image.Device, 0, image.Device.Size()); err != nil {
		return fmt.Errorf("before the storm: %w", err)
	}
	if err := l.rage(image); err != nil {
		return err
	}
	if err := l.calm(image); err != nil {
		return fmt.Errorf("after the storm: %w", err)
	}
	return l.end(image)
}

func (l *life) rage(image *Life) error {
	for _, d := range l.disks {
		d.SetWeather(l.w)
	}
	if image.Base != nil {
		image.Base.FailReads(l.w.Base)
	}
	steward := func(*rand.Rand) error { return nil }
	if image.Steward != nil {
		steward = func(r *rand.Rand) error { return image.Steward(l.storm, r) }
	}
	err := l.storm.Rage(l.r.Uint64(), steward)
	for _, d := range l.disks {
		d.SetWeather(Weather{})
	}
	if image.Base != nil {
		image.Base.FailReads(0)
	}
	return err
}

// calm wants an image that did not stop to work, and one that did to refuse all changes.
func (l *life) calm(image *Life) error {
	s, d := l.storm, image.Device
	if s.Failed() != nil {
		if d.Flush() == nil {
			return errors.New("a flush was answered without an error, though the image had stopped")
		}
		return s.Model.Read(d, 0, d.Size())
	}
	s.MayFail, s.Tolerated = false, []error{errors.ErrUnsupported}
	if err := s.Flush(); err != nil {
		return err
	}
	for range 60 {
		if err := s.Step(l.r); err != nil {
			return err
		}
	}
	if err := s.Model.Read(d, 0, d.Size()); err != nil {
		return err
	}
	if image.Rest == nil || l.r.IntN(2) == 0 {
		return nil
	}
	if err := s.Flush(); err != nil {
		return err
	}
	return image.Rest(s)
}

// end closes the image, or does not, and looks at what is there then.
func (l *life) end(image *Life) error {
	s := l.storm
	l.how = "killed"
	if stopped := s.Failed(); stopped != nil {
		l.how = "stopped"
	} else if l.t.Fragile || l.r.IntN(2) == 0 {
		l.how = "closed"
		began := s.Model.Now()
		if err := image.Device.Close(); err != nil {
			return fmt.Errorf("close: %w", err)
		}
		s.Model.Flushed(began)
	}
	if !l.t.Fragile {
		if err := l.powerCuts(image); err != nil {
			return err
		}
	}
	if l.how == "closed" {
		if err := l.t.Check(l.files, l.crashed); err != nil {
			return err
		}
		again, err := l.t.Open(l.files)
		if err != nil {
			return fmt.Errorf("open again: %w", err)
		}
		got, err := ReadAll(again.Device)
		if err == nil {
			err = s.Model.Crashed(got, s.Model.Now())
		}
		if err == nil && image.Judge != nil {
			err = image.Judge(again, s.Model.Now())
		}
		if err == nil {
			err = again.Device.Close()
		}
		if err != nil {
			return fmt.Errorf("again: %w", err)
		}
		if l.next == nil || l.r.IntN(2) == 0 {
			l.next, l.holds = l.lab, got
			return nil
		}
	}
	l.crashed = true
	return nil
}

// powerCuts looks at crashes of the life so far, and goes on with one of them.
func (l *life) powerCuts(image *Life) error {
	states, err := l.lab.RandomCrashes(crashlab.Model{Tear: storage.SectorSize, Poison: l.r.IntN(2) == 0}, crashes, l.r.Uint64())
	if err != nil {
		return err
	}
	n, chosen := 0, l.r.IntN(crashes)
	for state := range states {
		lab, at := state.Lab(), uint64(state.Event())+2
		got, err := l.recovered(image, lab, at)
		if err != nil {
			return fmt.Errorf("a crash at %d: %w", at, err)
		}
		if n == chosen {
			l.next, l.holds = lab, got
		}
		n++
	}
	return nil
}

// recovered wants a disk that crashed to hold what it may hold, now and when it is opened once more.
func (l *life) recovered(image *Life, lab *crashlab.Lab, at uint64) ([]byte, error) {
	_, files, err := l.t.files(lab)
	if err != nil {
		return nil, err
	}
	again, err := l.t.Open(files)
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	defer again.Device.Close()
	got, err := ReadAll(again.Device)
	if err == nil {
		err = l.storm.Model.Crashed(got, at)
	}
	if err == nil && image.Judge != nil {
		err = image.Judge(again, at)
	}
	if err == nil {
		err = again.Device.Close()
	}
	if err == nil {
		err = l.t.Check(files, true)
	}
	if err != nil {
		return nil, err
	}
	once, err := l.t.Open(files)
	if err != nil {
		return nil, fmt.Errorf("open once more: %w", err)
	}
	defer once.Device.Close()
	more, err := ReadAll(once.Device)
	if err == nil && !bytes.Equal(got, more) {
		err = errors.New("the disk holds something else when it is opened once more")
	}
	return got, err
}
