package crashcases

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"regexp"
	"strings"
	"sync"

	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/storage"
)

// snapshotHistory is what a workload did with snapshots, for those who judge what a crash left of them. The
// guest's requests bear the names that it is keyed by.
type snapshotHistory struct {
	ranges []crashlab.Range // that are compared, in order; nil: the whole disk

	mu    sync.Mutex
	holds map[string][]byte    // what each snapshot holds, by its name
	moves map[string][2][]byte // what the disk held before and after a snapshot was applied, by the request
}

func newSnapshotHistory(ranges []crashlab.Range) *snapshotHistory {
	return &snapshotHistory{ranges: ranges, holds: map[string][]byte{}, moves: map[string][2][]byte{}}
}

const (
	verbCreate = "create snapshot "
	verbDelete = "delete snapshot "
	verbApply  = "apply snapshot "
)

// create takes a snapshot.
func (h *snapshotHistory) create(g *crashlab.Guest, name string) error {
	im := g.Subject().(*qcow2Subject).Image
	contents, err := g.Contents()
	if err != nil {
		return err
	}
	h.mu.Lock()
	h.holds[name] = contents
	h.mu.Unlock()
	return g.FlushWith(verbCreate+name, func() error {
		_, err := im.CreateSnapshot(name, qcow2.SnapshotOptions{})
		return err
	})
}

func (h *snapshotHistory) delete(g *crashlab.Guest, name string) error {
	im := g.Subject().(*qcow2Subject).Image
	return g.FlushWith(verbDelete+name, func() error { return im.DeleteSnapshot(name) })
}

// apply applies a snapshot to a disk that has no request under way.
func (h *snapshotHistory) apply(g *crashlab.Guest, name string) error {
	if err := g.Flush(); err != nil {
		return err
	}
	im := g.Subject().(*qcow2Subject).Image
	before, err := g.Contents()
	if err != nil {
		return err
	}
	h.mu.Lock()
	after := h.holds[name]
	verb := fmt.Sprintf("%s%s, number %d", verbApply, name, len(h.moves)+1)
	h.moves[verb] = [2][]byte{before, after}
	h.mu.Unlock()
	if err := g.Revert(verb, after, func() error { return im.ApplySnapshot(name) }); err != nil {
		return err
	}
	return g.Flush()
}

// work takes, applies and deletes snapshots between bursts of requests. Each letter of script is a burst and
// what follows it: c, a snapshot is taken; a, one is applied; d, one is deleted; ?, any of these.
func (h *snapshotHistory) work(script string, m crashlab.Mix) func(seed uint64) func(*crashlab.Guest) error {
	return func(seed uint64) func(*crashlab.Guest) error {
		return func(g *crashlab.Guest) error {
			r := newRand(seed)
			var names []string
			for i, op := range script {
				burst := m
				burst.Ranges, burst.Seed = h.ranges, r.Uint64()
				if err := burst.Run(g); err != nil {
					return err
				}
				var err error
				if names, err = h.step(g, r, names, op, i); err != nil {
					return err
				}
			}
			return g.Check()
		}
	}
}

// step does what a letter of a script says, and returns the snapshots that there are then.
func (h *snapshotHistory) step(g *crashlab.Guest, r *rand.Rand, names []string, op rune, i int) ([]string, error) {
	if op == '?' {
		op = rune("ccad"[r.IntN(4)])
	}
	if len(names) == 0 || op == 'c' && len(names) < 3 {
		name := fmt.Sprint("s", i)
		return append(names, name), h.create(g, name)
	}
	k := r.IntN(len(names))
	if op == 'd' {
		name := names[k]
		return append(names[:k:k], names[k+1:]...), h.delete(g, name)
	}
	return names, h.apply(g, names[k])
}

// judge says what is wrong with the snapshots of a disk that was opened after a crash.
func (h *snapshotHistory) judge(s crashlab.Subject, at crashlab.Moment) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	im := s.(*qcow2Subject).Image
	list, err := im.Snapshots()
	if err != nil {
		return err
	}
	have := map[string]bool{}
	for _, one := range list {
		have[one.Name] = true
		if err := h.compare(im, one); err != nil {
			return err
		}
	}
	if at.Phase == crashlab.PhaseAgain {
		return nil // the history of the time before is not at hand
	}
	issued, answered := requests(at.Marks())
	for verb := range issued {
		name, create := strings.CutPrefix(verb, verbCreate)
		switch {
		case create && answered[verb] && !issued[verbDelete+name] && !have[name]:
			return fmt.Errorf("snapshot %s is gone", name)
		case create && answered[verbDelete+name] && have[name]:
			return fmt.Errorf("snapshot %s is there although it was deleted", name)
		}
		if move, apply := h.moves[verb]; apply && !answered[verb] {
			now, err := h.read(s, s.Size())
			if err != nil {
				return err
			}
			if !bytes.Equal(now, move[0]) && !bytes.Equal(now, move[1]) {
				return fmt.Errorf("%s: the disk is neither what it was before nor what it is to be, but a mixture", verb)
			}
		}
	}
	return nil
}

// requests tells which requests were issued and which answered, by their names.
func requests(marks []crashlab.Mark) (issued, answered map[string]bool) {
	issued, answered = map[string]bool{}, map[string]bool{}
	for _, m := range marks {
		text, _, _ := strings.Cut(m.Text, " (request ")
		if verb, ok := strings.CutPrefix(text, "guest issues "); ok {
			issued[verb] = true
		} else if verb, ok := strings.CutPrefix(text, "answered: "); ok {
			answered[verb] = true
		}
	}
	return issued, answered
}

// compare reads a snapshot and compares it with what the disk held when it was taken.
func (h *snapshotHistory) compare(im *qcow2.Image, s qcow2.Snapshot) (err error) {
	want, known := h.holds[s.Name]
	if !known {
		return fmt.Errorf("snapshot %q was never taken", s.Name)
	}
	dev, err := im.SnapshotDevice(s.ID)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	got, err := h.read(dev, dev.Size())
	if err != nil {
		return err
	}
	for i := 0; i < len(want); i += storage.SectorSize {
		if !bytes.Equal(got[i:i+storage.SectorSize], want[i:i+storage.SectorSize]) {
			return fmt.Errorf("snapshot %s: the sector at byte %d of the watched ranges is not what the disk held", s.Name, i)
		}
	}
	return nil
}

func (h *snapshotHistory) read(disk io.ReaderAt, size int64) ([]byte, error) {
	ranges := h.ranges
	if ranges == nil {
		ranges = []crashlab.Range{{Offset: 0, Length: size}}
	}
	var all []byte
	for _, r := range ranges {
		p := make([]byte, r.Length)
		if _, err := disk.ReadAt(p, r.Offset); err != nil {
			return nil, err
		}
		all = append(all, p...)
	}
	return all, nil
}

// checkInterrupted is checkQcow2 for disciplines that may leave an operation on snapshots unfinished: counts
// that are too high, and COPIED bits that do not agree with them. That is harmless as long as no entry with a
// COPIED bit has a second user; giving the leaks back has to cure it.
func checkInterrupted(f storage.File) error {
	if checkQcow2(f, 1<<30) == nil {
		return nil
	}
	copiedAway := regexp.MustCompile("^Repairing OFLAG_COPIED .*entry=[89a-f][0-9a-f]{15} ") // bit 63 was set
	repaired, err := copyOf(f)
	if err != nil {
		return err
	}
	var shared error
	_, err = qcow2.Check(repaired, qcow2.CheckOptions{Repair: qcow2.RepairLeaks, Report: func(found qcow2.Finding) {
		// What the first examination finds is not about references; what is repaired afterwards is.
		if shared == nil && copiedAway.MatchString(found.Message) {
			shared = fmt.Errorf("an entry may be written in place that has another user: %s", found.Message)
		}
	}})
	if err = errors.Join(err, shared); err != nil {
		return err
	}
	return checkQcow2(repaired, 0)
}
