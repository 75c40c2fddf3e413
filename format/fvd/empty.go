package fvd

import (
	"errors"
	"fmt"

	"github.com/platter-disk/platter/block"
)

// Empty gives up what the image holds of the part that its base image covers: it is read from the base again, and
// its space is given back. It is for an image whose contents were written to its base, durably: at every moment,
// also of a crash, the disk then reads the same bytes. Past base_img_size, which is fixed when an image is created,
// the image keeps what it holds.
//
// It is durable when Empty returns. Requests wait meanwhile. An image that does not need its base image any more
// has nothing to be emptied into; the error wraps errors.ErrUnsupported.
func (im *Image) Empty() error {
	if !im.m.guard.pause() {
		return im.errClosed()
	}
	defer im.m.guard.resume(false)
	if err := im.empty(); err != nil {
		return fmt.Errorf("fvd image %s: empty: %w", im.m.name, err)
	}
	return nil
}

// empty makes bits durable before entries: a block whose bit is set is read from here, and needs its chunk. The
// caller has the image to itself.
func (im *Image) empty() error {
	m := im.m
	switch {
	case im.readOnly:
		return block.ErrReadOnly
	case im.base == nil || !im.baseLive.Load():
		return fmt.Errorf("the image has no base image in use: %w", errors.ErrUnsupported)
	}
	if err := m.failed(); err != nil {
		return err
	}
	// From the first checkpoint on the tables on the disk are complete and nothing in the journal counts, so that
	// no record can set a bit again.
	if err := m.markInUse(); err != nil {
		return err
	}
	if err := im.discipline.checkpoint(headerChange{}); err != nil {
		return err
	}
	if !m.g.trailer {
		// BITMAP records without a generation are replayed whatever their age (D-16).
		if err := scrubJournal(m.file, m.header); err != nil {
			return m.fail("clearing the journal", err)
		}
	}
	if m.fresh.n > 0 {
		im.emptied.Store(true)
		m.clearBits()
		if err := im.discipline.checkpoint(headerChange{}); err != nil {
			return err
		}
	}
	if m.g.compact() {
		return im.emptyTable()
	}
	err := m.data.punch(m.g.dataStart, min(int64(m.g.baseSize), m.g.size))
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return m.dataSync.wait()
}

// emptyTable takes away the mappings of all chunks that lie below the end of the base image altogether.
func (im *Image) emptyTable() error {
	m := im.m
	var freed []chunkID
	for c := range m.g.chunks() {
		if min(m.g.chunkEnd(c), guestOffset(m.g.size)) > m.g.baseSize {
			break
		}
		if id, ok := m.unmapChunk(c); ok {
			freed = append(freed, id)
		}
	}
	if err := im.discipline.checkpoint(headerChange{}); err != nil {
		return err
	}
	for c := range m.g.chunks() {
		m.table.settle(c, entryEmpty)
	}
	m.alloc.retire(freed)
	m.alloc.release()
	return m.dataSync.wait()
}

// ForgetBaseLength has the image accept a base image of any length that covers base_img_size, durably. It comes
// before a change of the length of the base image; images refuse a base whose length is not what they recorded.
func (im *Image) ForgetBaseLength() error { return im.RecordBaseLength(0) }

// RecordBaseLength notes, durably, that the base image has length bytes from now on, so that a later change of it is
// noticed when the image is opened (D-34). It comes after such a change that was meant to be; 0 is ForgetBaseLength.
// A length that does not cover base_img_size is refused, as the image could not be opened any more.
func (im *Image) RecordBaseLength(length int64) error {
	pass, err := im.begin("change of the base image's length", 0, 0)
	if err != nil {
		return err
	}
	defer im.m.guard.leave(pass)
	h := im.m.headerCopy()
	h.BaseLength = uint64(length)
	if err := h.validateBaseLength(); err != nil {
		return fmt.Errorf("fvd image %s: %w", im.m.name, err)
	}
	if err := im.m.writeHeader(func(h *Header) { h.BaseLength = uint64(length) }); err != nil {
		return err
	}
	return im.m.metaSync.wait()
}
