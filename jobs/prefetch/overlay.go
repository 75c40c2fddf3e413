package prefetch

import (
	"bytes"
	"sync"
	"sync/atomic"

	"github.com/platter-disk/platter/block"
)

// Overlay is a disk some of whose bytes live in a base image. fvd.Image is one; Guarded makes one of any device.
// All methods are safe for concurrent use, with each other and with the guest's requests.
type Overlay interface {
	block.Device

	// BaseSize is how many bytes of the disk the base image covers; 0 once it is not needed any more.
	BaseSize() int64

	// CopyUnit is the size in bytes of the blocks that Populate stores whole; 1 or more.
	CopyUnit() int64

	// NextInBase finds the first run of bytes at or after off that still lives in the base image: n bytes from
	// start, n == 0 if there is none. A run that does not begin at off begins on a block boundary; it ends on
	// one or with the base image.
	NextInBase(off int64) (start, n int64)

	// ReadBase reads what the base image holds at [off, off+len(p)), which lies below BaseSize. A range that a
	// guest has written meanwhile may read as what it wrote.
	ReadBase(p []byte, off int64) error

	// Populate keeps p, which ReadBase read at off. Blocks that no longer live in the base image, that a write is
	// changing, or that p holds only in part, are passed over. It returns how many bytes it kept.
	Populate(p []byte, off int64) (kept int64, err error)

	// Checkpoint makes what was kept so far durable.
	Checkpoint() error

	// DetachBase makes the disk independent of its base image for good. It fails while anything lives there.
	DetachBase() error
}

// Guarded is the Overlay of a device whose format knows nothing of copies: it keeps a copy by writing it, and sees
// to it that no copy lands on what a guest is writing. All requests must go through it.
type Guarded struct {
	block.Device
	unit   int64
	base   int64
	detach func() error
	done   atomic.Bool // nothing lives in the base image any more: requests pass unguarded

	mu     sync.Mutex
	busy   []*busyRange
	change sync.Cond // a range became free
}

// busyRange is a range that a guest's change or a copy is at work on.
type busyRange struct {
	off, end int64
	copy     bool
}

// GuardedOptions describes the device to Guard.
type GuardedOptions struct {
	// Unit is the size in bytes of what is copied at a time: the cluster size; 0: Limits().Preferred.
	Unit int64
	// BaseSize is how many bytes of the disk the backing image covers.
	BaseSize int64
	// Detach takes the reference to the backing image out of the image; nil: it stays, unused.
	Detach func() error
}

// Guard returns an Overlay over d. Closing it closes d.
func Guard(d block.Device, o GuardedOptions) *Guarded {
	g := &Guarded{Device: d, unit: o.Unit, base: min(o.BaseSize, d.Size()), detach: o.Detach}
	if g.unit <= 0 {
		g.unit = max(1, d.Limits().Preferred)
	}
	g.change.L = &g.mu
	return g
}

// enter waits until no copy is at work in the range and marks it as being changed.
func (g *Guarded) enter(off, n int64) *busyRange {
	if g.done.Load() {
		return nil
	}
	r := &busyRange{off: off, end: off + n}
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.overlaps(r, true) {
		g.change.Wait()
	}
	g.busy = append(g.busy, r)
	return r
}

// tryCopy marks the range as being copied, unless anyone is at work in it.
func (g *Guarded) tryCopy(off, n int64) *busyRange {
	r := &busyRange{off: off, end: off + n, copy: true}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.overlaps(r, false) {
		return nil
	}
	g.busy = append(g.busy, r)
	return r
}

func (g *Guarded) overlaps(r *busyRange, copiesOnly bool) bool {
	for _, o := range g.busy {
		if o.off < r.end && r.off < o.end && (o.copy || !copiesOnly) {
			return true
		}
	}
	return false
}

func (g *Guarded) leave(r *busyRange) {
	if r == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for i, o := range g.busy {
		if o == r {
			g.busy = append(g.busy[:i], g.busy[i+1:]...)
			break
		}
	}
	g.change.Broadcast()
}

// WriteAt implements block.Device.
func (g *Guarded) WriteAt(p []byte, off int64) (int, error) {
	defer g.leave(g.enter(off, int64(len(p))))
	return g.Device.WriteAt(p, off)
}

// WriteCompressed implements block.Device.
func (g *Guarded) WriteCompressed(p []byte, off int64) error {
	defer g.leave(g.enter(off, int64(len(p))))
	return g.Device.WriteCompressed(p, off)
}

// WriteZeroes implements block.Device.
func (g *Guarded) WriteZeroes(off, n int64, flags block.ZeroFlags) error {
	defer g.leave(g.enter(off, n))
	return g.Device.WriteZeroes(off, n, flags)
}

// Discard implements block.Device.
func (g *Guarded) Discard(off, n int64) error {
	defer g.leave(g.enter(off, n))
	return g.Device.Discard(off, n)
}

// BaseSize implements Overlay.
func (g *Guarded) BaseSize() int64 {
	if g.done.Load() {
		return 0
	}
	return g.base
}

// CopyUnit implements Overlay.
func (g *Guarded) CopyUnit() int64 { return g.unit }

// NextInBase implements Overlay. A device that cannot tell what lives where has nothing in its base.
func (g *Guarded) NextInBase(off int64) (start, n int64) {
	if g.done.Load() || off < 0 || off >= g.base {
		return off, 0
	}
	start = -1
	err := g.Extents(off, g.base-off, func(e block.Extent) bool {
		inBase := e.Depth > 0 && e.Allocated
		switch {
		case inBase && start < 0:
			start, n = e.Offset, e.Length
		case inBase:
			n += e.Length
		default:
			return start < 0
		}
		return true
	})
	if err != nil || start < 0 {
		return off, 0
	}
	// Rounded out to whole units: what else they hold is looked at again before anything is stored.
	from, end := max(off, start/g.unit*g.unit), min((start+n+g.unit-1)/g.unit*g.unit, g.base)
	return from, end - from
}

// ReadBase implements Overlay: as long as a range lives in the backing image, that is what the device reads as.
func (g *Guarded) ReadBase(p []byte, off int64) error {
	if err := block.CheckRange("read of the base image", off, int64(len(p)), g.base); err != nil {
		return err
	}
	_, err := g.ReadAt(p, off)
	return err
}

// Populate implements Overlay.
func (g *Guarded) Populate(p []byte, off int64) (kept int64, err error) {
	end := min(off+int64(len(p)), g.base)
	for at := (off + g.unit - 1) / g.unit * g.unit; at < end; at += g.unit {
		n := min(g.unit, g.base-at)
		if at+n > end || g.done.Load() {
			break
		}
		stored, err := g.populateUnit(p[at-off:at-off+n], at)
		if err != nil {
			return kept, err
		}
		if stored {
			kept += n
		}
	}
	return kept, nil
}

// populateUnit stores one unit if all of it still lives in the backing image or nowhere.
func (g *Guarded) populateUnit(p []byte, at int64) (bool, error) {
	r := g.tryCopy(at, int64(len(p)))
	if r == nil {
		return false, nil
	}
	defer g.leave(r)
	inBase, ours := false, false
	err := g.Extents(at, int64(len(p)), func(e block.Extent) bool {
		inBase = inBase || e.Depth > 0 && e.Allocated
		ours = ours || e.Depth == 0 && e.Allocated
		return true
	})
	if err != nil || !inBase {
		return false, err
	}
	if ours { // subclusters: some of it is the disk's own by now
		if err := g.ReadBase(p, at); err != nil {
			return false, err
		}
	}
	if bytes.Count(p, []byte{0}) == len(p) {
		return true, g.Device.WriteZeroes(at, int64(len(p)), block.MayUnmap)
	}
	_, err = g.Device.WriteAt(p, at)
	return err == nil, err
}

// Checkpoint implements Overlay.
func (g *Guarded) Checkpoint() error { return g.Flush() }

// DetachBase implements Overlay.
func (g *Guarded) DetachBase() error {
	if g.done.Load() {
		return nil
	}
	if start, n := g.NextInBase(0); n > 0 {
		return stillNeeded(start, n)
	}
	if err := g.Flush(); err != nil {
		return err
	}
	if g.detach != nil {
		if err := g.detach(); err != nil {
			return err
		}
	}
	g.done.Store(true)
	return nil
}
