package qcow2

import (
	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
)

// extentWindow bounds the bytes of the disk whose mapping Extents looks at, and the spans it collects, in one
// hold.
const (
	extentWindow = 64 << 20
	extentBatch  = 512
)

// Extents reports how a range of the disk is stored, down through the backing chain.
func (im *Image) Extents(off, length int64, fn func(block.Extent) bool) error {
	if err := im.checkRequest("extents", off, length); err != nil {
		return err
	}
	return im.extents(off, length, fn)
}

func (im *Image) extents(off, length int64, fn func(block.Extent) bool) error {
	g := &im.geo
	var runs []block.Extent
	for length > 0 {
		n := min(length, extentWindow)
		hold, err := im.hold(off, off+n, false)
		if err != nil {
			return err
		}
		runs, n, err = im.collectExtents(runs[:0], guestOff(off), n)
		im.locks.unlock(hold)
		if err != nil {
			return err
		}
		// fn runs without any lock, so that it may use the device.
		for _, e := range runs {
			report := im.backingExtents
			switch {
			case e.Data && e.HostOffset >= 0 && !g.dataFile:
				report = im.dataExtents
			case e.Allocated || e.Zero:
				report = reportExtent
			}
			if more, err := report(e, fn); !more || err != nil {
				return err
			}
		}
		off, length = off+n, length-n
	}
	return nil
}

// collectExtents appends the runs of a range that the caller holds, up to a bound, and returns how far they
// reach. A run that is neither allocated nor zero is for the backing device to tell.
func (im *Image) collectExtents(runs []block.Extent, off guestOff, n int64) ([]block.Extent, int64, error) {
	g := &im.geo
	done := int64(0)
	for done < n && len(runs) < extentBatch {
		at := off + guestOff(done)
		s, err := im.span(at, n-done, false)
		if err != nil {
			return nil, 0, err
		}
		e := block.Extent{Offset: int64(at), Length: s.n, HostOffset: -1}
		if s.hosted {
			e.HostOffset = int64(s.host)
		}
		part := (*partial)(nil)
		if !s.inPlace() {
			part, e.Length = im.partials.find(at, s.n, g.clusterSize)
			if part != nil {
				var held bool
				if e.Length, held = part.held(g, at, e.Length, &s); !held {
					part = nil
				}
			}
		}
		switch {
		case part != nil:
			e.Allocated, e.Data, e.HostOffset = true, true, -1
		case s.kind == kindNormal:
			e.Allocated, e.Data = true, true
		case s.kind == kindCompressed:
			e.Allocated, e.Data, e.Compressed = true, true, true
		case s.kind == kindZero:
			e.Allocated, e.Zero = true, true
		default:
			if b := im.backed(at, e.Length); b == 0 {
				e.Zero = true
			} else {
				e.Length = b
			}
		}
		runs = append(runs, e)
		done += e.Length
	}
	return runs, done, nil
}

func reportExtent(e block.Extent, fn func(block.Extent) bool) (more bool, err error) {
	return fn(e), nil
}

// dataExtents reports a run that has its place in the file. Whole clusters that are holes there read as zeros:
// images whose metadata was preallocated consist of little else.
func (im *Image) dataExtents(e block.Extent, fn func(block.Extent) bool) (more bool, err error) {
	g := &im.geo
	done, end := int64(0), e.HostOffset+e.Length
	report := func(n int64, zero bool) bool {
		p := e
		p.Offset, p.Length, p.HostOffset, p.Zero = e.Offset+done, n, e.HostOffset+done, zero
		done += n
		return n == 0 || fn(p)
	}
	// hole reports a hole of the file, and first the data before it.
	hole := func(from, to int64) bool {
		from = (from + g.clusterSize - 1) &^ (g.clusterSize - 1)
		if to < end {
			to &^= g.clusterSize - 1
		}
		if from >= to {
			return true
		}
		return report(from-e.HostOffset-done, false) && report(to-from, true)
	}
	more = true
	covered := e.HostOffset
	err = im.data.DataExtents(e.HostOffset, e.Length, func(h storage.Extent) bool {
		covered = h.Offset + h.Length
		if !h.Data {
			more = hole(max(h.Offset, e.HostOffset), covered)
		}
		return more
	})
	if err == nil && more && covered < end {
		more = hole(covered, end) // past the end of the file
	}
	if err == nil && more {
		more = report(e.Length-done, false)
	}
	return more, err
}

// backingExtents reports a run that the backing device decides. The device may be detached meanwhile: the image is
// asked again about what it has not told by then, because some of that may have been copied into the image before.
func (im *Image) backingExtents(e block.Extent, fn func(block.Extent) bool) (more bool, err error) {
	more = true
	at, end := e.Offset, e.Offset+e.Length
	backing := im.backing.get()
	if backing != nil {
		err = backing.Extents(at, e.Length, func(b block.Extent) bool {
			at = b.Offset + b.Length
			b.Depth++
			more = fn(b)
			return more
		})
	}
	if more && at < end && im.backing.get() == nil {
		err = im.extents(at, end-at, func(e block.Extent) bool {
			more = fn(e)
			return more
		})
	}
	return more, err
}
