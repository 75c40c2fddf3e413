package qcow2

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"math/rand/v2"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/platter-disk/platter/storage"
)

// craftedJournal is an image with a pending journal that a test writes block by block.
type craftedJournal struct {
	file  *storage.Memory
	h     *Header
	super superblock
	lsn   uint64
	tx    uint64
}

// craftJournal makes an image with an empty journal of size bytes past its end.
func craftJournal(t testing.TB, clusterSize, size int64) *craftedJournal {
	t.Helper()
	f := storage.NewMemory("image")
	if err := Create(f, CreateOptions{Size: 1 << 20, Version: 3, ClusterSize: clusterSize}); err != nil {
		t.Fatal(err)
	}
	h, err := ReadHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	at := max(clusterSize*8, 1<<20)
	h.Journal = &JournalExtension{Offset: uint64(at), Size: uint64(size), UUID: [16]byte{1}, BlockOrder: min(defaultBlockOrder, h.ClusterBits)}
	h.Incompatible |= IncompatJournal
	c := &craftedJournal{file: f, h: h, lsn: 1, tx: 1, super: superblock{
		uuid: h.Journal.UUID, session: [16]byte{2}, generation: 1, tail: 1, tailTx: 1,
		blocks: h.Journal.ringBlocks(), blockSize: uint32(h.Journal.blockSize()),
	}}
	raw, err := h.Encode()
	if err != nil {
		t.Fatal(err)
	}
	c.write(t, raw, 0)
	c.write(t, c.super.encode(), at+h.Journal.blockSize())
	if err := f.Truncate(at + size); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *craftedJournal) write(t testing.TB, p []byte, at int64) {
	t.Helper()
	if _, err := c.file.WriteAt(p, at); err != nil {
		t.Fatal(err)
	}
}

// payload is the room for records in a block.
func (c *craftedJournal) payload() int { return int(c.h.Journal.blockSize()) - ringHeaderSize }

// block writes the next transaction, of one block with the given records, as far as the ring goes.
func (c *craftedJournal) block(t testing.TB, records []byte, durable uint64) {
	t.Helper()
	j := c.h.Journal
	b := make([]byte, j.blockSize())
	used := copy(b[ringHeaderSize:], records)
	h := ringHeader{session: c.super.session, lsn: c.lsn, tx: c.tx, count: 1, used: uint32(used), durable: durable}
	h.seal(b)
	c.write(t, b, int64(j.Offset)+int64(2+c.lsn%j.ringBlocks())*j.blockSize())
	c.lsn, c.tx = c.lsn+1, c.tx+1
}

// rawRecord encodes a record.
func rawRecord(kind uint8, length uint32, target uint64, body []byte) []byte {
	be := binary.BigEndian
	size := recordHeaderSize + (len(body)+7)&^7
	p := make([]byte, size)
	p[0] = kind
	be.PutUint16(p[2:], uint16(size))
	be.PutUint32(p[4:], length)
	be.PutUint64(p[8:], target)
	copy(p[recordHeaderSize:], body)
	return p
}

// TestReplayMatchesModel compares a replay with the plainest one: records applied in order, byte by byte, past
// what a later REVOKE covers.
func TestReplayMatchesModel(t *testing.T) {
	const (
		base = 0x10000 // where records aim
		area = 6 * sectorSize
	)
	rapid.Check(t, func(rt *rapid.T) {
		c := craftJournal(t, 65536, 1<<20)
		old := bytes.Repeat([]byte{0xee}, area)
		c.write(t, old, base)
		type step struct {
			kind   uint8
			lsn    uint64
			at, n  int
			filler []byte
		}
		var steps []step
		for range rapid.IntRange(1, 6).Draw(rt, "blocks") {
			var records []byte
			for range rapid.IntRange(0, 12).Draw(rt, "records") {
				s := step{lsn: c.lsn, kind: rapid.SampledFrom([]uint8{recordWrite, recordFill, recordRevoke}).Draw(rt, "kind")}
				s.at = rapid.IntRange(0, area-8).Draw(rt, "at")
				s.n = rapid.IntRange(0, area-s.at).Draw(rt, "n")
				mark := byte(len(steps) + 1)
				switch s.kind {
				case recordWrite:
					s.n = min(s.n, 200)
					s.filler = bytes.Repeat([]byte{mark}, max(s.n, 1))
					records = append(records, rawRecord(s.kind, uint32(s.n), base+uint64(s.at), s.filler[:s.n])...)
				case recordFill:
					s.n &^= 7
					s.filler = []byte{mark, 1, 2, 3, 4, 5, 6, 7}
					records = append(records, rawRecord(s.kind, uint32(s.n), base+uint64(s.at), s.filler)...)
				case recordRevoke:
					records = append(records, rawRecord(s.kind, uint32(s.n), base+uint64(s.at), nil)...)
				}
				steps = append(steps, s)
			}
			c.block(t, records, c.lsn)
		}
		want := bytes.Clone(old)
		for _, s := range steps {
			for i := 0; i < s.n && s.kind != recordRevoke; i++ {
				revoked := false
				for _, r := range steps {
					revoked = revoked || r.kind == recordRevoke && r.lsn > s.lsn && s.at+i >= r.at && s.at+i < r.at+r.n
				}
				if !revoked {
					want[s.at+i] = s.filler[i%len(s.filler)]
				}
			}
		}
		view, _, err := journalOverlay(c.file, c.h)
		if err != nil {
			rt.Fatal(err)
		}
		got := make([]byte, area)
		if err := storage.ReadFull(view, got, base); err != nil {
			rt.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			rt.Fatalf("%d records: the replay differs from the model", len(steps))
		}
		if err := recoverJournal(c.file, c.h, ""); err != nil {
			rt.Fatal(err)
		}
		if err := storage.ReadFull(c.file, got, base); err != nil {
			rt.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			rt.Fatalf("%d records: the recovered file differs from the model", len(steps))
		}
	})
}

// readCounter counts reads of a range of a file, and what they fetch.
type readCounter struct {
	storage.File
	from, to     int64
	calls, bytes int64
}

func (r *readCounter) ReadAt(p []byte, off int64) (int, error) {
	if off >= r.from && off < r.to {
		r.calls++
		r.bytes += int64(len(p))
	}
	return r.File.ReadAt(p, off)
}

// fullRing fills a ring of 4 MiB with what a hostile writer may think of.
func fullRing(t *testing.T, records func(r *rand.Rand, i int) []byte) *craftedJournal {
	t.Helper()
	c := craftJournal(t, 65536, 4<<20)
	r := rand.New(rand.NewPCG(1, 2))
	for n := c.h.Journal.ringBlocks(); c.lsn <= n; {
		var payload []byte
		for i := 0; ; i++ {
			p := records(r, i)
			if len(payload)+len(p) > c.payload() {
				break
			}
			payload = append(payload, p...)
		}
		c.block(t, payload, 0)
	}
	return c
}

// TestReplayIsLinear replays rings that are full of records and revokes of the same places: the work is bounded by
// the number of records and what they change, not by their product.
func TestReplayIsLinear(t *testing.T) {
	withoutRace(t)
	const where = 1 << 40
	eight := make([]byte, 8)
	for name, records := range map[string]func(r *rand.Rand, i int) []byte{
		"words and revokes": func(r *rand.Rand, i int) []byte {
			at := where + uint64(r.IntN(1<<16))*8
			if i%2 == 0 {
				return rawRecord(recordRevoke, 1<<16, at, nil)
			}
			return rawRecord(recordWrite, 8, at, eight)
		},
		"long fills": func(r *rand.Rand, _ int) []byte {
			return rawRecord(recordFill, 32<<20, where+uint64(r.IntN(4096))*8, eight)
		},
		"long fills under small revokes": func(r *rand.Rand, i int) []byte {
			if i%4 != 0 {
				return rawRecord(recordRevoke, 8, where+uint64(r.IntN(1<<20))*24, nil)
			}
			return rawRecord(recordFill, 32<<20, where+uint64(r.IntN(4096))*8, eight)
		},
		"long fills under long revokes": func(r *rand.Rand, i int) []byte {
			at := where + uint64(r.IntN(1<<20))*sectorSize
			if i%2 == 0 {
				return rawRecord(recordRevoke, 3<<30, at, nil)
			}
			return rawRecord(recordFill, 1<<31, at, eight)
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := fullRing(t, records)
			counter := &readCounter{File: c.file, from: int64(c.h.Journal.Offset), to: int64(c.h.Journal.Offset + c.h.Journal.Size)}
			l, err := scanJournal(counter, c.h, "")
			if err != nil {
				t.Fatal(err)
			}
			blocks := int(c.h.Journal.ringBlocks())
			if l.pending != blocks {
				t.Fatalf("%d transactions found, want %d", l.pending, blocks)
			}
			found := len(l.revokes)
			p := newReplayer(l)
			if err := p.run(); err != nil && !strings.Contains(err.Error(), "changes more than") {
				t.Fatal(err)
			}
			steps := p.steps
			inRing := blocks * (c.payload() / recordHeaderSize)
			if most := 8 * (inRing + c.h.Journal.replaySectors()); steps > most {
				t.Errorf("%d steps for a ring with room for %d records, %d of them revokes; want at most %d", steps, inRing, found, most)
			}
			if most := 3*int64(c.h.Journal.Size/ringReadBytes) + 8; counter.calls > most || counter.bytes > 3*int64(c.h.Journal.Size) {
				t.Errorf("the ring of %d bytes was read in %d calls, %d bytes; want at most %d calls", c.h.Journal.Size, counter.calls, counter.bytes, most)
			}
		})
	}
}

// TestReplayRefusals: journals that ask for more than a replay may change or that aim where none may are refused,
// and the file stays as it was.
func TestReplayRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		records []byte
		want    string
	}{
		"too much":        {rawRecord(recordFill, 1<<31, 1<<30, make([]byte, 8)), "changes more than"},
		"feature bits":    {rawRecord(recordWrite, 8, 72, make([]byte, 8)), "not metadata"},
		"the journal":     {rawRecord(recordWrite, 8, 1<<20, make([]byte, 8)), "not metadata"},
		"past the end":    {rawRecord(recordWrite, 8, 1<<60, make([]byte, 8)), "not metadata"},
		"unknown record":  {rawRecord(99, 0, 0, nil), "unknown type 99"},
		"a huge file":     {rawRecord(recordSize, 0, 1<<61, nil), "a file of"},
		"a huge checksum": {rawRecord(recordData, 1<<31, 1<<30, make([]byte, 8)), "checksums of more than"},
		"checked header":  {rawRecord(recordData, 512, 0, make([]byte, 8)), "not metadata"},
	} {
		t.Run(name, func(t *testing.T) {
			j := craftJournal(t, 65536, 1<<20)
			j.block(t, c.records, 0)
			before := make([]byte, 2<<20)
			if err := storage.ReadFull(j.file, before, 0); err != nil {
				t.Fatal(err)
			}
			_, err := Open(keepOpen{j.file}, Options{})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("open: %v; want %q", err, c.want)
			}
			after := make([]byte, len(before))
			if err := storage.ReadFull(j.file, after, 0); err != nil || !bytes.Equal(before, after) {
				t.Errorf("the file was changed (%v)", err)
			}
		})
	}
}

// TestDataChecksumsAtRecovery: a transaction with a checksum of data that is not there counts only if a later block
// says that it had been durable, and ends the log else.
func TestDataChecksumsAtRecovery(t *testing.T) {
	const data, table = 2 << 20, 0x50000
	sum := func(p []byte) []byte {
		return rawRecord(recordData, uint32(len(p)), data, binary.BigEndian.AppendUint64(nil, uint64(crc32.Checksum(p, castagnoli))<<32))
	}
	there, lost := bytes.Repeat([]byte{7}, 4096), bytes.Repeat([]byte{8}, 4096)
	for name, c := range map[string]struct {
		sums    []byte
		durable uint64 // that the next block says
		next    bool
		applied int
	}{
		"there":               {sum(there), 0, false, 1},
		"lost":                {sum(lost), 0, false, 0},
		"lost, one follows":   {sum(lost), 1, true, 0},
		"overwritten, proven": {sum(lost), 2, true, 2},
	} {
		t.Run(name, func(t *testing.T) {
			j := craftJournal(t, 65536, 1<<20)
			j.write(t, there, data)
			j.block(t, append(c.sums, rawRecord(recordWrite, 8, table, []byte("applied!"))...), 0)
			if c.next {
				j.block(t, rawRecord(recordWrite, 8, table+8, []byte("as well!")), c.durable)
			}
			l, err := scanJournal(j.file, j.h, "")
			if err != nil {
				t.Fatal(err)
			}
			if l.pending != c.applied {
				t.Errorf("%d transactions count, want %d", l.pending, c.applied)
			}
			if err := recoverJournal(j.file, j.h, ""); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 16)
			if err := storage.ReadFull(j.file, got, table); err != nil {
				t.Fatal(err)
			}
			want := make([]byte, 16)
			copy(want, "applied!as well!"[:8*c.applied])
			if !bytes.Equal(got, want) {
				t.Errorf("the table holds %q, want %q", got, want)
			}
		})
	}
}

// TestPackFills: runs of equal words become FILL records, and what is replayed is what was packed.
func TestPackFills(t *testing.T) {
	const table = 0x50000
	r := rand.New(rand.NewPCG(5, 5))
	for range 50 {
		tx := newTransaction()
		want := make([]byte, 65536)
		for at := 0; at < len(want); {
			n, word := 1+r.IntN(20), r.Uint64N(3)
			for ; n > 0 && at < len(want); n, at = n-1, at+8 {
				tx.words[table+hostOff(at)] = word
				binary.BigEndian.PutUint64(want[at:], word)
			}
			at += r.IntN(2) * 8
		}
		w := tx.pack(4096, 16)
		if n := uint64(len(w.blocks)); n > tx.bound(4096) {
			t.Fatalf("%d blocks, at most %d were foreseen", n, tx.bound(4096))
		}
		fills := 0
		j := craftJournal(t, 65536, 1<<20)
		for i, b := range w.blocks {
			records, err := decodeRecords(b[ringHeaderSize:w.used[i]])
			if err != nil {
				t.Fatal(err)
			}
			for _, rec := range records {
				if rec.kind == recordFill {
					fills++
				}
			}
			j.block(t, b[ringHeaderSize:w.used[i]], j.lsn)
		}
		if fills == 0 {
			t.Fatal("no FILL was written")
		}
		if err := recoverJournal(j.file, j.h, ""); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(want))
		if err := storage.ReadFull(j.file, got, table); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Fatal("what was replayed is not what was packed")
		}
	}
	tx := newTransaction()
	for i := range hostOff(8192) {
		tx.words[table+i*8] = entryZero
	}
	if w := tx.pack(4096, 16); len(w.blocks) != 1 || w.used[0] != ringHeaderSize+recordHeaderSize+8 {
		t.Errorf("a table of 8192 equal words takes %d blocks, %v bytes; want one record of 24 bytes", len(w.blocks), w.used)
	}
}
