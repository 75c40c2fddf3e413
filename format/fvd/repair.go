package fvd

import (
	"errors"
	"fmt"
	"math"
	"syscall"

	"github.com/platter-disk/platter/internal/bufpool"
)

// fix writes the image as it should be. The order is that of a recovery: the image is marked in use, copies of
// data come before the table that names them, the tables before the header that calls the image clean.
func (k *checker) fix() error {
	m := k.m
	if !k.changed {
		return nil
	}
	if k.clean { // what still counts there would be replayed once the image is marked in use
		if err := k.scrub(); err != nil {
			return err
		}
	}
	if err := m.markInUse(); err != nil {
		return err
	}
	if m.g.compact() {
		if err := k.fixTable(); err != nil {
			return err
		}
	}
	if k.stray {
		if err := k.clearStrayBits(); err != nil {
			return err
		}
	}
	if k.h.FullyPrefetched && !m.fresh.all(0, m.fresh.n) {
		if err := m.writeHeader((*Header).takePrefetchedBack); err != nil {
			return err
		}
	}
	if err := m.data.sync(); err != nil {
		return err
	}
	seal := epoch(0)
	if m.g.journalLen > 0 {
		seal = min(k.next, maxEpoch-1) // no record has a higher one
	}
	if err := m.checkpoint(m.snapshotTables(), headerChange{seal: seal}); err != nil {
		return err
	}
	if !k.clean {
		if err := k.scrub(); err != nil {
			return err
		}
	}
	if seal > maxEpoch-epochReserve { // no record is left that epochs could be compared with
		if err := m.writeHeader(func(h *Header) { h.StableEpoch = 0 }); err != nil {
			return err
		}
	}
	return m.checkpoint(m.snapshotTables(), headerChange{clean: true})
}

// scrub clears the journal.
func (k *checker) scrub() error {
	if err := scrubJournal(k.m.file, k.h); err != nil {
		return fmt.Errorf("fvd image %s: clearing the journal: %w", k.m.name, err)
	}
	return nil
}

// fixTable puts the entries of the table in memory right, and then knows the usage of the storage by it.
func (k *checker) fixTable() error {
	m := k.m
	k.use.used = nil // of the scan that found them; the next one needs its room
	var fixErr error
	_, err := m.scanTable(k.stored, func(c chunkIndex, e entry, fault tableFault) bool {
		fixErr = k.fixEntry(c, e, fault)
		return fixErr == nil
	})
	if err = errors.Join(err, fixErr); err != nil {
		return err
	}
	if k.stored, err = m.alloc.stored(); err != nil {
		return err
	}
	k.use, err = m.scanTable(k.stored, func(c chunkIndex, e entry, fault tableFault) bool {
		fixErr = fmt.Errorf("fvd image %s: table entry of chunk %d names chunk %#x after its repair, which %s", m.name, c, uint32(e), tableFaultNames[fault])
		return false
	})
	return errors.Join(err, fixErr)
}

// clearStrayBits takes bits that describe nothing out of the bitmap: those in its last page with the next checkpoint,
// those behind it here.
func (k *checker) clearStrayBits() error {
	m := k.m
	last := int((m.fresh.n - 1) / pageBits)
	m.bitmapPages.mark(last, last)
	zeros := make([]byte, pageSize)
	for from := int64(last) + 1; ; {
		pages, err := m.strayPages(from)
		if err != nil || len(pages) == 0 {
			return err
		}
		for _, page := range pages {
			if err := m.writeMeta("clearing the bitmap", zeros, m.g.bitmapAt+metaOffset(page)*pageSize); err != nil {
				return err
			}
		}
		from = pages[len(pages)-1] + 1
	}
}

// takePrefetchedBack has the base image be needed again, with settings for prefetching that make sense.
func (h *Header) takePrefetchedBack() {
	h.FullyPrefetched = false
	if h.validatePrefetch() != nil {
		h.PrefetchSlots = defaultSlots
		h.BytesPerPrefetch = uint64(roundUp(defaultPerPrefetch, int64(h.BlockSize)))
	}
}

// reserveCopies makes room in the storage for a copy for each duplicate, all at once and while nothing else is changed:
// a table can name one chunk so often that the copies fill any disk. Where the storage cannot reserve space, that of a
// file may still run out later; the repair can then be made again.
func (k *checker) reserveCopies() error {
	m := k.m
	first := int64(k.use.next)
	end := first + k.duplicates
	if from, to := m.reservedChunks(); from < end && first < to {
		end += to - max(from, first)
	}
	if most := min(maxChunks, (math.MaxInt64-int64(m.g.dataStart))/m.g.chunkSize); end > most {
		return fmt.Errorf("fvd image %s: table entries that name the same chunks need %d more chunks, %d numbers are left: %w",
			m.name, k.duplicates, most-first, syscall.ENOSPC)
	}
	refuse := func(err error) error {
		return fmt.Errorf("fvd image %s: table entries that name the same chunks need copies of %d bytes in all; making room for them: %w",
			m.name, k.duplicates*m.g.chunkSize, noSpace(err))
	}
	old, err := m.data.size()
	if err != nil {
		return refuse(err)
	}
	at, until := m.g.chunkData(chunkID(first)), m.g.chunkData(chunkID(end))
	if old < int64(until) {
		if err := m.data.resize(int64(until)); err != nil {
			return refuse(err)
		}
	}
	err = m.data.allocate(at, int64(until-at))
	if err == nil || errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	if old < int64(until) {
		err = errors.Join(err, m.data.resize(old))
	}
	return refuse(err)
}

// fixEntry puts one table entry right. Two entries that name one chunk get a copy each: nobody can tell whose it
// was. An entry that names nothing usable becomes EMPTY.
func (k *checker) fixEntry(c chunkIndex, e entry, fault tableFault) error {
	m := k.m
	id := e.id()
	switch fault {
	case faultDirty:
		m.setEntry(c, entry(id))
		return nil
	case faultOutside, faultMetadata:
		m.setEntry(c, entryEmpty)
		return nil
	}
	fresh := k.use.next
	for m.reservedChunk(fresh) {
		fresh++
	}
	if err := k.copyChunk(id, fresh); err != nil {
		return fmt.Errorf("fvd image %s: copying chunk %#x: %w", m.name, id, err)
	}
	k.use.next = fresh + 1
	m.setEntry(c, entry(fresh))
	return nil
}

func (k *checker) copyChunk(from, to chunkID) error {
	m := k.m
	buf := bufpool.Get(int(min(m.g.chunkSize, ioUnit)))
	defer buf.Put()
	for off := int64(0); off < m.g.chunkSize; off += int64(len(buf.B)) {
		p := buf.B[:min(int64(len(buf.B)), m.g.chunkSize-off)]
		if err := m.data.read(p, m.g.chunkData(from)+dataOffset(off)); err != nil {
			return err
		}
		if err := m.data.write(p, m.g.chunkData(to)+dataOffset(off)); err != nil {
			return err
		}
	}
	return nil
}
