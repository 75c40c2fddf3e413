package fvd

import (
	"fmt"

	"github.com/platter-disk/platter/block"
)

// Resize implements block.Device. Disks only grow: bits and mappings of a part that is cut off could come back
// from the journal. Where the table has no room for the new chunks it is moved (D-25). Requests
// wait until the new part is laid out as prealloc says.
func (im *Image) Resize(size int64, prealloc block.Preallocation) error {
	if !im.m.guard.pause() {
		return block.ErrClosed
	}
	defer im.m.guard.resume(false)
	old := im.Size()
	if err := im.grow(size); err != nil {
		return err
	}
	return im.preallocate(old, size, prealloc)
}

// grow makes the disk larger. The caller has the image to itself.
func (im *Image) grow(size int64) error {
	m := im.m
	refuse := func(format string, args ...any) error {
		return fmt.Errorf("fvd image %s: resize to %d bytes: %w", m.name, size, fmt.Errorf(format, args...))
	}
	if im.readOnly {
		return refuse("%w", block.ErrReadOnly)
	}
	if err := m.failed(); err != nil {
		return err
	}
	switch {
	case size == m.g.size:
		return nil
	case size < m.g.size:
		return im.unsupported("shrinking")
	case size%sectorSize != 0 || size > maxVirtualSize:
		return refuse("want a multiple of %d up to %d", sectorSize, int64(maxVirtualSize))
	}
	if err := m.markInUse(); err != nil {
		return err
	}
	// From here on the tables on the disk are complete, nothing in the journal matters, and nothing runs in the
	// background.
	if err := im.discipline.checkpoint(headerChange{}); err != nil {
		return err
	}
	var err error
	if m.g.compact() {
		err = im.growTable(size)
	} else {
		err = im.growFlat(size)
	}
	if err != nil {
		return refuse("%w", err)
	}
	// The size is the only word of its header sector that changes: a crash leaves the old disk or the new one.
	h := m.headerCopy()
	h.VirtualSize = uint64(size)
	if err := m.rewriteHeaderSector(&h, 0); err != nil {
		return err
	}
	m.g.size = size // alone: who copies from the base image reads the rest without asking
	im.size.Store(size)
	return nil
}

// growFlat gives an image without table the storage for its new size; the new part reads as zeros, whatever lay
// there. Regions behind the data area stay in the way.
func (im *Image) growFlat(size int64) error {
	m := im.m
	h := m.headerCopy()
	h.VirtualSize = uint64(size)
	end, err := m.file.Size()
	if err != nil {
		return err
	}
	if err := h.validateRegions(end); err != nil {
		return err
	}
	from, to := m.g.dataStart+dataOffset(m.g.size), m.g.dataStart+dataOffset(size)
	have, err := m.data.size()
	if err != nil {
		return fmt.Errorf("size of the data storage: %w", err)
	}
	if stale := min(have, int64(to)) - int64(from); stale > 0 {
		if err := zeroStore(m.data, from, stale, true, false); err != nil {
			return fmt.Errorf("zeroing the data storage: %w", err)
		}
	}
	if have < int64(to) {
		if err := m.data.resize(int64(to)); err != nil {
			return fmt.Errorf("growing the data storage: %w", err)
		}
	}
	return m.dataSync.wait()
}

// growTable gives the table its new length, in place or, if its region is too short, elsewhere.
func (im *Image) growTable(size int64) error {
	m := im.m
	h := m.headerCopy()
	h.VirtualSize = uint64(size)
	entries := chunkIndex(ceilDiv(size, m.g.chunkSize))
	if entries > maxChunks {
		return fmt.Errorf("in chunks of %d bytes that takes more than %d chunks", m.g.chunkSize, maxChunks)
	}
	if least := minJournalSize(int64(entries), m.g.trailer); m.g.journalLen > 0 && m.g.journalLen < least {
		return fmt.Errorf("that needs a journal of %d bytes, there are %d", least, m.g.journalLen)
	}
	grownTo := m.g
	grownTo.size = size
	if err := grownTo.fits(m.maxMemory); err != nil {
		return err
	}
	at, err := im.tableRoom(entries)
	if err != nil {
		return err
	}
	grown := newTable(entries)
	copy(grown, m.table)
	old := len(m.table)
	m.table = grown
	m.tablePages = newPageSet(int(ceilDiv(int64(entries), pageEntries)))
	if entries <= m.g.tableCap {
		// The entries past the old end are EMPTY since the table was laid out; written again, they surely are.
		m.tablePages.mark(old/pageEntries, int((entries-1)/pageEntries))
		return im.discipline.checkpoint(headerChange{})
	}
	return im.moveTable(&h, at, movedTableSize(entries))
}

// movedTableSize is the size in bytes of a table that is moved: it has room to double.
func movedTableSize(entries chunkIndex) int64 { return roundUp(8*int64(entries), pageSize) }

// tableRoom finds the place at the end of the image file for a table that has to move, and makes sure of it while
// nothing has changed yet; 0 if the table can stay where it is.
func (im *Image) tableRoom(entries chunkIndex) (at int64, err error) {
	m := im.m
	if entries <= m.g.tableCap {
		return 0, nil
	}
	end, err := m.file.Size()
	if err != nil {
		return 0, err
	}
	if !m.separate() {
		end = max(end, int64(m.g.chunkData(m.alloc.limit)))
	}
	at = roundUp(end, pageSize)
	defer m.metaSync.changed()
	if err := m.file.Truncate(at + movedTableSize(entries)); err != nil {
		return 0, fmt.Errorf("room for a table of %d entries, the one in place has room for %d: %w", entries, m.g.tableCap, err)
	}
	return at, nil
}

// moveTable writes the table to [at, at+room) of the image file and points the header to it.
func (im *Image) moveTable(h *Header, at, room int64) error {
	m := im.m
	if !m.separate() {
		h.Features |= FeatureTableInData
	}
	full := pages{data: make([]byte, 0, ioUnit)}
	for page := range int(room / pageSize) {
		full.numbers = append(full.numbers, page)
		full.data = full.data[:len(full.data)+pageSize]
		m.table.encodePage(page, full.page(len(full.numbers)-1))
		if len(full.data) == cap(full.data) || page == int(room/pageSize)-1 {
			if err := m.writePages("moving the table", full, metaOffset(at)); err != nil {
				return err
			}
			full = pages{data: full.data[:0]}
		}
	}
	if err := m.metaSync.wait(); err != nil {
		return err
	}
	// Table offset and size share a header sector: a crash leaves the old table or the new one. The feature bit
	// lies in another; it is durable first, as alone it does no harm.
	h.VirtualSize = m.header.VirtualSize
	if err := m.rewriteHeaderSector(h, mutableSector); err != nil {
		return err
	}
	h.TableOffset, h.TableSize = uint64(at), uint64(room)
	if err := m.rewriteHeaderSector(h, 2048); err != nil {
		return err
	}
	m.g.tableStart, m.g.tableCap = metaOffset(at), chunkIndex(room/4)
	return nil
}

// rewriteHeaderSector makes h the header and writes one of its sectors, durably.
func (m *metadata) rewriteHeaderSector(h *Header, at int) error {
	b, err := h.encode()
	if err != nil {
		return err
	}
	m.headerMu.Lock()
	*m.header = *h
	m.headerMu.Unlock()
	if err := m.writeMeta("writing the header", b[at:at+sectorSize], metaOffset(at)); err != nil {
		return err
	}
	return m.metaSync.wait()
}

// preallocate lays out [off, end), which nobody has written yet. The caller has the image to itself.
func (im *Image) preallocate(off, end int64, how block.Preallocation) error {
	if how == block.PreallocOff || off >= end {
		return nil
	}
	m := im.m
	if !m.g.compact() && how == block.PreallocMetadata {
		return nil // there are no tables to lay out
	}
	for off < end {
		next := min(end, roundDown(off, zeroStep)+zeroStep)
		if err := im.preallocateStep(guestOffset(off), guestOffset(next), how); err != nil {
			return fmt.Errorf("fvd image %s: preallocating %d bytes at %d: %w", m.name, next-off, off, err)
		}
		off = next
	}
	return im.flush()
}

func (im *Image) preallocateStep(off, end guestOffset, how block.Preallocation) error {
	m := im.m
	if m.g.compact() {
		if err := m.markInUse(); err != nil {
			return err
		}
		if err := m.mapChunks(m.g.chunkRange(off, end)); err != nil {
			return err
		}
	}
	if how != block.PreallocMetadata {
		if err := im.layOut(off, end, how); err != nil {
			return err
		}
	}
	first, last := m.g.chunkRange(off, end)
	if !m.table.anyPending(first, last) {
		return nil
	}
	u := update{span: span{off: off, end: end, entries: true}}
	return im.discipline.commit(&u)
}

// layOut reserves or writes the storage of [off, end).
func (im *Image) layOut(off, end guestOffset, how block.Preallocation) error {
	for off < end {
		p := im.place(off, int64(end-off))
		var err error
		switch {
		case p.kind == pieceHole:
			err = errMoved
		case how == block.PreallocFalloc:
			err = im.m.data.allocate(p.at, p.n)
		default:
			err = writeZeroBytes(im.m.data, p.at, p.n)
		}
		if err != nil {
			return err
		}
		off += guestOffset(p.n)
	}
	return nil
}
