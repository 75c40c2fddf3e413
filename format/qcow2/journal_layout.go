package qcow2

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"maps"
	"slices"
)

// The metadata journal on disk (docs/qcow2-journal.md): a redo log of small byte ranges in a ring of
// self-checking blocks. It exists while the image is open for writing, or after a crash; the incompatible
// feature bit 63 keeps everyone away who does not know it. This file is pure: encode, decode, validate.
//
//	journal_offset                                                           + journal_size
//	| block 0: superblock | block 1: superblock | ring block 0 | 1 | … | N-1 |
//
// The superblock of generation g lies in block g mod 2. The ring block with sequence number lsn lies at ring
// index lsn mod N. A transaction is a run of consecutive ring blocks and counts when all of them are valid.
const (
	extJournal uint32 = 0x6A726E6C // "jrnl"

	journalFeatureBit  = 63
	journalFeatureName = "metadata journal needs replay"

	journalVersion    = 1
	journalExtSize    = 64
	superSize         = 512
	ringHeaderSize    = 64
	recordHeaderSize  = 16
	sumBytes          = recordHeaderSize + 8 // of a recordData
	opstateSize       = 64
	superMagic        = "QCJSUPER"
	ringMagic         = 0x716a626c // "qjbl"
	minJournalBlocks  = 64
	maxJournalBytes   = 1 << 30
	defaultJournal    = 16 << 20
	maxRingTxBlocks   = 65535
	maxLSN            = 1 << 62
	defaultBlockOrder = 12
)

// IncompatJournal says that the metadata can be read only through the journal.
const IncompatJournal uint64 = 1 << journalFeatureBit

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// JournalExtension is the header extension of the metadata journal. Its presence asks for the journal
// discipline when the image is opened for writing; where the journal lies it says only while IncompatJournal
// is set.
type JournalExtension struct {
	Offset        uint64 // bytes, cluster-aligned
	Size          uint64 // bytes, a multiple of the cluster size
	UUID          [16]byte
	BlockOrder    uint32 // log2 of the block size: 9..16, at most cluster_bits
	PreferredSize uint64 // bytes; 0: the default of 16 MiB
}

func (j *JournalExtension) blockSize() int64 { return 1 << j.BlockOrder }

// ringBlocks is the number of blocks in the ring.
func (j *JournalExtension) ringBlocks() uint64 { return j.Size>>j.BlockOrder - 2 }

func (j *JournalExtension) encode() []byte {
	be := binary.BigEndian
	b := make([]byte, journalExtSize)
	be.PutUint64(b[0:], j.Offset)
	be.PutUint64(b[8:], j.Size)
	copy(b[16:], j.UUID[:])
	be.PutUint32(b[32:], j.BlockOrder)
	be.PutUint32(b[36:], journalVersion)
	be.PutUint64(b[40:], j.PreferredSize)
	be.PutUint32(b[56:], crc32.Checksum(b[:56], castagnoli))
	return b
}

// decodeJournalExtension decodes and validates the extension; live says that IncompatJournal is set, so that
// the place of the journal matters.
func decodeJournalExtension(name string, b []byte, clusterBits uint32, live bool) (*JournalExtension, error) {
	bad := func(field string, found any, expected string) error {
		return &FormatError{File: name, Problem: "invalid journal extension", Field: field, Found: fmt.Sprint(found), Expected: expected}
	}
	be := binary.BigEndian
	if len(b) != journalExtSize {
		return nil, bad("length", len(b), fmt.Sprint(journalExtSize))
	}
	if got, want := be.Uint32(b[56:]), crc32.Checksum(b[:56], castagnoli); got != want {
		return nil, bad("checksum", fmt.Sprintf("%#x", got), fmt.Sprintf("%#x", want))
	}
	if v := be.Uint32(b[36:]); v != journalVersion {
		return nil, bad("version", v, fmt.Sprint(journalVersion))
	}
	j := &JournalExtension{
		Offset: be.Uint64(b[0:]), Size: be.Uint64(b[8:]), UUID: [16]byte(b[16:32]),
		BlockOrder: be.Uint32(b[32:]), PreferredSize: be.Uint64(b[40:]),
	}
	if j.BlockOrder < 9 || j.BlockOrder > min(16, clusterBits) {
		return nil, bad("block_order", j.BlockOrder, fmt.Sprintf("9 to %d", min(16, clusterBits)))
	}
	if j.PreferredSize > maxJournalBytes {
		return nil, bad("preferred_size", j.PreferredSize, fmt.Sprintf("at most %d", maxJournalBytes))
	}
	if !live {
		return j, nil
	}
	cluster := uint64(1) << clusterBits
	if j.Offset == 0 || j.Offset%cluster != 0 || j.Offset > 1<<62 {
		return nil, bad("journal_offset", j.Offset, fmt.Sprintf("a multiple of the cluster size %d, not 0", cluster))
	}
	if j.Size%cluster != 0 || j.Size > maxJournalBytes || j.Size>>j.BlockOrder < minJournalBlocks {
		return nil, bad("journal_size", j.Size, fmt.Sprintf("a multiple of %d, at least %d blocks of %d, at most %d", cluster, minJournalBlocks, j.blockSize(), maxJournalBytes))
	}
	return j, nil
}

// superblock holds the tail of the journal.
type superblock struct {
	uuid       [16]byte
	session    [16]byte
	generation uint64
	tail       uint64 // lsn of the oldest block that recovery needs
	tailTx     uint64 // number of the transaction that begins there
	blocks     uint64 // N
	blockSize  uint32
	minSize    uint64 // file size that all records need (informative)
	opstate    [opstateSize]byte
}

func (s *superblock) encode() []byte {
	be := binary.BigEndian
	b := make([]byte, superSize)
	copy(b, superMagic)
	be.PutUint32(b[12:], journalVersion)
	copy(b[16:], s.uuid[:])
	copy(b[32:], s.session[:])
	be.PutUint64(b[48:], s.generation)
	be.PutUint64(b[56:], s.tail)
	be.PutUint64(b[64:], s.tailTx)
	be.PutUint64(b[72:], s.blocks)
	be.PutUint32(b[80:], s.blockSize)
	be.PutUint64(b[88:], s.minSize)
	copy(b[96:], s.opstate[:])
	be.PutUint32(b[8:], crc32.Checksum(b, castagnoli))
	return b
}

// decodeSuperblock returns nil unless b is a valid superblock of the journal j.
func decodeSuperblock(b []byte, j *JournalExtension) *superblock {
	be := binary.BigEndian
	if len(b) < superSize || string(b[:8]) != superMagic || !checksummed(b[:superSize], 8) || be.Uint32(b[12:]) != journalVersion {
		return nil
	}
	s := &superblock{
		uuid: [16]byte(b[16:32]), session: [16]byte(b[32:48]),
		generation: be.Uint64(b[48:]), tail: be.Uint64(b[56:]), tailTx: be.Uint64(b[64:]),
		blocks: be.Uint64(b[72:]), blockSize: be.Uint32(b[80:]), minSize: be.Uint64(b[88:]),
		opstate: [opstateSize]byte(b[96:160]),
	}
	if s.uuid != j.UUID || s.generation == 0 || s.tail > maxLSN || s.blocks != j.ringBlocks() || int64(s.blockSize) != j.blockSize() {
		return nil
	}
	return s
}

// checksummed reports whether the CRC32C at byte at of b is that of b with the field zero.
func checksummed(b []byte, at int) bool {
	var zero [4]byte
	sum := crc32.Update(0, castagnoli, b[:at])
	sum = crc32.Update(sum, castagnoli, zero[:])
	return crc32.Update(sum, castagnoli, b[at+4:]) == binary.BigEndian.Uint32(b[at:])
}

// ringHeader heads a block of the ring.
type ringHeader struct {
	session [16]byte
	lsn     uint64
	tx      uint64
	index   uint16 // of the block in its transaction
	count   uint16 // blocks of the transaction
	used    uint32 // bytes of records
	durable uint64 // every block with a smaller lsn was known durable when this one was submitted
}

// seal writes the header and the checksum of a block whose records are in place.
func (h *ringHeader) seal(b []byte) {
	be := binary.BigEndian
	be.PutUint32(b[0:], ringMagic)
	be.PutUint32(b[4:], 0)
	copy(b[8:], h.session[:])
	be.PutUint64(b[24:], h.lsn)
	be.PutUint64(b[32:], h.tx)
	be.PutUint16(b[40:], h.index)
	be.PutUint16(b[42:], h.count)
	be.PutUint32(b[44:], h.used)
	be.PutUint64(b[48:], h.durable)
	be.PutUint64(b[56:], 0)
	be.PutUint32(b[4:], crc32.Checksum(b, castagnoli))
}

// decodeRing returns the header of a block, if the block is valid and of the session.
func decodeRing(b []byte, session [16]byte) (ringHeader, bool) {
	be := binary.BigEndian
	if len(b) < ringHeaderSize || be.Uint32(b) != ringMagic || [16]byte(b[8:24]) != session || !checksummed(b, 4) {
		return ringHeader{}, false
	}
	h := ringHeader{
		session: session, lsn: be.Uint64(b[24:]), tx: be.Uint64(b[32:]),
		index: be.Uint16(b[40:]), count: be.Uint16(b[42:]), used: be.Uint32(b[44:]), durable: be.Uint64(b[48:]),
	}
	return h, h.count > 0 && h.index < h.count && int64(h.used) <= int64(len(b)-ringHeaderSize)
}

// Record types.
const (
	recordEnd     = 0
	recordWrite   = 1
	recordFill    = 2
	recordRevoke  = 3
	recordOpstate = 4
	recordNote    = 5
	recordData    = 7 // the transaction counts only if the data at target is there, or it is known to have been durable

	recordOptional = 128 // types from here on may be skipped by those who do not know them
	recordSize     = 128 // the image file has at least target bytes; so no pointer leads past its end after a replay
)

// record is a decoded journal record.
type record struct {
	kind   uint8
	length uint32
	target uint64
	body   []byte // of recordWrite the bytes, of recordFill the 8-byte pattern, of recordOpstate the state, of recordData the checksum
}

// decodeRecords decodes the records of a ring block. Everything that does not make sense is an error: the
// block was complete when it was written.
func decodeRecords(payload []byte) ([]record, error) {
	be := binary.BigEndian
	var out []record
	for len(payload) >= recordHeaderSize && payload[0] != recordEnd {
		r := record{kind: payload[0], length: be.Uint32(payload[4:]), target: be.Uint64(payload[8:])}
		size := int(be.Uint16(payload[2:]))
		if size < recordHeaderSize || size%8 != 0 || size > len(payload) {
			return nil, fmt.Errorf("record length %d: want a multiple of 8 from %d to %d", size, recordHeaderSize, len(payload))
		}
		r.body = payload[recordHeaderSize:size]
		payload = payload[size:]
		want := -1
		switch r.kind {
		case recordWrite:
			want = int(min((int64(r.length)+7)&^7, 1<<20))
		case recordData:
			want = 8
		case recordFill:
			want = 8
			if r.length%8 != 0 || r.length > 1<<31 {
				return nil, fmt.Errorf("fill of %d bytes: want a multiple of 8, at most %d", r.length, 1<<31)
			}
		case recordRevoke, recordSize:
			want = 0
		case recordOpstate:
			want = opstateSize
		case recordNote:
			continue
		default:
			if r.kind >= recordOptional {
				continue
			}
			return nil, fmt.Errorf("record of unknown type %d", r.kind)
		}
		if len(r.body) != want {
			return nil, fmt.Errorf("record of type %d has %d bytes after its header, want %d", r.kind, len(r.body), want)
		}
		if r.kind == recordWrite {
			r.body = r.body[:r.length]
		}
		if r.target > 1<<62 {
			return nil, fmt.Errorf("record target %#x: want less than 2^62", r.target)
		}
		out = append(out, r)
	}
	return out, nil
}

// dataSum is a checksum of guest data that a transaction exposes.
type dataSum struct {
	at, n uint64 // bytes of the image file
	sum   uint32 // CRC32C
}

func decodeDataSum(r record) dataSum {
	return dataSum{r.target, uint64(r.length), binary.BigEndian.Uint32(r.body)}
}

// transaction collects the changes of one commit: the newest value of every table word, and what is given up.
type transaction struct {
	words   map[hostOff]uint64 // by host offset, a multiple of 8
	sums    []dataSum
	covered int       // clusters that it may have checksums of
	revokes []hostRun // clusters of tables that are not in use any more
	opstate *[opstateSize]byte
	size    uint64 // of the file in bytes, if it grew since the transaction before; 0: it did not
}

func (t *transaction) empty() bool {
	return len(t.words) == 0 && len(t.revokes) == 0 && t.opstate == nil
}

// ringWriter packs records into blocks. No record crosses the end of a block.
type ringWriter struct {
	blockSize int
	blocks    [][]byte
	used      []int
}

// room returns the free end of a block that has place for a record with need bytes of body.
func (w *ringWriter) room(need int) []byte {
	last := len(w.blocks) - 1
	if last < 0 || w.blockSize-w.used[last] < recordHeaderSize+need {
		w.blocks = append(w.blocks, make([]byte, w.blockSize))
		w.used = append(w.used, ringHeaderSize)
		last++
	}
	return w.blocks[last][w.used[last]:]
}

// add appends a record to the block that p is the free end of. body fits.
func (w *ringWriter) add(p []byte, kind uint8, length uint32, target uint64, body []byte) {
	be := binary.BigEndian
	size := recordHeaderSize + (len(body)+7)&^7
	p[0], p[1] = kind, 0
	be.PutUint16(p[2:], uint16(size))
	be.PutUint32(p[4:], length)
	be.PutUint64(p[8:], target)
	copy(p[recordHeaderSize:], body)
	w.used[len(w.used)-1] += size
}

// pack encodes the transaction as records in blocks, at least one.
func (t *transaction) pack(blockSize int, clusterBits uint) *ringWriter {
	w := &ringWriter{blockSize: blockSize}
	for _, r := range t.revokes {
		for at, n := uint64(r.start)<<clusterBits, uint64(r.n)<<clusterBits; n > 0; {
			step := min(n, 1<<31)
			w.add(w.room(0), recordRevoke, uint32(step), at, nil)
			at, n = at+step, n-step
		}
	}
	for _, s := range t.sums {
		body := binary.BigEndian.AppendUint64(nil, uint64(s.sum)<<32)
		w.add(w.room(len(body)), recordData, uint32(s.n), s.at, body)
	}
	targets := slices.Sorted(maps.Keys(t.words))
	for len(targets) > 0 {
		n := t.equal(targets)
		if n >= minFillWords {
			body := binary.BigEndian.AppendUint64(nil, t.words[targets[0]])
			w.add(w.room(len(body)), recordFill, uint32(n*8), uint64(targets[0]), body)
			targets = targets[n:]
			continue
		}
		var body []byte
		i := 0
		for ; i < len(targets) && targets[i] == targets[0]+hostOff(i)*8 && t.equal(targets[i:]) < minFillWords; i++ {
			body = binary.BigEndian.AppendUint64(body, t.words[targets[i]])
		}
		w.addWrite(uint64(targets[0]), body)
		targets = targets[i:]
	}
	if t.size != 0 {
		w.add(w.room(0), recordSize, 0, t.size, nil)
	}
	if t.opstate != nil {
		w.add(w.room(opstateSize), recordOpstate, opstateSize, 0, t.opstate[:])
	}
	if len(w.blocks) == 0 {
		w.room(0)
	}
	return w
}

// minFillWords is the least number of equal words in a row that a FILL is written for. It takes 24 bytes and may
// cut a WRITE in two, which is another 16.
const minFillWords = 8

// maxFillWords is what the length of a FILL allows.
const maxFillWords = 1 << 31 / 8

// equal returns the length of the run of equal words, one after the other in the file, that targets begin with.
// Of more than a FILL's worth it is as much as a FILL takes.
func (t *transaction) equal(targets []hostOff) int {
	n, word := 1, t.words[targets[0]]
	for n < min(len(targets), maxFillWords) && targets[n] == targets[0]+hostOff(n)*8 && t.words[targets[n]] == word {
		n++
	}
	return n
}

// addWrite adds WRITE records for bytes that may be more than a block takes.
func (w *ringWriter) addWrite(at uint64, p []byte) {
	for len(p) > 0 {
		free := w.room(8)
		n := min(len(p), (len(free)-recordHeaderSize)&^7)
		w.add(free, recordWrite, uint32(n), at, p[:n])
		at, p = at+uint64(n), p[n:]
	}
}

// bound is the most blocks that the transaction may need.
func (t *transaction) bound(blockSize int) uint64 {
	payload := blockSize - ringHeaderSize - recordHeaderSize - opstateSize
	bytes := len(t.words)*(recordHeaderSize+8) + t.covered*sumBytes + len(t.revokes)*recordHeaderSize + 2*recordHeaderSize + opstateSize
	return uint64(bytes/payload + 1)
}
