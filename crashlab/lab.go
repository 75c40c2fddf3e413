package crashlab

import (
	"errors"
	"fmt"
	"sync"

	"github.com/platter-disk/platter/storage"
)

var (
	// ErrPowerOff is returned by every operation on a file after Lab.PowerOff.
	ErrPowerOff = errors.New("crashlab: the power is off")

	// ErrRunaway is returned by every change after maxOps of them: recovery does not come to an end.
	ErrRunaway = errors.New("crashlab: too many operations recorded, the engine does not come to an end")
)

const (
	// maxOps bounds the operations one lab records.
	maxOps = 1 << 22
	// maxFixedSize bounds a block device in a lab, whose never written space is not the same as zeros.
	maxFixedSize = 1 << 30
	// maxFileSize bounds a growing file; sector numbers and sizes cannot overflow below it.
	maxFileSize = 1 << 60
)

// FileSpec describes a file of a Lab before anything was written to it.
type FileSpec struct {
	Name string
	Size int64 // bytes, 0 to 1 EiB; 0 to 1 GiB where Fixed
	// Fixed makes it a block device: its size never changes, and space that was never written reads as
	// poison (see Poison) instead of zeros.
	Fixed bool
}

// Lab is a set of files in memory with one common recorded history. Safe for concurrent use.
type Lab struct {
	// Yield gives other goroutines a turn inside each operation, so that an engine with several of them has
	// operations in flight together more often. Set it before the files are used.
	Yield bool

	sites *siteTable

	mu     sync.RWMutex
	files  []*content
	ops    []*op
	events []event
	off    bool // power
}

// content is a file of a lab: what a read returns now, and what the recorded history started from.
type content struct {
	spec        FileSpec
	index       int
	blank       *sector // what a sector without an entry reads as
	now         sectorTree
	size        int64
	initial     sectorTree // a snapshot: never changed
	initialSize int64
}

// NewLab returns a lab with the given files and an empty history.
func NewLab(specs ...FileSpec) (*Lab, error) {
	l := &Lab{sites: newSiteTable()}
	for i, s := range specs {
		limit := int64(maxFileSize)
		if s.Fixed {
			limit = maxFixedSize
		}
		if s.Size < 0 || s.Size > limit {
			return nil, fmt.Errorf("crashlab: size of %q is %d bytes: want 0 to %d", s.Name, s.Size, limit)
		}
		l.files = append(l.files, newContent(s, i, sectorTree{}, s.Size))
	}
	return l, nil
}

func newContent(spec FileSpec, index int, tree sectorTree, size int64) *content {
	c := &content{spec: spec, index: index, now: tree, size: size, initialSize: size, blank: &zeroSector}
	if spec.Fixed {
		c.blank = &poisonSector
	}
	c.initial = c.now.snapshot()
	return c
}

// Files returns a new handle for each file, in the order of their specs. Handles of one file share its
// contents; closing one leaves the others open, as with a file opened twice.
func (l *Lab) Files() []storage.File {
	handles := make([]storage.File, len(l.files))
	for i, c := range l.files {
		handles[i] = &file{lab: l, c: c}
	}
	return handles
}

// Settle forgets the history: what the files hold now is durable. Nothing may be in flight.
func (l *Lab) Settle() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.files {
		c.initial, c.initialSize = c.now.snapshot(), c.size
	}
	l.ops, l.events = nil, nil
}

// PowerOff makes every operation from now on fail with ErrPowerOff. An engine on these files can then be
// closed, to release what it holds, without changing anything.
func (l *Lab) PowerOff() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.off = true
}

// Note adds a mark of the caller's to the history and returns the number of its event: a State whose Event is
// not smaller is of a crash after it.
func (l *Lab) Note(text string, promise bool) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mark(text, promise)
}

// mark appends a mark and returns its event number. l.mu is held.
func (l *Lab) mark(text string, promise bool) int {
	at := len(l.events)
	l.events = append(l.events, event{mark: &Mark{Event: at, Text: text, Promise: promise}})
	return at
}

// begin records that an operation starts and takes effect. l.mu is held; the caller fills in the changes
// before it unlocks.
func (l *Lab) begin(c *content, kind Kind, off, length int64, site *Site) *op {
	o := &op{
		index: len(l.ops), file: c.index, kind: kind, off: off, len: length, site: site,
		begin: len(l.events), end: never, oldSize: c.size, newSize: c.size,
	}
	l.ops = append(l.ops, o)
	l.events = append(l.events, event{op: o})
	return o
}

// finish records that an operation has returned. l.mu is held.
func (l *Lab) finish(o *op) {
	o.end = len(l.events)
	l.events = append(l.events, event{op: o, ends: true})
}

// clone returns a lab whose files start from what l's files hold now, with an empty history.
func (l *Lab) clone() *Lab {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := &Lab{sites: l.sites}
	for i, c := range l.files {
		n.files = append(n.files, newContent(c.spec, i, c.now.snapshot(), c.size))
	}
	return n
}

// changed says whether any operation that may change a file was recorded.
func (l *Lab) changed() bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	for _, o := range l.ops {
		if o.kind != KindSync {
			return true
		}
	}
	return false
}
