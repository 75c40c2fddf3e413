package fvd

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sync"

	"github.com/platter-disk/platter/internal/bufpool"
)

const (
	// journalUnit is what a journal write is padded to, so that on media that write 4 KiB at a time a new
	// write never touches a sector that an earlier one made durable (defect D-08).
	journalUnit = 4096

	journalBatch = 64 << 10 // most bytes written at once

	epochReserve = 1 << 40 // epochs an image must have left to be opened for writing
)

// journal appends records to the journal region and reuses it.
//
// The region has two halves. Records go to the active one; when it is full the other one becomes active and a
// checkpoint in the background brings the tables up to date, after which the full half may be overwritten
// (defect D-30). A checkpoint of a half outdates its records through stable_journal_epoch; no sector is reused
// before that is durable. A region too small for two halves is one, and waits for its checkpoint.
type journal struct {
	m *metadata

	lead   sync.Mutex // held to build and write records; what follows belongs to its holder
	next   epoch      // the epoch to hand out
	unit   int64
	halves []journalHalf
	active int
	pos    metaOffset // where the next write goes, in the active half

	mu   sync.Mutex // halves[i].busy
	idle sync.Cond  // a checkpoint ended

	checkpoints sync.Mutex // held for the length of a checkpoint that somebody asked for; taken before lead
}

type journalHalf struct {
	start, end metaOffset
	busy       bool // a checkpoint must end before the half is overwritten
}

func newJournal(m *metadata, next epoch) *journal {
	j := &journal{m: m, next: next, unit: sectorSize}
	j.idle.L = &j.mu
	start, length := m.g.journalAt, m.g.journalLen
	if length%journalUnit == 0 && m.mutant != MutantNoPadding {
		j.unit = journalUnit
	}
	if units := length / j.unit; units >= 2 {
		middle := start + metaOffset(units/2*j.unit)
		j.halves = []journalHalf{{start: start, end: middle}, {start: middle, end: start + metaOffset(length)}}
	} else {
		j.halves = []journalHalf{{start: start, end: start + metaOffset(length)}}
	}
	j.pos = start
	return j
}

// append records the spans and then retires the chunks they release. The caller holds lead.
func (j *journal) append(spans []span, releases []chunkID) error {
	m := j.m
	if err := m.failed(); err != nil {
		return err
	}
	for i := range spans {
		// A bit or a copy must never be durable before the bytes it exposes (FVD specification 1.10, D-06).
		if !spans[i].exposesData || m.mutant == MutantNoDataBarrier || m.mutant == MutantMetadataFirst && m.separate() {
			continue
		}
		if err := m.dataSync.wait(); err != nil {
			return err
		}
		break
	}
	if m.mutant == MutantStraddle {
		bits := slices.Clone(spans)
		for i := range spans {
			bits[i].entries, spans[i].bits = false, false
		}
		if err := j.record(bits); err != nil {
			return err
		}
	}
	if err := j.record(spans); err != nil {
		return err
	}
	m.alloc.retire(releases)
	return nil
}

// record writes records for the spans, which it uses up.
func (j *journal) record(spans []span) error {
	buf := bufpool.Get(journalBatch)
	defer buf.Put()
	for len(spans) > 0 {
		room := int64(j.halves[j.active].end - j.pos)
		if room == 0 {
			if err := j.turn(); err != nil {
				return err
			}
			continue
		}
		p := packer{j: j, buf: buf.B[:0:min(room, journalBatch)]}
		for len(spans) > 0 && p.add(&spans[0]) {
			spans = spans[1:]
		}
		if err := j.write(p.finish()); err != nil {
			return err
		}
	}
	return nil
}

// write puts sealed sectors at the write position and settles what they record.
func (j *journal) write(b []byte) error {
	if len(b) == 0 { // none of the spans had anything to tell
		return nil
	}
	if j.next >= maxEpoch {
		return j.m.fail("writing the journal", fmt.Errorf("journal epochs are used up"))
	}
	if err := j.m.writeMeta("writing the journal", b, j.pos); err != nil {
		return err
	}
	j.pos += metaOffset(len(b))
	j.settle(b)
	return nil
}

// settle tells memory that the records in b are on the disk. Entries that changed since they were copied into a
// record stay pending (defect D-36).
func (j *journal) settle(b []byte) {
	for ; len(b) > 0; b = b[sectorSize:] {
		r := recordReader{rest: b[:sectorRoom(j.m.g.trailer)]}
		for {
			rec, ok, err := r.next()
			if !ok || err != nil {
				break
			}
			if !rec.table {
				first, last := j.m.g.blockRange(rec.guestRange())
				j.m.stale.setRange(first, last)
				continue
			}
			for i := range rec.count() {
				j.m.table.settle(chunkIndex(rec.first)+chunkIndex(i), rec.entry(i).settled())
			}
		}
	}
}

// turn makes the other half the active one and starts the checkpoint of the full one; with a single half it
// waits for that checkpoint. The caller holds lead.
func (j *journal) turn() error {
	full := j.active
	if len(j.halves) == 1 {
		if err := j.m.checkpoint(j.m.snapshotTables(), headerChange{seal: j.seal()}); err != nil && j.m.mutant != MutantReuseAfterFailure {
			return err
		}
		j.pos = j.halves[0].start
		return nil
	}
	j.awaitIdle()
	if err := j.m.failed(); err != nil {
		return err
	}
	copies, change := j.m.snapshotTables(), headerChange{seal: j.switchHalf()}
	go func() {
		// An error is latched: the next append returns it, and the half is never reused.
		_ = j.m.checkpoint(copies, change)
		j.checkpointed(full)
	}()
	return nil
}

// seal draws the epoch that separates the records written so far from those to come.
func (j *journal) seal() epoch {
	e := j.next
	j.next++
	return e
}

// switchHalf makes the idle half active; its predecessor is busy until checkpointed.
func (j *journal) switchHalf() epoch {
	j.mu.Lock()
	j.halves[j.active].busy = true
	j.mu.Unlock()
	j.active = 1 - j.active
	j.pos = j.halves[j.active].start
	return j.seal()
}

func (j *journal) checkpointed(half int) {
	j.mu.Lock()
	j.halves[half].busy = false
	j.idle.Broadcast()
	j.mu.Unlock()
}

// awaitIdle waits until no checkpoint of a half is under way.
func (j *journal) awaitIdle() {
	j.mu.Lock()
	defer j.mu.Unlock()
	for j.anyBusy() {
		j.idle.Wait()
	}
}

// busy reports whether a checkpoint of a half is under way; the holder of lead alone begins one.
func (j *journal) busy() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.anyBusy()
}

// anyBusy is busy for the holder of mu.
func (j *journal) anyBusy() bool { return j.halves[0].busy || j.halves[len(j.halves)-1].busy }

// leadIdle takes lead at a moment when no checkpoint is under way. It waits for that without lead: writers go on.
func (j *journal) leadIdle() {
	for {
		j.awaitIdle()
		j.lead.Lock()
		if !j.busy() {
			return
		}
		j.lead.Unlock() // the half in use became full meanwhile
	}
}

// checkpoint implements discipline: everything recorded so far gets into the tables and out of the journal.
// Records of others may be written meanwhile, to the other half; also while this checkpoint waits for another one.
func (j *journal) checkpoint(change headerChange) error {
	j.checkpoints.Lock()
	defer j.checkpoints.Unlock()
	j.leadIdle()
	if err := j.m.failed(); err != nil {
		j.lead.Unlock()
		return err
	}
	if len(j.halves) == 1 {
		defer j.lead.Unlock()
		change.seal = j.seal()
		if err := j.m.checkpoint(j.m.snapshotTables(), change); err != nil {
			return err
		}
		j.pos = j.halves[0].start
		return nil
	}
	full := j.active
	copies := j.m.snapshotTables()
	change.seal = j.switchHalf()
	j.lead.Unlock()
	defer j.checkpointed(full)
	return j.m.checkpoint(copies, change)
}

// holdsReleases implements discipline: what a drain has written is with the allocator.
func (j *journal) holdsReleases() bool { return false }

// packer lays spans out in journal sectors.
type packer struct {
	j    *journal
	buf  []byte // sealed sectors and the one being filled; cap is the room there is
	used int    // bytes of records in the last sector; 0: no sector is open
}

// room returns how many bytes of records fit into the open sector, opening one if need bytes do not; 0 when the
// buffer is full.
func (p *packer) room(need int) int {
	total := sectorRoom(p.j.m.g.trailer)
	if p.used > 0 && total-p.used < need {
		p.sealOpen()
	}
	if p.used == 0 {
		if len(p.buf)+sectorSize > cap(p.buf) {
			return 0
		}
		p.buf = p.buf[:len(p.buf)+sectorSize]
	}
	return total - p.used
}

// sector is the open sector.
func (p *packer) sector() []byte { return p.buf[len(p.buf)-sectorSize:] }

func (p *packer) sealOpen() {
	sealSector(p.sector(), p.used, p.j.m.g.trailer, p.j.seal(), p.j.m.crc)
	p.used = 0
}

// finish seals the last sector and pads to whole units with blank sectors.
func (p *packer) finish() []byte {
	if p.used > 0 {
		p.sealOpen()
	}
	for int64(len(p.buf))%p.j.unit != 0 {
		p.buf = p.buf[:len(p.buf)+sectorSize]
		sec := p.sector()
		clear(sec)
		binary.LittleEndian.PutUint32(sec, recordEmpty)
	}
	return p.buf
}

// add writes records for the span, or for as much of its beginning as there is room for: then it cuts that part
// off the span and returns false. A sector never holds a bit without the mappings that go with it
// (FVD specification 1.5).
func (p *packer) add(s *span) bool {
	m := p.j.m
	for s.off < s.end {
		part := p.recordable(*s)
		need := 0
		if part.entries {
			need = tableRecordHead + 4
		}
		if part.bits {
			need += bitmapRecordSize
		}
		if need == 0 {
			s.off = part.end
			continue
		}
		room := p.room(need)
		if room == 0 {
			return false
		}
		rec := p.sector()[:p.used]
		if part.entries {
			first, last := m.g.chunkRange(part.off, part.end)
			n := min(last-first, chunkIndex(room-need)/4+1)
			part.end = min(part.end, m.g.chunkStart(first+n))
			rec = appendTableHead(rec, p.j.seal(), uint32(n), uint32(first))
			for c := first; c < first+n; c++ {
				rec = binary.LittleEndian.AppendUint32(rec, uint32(m.table.get(c).recorded()))
			}
		}
		if part.bits {
			// A count of sectors has 32 bits; a longer range is told in parts, on block boundaries.
			most := guestOffset(roundDown(1<<40, m.g.blockSize))
			part.end = min(part.end, guestOffset(roundDown(int64(part.off), m.g.blockSize))+most)
			rec = appendBitmapRecord(rec, uint64(part.off)/sectorSize, uint32((part.end-part.off)/sectorSize))
		}
		p.used = len(rec)
		s.off = part.end
	}
	return true
}

// recordable is the beginning of the span that one kind of record can tell: mappings and bits, or bits alone. Of
// mappings it looks at no more than a sector holds: it is asked once for every sector.
func (p *packer) recordable(s span) span {
	if !s.entries {
		return s
	}
	first, last := p.j.m.g.chunkRange(s.off, s.end)
	s.entries = p.tells(first, &s)
	for c := first + 1; c < last; c++ {
		if s.entries && c-first == sectorSize/4 || p.tells(c, &s) != s.entries {
			s.end = p.j.m.g.chunkStart(c)
			break
		}
	}
	return s
}

// tells reports whether a record of the span says what chunk c is. EMPTY is told only of a chunk that the span
// covers whole, as it does when it takes a mapping away; all blocks of the chunk have left the base image then. Told
// of a chunk of which the span zeroed a part, it would outlive the mapping that a copy from the base image gives the
// chunk later, without a record: a crash between the bitmap and the header of a checkpoint would replay EMPTY over
// that mapping, and the copied blocks would read as zeros. Without the unmap feature a record cannot say EMPTY at
// all (D-20).
func (p *packer) tells(c chunkIndex, s *span) bool {
	m, g := p.j.m, &p.j.m.g
	whole := s.off <= g.chunkStart(c) && g.chunkEnd(c) <= s.end || m.mutant == MutantEmptyInPart
	return m.table.get(c).mapped() || g.unmap && whole
}
