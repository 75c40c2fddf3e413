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
func (k *checker) fix(next epoch) error {
	m := k.m
	if !k.changed {
		if k.res.LeaksFixed > 0 {
			return m.data.sync()
		}
		return nil
	}
	if err := m.markInUse(); err != nil {
		return err
	}
	if m.g.compact() {
		k.use.used = nil // of the scan that found them; the next one needs its room
		var fixErr error
		_, err := m.scanTable(k.stored, func(c chunkIndex, e entry, fault tableFault) bool {
			fixErr = k.fixEntry(c, e, fault)
			return fixErr == nil
		})
		if err = errors.Join(err, fixErr); err != nil {
			return err
		}
	}
	if k.stray {
		last := int((m.fresh.n - 1) / pageBits)
		m.bitmapPages.mark(last, last)
	}
	if err := m.data.sync(); err != nil {
		return err
	}
	seal := epoch(0)
	if m.g.journalLen > 0 {
		seal = min(next, maxEpoch-1) // no record has a higher one
	}
	if err := m.checkpoint(m.snapshotTables(), headerChange{seal: seal}); err != nil {
		return err
	}
	if err := scrubJournal(m.file, k.h); err != nil {
		return fmt.Errorf("fvd image %s: clearing the journal: %w", m.name, err)
	}
	return m.checkpoint(m.snapshotTables(), headerChange{clean: true})
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
