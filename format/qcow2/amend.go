package qcow2

import (
	"errors"
	"fmt"

	"github.com/platter-disk/platter/storage"
)

// Amendment is a change of what the header of an image says about it. What is not set stays as it is.
type Amendment struct {
	Version       uint32 // 3 for an image of version 2; an image of version 3 cannot become one of version 2
	LazyRefcounts *bool  // needs version 3
	DataFileRaw   *bool  // can be taken back, and not promised of a data file that exists
	RefcountBits  int    // the width that the image has, or 0
}

// Amend changes the header of an image that nobody has open, durably: a crash leaves the header as it was or as it is
// to be. An image that was not closed is recovered first, as Open does. The error wraps errors.ErrUnsupported where
// more than the header would have to change, and ErrHeaderFull where cluster 0 has no room for the longer header of
// version 3.
func Amend(f storage.File, a Amendment) error {
	f, h, err := readForUse(f, &Options{})
	if err != nil {
		return err
	}
	next := *h
	if err := a.apply(f, &next); err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	upgrade := next.Version != h.Version
	if !upgrade && next.Compatible == h.Compatible && next.Autoclear == h.Autoclear {
		return nil
	}
	next.Autoclear &= AutoclearBitmaps | AutoclearRawData // who sets another may want to know of the change
	im := makeImage(f, h, Options{})
	im.mu.Lock()
	defer im.mu.Unlock()
	if upgrade {
		return im.editHeader(func(h *Header) { *h = next })
	}
	*h = next
	return im.switchHeader(fieldFeatures)
}

// apply makes the changes in a header.
func (a Amendment) apply(f storage.File, h *Header) error {
	switch {
	case a.Version != 0 && a.Version != 2 && a.Version != 3:
		return fmt.Errorf("version %d: want 2 or 3", a.Version)
	case a.Version == 2 && h.Version > 2:
		return fmt.Errorf("compatibility level 0.10: the image has 1.1, and cannot go back: %w", errors.ErrUnsupported)
	case a.RefcountBits != 0 && a.RefcountBits != 1<<h.RefcountOrder:
		return fmt.Errorf("refcount_bits %d: the image has %d, and every count would have to be written anew: %w",
			a.RefcountBits, 1<<h.RefcountOrder, errors.ErrUnsupported)
	}
	if a.Version == 3 && h.Version < 3 {
		if err := checkUpgrade(f, h); err != nil {
			return err
		}
		h.Version = 3
	}
	problem := "" // in QEMU's words
	switch lazy, raw := a.LazyRefcounts, a.DataFileRaw; {
	case lazy != nil && *lazy && h.Version < 3:
		problem = "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"
	case raw != nil && *raw && h.Autoclear&AutoclearRawData == 0:
		problem = "data-file-raw cannot be set on existing images"
	}
	if problem != "" {
		return errors.New(problem)
	}
	if a.LazyRefcounts != nil {
		h.Compatible &^= CompatLazyRefcounts
		if *a.LazyRefcounts {
			h.Compatible |= CompatLazyRefcounts
		}
	}
	if a.DataFileRaw != nil && !*a.DataFileRaw {
		h.Autoclear &^= AutoclearRawData
	}
	return nil
}

// checkUpgrade refuses an image of version 2 whose snapshots lack what version 3 demands of their entries.
func checkUpgrade(f storage.File, h *Header) error {
	list, _, err := readSnapshots(f, h)
	if err != nil {
		return err
	}
	for _, s := range list {
		if s.ExtraSize < snapshotExtraV3 {
			return fmt.Errorf("compatibility level 1.1: the table entry of snapshot %q has %d bytes of extra data, want %d or more; delete the snapshot first: %w",
				s.ID, s.ExtraSize, snapshotExtraV3, errors.ErrUnsupported)
		}
	}
	return nil
}
