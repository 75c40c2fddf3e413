package fvd

import (
	"fmt"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
)

// maxFindings bounds how many findings a check describes one by one; all are counted.
const maxFindings = 1000

// Repair says what a check may change.
type Repair uint8

const (
	RepairNone  Repair = iota // nothing is written
	RepairLeaks               // space that nothing refers to is given back; nothing else changes
	RepairAll                 // everything found is put right as far as that is possible
)

// FindingKind is a class of what a check finds.
type FindingKind string

// What a check finds. Leaks waste space and are reused when the image is next opened for writing; the others
// are corruptions, except for FindingReplay and FindingTorn, which are how a crash looks.
const (
	FindingLeak       FindingKind = "leak"              // stored chunks that no entry names
	FindingDuplicate  FindingKind = "duplicate-chunk"   // an entry names a chunk that another one names
	FindingOutside    FindingKind = "chunk-outside"     // an entry names a chunk past the end of the storage
	FindingMetadata   FindingKind = "chunk-on-metadata" // an entry names a chunk where metadata lies
	FindingDirtyEntry FindingKind = "dirty-entry"       // an entry on disk carries the DIRTY mark
	FindingStrayBits  FindingKind = "stray-bits"        // bitmap bits past the end of the base image
	FindingShortData  FindingKind = "short-data"        // the data storage ends before the disk does
	FindingJournal    FindingKind = "journal-anomaly"   // journal contents that no crash explains
	FindingDirtyImage FindingKind = "dirty-image"       // not closed cleanly, and no journal to tell what was lost
	FindingReplay     FindingKind = "replay-pending"    // not closed cleanly; the journal has the rest
	FindingTorn       FindingKind = "torn-sector"       // journal sectors that a crash tore; ignored
)

// Finding is one thing a check found.
type Finding struct {
	Kind  FindingKind `json:"kind"`
	Text  string      `json:"text"`
	Fixed bool        `json:"fixed"`
}

// CheckOptions are the options of Check.
type CheckOptions struct {
	Data       storage.File // the data file, as for Open
	DataDevice block.Device
	Repair     Repair

	MaxMetadata int64 // bytes, as for Open
}

// CheckResult is what a check found. Counts are of single bad entries, chunks and records.
type CheckResult struct {
	Corruptions      int64     `json:"corruptions"`       // found and not fixed
	Leaks            int64     `json:"leaks"`             // chunks leaked and not given back
	CorruptionsFixed int64     `json:"corruptions-fixed"` // found and fixed
	LeaksFixed       int64     `json:"leaks-fixed"`
	Findings         []Finding `json:"findings,omitempty"` // the first maxFindings

	TotalChunks     int64 `json:"total-chunks"`     // entries of the table
	AllocatedChunks int64 `json:"allocated-chunks"` // of those, mapped ones
	TotalBlocks     int64 `json:"total-blocks"`     // bits of the bitmap
	LocalBlocks     int64 `json:"local-blocks"`     // of those, blocks that have left the base image
	ImageEnd        int64 `json:"image-end-offset"` // bytes of the data storage in use
}

// checker is one run of Check.
type checker struct {
	m      *metadata
	h      *Header
	repair Repair
	res    *CheckResult

	stored     int64 // chunks that the storage has room for
	use        usage
	duplicates int64 // entries that name a chunk that another one names: each takes a copy to repair
	stray      bool
	replay     Replay
	changed    bool
}

// Check looks for everything in an image that is not as the format wants it. It does not take f over. An image
// that was not closed cleanly is judged as its journal would leave it. With Repair the findings are put right
// where they can be, the image written in the order of a checkpoint, so that a crash in the middle leaves an image
// that can be repaired again; the base image is not needed. A repair for which the storage has no room is refused
// before anything is changed, with an error that wraps syscall.ENOSPC. The error is about what keeps the check from being
// made: a file that cannot be read, a header that cannot be.
func Check(f storage.File, o CheckOptions) (*CheckResult, error) {
	h, err := ReadHeader(f)
	if err != nil {
		return nil, err
	}
	im, err := assemble(f, h, &Options{
		ReadOnly: o.Repair == RepairNone, Data: o.Data, DataDevice: o.DataDevice, MaxMetadata: o.MaxMetadata,
	})
	if err != nil {
		return nil, err
	}
	if o.Repair != RepairNone {
		if err := finishHeader(f); err != nil {
			return nil, err
		}
	}
	k := &checker{m: im.m, h: h, repair: o.Repair, res: &CheckResult{}}
	next, err := k.read()
	if err != nil {
		return nil, err
	}
	if err := k.judge(); err != nil {
		return nil, err
	}
	if o.Repair != RepairNone {
		if err := k.fix(next); err != nil {
			return nil, err
		}
	}
	return k.res, nil
}

// read loads the tables and replays the journal in memory.
func (k *checker) read() (next epoch, err error) {
	m := k.m
	m.initTables()
	if m.fresh.n > 0 {
		if k.stray, err = m.loadBitmap(); err != nil {
			return 0, err
		}
	}
	if m.g.compact() {
		if err := m.loadTable(); err != nil {
			return 0, err
		}
	}
	next = epoch(k.h.StableEpoch) + 1
	m.inUse.Store(!k.h.CleanShutdown)
	if k.h.CleanShutdown || m.g.journalLen == 0 {
		return next, nil
	}
	var highest epoch
	k.replay, highest, err = m.replayJournal()
	return max(next, highest+1), err
}

// judge collects the findings.
func (k *checker) judge() error {
	m, h := k.m, k.h
	fixes := k.repair == RepairAll
	switch {
	case h.CleanShutdown:
	case m.g.journalLen > 0:
		k.found(FindingReplay, 0, fixes, "the image was not closed cleanly; its journal holds %d records to replay", k.replay.Records)
	case m.fresh.n > 0 || m.g.compact():
		k.found(FindingDirtyImage, 1, fixes, "the image has no journal and was not closed cleanly: writes may be lost")
	}
	if k.replay.Damaged > 0 {
		k.found(FindingTorn, 0, fixes, "%d journal sectors were torn by a crash", k.replay.Damaged)
	}
	for _, text := range k.replay.Anomalies {
		k.found(FindingJournal, 1, fixes, "%s", text)
	}
	if rest := k.replay.anomalies - int64(len(k.replay.Anomalies)); rest > 0 {
		k.found(FindingJournal, rest, fixes, "%d more anomalies in the journal", rest)
	}
	if k.stray {
		k.found(FindingStrayBits, 1, fixes, "the bitmap has bits set past the %d blocks of the base image", m.fresh.n)
	}
	k.res.TotalBlocks, k.res.LocalBlocks = int64(m.fresh.n), int64(m.fresh.count())
	if !m.g.compact() {
		return k.judgeIdentity()
	}
	return k.judgeTable()
}

// found notes a finding of n corruptions, 0 for what is none.
func (k *checker) found(kind FindingKind, n int64, fixed bool, format string, args ...any) {
	if fixed {
		k.changed = true
		k.res.CorruptionsFixed += n
	} else {
		k.res.Corruptions += n
	}
	k.describe(kind, fixed, format, args...)
}

func (k *checker) describe(kind FindingKind, fixed bool, format string, args ...any) {
	if len(k.res.Findings) < maxFindings {
		k.res.Findings = append(k.res.Findings, Finding{kind, fmt.Sprintf(format, args...), fixed})
	}
}

// judgeIdentity checks the storage of an image without table.
func (k *checker) judgeIdentity() error {
	size, err := k.m.data.size()
	if err != nil {
		return fmt.Errorf("fvd image %s: size of the data storage: %w", k.m.name, err)
	}
	end := int64(k.m.g.dataStart) + k.m.g.size
	k.res.ImageEnd = min(size, end)
	if size < end && k.h.CleanShutdown {
		fixed := k.repair == RepairAll && k.m.data.resize(end) == nil
		k.found(FindingShortData, 1, fixed, "the data storage has %d bytes, the disk needs %d", size, end)
	}
	return nil
}

// judgeTable checks the table, and which stored chunks no entry names.
func (k *checker) judgeTable() error {
	m := k.m
	m.alloc = &allocator{m: m, reserved: m.reservedChunk}
	var err error
	if k.stored, err = m.alloc.stored(); err != nil {
		return err
	}
	kinds := [...]FindingKind{faultDirty: FindingDirtyEntry, faultOutside: FindingOutside, faultMetadata: FindingMetadata, faultDuplicate: FindingDuplicate}
	k.use, err = m.scanTable(k.stored, func(c chunkIndex, e entry, fault tableFault) bool {
		if fault == faultDuplicate {
			k.duplicates++
		}
		k.found(kinds[fault], 1, k.repair == RepairAll, "table entry of chunk %d names chunk %#x, which %s", c, uint32(e), tableFaultNames[fault])
		return true
	})
	if err != nil {
		return err
	}
	if k.repair == RepairAll && k.duplicates > 0 {
		if err := k.reserveCopies(); err != nil {
			return err
		}
	}
	k.res.TotalChunks = int64(len(m.table))
	for c := range chunkIndex(len(m.table)) {
		if m.table.get(c).mapped() {
			k.res.AllocatedChunks++
		}
	}
	k.res.ImageEnd = int64(m.g.chunkData(k.use.next))
	return k.leaks()
}

// leaks finds chunks below the high-water mark that no entry names and that take space in the storage.
func (k *checker) leaks() error {
	used := bitset{words: k.use.used, n: blockIndex(k.use.next)}
	for id := blockIndex(0); id < used.n; {
		n, named := used.run(id, used.n)
		if !named {
			if err := k.leaksAmong(chunkID(id), chunkID(id+n)); err != nil {
				return err
			}
		}
		id += n
	}
	return nil
}

// maxLeakRuns bounds how many runs of leaked chunks are gathered before they are given back.
const maxLeakRuns = 4096

// leaksAmong finds those of chunks [first, last), none of which an entry names, that take space.
func (k *checker) leaksAmong(first, last chunkID) error {
	m := k.m
	for first < last {
		start := m.g.chunkData(first)
		var leaked [][2]chunkID // runs
		seen := first           // chunks below it are in leaked or take no space
		err := m.data.extents(start, int64(last-first)*m.g.chunkSize, func(off dataOffset, n int64, data bool) bool {
			from := max(seen, first+chunkID(int64(off-start)/m.g.chunkSize))
			seen = max(seen, first+chunkID(ceilDiv(int64(off-start)+n, m.g.chunkSize)))
			if data && from < seen {
				leaked = append(leaked, [2]chunkID{from, seen})
			}
			return len(leaked) < maxLeakRuns
		})
		if err != nil {
			return fmt.Errorf("fvd image %s: looking for leaked chunks: %w", m.name, err)
		}
		for _, run := range leaked {
			k.leakedRun(run[0], run[1])
		}
		if len(leaked) < maxLeakRuns {
			return nil
		}
		first = seen
	}
	return nil
}

// leakedRun notes, and gives back, chunks [first, last), except for those that metadata occupies.
func (k *checker) leakedRun(first, last chunkID) {
	m := k.m
	if first >= last {
		return
	}
	if from, to := m.reservedChunks(); from < int64(last) && int64(first) < to {
		k.leakedRun(first, chunkID(max(int64(first), from)))
		k.leakedRun(chunkID(min(int64(last), to)), last)
		return
	}
	fixed := k.repair != RepairNone && m.data.punch(m.g.chunkData(first), int64(last-first)*m.g.chunkSize) == nil
	for id := first; id < last; id++ {
		if fixed {
			k.res.LeaksFixed++
		} else {
			k.res.Leaks++
		}
		k.describe(FindingLeak, fixed, "chunk %#x of the storage takes space and no table entry names it", uint32(id))
	}
}
