package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/platter-disk/platter/storage"
)

// journalLog is what a scan found in a journal.
type journalLog struct {
	file    storage.File
	name    string
	cluster uint64 // bytes
	ext     JournalExtension
	super   superblock
	end     uint64 // lsn after the last complete transaction
	pending int    // complete transactions
	revokes []revoked
	size    uint64            // bytes that the file has to have
	opstate [opstateSize]byte // as of the last complete transaction
}

// revoked is a range whose records of smaller lsn do not count.
type revoked struct {
	from, to uint64
	lsn      uint64
}

// maxReplayBytes bounds the memory for the sectors that records change.
const maxReplayBytes = 256 << 20

// scanJournal reads the journal of a crashed image (qcow2 journal specification, "Recovery"). It changes
// nothing. An incomplete transaction at the end was never acknowledged and is left out; a hole in front of
// what was known to be durable is an error, because something that was acknowledged is lost.
func scanJournal(f storage.File, h *Header) (*journalLog, error) {
	l := &journalLog{file: f, name: f.Name(), cluster: uint64(h.ClusterSize()), ext: *h.Journal}
	if err := l.readSuper(); err != nil {
		return nil, err
	}
	lsn, tx := l.super.tail, l.super.tailTx
	l.opstate = l.super.opstate
	limit := l.super.tail + l.super.blocks
	buf := make([]byte, l.ext.blockSize())
	for lsn < limit {
		n, err := l.scanTransaction(buf, lsn, tx, limit)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			break
		}
		lsn, tx = lsn+n, tx+1
		l.pending++
	}
	l.end = lsn
	return l, l.checkDamage(buf, limit)
}

func (l *journalLog) readSuper() error {
	buf := make([]byte, superSize)
	found := false
	for slot := range int64(2) {
		if err := storage.ReadFull(l.file, buf, int64(l.ext.Offset)+slot<<l.ext.BlockOrder); err != nil {
			return fmt.Errorf("%s: journal superblock: %w", l.name, err)
		}
		if s := decodeSuperblock(buf, &l.ext); s != nil && (!found || s.generation > l.super.generation) {
			l.super, found = *s, true
		}
	}
	if !found {
		return &FormatError{
			File: l.name, Problem: "the metadata journal cannot be read", Field: "journal superblocks",
			Found: "none that is valid", Expected: "at least one; repair with the journal discarded may lose acknowledged writes",
		}
	}
	return nil
}

func (l *journalLog) read(buf []byte, lsn uint64) (ringHeader, bool, error) {
	at := int64(l.ext.Offset) + int64(2+lsn%l.super.blocks)<<l.ext.BlockOrder
	if err := storage.ReadFull(l.file, buf, at); err != nil {
		return ringHeader{}, false, fmt.Errorf("%s: journal block at offset %#x: %w", l.name, at, err)
	}
	h, ok := decodeRing(buf, l.super.session)
	return h, ok, nil
}

// scanTransaction returns the number of blocks of the transaction at lsn if all of it is there, else 0.
func (l *journalLog) scanTransaction(buf []byte, lsn, tx, limit uint64) (uint64, error) {
	count := uint64(1)
	var revokes []revoked
	opstate, size := l.opstate, l.size
	for i := uint64(0); i < count; i++ {
		h, ok, err := l.read(buf, lsn+i)
		if err != nil {
			return 0, err
		}
		if i == 0 {
			count = uint64(h.count)
		}
		if !ok || h.lsn != lsn+i || h.tx != tx || uint64(h.index) != i || uint64(h.count) != count || lsn+count > limit {
			return 0, nil
		}
		records, err := decodeRecords(buf[ringHeaderSize : ringHeaderSize+h.used])
		if err != nil {
			return 0, l.damaged(lsn+i, err.Error())
		}
		for _, r := range records {
			switch r.kind {
			case recordRevoke:
				revokes = append(revokes, revoked{from: r.target, to: r.target + uint64(r.length), lsn: lsn + i})
			case recordOpstate:
				opstate = [opstateSize]byte(r.body)
			case recordSize:
				size = max(size, r.target)
			}
		}
	}
	if size > maxHostOffset {
		return 0, l.damaged(lsn, fmt.Sprintf("a record for a file of %d bytes", size))
	}
	l.revokes, l.opstate, l.size = append(l.revokes, revokes...), opstate, size
	return count, nil
}

// checkDamage looks for blocks that prove that something which is missing had been durable.
func (l *journalLog) checkDamage(buf []byte, limit uint64) error {
	for lsn := l.end; lsn < limit; lsn++ {
		h, ok, err := l.read(buf, lsn)
		if err != nil {
			return err
		}
		if ok && h.lsn >= l.end && h.lsn < limit && h.durable > l.end {
			return l.damaged(l.end, fmt.Sprintf("not valid, but block %d says that it was durable", h.lsn))
		}
	}
	return nil
}

func (l *journalLog) damaged(lsn uint64, found string) error {
	return &FormatError{
		File: l.name, Problem: "the metadata journal is damaged", Field: fmt.Sprintf("journal block %d", lsn),
		Found: found, Expected: "a complete block",
	}
}

// changedSectors is what applying a journal changes: whole sectors by offset.
type changedSectors map[int64]*[sectorSize]byte

// replay computes the sectors that the log changes.
func (l *journalLog) replay() (changedSectors, error) {
	changed := changedSectors{}
	buf := make([]byte, l.ext.blockSize())
	for lsn := l.super.tail; lsn < l.end; lsn++ {
		h, ok, err := l.read(buf, lsn)
		if err != nil {
			return nil, err
		}
		if !ok {
			return nil, l.damaged(lsn, "not valid any more")
		}
		records, err := decodeRecords(buf[ringHeaderSize : ringHeaderSize+h.used])
		if err != nil {
			return nil, l.damaged(lsn, err.Error())
		}
		for _, r := range records {
			switch r.kind {
			case recordWrite:
				err = l.apply(changed, lsn, r.target, uint64(len(r.body)), r.body)
			case recordFill:
				err = l.apply(changed, lsn, r.target, uint64(r.length), r.body)
			}
			if err != nil {
				return nil, err
			}
		}
	}
	return changed, nil
}

// apply writes n bytes of the repeated pattern at a target, past what is revoked.
func (l *journalLog) apply(changed changedSectors, lsn, target, n uint64, pattern []byte) error {
	if err := l.checkTarget(lsn, target, n); err != nil {
		return err
	}
	revokes := l.revoking(lsn, target, target+n)
	for done := uint64(0); done < n; {
		at := target + done
		in := at % sectorSize
		step := min(sectorSize-in, n-done)
		sector, err := l.sector(changed, int64(at-in))
		if err != nil {
			return err
		}
		for i := uint64(0); i < step; i++ {
			if !covered(revokes, at+i) {
				sector[in+i] = pattern[(done+i)%uint64(len(pattern))]
			}
		}
		done += step
	}
	return nil
}

// revoking lists the ranges that keep a record of [from, to) from being applied.
func (l *journalLog) revoking(lsn, from, to uint64) []revoked {
	var out []revoked
	for _, r := range l.revokes {
		if lsn < r.lsn && r.from < to && from < r.to {
			out = append(out, r)
		}
	}
	return out
}

func covered(ranges []revoked, at uint64) bool {
	return slices.ContainsFunc(ranges, func(r revoked) bool { return at >= r.from && at < r.to })
}

// checkTarget refuses records that change what no journal may change.
func (l *journalLog) checkTarget(lsn, target, n uint64) error {
	end := target + n
	legal := target >= 24 && end <= 72 || target >= 80 && end <= 104 ||
		target >= l.cluster && (end <= l.ext.Offset || target >= l.ext.Offset+l.ext.Size)
	if !legal {
		return l.damaged(lsn, fmt.Sprintf("a record for bytes %#x to %#x, which is not metadata that may be journalled", target, end))
	}
	return nil
}

func (l *journalLog) sector(changed changedSectors, at int64) (*[sectorSize]byte, error) {
	if s := changed[at]; s != nil {
		return s, nil
	}
	if len(changed) >= maxReplayBytes/sectorSize {
		return nil, fmt.Errorf("%s: the metadata journal changes more than %d bytes", l.name, maxReplayBytes)
	}
	s := new([sectorSize]byte)
	if err := storage.ReadFull(l.file, s[:], at); err != nil {
		return nil, fmt.Errorf("%s: sector at offset %#x: %w", l.name, at, err)
	}
	changed[at] = s
	return s, nil
}

// recoverJournal applies the journal of a crashed image, makes that durable, and ends the journal's session:
// afterwards the image is an ordinary one. A crash in between leaves the journal as it was, or the image done.
func recoverJournal(f storage.File, h *Header, m Mutant) error {
	l, err := scanJournal(f, h)
	if err != nil {
		return err
	}
	if m == MutantRevokeIgnored {
		l.revokes = nil
	}
	changed, err := l.replay()
	if err != nil {
		return err
	}
	var batch writeBatch
	for _, at := range slices.Sorted(maps.Keys(changed)) {
		batch.add(hostOff(at), changed[at][:])
	}
	if err := batch.write(f); err != nil {
		return fmt.Errorf("%s: apply the metadata journal: %w", f.Name(), err)
	}
	if size, err := f.Size(); err != nil {
		return fmt.Errorf("%s: apply the metadata journal: %w", f.Name(), err)
	} else if size < int64(l.size) {
		if err := f.Truncate(int64(l.size)); err != nil {
			return fmt.Errorf("%s: apply the metadata journal: %w", f.Name(), err)
		}
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("%s: apply the metadata journal: %w", f.Name(), err)
	}
	g := newGeometry(h)
	if o, ok := decodeOperation(l.opstate, &g); ok && h.Incompatible&(IncompatDirty|IncompatCorrupt) == 0 && m != MutantOpstateIgnored {
		return l.resume(o, m)
	}
	return endJournal(f)
}

// resume finishes, or undoes, the operation that a crash interrupted, in a session of the journal that goes on
// where the log ends: a crash in the middle leaves it to be resumed again. Everything in the log is in its place.
func (l *journalLog) resume(o operation, m Mutant) error {
	h, err := ReadHeader(l.file)
	if err != nil {
		return err
	}
	f := &lentFile{File: l.file, returned: func() {}}
	size, err := f.Size()
	if err != nil {
		return fmt.Errorf("%s: %w", l.name, err)
	}
	im := makeImage(f, h, Options{Discipline: Journal, NoBacking: true, Mutant: m})
	err = im.openTables(size)
	if err == nil {
		err = im.openForWriting(size)
	}
	var damaged *FormatError
	if errors.As(err, &damaged) {
		return endJournal(l.file) // a damaged image can still be repaired; what was under way is a leak then
	} else if err != nil {
		return err
	}
	if err := im.discipline.(*journal).resume(l, o); err != nil {
		return err
	}
	if err := im.finishOperation(o); err != nil && im.failed() != nil {
		return err
	}
	return im.Close() // an operation that cannot be finished leaves leaks
}

// endJournal clears the journal's feature bit durably. Everything in the journal is in its place.
func endJournal(f storage.File) error {
	var word [8]byte
	if _, err := f.ReadAt(word[:], int64(fieldFeatures.from)); err != nil {
		return fmt.Errorf("%s: end the metadata journal: %w", f.Name(), err)
	}
	bits := binary.BigEndian.Uint64(word[:]) &^ IncompatJournal
	if _, err := f.WriteAt(binary.BigEndian.AppendUint64(nil, bits), int64(fieldFeatures.from)); err != nil {
		return fmt.Errorf("%s: end the metadata journal: %w", f.Name(), err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("%s: end the metadata journal: %w", f.Name(), err)
	}
	return nil
}

// journalOverlay returns a read-only view of a crashed image with its journal applied in memory and the
// feature bit clear, and the number of transactions that are pending.
func journalOverlay(f storage.File, h *Header) (storage.File, int, error) {
	l, err := scanJournal(f, h)
	if err != nil {
		return nil, 0, err
	}
	changed, err := l.replay()
	if err != nil {
		return nil, 0, err
	}
	head, err := l.sector(changed, 0)
	if err != nil {
		return nil, 0, err
	}
	features := head[fieldFeatures.from:]
	binary.BigEndian.PutUint64(features, binary.BigEndian.Uint64(features)&^IncompatJournal)
	size, err := f.Size()
	if err != nil {
		return nil, 0, err
	}
	for at := range changed {
		size = max(size, at+sectorSize)
	}
	size = max(size, int64(l.size))
	return &overlayFile{File: f, changed: changed, size: size}, l.pending, nil
}

// overlayFile shows a file with some sectors changed. It refuses to be written.
type overlayFile struct {
	storage.File
	changed changedSectors
	size    int64
}

func (o *overlayFile) Size() (int64, error) { return o.size, nil }

func (o *overlayFile) ReadAt(p []byte, off int64) (int, error) {
	return o.patch(p, off, storage.ReadFull(o.File, p, off))
}

func (o *overlayFile) TryReadAt(p []byte, off int64) (int, error) {
	return o.patch(p, off, storage.TryReadFull(o.File, p, off))
}

func (o *overlayFile) patch(p []byte, off int64, err error) (int, error) {
	if err != nil {
		return 0, err
	}
	for at := off &^ (sectorSize - 1); at < off+int64(len(p)); at += sectorSize {
		if s := o.changed[at]; s != nil {
			from := max(off, at)
			copy(p[from-off:], s[from-at:])
		}
	}
	if n := max(o.size-off, 0); n < int64(len(p)) {
		return int(n), io.EOF
	}
	return len(p), nil
}

func (o *overlayFile) refuse() error {
	return fmt.Errorf("%s: the image was opened read-only with its metadata journal pending", o.Name())
}

func (o *overlayFile) WriteAt([]byte, int64) (int, error) { return 0, o.refuse() }
func (o *overlayFile) Truncate(int64) error               { return o.refuse() }
func (o *overlayFile) PunchHole(int64, int64) error       { return o.refuse() }
func (o *overlayFile) ZeroRange(int64, int64) error       { return o.refuse() }
func (o *overlayFile) Allocate(int64, int64) error        { return o.refuse() }

// DataExtents reports everything as data: the changed sectors may lie in holes.
func (o *overlayFile) DataExtents(off, length int64, fn func(storage.Extent) bool) error {
	if n := min(length, o.size-off); n > 0 {
		fn(storage.Extent{Offset: off, Length: n, Data: true})
	}
	return nil
}
