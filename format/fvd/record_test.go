package fvd

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// TestSectorVector is the worked vector of FVD specification 1.5: chunk size 1 MiB, a write of 16 sectors at sector
// 4090, epoch 0x11, chunks 1 and 2 mapped to 5 and 6.
func TestSectorVector(t *testing.T) {
	want, err := hex.DecodeString(vectorHex)
	if err != nil {
		t.Fatal(err)
	}
	want = append(want, make([]byte, sectorSize-len(want))...)

	g := geometry{size: 64 << 20, chunkSize: 1 << 20, blockSize: 64 << 10, baseSize: 64 << 20}
	m := &metadata{g: g, table: newTable(g.chunks()), crc: castagnoliTable()}
	m.table.set(1, 5|entryDirty)
	m.table.set(2, 6|entryDirty)
	p := packer{j: &journal{m: m, next: 0x11, unit: sectorSize}, buf: make([]byte, 0, sectorSize)}
	if !p.add(&span{off: 4090 * 512, end: 4106 * 512, bits: true, entries: true}) {
		t.Fatal("the span does not fit")
	}
	if got := p.finish(); !bytes.Equal(got, want) {
		t.Fatalf("got\n%swant\n%s", hex.Dump(got[:64]), hex.Dump(want[:64]))
	}

	state, records, _ := openSector(want, false, m.crc)
	if state != sectorLive {
		t.Fatalf("the sector is %v", state)
	}
	r := recordReader{rest: records}
	rec, ok, err := r.next()
	if !ok || err != nil || !rec.table || rec.epoch != 0x11 || rec.first != 1 || rec.count() != 2 || rec.entry(1) != 6|entryDirty {
		t.Errorf("TABLE record: %+v %v %v", rec, ok, err)
	}
	rec, ok, err = r.next()
	if !ok || err != nil || rec.table || rec.sector != 4090 || rec.sectors != 16 {
		t.Errorf("BITMAP record: %+v %v %v", rec, ok, err)
	}
	if _, ok, err = r.next(); ok || err != nil {
		t.Errorf("after the last record: %v %v", ok, err)
	}
}

const vectorHex = "acf7e6b411000000" + "0000000002000000" + "0100000005000080" +
	"06000080edb82aef" + "10000000fa0f0000" + "00000000a5a5a5a5"

// TestSectorCapacities: the entries a sector holds are those of the specification, so that nothing is cut off
// before its terminator and no byte is wasted.
func TestSectorCapacities(t *testing.T) {
	for _, c := range []struct {
		trailer, bits bool
		want          int
	}{
		{false, false, 123}, {false, true, 119}, {true, false, 118}, {true, true, 114},
	} {
		g := geometry{size: 1 << 30, chunkSize: 1 << 20, trailer: c.trailer}
		if c.bits {
			g.blockSize, g.baseSize = 64<<10, 1<<30
		}
		m := &metadata{g: g, table: newTable(g.chunks()), crc: castagnoliTable()}
		for i := range g.chunks() {
			m.table.set(i, entry(i)|entryDirty)
		}
		p := packer{j: &journal{m: m, next: 1, unit: sectorSize}, buf: make([]byte, 0, 64*sectorSize)}
		if !p.add(&span{off: 0, end: guestOffset(g.size), bits: c.bits, entries: true}) {
			t.Fatal("no room")
		}
		b := p.finish()
		if n := (1024 + c.want - 1) / c.want; len(b) != n*sectorSize {
			t.Errorf("%+v: %d sectors, want %d", c, len(b)/sectorSize, n)
		}
		_, records, _ := openSector(b[:sectorSize], c.trailer, m.crc)
		r := recordReader{rest: records}
		if rec, ok, err := r.next(); !ok || err != nil || rec.count() != c.want {
			t.Errorf("%+v: first record has %d entries (%v)", c, rec.count(), err)
		}
	}
}

// TestPackerCoversExactly: whatever the spans, the records of all sectors together say exactly what the spans said,
// and every bit is in a sector with the mappings of its chunks.
func TestPackerCoversExactly(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		g := geometry{
			size: 4 << 20, chunkSize: 4096, blockSize: rapid.SampledFrom([]int64{512, 1024, 4096}).Draw(t, "block"),
			baseSize: guestOffset(rapid.IntRange(1, 8192).Draw(t, "base") * 512), trailer: rapid.Bool().Draw(t, "trailer"),
		}
		m := &metadata{g: g, table: newTable(g.chunks()), crc: castagnoliTable()}
		for i := range g.chunks() {
			m.table.set(i, entry(i)|entryDirty)
		}
		j := &journal{m: m, next: 1, unit: sectorSize}
		wantSectors, wantChunks := map[uint64]bool{}, map[uint32]bool{}
		gotSectors, gotChunks := map[uint64]bool{}, map[uint32]bool{}
		n := rapid.IntRange(1, 20).Draw(t, "spans")
		var spans []span
		for range n {
			a := rapid.IntRange(0, 8191).Draw(t, "from")
			b := rapid.IntRange(a+1, min(8192, a+3000)).Draw(t, "to")
			s := span{off: guestOffset(a) * 512, end: guestOffset(b) * 512, entries: true, bits: rapid.Bool().Draw(t, "bits")}
			spans = append(spans, s)
			first, last := g.chunkRange(s.off, s.end)
			for c := first; c < last; c++ {
				wantChunks[uint32(c)] = true
			}
			for i := a; i < b && s.bits; i++ {
				wantSectors[uint64(i)] = true
			}
		}
		lastEpoch := epoch(0)
		for len(spans) > 0 {
			p := packer{j: j, buf: make([]byte, 0, 8*sectorSize)}
			for len(spans) > 0 && p.add(&spans[0]) {
				spans = spans[1:]
			}
			for b := p.finish(); len(b) > 0; b = b[sectorSize:] {
				state, records, _ := openSector(b[:sectorSize], g.trailer, m.crc)
				if state != sectorLive {
					t.Fatalf("sector is %v", state)
				}
				here := map[chunkIndex]bool{}
				r := recordReader{rest: records}
				for {
					rec, ok, err := r.next()
					if err != nil {
						t.Fatal(err)
					}
					if !ok {
						break
					}
					if err := rec.validate(&g); err != nil {
						t.Fatal(err)
					}
					if rec.table {
						if rec.epoch <= lastEpoch {
							t.Fatalf("epoch %d after %d", rec.epoch, lastEpoch)
						}
						lastEpoch = rec.epoch
						for i := range rec.count() {
							gotChunks[rec.first+uint32(i)] = true
							here[chunkIndex(rec.first)+chunkIndex(i)] = true
						}
						continue
					}
					first, last := g.chunkRange(rec.guestRange())
					for c := first; c < last; c++ {
						if !here[c] {
							t.Fatalf("bits of chunk %d without its mapping in the sector", c)
						}
					}
					for i := range rec.sectors {
						gotSectors[rec.sector+uint64(i)] = true
					}
				}
			}
		}
		if len(gotSectors) != len(wantSectors) || len(gotChunks) != len(wantChunks) {
			t.Fatalf("%d sectors and %d chunks recorded, want %d and %d", len(gotSectors), len(gotChunks), len(wantSectors), len(wantChunks))
		}
		for s := range wantSectors {
			if !gotSectors[s] {
				t.Fatalf("sector %d is missing", s)
			}
		}
	})
}

func TestTrailer(t *testing.T) {
	crc := castagnoliTable()
	sec := make([]byte, sectorSize)
	n := len(appendBitmapRecord(sec[:0], 5, 6))
	sealSector(sec, n, true, 99, crc)
	state, _, generation := openSector(sec, true, crc)
	if state != sectorLive || generation != 99 {
		t.Fatalf("state %v, generation %d", state, generation)
	}
	// A parser that knows no trailer stops at EMPTY before it.
	r := recordReader{rest: sec}
	if _, ok, err := r.next(); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if _, ok, err := r.next(); ok || err != nil {
		t.Fatalf("a 2011 parser reads on: %v %v", ok, err)
	}
	for i := range sec {
		sec[i] ^= 0x10
		if state, _, _ := openSector(sec, true, crc); state == sectorLive {
			t.Errorf("a flip in byte %d goes unnoticed", i)
		}
		sec[i] ^= 0x10
	}
}

// TestD17_D18_D19_D20_RecordValidation: a record that does not fit is refused as a whole.
func TestD17_D18_D19_D20_RecordValidation(t *testing.T) {
	g := geometry{size: 1 << 20, chunkSize: 4096, blockSize: 512, baseSize: 1 << 20}
	noTable := geometry{size: 1 << 20, blockSize: 512, baseSize: 1 << 20}
	unmap := g
	unmap.unmap = true
	tableRecord := func(first uint32, entries ...entry) []byte {
		b := appendTableHead(nil, 5, uint32(len(entries)), first)
		for _, e := range entries {
			b = binary.LittleEndian.AppendUint32(b, uint32(e))
		}
		return b
	}
	for _, c := range []struct {
		name string
		g    *geometry
		raw  []byte
		want string // "": accepted
	}{
		{"mapping", &g, tableRecord(3, 7|entryDirty), ""},
		{"D-17 too many entries for the table", &g, tableRecord(255, 1|entryDirty, 2|entryDirty), "256 chunks"},
		{"D-17 first past the table", &g, tableRecord(0xFFFFFFFF, 1|entryDirty), "256 chunks"},
		{"D-17 no entries", &g, tableRecord(0), "0 entries"},
		{"D-17 count past the sector", &g, appendTableHead(nil, 5, 0xFFFFFFFF, 0), "ends past its sector"},
		{"D-17 head past the sector", &g, tableRecord(3, 7)[:12], "ends past its sector"},
		{"D-18 no table", &noTable, tableRecord(3, 7|entryDirty), "without a lookup table"},
		{"D-19 begin past the disk", &g, appendBitmapRecord(nil, 1<<63, 1), "2048 sectors"},
		{"D-19 count past the disk", &g, appendBitmapRecord(nil, 2047, 2), "2048 sectors"},
		{"D-19 no sectors", &g, appendBitmapRecord(nil, 0, 0), "0 sectors"},
		{"D-19 cut off", &g, appendBitmapRecord(nil, 0, 1)[:9], "ends past its sector"},
		{"D-20 EMPTY without the feature", &g, tableRecord(0, entryEmpty), "0xffffffff"},
		{"D-20 the unusable id", &unmap, tableRecord(0, entryUnmapped), "0x7fffffff"},
		{"EMPTY with the feature", &unmap, tableRecord(0, entryEmpty), ""},
		{"D-22 epoch 0", &g, appendTableHead(nil, 0, 0, 0), "epoch 0"},
		{"D-22 epoch near wrapping", &g, appendTableHead(nil, 1<<63, 0, 0), "epoch 9223372036854775808"},
		{"D-21 unknown type", &g, []byte("\x01\x02\x03\x04"), "unknown record type 0x04030201"},
	} {
		r := recordReader{rest: c.raw}
		rec, ok, err := r.next()
		if err == nil && ok {
			err = rec.validate(c.g)
		}
		if c.want == "" && (err != nil || !ok) || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

// TestD26_NoGarbageAfterRecords: what a sector does not need is zero, whatever the buffer held.
func TestD26_NoGarbageAfterRecords(t *testing.T) {
	g := geometry{size: 1 << 20, chunkSize: 4096}
	m := &metadata{g: g, table: newTable(g.chunks()), crc: castagnoliTable()}
	m.table.set(0, 9|entryDirty)
	buf := bytes.Repeat([]byte{0xEE}, journalUnit)
	p := packer{j: &journal{m: m, next: 1, unit: journalUnit}, buf: buf[:0]}
	p.add(&span{off: 0, end: 4096, entries: true})
	b := p.finish()
	if len(b) != journalUnit {
		t.Fatalf("%d bytes", len(b))
	}
	if i := bytes.IndexByte(b, 0xEE); i >= 0 {
		t.Errorf("old buffer contents at byte %d", i)
	}
	for off := sectorSize; off < len(b); off += sectorSize {
		if binary.LittleEndian.Uint32(b[off:]) != recordEmpty {
			t.Errorf("padding sector at %d does not begin with EMPTY", off)
		}
	}
}

func FuzzJournalSector(f *testing.F) {
	sec := make([]byte, sectorSize)
	sealSector(sec, len(appendBitmapRecord(sec[:0], 5, 6)), true, 1, castagnoliTable())
	f.Add(sec, true)
	v, err := hex.DecodeString(vectorHex)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(append(v, make([]byte, sectorSize-len(v))...), false)
	f.Fuzz(func(t *testing.T, b []byte, trailer bool) {
		sec := make([]byte, sectorSize)
		copy(sec, b)
		g := geometry{size: 1 << 20, chunkSize: 4096, blockSize: 512, baseSize: 1 << 19, trailer: trailer, unmap: trailer}
		m := &metadata{g: g, table: newTable(g.chunks()), fresh: newBitset(g.blocks()), tablePages: newPageSet(1), bitmapPages: newPageSet(1), crc: castagnoliTable()}
		state, records, _ := openSector(sec, trailer, m.crc)
		if state != sectorLive {
			return
		}
		best := make([]epoch, len(m.table))
		r := recordReader{rest: records}
		for {
			rec, ok, err := r.next()
			if !ok || err != nil || rec.validate(&g) != nil {
				break
			}
			if rec.table {
				m.replayTable(&rec, best)
			} else {
				m.setFresh(g.blockRange(rec.guestRange()))
			}
		}
		for c := range m.g.chunks() {
			if e := m.table.get(c); e != entryEmpty && e >= maxChunks {
				t.Fatalf("entry %d is %#x", c, e)
			}
		}
	})
}
