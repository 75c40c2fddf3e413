package qcow2

import (
	"fmt"
	"hash/crc32"

	"github.com/platter-disk/platter/storage"
)

// journalLog is what a scan found in a journal.
type journalLog struct {
	file    storage.File
	name    string
	cluster uint64 // bytes
	ext     JournalExtension
	super   superblock
	ring    ringReader
	logState
	revokes []revoked

	proven   uint64        // some block says that every one with a smaller lsn was durable
	unproven []provisional // transactions that count only if the data they expose is there
	sums     int           // of those
}

// logState is what a log comes to up to some point.
type logState struct {
	end     uint64            // lsn after the last transaction
	pending int               // transactions
	revoked int               // REVOKEs
	size    uint64            // bytes that the file has to have
	opstate [opstateSize]byte // of the long operation that is under way
}

// provisional is a transaction with checksums of the data that it exposes.
type provisional struct {
	before logState
	end    uint64 // lsn after it
	sums   []dataSum
}

// Bounds of what the checksums of a log may ask for: there is one transaction to check after an honest crash.
const (
	maxLoggedSums   = 1 << 16
	maxCheckedBytes = 64 << 20
)

// scanJournal reads the journal of a crashed image (qcow2 journal specification, "Recovery"). It changes
// nothing. An incomplete transaction at the end was never acknowledged and is left out, as is one whose data
// is not there unless it is known to have been durable; a hole in front of what was known to be durable is an
// error, because something that was acknowledged is lost.
func scanJournal(f storage.File, h *Header, m Mutant) (*journalLog, error) {
	l := &journalLog{file: f, name: f.Name(), cluster: uint64(h.ClusterSize()), ext: *h.Journal}
	if err := l.readSuper(); err != nil {
		return nil, err
	}
	l.ring = newRingReader(f, &l.ext)
	l.end, l.opstate = l.super.tail, l.super.opstate
	limit := l.super.tail + l.super.blocks
	for tx := l.super.tailTx; l.end < limit; tx++ {
		ok, err := l.scanTransaction(tx, limit)
		if err != nil {
			return nil, err
		}
		if !ok {
			break
		}
	}
	if err := l.scanRest(limit); err != nil {
		return nil, err
	}
	if m != MutantSumsIgnored {
		if err := l.checkData(); err != nil {
			return nil, err
		}
	}
	if l.proven > l.end {
		return nil, l.damaged(l.end, fmt.Sprintf("not valid, but a block says that all before %d were durable", l.proven))
	}
	l.revokes = l.revokes[:l.revoked]
	return l, nil
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

// header reads the block that is to have an lsn. ok is false if it is not a valid one of this session.
func (l *journalLog) header(lsn uint64) (b []byte, h ringHeader, ok bool, err error) {
	b, err = l.ring.block(lsn)
	if err != nil {
		return nil, h, false, fmt.Errorf("%s: journal block %d: %w", l.name, lsn, err)
	}
	h, ok = decodeRing(b, l.super.session)
	return b, h, ok && h.lsn == lsn, nil
}

// records returns the records of a block; they are good until another block is read.
func (l *journalLog) records(lsn uint64) (h ringHeader, records []record, ok bool, err error) {
	b, h, ok, err := l.header(lsn)
	if !ok || err != nil {
		return h, nil, false, err
	}
	l.proven = max(l.proven, h.durable)
	if records, err = decodeRecords(b[ringHeaderSize : ringHeaderSize+h.used]); err != nil {
		return h, nil, false, l.damaged(lsn, err.Error())
	}
	return h, records, true, nil
}

// scanTransaction takes the transaction at the end of the log if all of it is there.
func (l *journalLog) scanTransaction(tx, limit uint64) (bool, error) {
	next := l.logState
	l.revokes = l.revokes[:l.revoked]
	var sums []dataSum
	for i, count := uint64(0), uint64(1); i < count; i++ {
		h, records, ok, err := l.records(l.end + i)
		if err != nil {
			return false, err
		}
		if i == 0 {
			count = uint64(h.count)
		}
		if !ok || h.tx != tx || uint64(h.index) != i || uint64(h.count) != count || l.end+count > limit {
			return false, nil
		}
		for _, r := range records {
			switch r.kind {
			case recordRevoke:
				l.revokes = append(l.revokes, revoked{from: r.target, to: r.target + uint64(r.length), lsn: h.lsn})
			case recordOpstate:
				next.opstate = [opstateSize]byte(r.body)
			case recordSize:
				next.size = max(next.size, r.target)
			case recordData:
				sums = append(sums, decodeDataSum(r))
			}
		}
		switch {
		case next.size > maxHostOffset:
			return false, l.damaged(h.lsn, fmt.Sprintf("a record for a file of %d bytes", next.size))
		case len(l.revokes) > maxRevokes:
			return false, l.damaged(h.lsn, fmt.Sprintf("one more REVOKE record than the %d that are supported", maxRevokes))
		case l.sums+len(sums) > maxLoggedSums:
			return false, l.damaged(h.lsn, fmt.Sprintf("one more checksum of data that nothing proves to have been durable than the %d that are supported", maxLoggedSums))
		}
		next.end = h.lsn + 1
	}
	next.pending++
	next.revoked = len(l.revokes)
	l.provisional(provisional{before: l.logState, end: next.end, sums: sums})
	l.logState = next
	return true, nil
}

// provisional notes a transaction if it has checksums, and forgets those that are proven by now.
func (l *journalLog) provisional(p provisional) {
	for len(l.unproven) > 0 && l.unproven[0].end <= l.proven {
		l.sums -= len(l.unproven[0].sums)
		l.unproven = l.unproven[1:]
	}
	if len(p.sums) > 0 {
		l.unproven = append(l.unproven, p)
		l.sums += len(p.sums)
	}
}

// scanRest reads what is left of the ring, for blocks that prove that something had been durable.
func (l *journalLog) scanRest(limit uint64) error {
	for lsn := l.end; lsn < limit; lsn++ {
		_, h, ok, err := l.header(lsn)
		if err != nil {
			return err
		}
		if ok {
			l.proven = max(l.proven, h.durable)
		}
	}
	return nil
}

// checkData ends the log in front of the first transaction that exposes data which is not there. One that is
// known to have been durable is not looked at: its data may have been overwritten since.
func (l *journalLog) checkData() error {
	rest := uint64(maxCheckedBytes)
	buf := make([]byte, 0)
	for _, p := range l.unproven {
		if p.end <= l.proven {
			continue
		}
		for _, s := range p.sums {
			if s.n > rest {
				return l.damaged(p.before.end, fmt.Sprintf("checksums of more than %d bytes", maxCheckedBytes))
			}
			if err := l.checkTarget(p.before.end, s.at, s.at+s.n); err != nil {
				return err
			}
			rest -= s.n
			if uint64(cap(buf)) < s.n {
				buf = make([]byte, s.n)
			}
			if err := storage.ReadFull(l.file, buf[:s.n], int64(s.at)); err != nil {
				return fmt.Errorf("%s: data at offset %#x that the metadata journal has a checksum of: %w", l.name, s.at, err)
			}
			if crc32.Checksum(buf[:s.n], castagnoli) != s.sum {
				l.logState = p.before
				return nil
			}
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

// checkTarget refuses records that change what no journal may change.
func (l *journalLog) checkTarget(lsn, from, end uint64) error {
	legal := from >= 24 && end <= 72 || from >= 80 && end <= 104 ||
		from >= l.cluster && end <= maxHostOffset && (end <= l.ext.Offset || from >= l.ext.Offset+l.ext.Size)
	if !legal {
		return l.damaged(lsn, fmt.Sprintf("a record for bytes %#x to %#x, which is not metadata that may be journalled", from, end))
	}
	return nil
}

// ringReadBytes is how much of the ring is read at once.
const ringReadBytes = 1 << 20

// ringReader reads blocks of a ring in large pieces. It is made for readers that go through the ring in one
// direction or the other.
type ringReader struct {
	file      storage.File
	at        int64 // file offset of the first block
	blockSize int64
	blocks    uint64
	first     uint64 // index of the first block of the piece
	piece     []byte // empty: none yet
	buf       []byte
}

func newRingReader(f storage.File, j *JournalExtension) ringReader {
	return ringReader{
		file: f, at: int64(j.Offset) + 2*j.blockSize(), blockSize: j.blockSize(), blocks: j.ringBlocks(),
		buf: make([]byte, min(ringReadBytes, int64(j.ringBlocks())*j.blockSize())),
	}
}

// block returns the block at the place of an lsn; it is good until another block is read.
func (r *ringReader) block(lsn uint64) ([]byte, error) {
	index := lsn % r.blocks
	if have := uint64(int64(len(r.piece)) / r.blockSize); index < r.first || index >= r.first+have {
		per := uint64(int64(len(r.buf)) / r.blockSize)
		first := index / per * per
		piece := r.buf[:int64(min(per, r.blocks-first))*r.blockSize]
		r.piece = nil
		if err := storage.ReadFull(r.file, piece, r.at+int64(first)*r.blockSize); err != nil {
			return nil, err
		}
		r.first, r.piece = first, piece
	}
	at := int64(index-r.first) * r.blockSize
	return r.piece[at : at+r.blockSize], nil
}
