package crashlab

import (
	"fmt"
	"runtime"

	"github.com/platter-disk/platter/storage"
)

// Scenario is what Explore explores, as data: how to make, open and use a disk. All functions are called with
// handles of their own and may close them; Open and Judge are called from several goroutines.
type Scenario struct {
	Name string // of the report

	// Files describes the files, in the order in which the functions below get them.
	Files []FileSpec

	// Prepare makes the images. What it leaves is durable; it is not crashed. nil: empty files.
	Prepare func(files []storage.File) error

	// Open opens the disk for writing, recovery included.
	Open func(files []storage.File) (Subject, error)

	// Work uses the disk through the guest. It is recorded once, from Open to Close, and every instant of that
	// is crashed. It may use several goroutines and must not return before them.
	Work func(g *Guest) error

	// Again uses a disk that was recovered after a crash; Open to Close is recorded and crashed as well.
	// nil: recovered disks are not used again.
	Again func(g *Guest) error

	// Judge says what else is wrong with a disk that was opened after a crash; nil: nothing else is asked.
	Judge func(s Subject, at Moment) error

	// Closed says what is wrong with the files of a disk that was closed; nil: nothing is asked.
	Closed func(files []storage.File) error

	// Watch is the part of the guest disk that is used and judged; empty: all of it.
	Watch []Range

	// DiscardUnit is the size in bytes of the aligned units that read as zeros once they were discarded; 0
	// when a discard promises nothing.
	DiscardUnit int64
}

// Moment is the instant of a crash, for Scenario.Judge.
type Moment struct {
	Phase Phase
	h     *history
	event int
}

// Marks returns the requests of the guest, and the caller's notes, up to the crash. In the recovery phase they
// are those up to the crash that made the recovery necessary.
func (m Moment) Marks() []Mark {
	var marks []Mark
	for _, e := range m.h.events[:m.event+1] {
		if e.mark != nil {
			marks = append(marks, *e.mark)
		}
	}
	return marks
}

// Sampling says how many states get a treatment that costs much, and how much of it.
type Sampling struct {
	Every  int // one state in Every, by the seed; 0: none
	States int // crash states explored in each
}

// Options are the effort of an exploration. The zero value explores 20,000 states.
type Options struct {
	// States is how many crash states of the workload are explored at most, about; 0: 20,000. Crashes in
	// recoveries and of disks used again come on top.
	States int

	// Seed decides which states are explored where not all can be.
	Seed uint64

	// Models are explored one after the other with an even share of States; none: torn at 512 bytes, and at
	// 4 KiB. What one leaves of its share goes to the next.
	Models []Model

	// Recovery is how many recoveries are crashed at their own writes; zero value: one in 4, 8 states each.
	Recovery Sampling

	// Depth is how often in a row a recovery is crashed, 1 or more; 0: once.
	Depth int

	// Again is how many recovered disks are used again and crashed again; zero value: one in 16, 8 states each.
	Again Sampling

	// Faults are operations that fail while the work is recorded, from Open to its end. Whatever fails then may
	// fail; but nothing that was answered before may be lost, reads go on, and after a failed sync no flush
	// is answered any more. Report.FaultHits says whether the work came to them.
	Faults []Fault

	// Violations is the number of violations after which the exploration ends; 0: 1.
	Violations int

	// Workers is the number of goroutines that judge; 0: GOMAXPROCS. It has no influence on the report.
	Workers int

	// Progress is told now and then how many states have been explored; nil: nobody is told.
	Progress func(explored int)
}

func (o Options) withDefaults() (Options, error) {
	def := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	def(&o.States, 20000)
	def(&o.Violations, 1)
	def(&o.Workers, runtime.GOMAXPROCS(0))
	def(&o.Depth, 1)
	if o.Recovery == (Sampling{}) {
		o.Recovery = Sampling{Every: 4, States: 8}
	}
	if o.Again == (Sampling{}) {
		o.Again = Sampling{Every: 16, States: 8}
	}
	if len(o.Models) == 0 {
		o.Models = []Model{{Tear: 512}, {Tear: 4096}}
	}
	for _, m := range o.Models {
		if err := m.validate(); err != nil {
			return o, err
		}
	}
	for _, v := range []struct {
		name string
		n    int
	}{
		{"States", o.States}, {"Violations", o.Violations}, {"Workers", o.Workers}, {"Depth", o.Depth},
		{"Recovery.Every", o.Recovery.Every}, {"Recovery.States", o.Recovery.States},
		{"Again.Every", o.Again.Every}, {"Again.States", o.Again.States},
	} {
		if v.n < 0 {
			return o, fmt.Errorf("crashlab: options: %s is %d: want 0 or more", v.name, v.n)
		}
	}
	return o, nil
}

func (sc *Scenario) validate() error {
	switch {
	case len(sc.Files) == 0:
		return fmt.Errorf("crashlab: scenario %q: Files is empty", sc.Name)
	case sc.Open == nil:
		return fmt.Errorf("crashlab: scenario %q: Open is missing", sc.Name)
	case sc.Work == nil:
		return fmt.Errorf("crashlab: scenario %q: Work is missing", sc.Name)
	}
	return nil
}
