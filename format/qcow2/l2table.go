package qcow2

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"

	"github.com/platter-disk/platter/internal/bufpool"
	"github.com/platter-disk/platter/storage"
)

// ownL2 makes sure that the L2 table that maps off exists and belongs to the active tree alone, so that its
// words may change. The caller holds a guest range of the table exclusively and no other lock.
func (im *Image) ownL2(off guestOff) error {
	at, _, e, err := im.l2Word(off)
	if err != nil || at != 0 && e.copied() {
		return err
	}
	if err := im.lockForUpdate(); err != nil {
		return err
	}
	err = im.ownL2Locked(im.geo.l1Index(off))
	im.mu.Unlock()
	if err != nil {
		return err
	}
	return im.settle()
}

func (im *Image) ownL2Locked(i int64) error {
	l1 := im.l1.Load()
	e := l1.entry(i)
	if e.copied() && e.offset() != 0 {
		return nil // somebody else was first
	}
	// Of the L1 table of a new image nothing has been written.
	if err := im.alloc.allocate(l1.at+hostOff(i/sectorWords*sectorSize), sectorSize); err != nil {
		return err
	}
	fresh, err := im.alloc.take(1, e.offset() == 0)
	if err != nil {
		return err
	}
	at := im.geo.offsetOf(fresh.start)
	u := update{first: i, words: []uint64{uint64(at) | entryCopied}, uses: []freeRun{fresh}}
	if e.offset() == 0 && fresh.zeroed != never {
		// A table of zeros maps nothing, which is what was there before: it owes no barrier to the L1 word.
		err = im.alloc.allocate(at, im.geo.clusterSize)
		u.exposes = fresh.zeroed
	} else {
		err = im.writeNewL2(e.offset(), at)
		u.exposes = im.gen
	}
	if err != nil {
		im.alloc.giveBack(fresh)
		return err
	}
	if e.offset() != 0 {
		u.releases = []hostRun{{start: im.geo.clusterOf(e.offset()), n: 1, table: true}}
	}
	im.dropTable(at) // what the cluster held when it was a table before
	im.guard.add(fresh.start)
	if e.offset() != 0 {
		im.guard.remove(im.geo.clusterOf(e.offset()))
	}
	if err := im.discipline.accept(&u); err != nil {
		return im.fail(err)
	}
	return nil
}

// writeNewL2 writes the first contents of an L2 table: zeros, or a copy of the shared table it replaces. The
// copy's clusters stay shared with the snapshot, so none may be written in place.
func (im *Image) writeNewL2(from, to hostOff) error {
	g := &im.geo
	buf := bufpool.Get(int(g.clusterSize))
	defer buf.Put()
	raw := buf.B
	clear(raw)
	if from != 0 {
		if err := storage.ReadFull(im.file, raw, int64(from)); err != nil {
			return fmt.Errorf("%s: L2 table at offset %#x: %w", im.file.Name(), from, err)
		}
		im.overlayCached(raw, from)
		for i := int64(0); i < g.l2Entries(); i++ {
			raw[i*g.entrySize()] &^= entryCopied >> 56
		}
	}
	return im.writeFresh(raw, to)
}

// overlayCached replaces what raw, the contents of a table in the file, has not yet of the cached changes.
// The caller holds mu, so no words change.
func (im *Image) overlayCached(raw []byte, table hostOff) {
	for pos := int64(0); pos < int64(len(raw)); pos += im.tables.bytes {
		v, ok := im.tables.find(table + hostOff(pos))
		if !ok || !v.s.held.Load() {
			continue
		}
		for w := range v.s.words {
			binary.BigEndian.PutUint64(raw[pos+int64(w)*8:], atomic.LoadUint64(&v.s.words[w]))
		}
	}
}
