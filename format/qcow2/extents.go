package qcow2

import "github.com/platter-disk/platter/block"

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
			if e.Allocated || e.Zero {
				if !fn(e) {
					return nil
				}
				continue
			}
			if more, err := im.backingExtents(e, fn); !more || err != nil {
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
		part := (*partial)(nil)
		if !s.inPlace() {
			part, e.Length = im.partials.find(at, s.n, g.clusterSize)
		}
		switch {
		case part != nil:
			e.Allocated, e.Data = true, true
		case s.kind == kindNormal:
			e.Allocated, e.Data, e.HostOffset = true, true, int64(s.host)
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

// backingExtents reports a run that the backing device decides.
func (im *Image) backingExtents(e block.Extent, fn func(block.Extent) bool) (more bool, err error) {
	more = true
	err = im.backing.Extents(e.Offset, e.Length, func(b block.Extent) bool {
		b.Depth++
		more = fn(b)
		return more
	})
	return more, err
}
