package prefetch

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/bufpool"
)

// learnWindow is how many bytes of the disk are asked for at a time.
const learnWindow = 256 << 20

// Guarded is the Overlay of a device whose format knows nothing of copies: it keeps a copy by writing it, and sees
// to it that no copy lands on what a guest is writing. All requests must go through it.
//
// It remembers which units have left the backing image: half a byte of memory a unit, 32 MiB at most. The
// backing image is asked once for each part of the disk, when a first copy in that part is to be stored, or by
// Learn; until then all of the part counts as living there. Holes of the backing image are answered with zeros
// from then on, and never copied: they read as zeros when the backing image is gone, too.
type Guarded struct {
	block.Device
	unit   int64
	whole  bool
	base   atomic.Int64 // bytes of the disk that the backing image covers: fewer once the disk was smaller
	detach func() error
	done   atomic.Bool // nothing lives in the base image any more: requests pass unguarded
	units  *unitMap    // changed under mu

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
	// Unit is the size in bytes of what is copied at a time: the cluster size; 0: Limits().Preferred. For a large
	// disk with small clusters it is doubled until there are no more than 2^26 units.
	Unit int64
	// Whole says that a write of any part of a unit takes all of it out of the backing image. It is false for
	// devices with subclusters.
	Whole bool
	// BaseSize is how many bytes of the disk the backing image covers.
	BaseSize int64
	// Detach takes the reference to the backing image out of the image; nil: it stays, unused.
	Detach func() error
}

// Guard returns an Overlay over d. Closing it closes d.
func Guard(d block.Device, o GuardedOptions) *Guarded {
	g := &Guarded{Device: d, unit: o.Unit, whole: o.Whole, detach: o.Detach}
	base := min(o.BaseSize, d.Size())
	g.base.Store(base)
	if g.unit <= 0 {
		g.unit = max(1, d.Limits().Preferred)
	}
	for base/g.unit >= maxUnits {
		g.unit, g.whole = 2*g.unit, false
	}
	g.units = newUnitMap((base + g.unit - 1) / g.unit)
	g.change.L = &g.mu
	return g
}

// unitRange is the units that [off, end) touches, below the end of the base image.
func (g *Guarded) unitRange(off, end, base int64) (first, last int64) {
	end = min(end, base)
	if off < 0 || off >= end {
		return 0, 0
	}
	return off / g.unit, (end-1)/g.unit + 1
}

// enter waits until no copy is at work in the range and marks it as being changed; nil if none ever will be.
func (g *Guarded) enter(off, n int64) *busyRange {
	if first, last := g.unitRange(off, off+n, g.base.Load()); g.done.Load() || g.units.settled(first, last) {
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
func (g *Guarded) tryCopy(off, end int64) *busyRange {
	r := &busyRange{off: off, end: end, copy: true}
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

// leave ends what enter or tryCopy began. What a guest changed has to be asked for again, unless it was written and
// is the disk's own for sure.
func (g *Guarded) leave(r *busyRange, written bool) {
	if r == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.free(r)
	if !r.copy {
		base := g.base.Load()
		first, last := g.unitRange(r.off, r.end, base)
		for u := first; u < last; u++ {
			g.units.changed(u)
			if written && (g.whole || r.off <= u*g.unit && min((u+1)*g.unit, base) <= r.end) {
				g.units.left(u)
			}
		}
	}
}

// free ends the work on a range. The caller holds mu.
func (g *Guarded) free(r *busyRange) {
	g.busy = slices.DeleteFunc(g.busy, func(o *busyRange) bool { return o == r })
	g.change.Broadcast()
}

// ReadAt implements block.Device. Holes of the base image are not asked for.
func (g *Guarded) ReadAt(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		at := off + int64(done)
		zeros, n := g.sameKind(at, off+int64(len(p)))
		if zeros {
			clear(p[done : done+int(n)])
		} else if m, err := g.Device.ReadAt(p[done:done+int(n)], at); err != nil {
			return done + m, err
		}
		done += int(n)
	}
	return done, nil
}

// TryReadAt implements block.Device.
func (g *Guarded) TryReadAt(p []byte, off int64) error {
	zeros, n := g.sameKind(off, off+int64(len(p)))
	switch {
	case n < int64(len(p)):
		return block.ErrWouldBlock
	case zeros:
		clear(p)
		return nil
	}
	return g.Device.TryReadAt(p, off)
}

// sameKind is how many bytes from off on, up to end, are known to read as zeros, or are not.
func (g *Guarded) sameKind(off, end int64) (zeros bool, n int64) {
	base := g.base.Load()
	first, last := g.unitRange(off, end, base)
	if g.done.Load() || first >= last {
		return false, end - off
	}
	zeros = g.units.zero.get(first)
	u := g.units.zero.next(first, last, !zeros)
	if stop := min(u*g.unit, base); u < last || zeros && stop < end {
		return zeros, stop - off
	}
	return zeros, end - off
}

// WriteAt implements block.Device.
func (g *Guarded) WriteAt(p []byte, off int64) (int, error) {
	r := g.enter(off, int64(len(p)))
	n, err := g.Device.WriteAt(p, off)
	g.leave(r, err == nil)
	return n, err
}

// WriteCompressed implements block.Device.
func (g *Guarded) WriteCompressed(p []byte, off int64) error {
	r := g.enter(off, int64(len(p)))
	err := g.Device.WriteCompressed(p, off)
	g.leave(r, err == nil)
	return err
}

// WriteZeroes implements block.Device. What reads as zeros already may stay in the base image.
func (g *Guarded) WriteZeroes(off, n int64, flags block.ZeroFlags) error {
	defer g.leave(g.enter(off, n), false)
	return g.Device.WriteZeroes(off, n, flags)
}

// Discard implements block.Device.
func (g *Guarded) Discard(off, n int64) error {
	defer g.leave(g.enter(off, n), false)
	return g.Device.Discard(off, n)
}

// Resize implements block.Device. What a smaller disk cuts off has left the base image for good, whatever copies of it
// are under way: it reads as zeros when the disk grows again. Copies wait meanwhile.
func (g *Guarded) Resize(size int64, prealloc block.Preallocation) error {
	r := &busyRange{end: math.MaxInt64}
	g.mu.Lock()
	for g.overlaps(r, true) {
		g.change.Wait()
	}
	g.busy = append(g.busy, r)
	g.mu.Unlock()
	err := g.Device.Resize(size, prealloc)
	now := g.Size() // a disk may have become smaller although something failed after that
	g.mu.Lock()
	defer g.mu.Unlock()
	if now < g.base.Load() {
		if now%g.unit > 0 {
			g.units.changed(now / g.unit)
		}
		for u := (now + g.unit - 1) / g.unit; u < g.units.n; u++ {
			g.units.zero.clear(u)
			g.units.left(u)
		}
		g.base.Store(now)
	}
	g.free(r)
	return err
}

// BaseSize implements Overlay.
func (g *Guarded) BaseSize() int64 {
	if g.done.Load() {
		return 0
	}
	return g.base.Load()
}

// CopyUnit implements Overlay.
func (g *Guarded) CopyUnit() int64 { return g.unit }

// NextInBase implements Overlay. It asks nobody: whatever is not known to have left counts as living in the base.
func (g *Guarded) NextInBase(off int64) (start, n int64) {
	base := g.base.Load()
	first, last := g.unitRange(off, base, base)
	if g.done.Load() || first >= last {
		return off, 0
	}
	u := g.units.gone.next(first, last, false)
	if u == last {
		return off, 0
	}
	end := g.units.gone.next(u, last, true)
	start = max(off, u*g.unit)
	return start, min(end*g.unit, base) - start
}

// Learn finds out where everything lives, as far as nobody did yet. It may take a while, and needs the base image.
func (g *Guarded) Learn(ctx context.Context) error {
	for u := int64(0); u < g.units.n && !g.done.Load(); u += g.windowUnits() {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := g.learn(u); err != nil {
			return err
		}
	}
	return nil
}

// windowUnits is how many units are asked for at a time.
func (g *Guarded) windowUnits() int64 { return max(1, learnWindow/g.unit) }

// learn finds out where the units of the window live that has unit u, unless all is known.
func (g *Guarded) learn(u int64) error {
	window := g.windowUnits()
	first := u / window * window
	last := min(first+window, g.units.n)
	for first < last && g.units.isKnown(first) {
		first++
	}
	if first == last {
		return nil
	}
	found, err := g.look(first, last)
	g.mu.Lock()
	defer g.mu.Unlock()
	for i, v := range found {
		u := first + int64(i)
		// Who reads what a write that goes on has changed must not be answered with zeros later.
		if v == placeZero && g.overlaps(&busyRange{off: u * g.unit, end: (u + 1) * g.unit}, false) {
			continue
		}
		g.units.learned(u, v)
	}
	return err
}

// look asks the device where the units [first, end) live. After an error it returns those it could tell.
func (g *Guarded) look(first, end int64) ([]place, error) {
	found := make([]place, 0, end-first)
	var seen [placeOwn + 1]bool
	at, stop := first*g.unit, min(end*g.unit, g.base.Load())
	if at >= stop { // past the end of a disk that has become smaller
		return nil, nil
	}
	err := g.Extents(at, stop-at, func(e block.Extent) bool {
		v := placeZero
		switch {
		case e.Depth == 0 && e.Allocated:
			v = placeOwn
		case e.Allocated && !e.Zero:
			v = placeBase
		}
		for e.Length > 0 {
			seen[v] = true
			n := min(e.Length, g.unit-at%g.unit, stop-at)
			at, e.Length = at+n, e.Length-n
			if at%g.unit == 0 || at == stop {
				found = append(found, placeOf(seen))
				clear(seen[:])
			}
			if at == stop {
				return false
			}
		}
		return true
	})
	return found, err
}

// placeOf says where a unit lives whose parts live where seen says. Own bytes beside zeros leave nothing to copy.
func placeOf(seen [placeOwn + 1]bool) place {
	switch {
	case seen[placeBase] && seen[placeOwn]:
		return placeMixed
	case seen[placeBase]:
		return placeBase
	case seen[placeOwn]:
		return placeOwn
	default:
		return placeZero
	}
}

// ReadBase implements Overlay: as long as a range lives in the backing image, that is what the device reads as.
func (g *Guarded) ReadBase(p []byte, off int64) error {
	if err := block.CheckRange("read of the base image", off, int64(len(p)), g.base.Load()); err != nil {
		return err
	}
	_, err := g.ReadAt(p, off)
	return err
}

// Populate implements Overlay.
func (g *Guarded) Populate(p []byte, off int64) (kept int64, err error) {
	base := g.base.Load()
	if off < 0 || off >= base {
		return 0, nil
	}
	end := min(off+int64(len(p)), base)
	first, last := (off+g.unit-1)/g.unit, end/g.unit
	if end == base {
		last = (end + g.unit - 1) / g.unit
	}
	for u := first; u < last && !g.done.Load(); {
		if !g.units.isKnown(u) && g.learn(u) != nil {
			return kept, nil // another time
		}
		if g.units.gone.get(u) {
			u++
			continue
		}
		run := g.units.gone.next(u, last, true)
		n, err := g.populateRun(p, off, u, run)
		kept += n
		if err != nil {
			return kept, err
		}
		u = run
	}
	return kept, nil
}

// populateRun stores units [first, last) of p, which was read at off; if somebody is at work in one of them, each
// of the others by itself.
func (g *Guarded) populateRun(p []byte, off, first, last int64) (kept int64, err error) {
	r := g.tryCopy(first*g.unit, last*g.unit)
	if r == nil {
		for u := first; u < last && last-first > 1; u++ {
			n, err := g.populateRun(p, off, u, u+1)
			kept += n
			if err != nil {
				return kept, err
			}
		}
		return kept, nil
	}
	defer g.leave(r, false)
	for u := first; u < last; {
		switch g.find(u) {
		case placeOwn, placeZero:
			u++
			continue
		case placeMixed:
			n, err := g.complete(u)
			kept += n
			if err != nil {
				return kept, err
			}
			u++
			continue
		}
		zeros := g.allZero(p, off, u)
		run := u + 1
		for run < last && g.units.in.get(run) && g.allZero(p, off, run) == zeros {
			run++
		}
		n, err := g.store(p[u*g.unit-off:], u, run, zeros)
		kept += n
		if err != nil {
			return kept, err
		}
		u = run
	}
	return kept, nil
}

func (g *Guarded) allZero(p []byte, off, u int64) bool {
	b := p[u*g.unit-off : min((u+1)*g.unit, g.base.Load())-off]
	return bytes.Count(b, []byte{0}) == len(b)
}

// find tells where a unit lives on which the caller has a hold. Where the base image cannot tell, the unit is left
// for another time.
func (g *Guarded) find(u int64) place {
	switch {
	case g.units.gone.get(u):
		return placeOwn
	case g.units.in.get(u):
		return placeBase
	}
	found, err := g.look(u, u+1)
	if err != nil || len(found) == 0 {
		return placeOwn
	}
	if found[0] == placeOwn || found[0] == placeZero {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.units.left(u) // nobody can have changed it meanwhile
	}
	return found[0]
}

// complete stores the rest of a unit on which the caller has a hold, and of which some is the disk's own. If it
// cannot be read, it is left for another time.
func (g *Guarded) complete(u int64) (kept int64, err error) {
	buf := bufpool.Get(int(min((u+1)*g.unit, g.base.Load()) - u*g.unit))
	defer buf.Put()
	if g.ReadBase(buf.B, u*g.unit) != nil {
		return 0, nil
	}
	return g.store(buf.B, u, u+1, false)
}

// store writes units [first, last), on which the caller has a hold; p begins with them.
func (g *Guarded) store(p []byte, first, last int64, zeros bool) (kept int64, err error) {
	at, end := first*g.unit, min(last*g.unit, g.base.Load())
	if zeros {
		err = g.Device.WriteZeroes(at, end-at, block.MayUnmap)
	} else {
		_, err = g.Device.WriteAt(p[:end-at], at)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for u := first; u < last; u++ {
		if err != nil {
			g.units.changed(u) // some of it may be there
		} else {
			g.units.left(u)
		}
	}
	if err != nil {
		return 0, err
	}
	return end - at, nil
}

// Checkpoint implements Overlay.
func (g *Guarded) Checkpoint() error { return g.Flush() }

// DetachBase implements Overlay. The device itself is asked once more about every byte.
func (g *Guarded) DetachBase() error {
	if g.done.Load() {
		return nil
	}
	if start, n := g.NextInBase(0); n > 0 {
		return stillNeeded(start, n)
	}
	var needed error
	err := g.Extents(0, g.base.Load(), func(e block.Extent) bool {
		if e.Depth > 0 && e.Allocated && !e.Zero {
			needed = stillNeeded(e.Offset, e.Length)
		}
		return needed == nil
	})
	if err == nil {
		err = needed
	}
	if err == nil {
		err = g.Flush()
	}
	if err == nil && g.detach != nil {
		err = g.detach()
	}
	if err != nil {
		return fmt.Errorf("detaching the base image: %w", err)
	}
	g.done.Store(true)
	return nil
}
