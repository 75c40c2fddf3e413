package fvd

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/platter-disk/platter/internal/bufpool"
	"github.com/platter-disk/platter/storage"
)

// maxAnomalies bounds how many journal anomalies are described one by one.
const maxAnomalies = 16

// Replay tells what reading a journal found.
type Replay struct {
	Sectors   int64    // sectors that hold records
	Records   int64    // records applied, in whole or in part
	Stale     int64    // records that a checkpoint had outdated
	Damaged   int64    // sectors whose checksum is wrong: torn by a crash; ignored
	Anomalies []string // what no crash explains, the first few
	anomalies int64
}

func (r *Replay) anomaly(format string, args ...any) {
	r.anomalies++
	if len(r.Anomalies) < maxAnomalies {
		r.Anomalies = append(r.Anomalies, fmt.Sprintf(format, args...))
	}
}

// forEachData reads the parts of [off, off+length) of f that are not holes and calls fn with them, in pieces of at
// most ioUnit bytes; where a piece begins is a multiple of align from off.
func forEachData(f storage.File, off metaOffset, length, align int64, fn func(at int64, p []byte) error) error {
	buf := bufpool.Get(int(min(length, ioUnit)))
	defer buf.Put()
	var err error
	done := int64(0)
	extentErr := f.DataExtents(int64(off), length, func(e storage.Extent) bool {
		from, to := max(done, roundDown(e.Offset-int64(off), align)), min(length, roundUp(e.Offset+e.Length-int64(off), align))
		if !e.Data || from >= to {
			return true
		}
		for at := from; at < to; at += int64(len(buf.B)) {
			p := buf.B[:min(int64(len(buf.B)), to-at)]
			if err = storage.ReadFull(f, p, int64(off)+at); err == nil {
				err = fn(at, p)
			}
			if err != nil {
				return false
			}
		}
		done = to
		return true
	})
	if err == nil {
		err = extentErr
	}
	return err
}

// loadBitmap reads the bitmap into fresh.
func (m *metadata) loadBitmap() (stray bool, err error) {
	err = forEachData(m.file, m.g.bitmapAt, ceilDiv(int64(m.fresh.n), 8), 8, func(at int64, p []byte) error {
		stray = m.fresh.decode(p, at) || stray
		return nil
	})
	if err != nil {
		err = fmt.Errorf("fvd image %s: reading the bitmap: %w", m.name, err)
	}
	return stray, err
}

// maxStrayPages bounds how many pages strayPages lists at once.
const maxStrayPages = 4096

// strayPages lists the first pages of the bitmap region, from page first on, in which a bit is set behind the bytes
// that loadBitmap reads: nothing is there that it could describe. Holes are not read.
func (m *metadata) strayPages(first int64) (pages []int64, err error) {
	bits := ceilDiv(int64(m.fresh.n), 8) // bytes of the region
	first = max(first, bits/pageSize)
	length := int64(m.header.BitmapSize) - first*pageSize
	if length <= 0 {
		return nil, nil
	}
	enough := errors.New("enough pages")
	err = forEachData(m.file, m.g.bitmapAt+metaOffset(first*pageSize), length, pageSize, func(at int64, p []byte) error {
		for at += first * pageSize; len(p) > 0; p, at = p[pageSize:], at+pageSize {
			if rest := p[min(pageSize, max(0, bits-at)):pageSize]; slices.ContainsFunc(rest, func(b byte) bool { return b != 0 }) {
				pages = append(pages, at/pageSize)
			}
			if len(pages) == maxStrayPages {
				return enough
			}
		}
		return nil
	})
	if err != nil && err != enough {
		return nil, fmt.Errorf("fvd image %s: reading the bitmap: %w", m.name, err)
	}
	return pages, nil
}

// loadTable reads the table as stored.
func (m *metadata) loadTable() error {
	clear(m.table) // holes, which no writer leaves, are chunk 0
	err := forEachData(m.file, m.g.tableStart, 4*int64(len(m.table)), 4, func(at int64, p []byte) error {
		decodeEntries(m.table[at/4:at/4+int64(len(p)/4)], p)
		return nil
	})
	if err != nil {
		return fmt.Errorf("fvd image %s: reading the table: %w", m.name, err)
	}
	return nil
}

// replayJournal applies the journal to the tables in memory (FVD specification 1.7) and returns the highest epoch
// it saw.
func (m *metadata) replayJournal() (r Replay, highest epoch, err error) {
	var best []epoch     // of the record that decided a chunk's entry
	var runs []blockSpan // whose bits are to be set
	r, highest, err = m.scanJournal(func(_ *Replay, _ int64, rec *record) {
		if !rec.table {
			if runs = append(runs, m.blockSpan(rec)); len(runs) == maxReplaySpans {
				m.setSpans(runs)
				runs = runs[:0]
			}
			return
		}
		if best == nil {
			best = make([]epoch, len(m.table))
		}
		m.replayTable(rec, best)
	})
	m.setSpans(runs)
	return r, highest, err
}

// scanJournal reads the journal and calls counts with every record that no checkpoint has outdated, and with the number
// of its sector. A record is checked as a whole before (D-17 to D-20). highest is the highest epoch of all.
func (m *metadata) scanJournal(counts func(r *Replay, sector int64, rec *record)) (r Replay, highest epoch, err error) {
	stable := epoch(m.header.StableEpoch)
	crc := m.crc
	if m.mutant == MutantNoChecksum {
		crc = nil
	}
	err = forEachData(m.file, m.g.journalAt, m.g.journalLen, sectorSize, func(at int64, p []byte) error {
		for ; len(p) > 0; p, at = p[sectorSize:], at+sectorSize {
			state, records, generation := openSector(p[:sectorSize], m.g.trailer, crc)
			switch {
			case state == sectorBlank:
				continue
			case state == sectorDamaged:
				r.Damaged++
				continue
			case generation >= maxEpoch:
				r.anomaly("journal sector %d: generation %d, want less than 2^63", at/sectorSize, generation)
				continue
			}
			r.Sectors++
			highest = max(highest, generation)
			rd := recordReader{rest: records}
			for {
				rec, ok, err := rd.next()
				if err == nil && ok {
					err = rec.validate(&m.g)
				}
				if err != nil {
					r.anomaly("journal sector %d: %v", at/sectorSize, err)
					break
				}
				if !ok {
					break
				}
				if rec.table {
					highest = max(highest, rec.epoch)
				}
				if m.g.trailer && generation <= stable || rec.table && rec.epoch <= stable {
					r.Stale++
					continue
				}
				r.Records++
				counts(&r, at/sectorSize, &rec)
			}
		}
		return nil
	})
	if err != nil {
		err = fmt.Errorf("fvd image %s: reading the journal: %w", m.name, err)
	}
	return r, highest, err
}

// outdatedJournal reads the journal of an image that was closed cleanly, for the checker. The checkpoint that ended it
// has outdated every record: one that still counts would be replayed after the next crash, over newer tables. BITMAP
// records without a trailer always count; there it is enough that their bits are set.
func (m *metadata) outdatedJournal() (r Replay, highest epoch, err error) {
	var runs []blockSpan
	unset := func(r *Replay) {
		for _, s := range mergeSpans(runs) {
			if !m.fresh.all(s.first, s.last) {
				r.anomaly("BITMAP records of the journal would set bits of blocks %d to %d, though the image was closed cleanly", s.first, s.last-1)
			}
		}
		runs = runs[:0]
	}
	r, highest, err = m.scanJournal(func(r *Replay, sector int64, rec *record) {
		switch {
		case rec.table:
			r.anomaly("journal sector %d: a TABLE record of epoch %d counts, though the image was closed cleanly", sector, rec.epoch)
		case m.g.trailer:
			r.anomaly("journal sector %d: a BITMAP record counts, though the image was closed cleanly", sector)
		default:
			if runs = append(runs, m.blockSpan(rec)); len(runs) == maxReplaySpans {
				unset(r)
			}
		}
	})
	unset(&r)
	return r, highest, err
}

// blockSpan is blocks first up to last, excluded.
type blockSpan struct{ first, last blockIndex }

// maxReplaySpans is of how many BITMAP records the spans are gathered, to be merged before their bits are set. Set one
// by one, a journal of records that each speak of the whole disk would take hours.
const maxReplaySpans = 1 << 16

func (m *metadata) blockSpan(rec *record) (s blockSpan) {
	s.first, s.last = m.g.blockRange(rec.guestRange())
	return s
}

// setSpans sets the fresh bits of all spans, which it sorts.
func (m *metadata) setSpans(spans []blockSpan) {
	for _, s := range mergeSpans(spans) {
		m.setFresh(s.first, s.last)
	}
}

// mergeSpans sorts spans and makes one of those that touch or overlap, in place.
func mergeSpans(spans []blockSpan) []blockSpan {
	slices.SortFunc(spans, func(a, b blockSpan) int { return cmp.Compare(a.first, b.first) })
	merged := spans[:0]
	for _, s := range spans {
		if n := len(merged); n > 0 && s.first <= merged[n-1].last {
			merged[n-1].last = max(merged[n-1].last, s.last)
			continue
		}
		merged = append(merged, s)
	}
	return merged
}

// replayTable applies a TABLE record: the highest epoch wins, whatever the order in the journal.
func (m *metadata) replayTable(rec *record, best []epoch) {
	for i := range rec.count() {
		c := chunkIndex(rec.first) + chunkIndex(i)
		if rec.epoch <= best[c] {
			continue
		}
		best[c] = rec.epoch
		if e := rec.entry(i).settled(); m.table.get(c) != e {
			m.setEntry(c, e)
		}
	}
}

// usage is what the table says about the storage.
type usage struct {
	used []uint64 // bit a chunk number: some entry names it
	next chunkID  // high-water mark: one above the highest chunk named
}

func (u *usage) has(id chunkID) bool {
	return int(id>>6) < len(u.used) && u.used[id>>6]>>(id&63)&1 == 1
}

// tableFault is what can be wrong with a table entry.
type tableFault uint8

const (
	faultDirty     tableFault = iota // DIRTY mark on the disk, otherwise good
	faultOutside                     // past the end of the data storage
	faultMetadata                    // on a chunk that holds metadata
	faultDuplicate                   // names a chunk that another entry names
)

var tableFaultNames = [...]string{
	"has its DIRTY mark set on the disk",
	"lies past the end of the data storage",
	"lies where the image keeps metadata",
	"is named by another entry too",
}

// scanTable checks the table as a whole against a data storage with room for stored chunks (FVD specification
// 1.14, D-20) and calls bad for every entry that cannot be; it stops when bad returns false. The usage is that of
// the entries with a chunk of their own. The error is of an image whose chunk numbers go higher than a bit for each
// fits into the memory allowed for tables; the table itself is within bounds.
func (m *metadata) scanTable(stored int64, bad func(chunkIndex, entry, tableFault) bool) (u usage, err error) {
	usable := func(e entry) bool { return int64(e.id()) < stored && !m.reservedChunk(e.id()) }
	for c := range chunkIndex(len(m.table)) {
		if e := m.table.get(c); e.mapped() && usable(e) {
			u.next = max(u.next, e.id()+1)
		}
	}
	if need := int64(u.next) / 8; need > m.maxMemory {
		return u, fmt.Errorf("fvd image %s: %w: the table names chunk %#x of the storage; to keep track of so many takes %d bytes of memory, the limit is %d",
			m.name, ErrMaxMetadata, u.next-1, need, m.maxMemory)
	}
	u.used = make([]uint64, (int64(u.next)+63)/64)
	for c := range chunkIndex(len(m.table)) {
		e := m.table.get(c)
		if e == entryEmpty {
			continue
		}
		id := e.id()
		fault := faultDirty
		switch {
		case int64(id) >= stored:
			fault = faultOutside
		case m.reservedChunk(id):
			fault = faultMetadata
		case u.has(id):
			fault = faultDuplicate
		default:
			u.used[id>>6] |= 1 << (id & 63)
			if e&entryDirty == 0 {
				continue
			}
		}
		if !bad(c, e, fault) {
			break
		}
	}
	return u, nil
}

// reservedChunks is the run of chunks of which metadata occupies a part: a table that was moved into the data area
// when the disk grew. first == last if there is none; last may be past every legal number.
func (m *metadata) reservedChunks() (first, last int64) {
	if m.header.Features&FeatureTableInData == 0 || m.header.DataFile != "" {
		return 0, 0
	}
	start := int64(m.header.TableOffset) - int64(m.g.dataStart)
	end := start + int64(m.header.TableSize)
	if end <= 0 {
		return 0, 0
	}
	return max(0, start) / m.g.chunkSize, ceilDiv(end, m.g.chunkSize)
}

// reservedChunk reports whether metadata occupies a part of the chunk.
func (m *metadata) reservedChunk(id chunkID) bool {
	first, last := m.reservedChunks()
	return first <= int64(id) && int64(id) < last
}
