package crashlab_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"sync"

	"github.com/platter-disk/platter/storage"
)

// bug names a mistake that the toy makes on purpose.
type bug string

const (
	noBug              bug = ""
	noDataBarrier      bug = "journal record before the data is durable"
	noCommitBarrier    bug = "flush answered before the journal record is durable"
	noChecksum         bug = "torn journal record accepted"
	earlyReuse         bug = "sector reused before its release is durable"
	headerBeforeTable  bug = "checkpoint header before the table is durable"
	noHeaderBarrier    bug = "journal reused before the checkpoint header is durable"
	earlyTruncate      bug = "file truncated before the release is durable"
	earlyPunch         bug = "hole punched before the release is durable"
	recoveryHeader     bug = "recovery retires the journal before the table is durable"
	recoveryDrops      bug = "recovery retires the journal and never writes the table"
	recoveryForgets    bug = "recovery takes replayed sectors for free"
	recoveryCannotGrow bug = "recovery panics when the file ends inside a data sector"
	notSticky          bug = "goes on after a failed sync"
	ignoresWriteError  bug = "ignores a failed write"
	panicsOnError      bug = "panics when a write fails"
)

// The toy is a journaling store of 512-byte values by number, shown as a disk: value k is sector k. It never
// overwrites in place. A write goes to a free sector; a flush makes the data durable and then appends one
// record with the new places to the journal; when the journal is full a checkpoint writes the table home.
//
//	sector 0      header: magic, number of the last record that the table contains, checksum
//	sectors 1-8   journal: four records of two sectors each
//	sectors 9-10  table: the place of each value, 32 bytes an entry
//	sectors 11-   data
const (
	toyValues     = 32
	toyRecords    = 4
	toyTable      = 1 + 2*toyRecords
	toyData       = toyTable + 2
	toyMagic      = 0x796F7459
	toyRecordSize = 2 * storage.SectorSize
)

type toy struct {
	f   storage.File
	bug bug

	mu      sync.Mutex
	place   [toyValues]uint32
	pending map[uint32]bool // values whose place changed since the last record
	free    []uint32
	waiting []uint32 // released, but not yet durably
	end     uint32   // sectors in the file
	seq     uint64   // of the last record
	slot    int      // where the next record goes
	err     error    // sticky
}

// makeToy writes an empty store.
func makeToy(f storage.File) error {
	if err := f.Truncate(toyData * storage.SectorSize); err != nil {
		return err
	}
	return (&toy{f: f}).writeHeader()
}

func (t *toy) writeHeader() error {
	var p [storage.SectorSize]byte
	binary.LittleEndian.PutUint32(p[0:], toyMagic)
	binary.LittleEndian.PutUint64(p[8:], t.seq)
	binary.LittleEndian.PutUint32(p[16:], crc32.ChecksumIEEE(p[:16]))
	_, err := t.f.WriteAt(p[:], 0)
	return err
}

// openToy opens a store; recovery replays the journal and checkpoints.
func openToy(f storage.File, b bug) (*toy, error) {
	t := &toy{f: f, bug: b, pending: make(map[uint32]bool)}
	meta := make([]byte, toyData*storage.SectorSize)
	if _, err := f.ReadAt(meta, 0); err != nil {
		return nil, fmt.Errorf("toy: %w", err)
	}
	if binary.LittleEndian.Uint32(meta) != toyMagic || binary.LittleEndian.Uint32(meta[16:]) != crc32.ChecksumIEEE(meta[:16]) {
		return nil, errors.New("toy: bad header")
	}
	t.seq = binary.LittleEndian.Uint64(meta[8:])
	for i := range t.place {
		t.place[i] = binary.LittleEndian.Uint32(meta[toyTable*storage.SectorSize+i*32:])
	}
	fromTable := t.place
	replayed := 0
	for ; replayed < toyRecords; replayed++ {
		if !t.replay(meta[storage.SectorSize+replayed*toyRecordSize:][:toyRecordSize]) {
			break
		}
	}
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if b == recoveryCannotGrow && size%1024 != 0 && replayed > 1 {
		panic("toy: odd size")
	}
	t.end = uint32(size / storage.SectorSize)
	used := make(map[uint32]bool)
	places := t.place
	if b == recoveryForgets {
		places = fromTable
	}
	for _, at := range places {
		used[at] = true
	}
	for at := uint32(toyData); at < t.end; at++ {
		if !used[at] {
			t.free = append(t.free, at)
		}
	}
	if replayed == 0 {
		return t, nil
	}
	if b == recoveryDrops {
		return t, errors.Join(t.writeHeader(), f.Sync())
	}
	if b == recoveryHeader {
		if err := errors.Join(t.writeHeader(), f.Sync(), t.writeTable(), f.Sync()); err != nil {
			return nil, err
		}
		return t, nil
	}
	return t, t.checkpoint()
}

// replay applies a record if it is the next one.
func (t *toy) replay(p []byte) bool {
	sum := binary.LittleEndian.Uint32(p[20:])
	head := slices.Clone(p)
	clear(head[20:24])
	if binary.LittleEndian.Uint32(p) != toyMagic || binary.LittleEndian.Uint64(p[8:]) != t.seq+1 ||
		t.bug != noChecksum && crc32.ChecksumIEEE(head) != sum {
		return false
	}
	t.seq++
	n := binary.LittleEndian.Uint32(p[16:])
	for i := range n {
		e := p[toyEntry(i):]
		if k := binary.LittleEndian.Uint32(e); k < toyValues {
			t.place[k] = binary.LittleEndian.Uint32(e[4:])
		}
	}
	return true
}

// toyEntry is where entry i lies in a record: entries take turns between its two sectors.
func toyEntry(i uint32) uint32 { return 32 + i%2*storage.SectorSize + i/2*8 }

func (t *toy) ReadAt(p []byte, off int64) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := 0
	for n < len(p) && off < t.Size() {
		var s [storage.SectorSize]byte
		if at := t.place[off/storage.SectorSize]; at != 0 {
			if err := storage.ReadFull(t.f, s[:], int64(at)*storage.SectorSize); err != nil {
				return n, err
			}
		}
		c := copy(p[n:], s[off%storage.SectorSize:])
		n, off = n+c, off+int64(c)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// fail makes an error sticky.
func (t *toy) fail(err error) error {
	if t.bug == panicsOnError {
		panic(err)
	}
	if t.bug != notSticky {
		t.err = err
	}
	return err
}

func (t *toy) WriteAt(p []byte, off int64) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err != nil {
		return 0, t.err
	}
	for n := 0; n < len(p); n += storage.SectorSize {
		at := t.allocate()
		if _, err := t.f.WriteAt(p[n:n+storage.SectorSize], int64(at)*storage.SectorSize); err != nil && t.bug != ignoresWriteError {
			return n, t.fail(err)
		}
		if err := t.put(uint32((off+int64(n))/storage.SectorSize), at); err != nil {
			return n, t.fail(err)
		}
	}
	return len(p), nil
}

func (t *toy) allocate() uint32 {
	if len(t.free) > 0 {
		at := t.free[0]
		t.free = t.free[1:]
		return at
	}
	t.end++
	return t.end - 1
}

// put gives a value a new place and releases the old one.
func (t *toy) put(k, at uint32) error {
	old := t.place[k]
	t.place[k] = at
	t.pending[k] = true
	if old == 0 {
		return nil
	}
	if t.bug == earlyReuse {
		t.free = append(t.free, old)
		return nil
	}
	t.waiting = append(t.waiting, old)
	if t.bug == earlyPunch {
		return t.f.PunchHole(int64(old)*storage.SectorSize, storage.SectorSize)
	}
	return nil
}

func (t *toy) WriteZeroes(off, length int64, _ bool) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err != nil {
		return t.err
	}
	for k := off / storage.SectorSize; k < (off+length)/storage.SectorSize; k++ {
		if err := t.put(uint32(k), 0); err != nil {
			return t.fail(err)
		}
	}
	return nil
}

func (t *toy) Discard(off, length int64) error { return t.WriteZeroes(off, length, true) }

func (t *toy) Flush() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err != nil {
		return t.err
	}
	if err := t.flush(); err != nil {
		return t.fail(err)
	}
	return nil
}

func (t *toy) flush() error {
	if len(t.pending) == 0 {
		return t.f.Sync()
	}
	if t.slot == toyRecords {
		return t.checkpoint()
	}
	if t.bug != noDataBarrier {
		if err := t.f.Sync(); err != nil {
			return err
		}
	}
	p := make([]byte, toyRecordSize)
	t.seq++
	binary.LittleEndian.PutUint32(p, toyMagic)
	binary.LittleEndian.PutUint64(p[8:], t.seq)
	n := uint32(0)
	for k := range uint32(toyValues) {
		if t.pending[k] {
			binary.LittleEndian.PutUint32(p[toyEntry(n):], k)
			binary.LittleEndian.PutUint32(p[toyEntry(n)+4:], t.place[k])
			n++
		}
	}
	binary.LittleEndian.PutUint32(p[16:], n)
	binary.LittleEndian.PutUint32(p[20:], crc32.ChecksumIEEE(p))
	if _, err := t.f.WriteAt(p, int64(storage.SectorSize+t.slot*toyRecordSize)); err != nil {
		return err
	}
	t.slot++
	if t.bug != noCommitBarrier {
		if err := t.f.Sync(); err != nil {
			return err
		}
	}
	return t.release()
}

// release hands out again what was waiting for the metadata to become durable.
func (t *toy) release() error {
	for _, at := range t.waiting {
		if err := t.f.PunchHole(int64(at)*storage.SectorSize, storage.SectorSize); err != nil {
			return err
		}
	}
	t.free = append(t.free, t.waiting...)
	t.waiting = nil
	clear(t.pending)
	return nil
}

func (t *toy) writeTable() error {
	p := make([]byte, 2*storage.SectorSize)
	for i, at := range t.place {
		binary.LittleEndian.PutUint32(p[i*32:], at)
	}
	_, err := t.f.WriteAt(p, toyTable*storage.SectorSize)
	return err
}

// checkpoint writes the table home and starts the journal anew.
func (t *toy) checkpoint() error {
	if len(t.pending) > 0 {
		t.seq++ // the table will contain what was never journaled
	}
	if t.bug == earlyTruncate {
		t.free = append(t.free, t.waiting...)
		t.waiting = nil
		if err := t.trim(); err != nil {
			return err
		}
	}
	// The record of the previous period must not be taken for a part of this one: the table, which is about to
	// be overwritten in two sectors, is only complete together with the journal until the header says otherwise.
	if err := t.f.Sync(); err != nil {
		return err
	}
	if err := t.writeTable(); err != nil {
		return err
	}
	if t.bug != headerBeforeTable {
		if err := t.f.Sync(); err != nil {
			return err
		}
	}
	if err := t.writeHeader(); err != nil {
		return err
	}
	if t.bug != noHeaderBarrier {
		if err := t.f.Sync(); err != nil {
			return err
		}
	}
	t.slot = 0
	if err := t.release(); err != nil {
		return err
	}
	return t.trim()
}

// trim cuts free sectors off the end of the file.
func (t *toy) trim() error {
	slices.Sort(t.free)
	end := t.end
	for len(t.free) > 0 && t.free[len(t.free)-1] == end-1 {
		t.free = t.free[:len(t.free)-1]
		end--
	}
	if end == t.end {
		return nil
	}
	t.end = end
	return t.f.Truncate(int64(end) * storage.SectorSize)
}

func (t *toy) Size() int64 { return toyValues * storage.SectorSize }

// Check looks for values that share a sector or lie outside the file.
func (t *toy) Check() error {
	owner := make(map[uint32]int)
	for k, at := range t.place {
		if at == 0 {
			continue
		}
		if at < toyData || at >= t.end {
			return fmt.Errorf("toy: value %d lies in sector %d: want %d to %d", k, at, toyData, t.end-1)
		}
		if other, taken := owner[at]; taken {
			return fmt.Errorf("toy: values %d and %d share sector %d", other, k, at)
		}
		owner[at] = k
	}
	return nil
}

func (t *toy) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err == nil {
		t.err = t.checkpoint()
	}
	err := t.err
	t.err = errors.New("toy: closed")
	return errors.Join(err, t.f.Close())
}
