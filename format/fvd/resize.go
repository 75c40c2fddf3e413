package fvd

import (
	"errors"
	"fmt"

	"github.com/platter-disk/platter/block"
)

// Resize implements block.Device. Disks only grow: bits and mappings of a part that is cut off could come back
// from the journal. Where the table has no room for the new chunks it is moved (D-25). Requests
// wait until the new part is laid out as prealloc says. A Resize that fails, or is interrupted (Options.Interrupt),
// gives back what it has laid out; the disk keeps its size.
func (im *Image) Resize(size int64, prealloc block.Preallocation) error {
	if !im.m.guard.pause() {
		return im.errClosed()
	}
	defer im.m.guard.resume(false)
	if im.readOnly {
		return im.errResize(size, block.ErrReadOnly)
	}
	if err := im.m.failed(); err != nil {
		return err
	}
	switch old := im.m.g.size; {
	case size == old:
		return nil
	case size < old:
		return im.unsupported(fmt.Sprintf("shrinking from %d to %d bytes", old, size))
	}
	if err := im.checkGrow(size); err != nil {
		return im.errResize(size, err)
	}
	return im.grow(size, prealloc)
}

func (im *Image) errResize(size int64, err error) error {
	return fmt.Errorf("fvd image %s: resize to %d bytes: %w", im.m.name, size, err)
}

// checkGrow refuses what grow cannot do, while nothing has changed yet.
func (im *Image) checkGrow(size int64) error {
	m := im.m
	if size%sectorSize != 0 || size > maxVirtualSize {
		return fmt.Errorf("want a multiple of %d up to %d", sectorSize, int64(maxVirtualSize))
	}
	if !m.g.compact() {
		h := m.headerCopy()
		h.VirtualSize = uint64(size)
		end, err := m.file.Size()
		if err != nil {
			return err
		}
		return h.validateRegions(end) // regions behind the data area stay in the way
	}
	entries := chunkIndex(ceilDiv(size, m.g.chunkSize))
	if entries > maxChunks {
		return fmt.Errorf("in chunks of %d bytes that takes more than %d chunks", m.g.chunkSize, maxChunks)
	}
	if least := minJournalSize(int64(entries), m.g.trailer); m.g.journalLen > 0 && m.g.journalLen < least {
		return fmt.Errorf("that needs a journal of %d bytes, there are %d", least, m.g.journalLen)
	}
	grown := m.g
	grown.size = size
	return grown.fits(m.maxMemory)
}

// grow makes the disk larger. The caller has the image to itself.
func (im *Image) grow(size int64, prealloc block.Preallocation) error {
	m := im.m
	if err := m.markInUse(); err != nil {
		return err
	}
	// From here on the tables on the disk are complete, nothing in the journal matters, and nothing runs in the
	// background.
	if err := im.discipline.checkpoint(headerChange{}); err != nil {
		return err
	}
	var err error
	old, stored := m.g.size, int64(0)
	if m.g.compact() {
		err = im.growTable(size)
	} else {
		stored, err = im.growFlat(size)
	}
	if err != nil {
		return im.errResize(size, err)
	}
	m.g.size = size // alone: who copies from the base image reads the rest without asking
	if err := im.preallocate(old, size, prealloc); err != nil {
		m.g.size = old
		return errors.Join(err, im.ungrow(size, stored))
	}
	// The size is the only word of its header sector that changes: a crash leaves the old disk or the new one.
	h := m.headerCopy()
	h.VirtualSize = uint64(size)
	if err := m.rewriteHeaderSector(&h, 0); err != nil {
		return err
	}
	im.size.Store(size)
	return nil
}

// ungrow gives back what was laid out for a disk of that size, of which nothing is in the tables on the disk. An image
// without table had storage of so many bytes before.
func (im *Image) ungrow(size, stored int64) error {
	m := im.m
	if m.failed() != nil {
		return nil
	}
	if !m.g.compact() {
		from, to := m.g.dataStart+dataOffset(m.g.size), m.g.dataStart+dataOffset(size)
		// Storage that can do neither keeps the space: at worst that is a leak.
		if stored < int64(to) && m.data.resize(stored) == nil {
			to = dataOffset(stored)
		}
		if from < to {
			_ = m.data.punch(from, int64(to-from))
		}
		return im.flush()
	}
	var taken []chunkID
	for c := m.g.chunks(); c < chunkIndex(len(m.table)); c++ {
		if id, ok := m.unmapChunk(c); ok {
			taken = append(taken, id)
		}
	}
	m.table = m.table[:m.g.chunks()]
	m.alloc.retire(taken)
	return im.flush()
}

// growFlat gives an image without table the storage for its new size; the new part reads as zeros, whatever lay
// there. It returns how many bytes of storage there were.
func (im *Image) growFlat(size int64) (stored int64, err error) {
	m := im.m
	from, to := m.g.dataStart+dataOffset(m.g.size), m.g.dataStart+dataOffset(size)
	if stored, err = m.data.size(); err != nil {
		return 0, fmt.Errorf("size of the data storage: %w", err)
	}
	if stale := min(stored, int64(to)) - int64(from); stale > 0 {
		if err := zeroStore(m.data, from, stale, true, false); err != nil {
			return stored, fmt.Errorf("zeroing the data storage: %w", err)
		}
	}
	if stored < int64(to) {
		if err := m.data.resize(int64(to)); err != nil {
			return stored, fmt.Errorf("growing the data storage: %w", err)
		}
	}
	return stored, m.dataSync.wait()
}

// growTable gives the table its new length, in place or, if its region is too short, elsewhere.
func (im *Image) growTable(size int64) error {
	m := im.m
	h := m.headerCopy()
	entries := chunkIndex(ceilDiv(size, m.g.chunkSize))
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
		// The entries past the old end are EMPTY since the table was laid out, but where a Resize ended in a crash.
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

// layOutStep is how many bytes of the disk are laid out between two questions whether to go on.
const layOutStep = 64 << 20

// preallocate lays out [off, end), which nobody has written yet. The caller has the image to itself. The mappings are
// written to the table when all of them are there; no record of them gets into the journal, which must not tell of
// chunks past the end of a disk whose header has the old size yet.
func (im *Image) preallocate(off, end int64, how block.Preallocation) error {
	m := im.m
	if how == block.PreallocOff || off >= end || !m.g.compact() && how == block.PreallocMetadata {
		return nil // without a table there are no metadata to lay out
	}
	if m.g.compact() {
		if err := m.markInUse(); err != nil {
			return err
		}
		if err := m.reserve(m.g.chunkRange(guestOffset(off), guestOffset(end))); err != nil {
			return err
		}
	}
	for off < end {
		if im.interrupt != nil {
			if err := im.interrupt(); err != nil {
				return err
			}
		}
		next := min(end, roundDown(off, layOutStep)+layOutStep)
		if err := im.preallocateStep(guestOffset(off), guestOffset(next), how); err != nil {
			return fmt.Errorf("fvd image %s: preallocating %d bytes at %d: %w", m.name, next-off, off, err)
		}
		off = next
	}
	if err := im.flush(); err != nil || !m.g.compact() {
		return err
	}
	return im.discipline.checkpoint(headerChange{})
}

func (im *Image) preallocateStep(off, end guestOffset, how block.Preallocation) error {
	if im.m.g.compact() {
		if err := im.m.mapChunks(im.m.g.chunkRange(off, end)); err != nil {
			return err
		}
	}
	if how == block.PreallocMetadata {
		return nil
	}
	return im.layOut(off, end, how)
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
