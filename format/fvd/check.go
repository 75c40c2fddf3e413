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
	RepairLeaks               // space that nothing refers to is given back, if it is sure that nothing does; nothing else changes
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
	FindingPrefetched FindingKind = "not-prefetched"    // blocks left in a base image that is said not to be needed
	FindingEpochs     FindingKind = "epochs-used-up"    // stable_journal_epoch leaves too few epochs to write the image
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

// Clean reports that nothing is wrong.
func (r *CheckResult) Clean() bool { return r.Corruptions+r.Leaks == 0 }

// checker is one run of Check.
type checker struct {
	m      *metadata
	h      *Header
	clean  bool // clean_shutdown, as it was found
	repair Repair
	res    *CheckResult

	stored     int64 // chunks that the storage has room for
	use        usage
	duplicates int64 // entries that name a chunk that another one names: each takes a copy to repair
	damaged    int64 // entries that do not say where their chunk is
	stray      bool  // the bitmap has bits that describe nothing
	replay     Replay
	next       epoch // above every epoch that counts
	changed    bool
}

// Check looks for everything in an image that is not as the format wants it. It does not take f over. An image
// that was not closed cleanly is judged as its journal would leave it; the journal of one that was is read as well,
// and nothing in it may count. With Repair the findings are put right where they can be, the image written in the
// order of a checkpoint, so that a crash in the middle leaves an image that can be repaired again; the base image is
// not needed. What no repair puts right is the mark of an image without a journal that was not closed cleanly: that
// takes an operator's word (FVD specification 5, invariant 31; see Amend). Space is given back last, and not
// at all while the table or the journal has damage that is not repaired: a chunk that no entry names may then be what a
// damaged one should name. A repair for which the storage has no room is refused before anything is changed, with an
// error that wraps syscall.ENOSPC. The error is about what keeps the check from being made: a file that cannot be read,
// a header that cannot be.
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
	k := &checker{m: im.m, h: h, clean: h.CleanShutdown, repair: o.Repair, res: &CheckResult{}}
	for _, step := range []func() error{k.read, k.judge, k.fix, k.judgeSpace} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return k.res, nil
}

// read loads the tables and replays the journal in memory.
func (k *checker) read() (err error) {
	m := k.m
	m.initTables()
	if m.fresh.n > 0 {
		if k.stray, err = m.loadBitmap(); err != nil {
			return err
		}
		rest, err := m.strayPages(0)
		if err != nil {
			return err
		}
		k.stray = k.stray || len(rest) > 0
	}
	if m.g.compact() {
		if err := m.loadTable(); err != nil {
			return err
		}
	}
	k.next = epoch(k.h.StableEpoch) + 1
	m.inUse.Store(!k.clean)
	m.doubtful = m.untold()
	if m.g.journalLen == 0 {
		return nil
	}
	var highest epoch
	if k.clean {
		k.replay, highest, err = m.outdatedJournal()
	} else {
		k.replay, highest, err = m.replayJournal()
	}
	k.next = max(k.next, highest+1)
	return err
}

// judge collects the findings.
func (k *checker) judge() error {
	m := k.m
	fixes := k.repair == RepairAll
	switch {
	case k.clean:
	case m.g.journalLen > 0:
		k.found(FindingReplay, 0, fixes, "the image was not closed cleanly; its journal holds %d records to replay", k.replay.Records)
	case m.doubtful:
		k.found(FindingDirtyImage, 1, false, "the image has no journal and was not closed cleanly: writes may be lost, and no check can tell which; "+
			"it stays marked until clean_shutdown is set by hand (amend -o clean_shutdown=on)")
	}
	if k.replay.Damaged > 0 && !k.clean {
		k.found(FindingTorn, 0, fixes, "%d journal sectors were torn by a crash", k.replay.Damaged)
	}
	for _, text := range k.replay.Anomalies {
		k.found(FindingJournal, 1, fixes, "%s", text)
	}
	if rest := k.replay.anomalies - int64(len(k.replay.Anomalies)); rest > 0 {
		k.found(FindingJournal, rest, fixes, "%d more anomalies in the journal", rest)
	}
	if m.g.journalLen > 0 && k.next > maxEpoch-epochReserve {
		k.found(FindingEpochs, 1, fixes, "stable_journal_epoch is %d, and the next epoch %d: too few are left below 2^63 to write the image; "+
			"check -r all clears the journal and begins at 1 again, and a copy of the image (convert) begins there too", k.h.StableEpoch, k.next)
	}
	if k.stray {
		k.found(FindingStrayBits, 1, fixes, "the bitmap has bits set past the %d blocks of the base image", m.fresh.n)
	}
	k.res.TotalBlocks, k.res.LocalBlocks = int64(m.fresh.n), int64(m.fresh.count())
	if left := k.res.TotalBlocks - k.res.LocalBlocks; k.h.FullyPrefetched && left > 0 {
		k.found(FindingPrefetched, 1, fixes, "base_img_fully_prefetched is set, and %d of the %d blocks still live in the base image %q: "+
			"they read as what the image happens to hold there; with check -r all the flag is taken back, and they read from the base image again, "+
			"whatever was written to them since it was set", left, m.fresh.n, k.h.BaseImage)
	}
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
	if size < end && k.clean {
		fixed := k.repair == RepairAll && k.m.data.resize(end) == nil
		k.found(FindingShortData, 1, fixed, "the data storage has %d bytes, the disk needs %d", size, end)
	}
	return nil
}

// judgeTable checks the table.
func (k *checker) judgeTable() error {
	m := k.m
	m.alloc = &allocator{m: m, reserved: m.reservedChunk}
	var err error
	if k.stored, err = m.alloc.stored(); err != nil {
		return err
	}
	kinds := [...]FindingKind{faultDirty: FindingDirtyEntry, faultOutside: FindingOutside, faultMetadata: FindingMetadata, faultDuplicate: FindingDuplicate}
	fixes := k.repair == RepairAll
	k.use, err = m.scanTable(k.stored, func(c chunkIndex, e entry, fault tableFault) bool {
		remedy := ""
		switch {
		case fault == faultDirty:
		case fault == faultDuplicate:
			k.damaged, k.duplicates = k.damaged+1, k.duplicates+1
			remedy = "; now it names a copy"
		default:
			k.damaged++
			remedy = fmt.Sprintf("; now it is EMPTY, and what it stood for of bytes %d to %d of the disk reads as zeros from now on",
				m.g.chunkStart(c), m.g.chunkEnd(c)-1)
		}
		if !fixes {
			remedy = ""
		}
		k.found(kinds[fault], 1, fixes, "table entry of chunk %d names chunk %#x, which %s%s", c, uint32(e), tableFaultNames[fault], remedy)
		return true
	})
	if err != nil {
		return err
	}
	if fixes && k.duplicates > 0 {
		return k.reserveCopies()
	}
	return nil
}
