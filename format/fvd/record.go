package fvd

import (
	"encoding/binary"
	"fmt"
)

// Record types (FVD specification 1.5). BITMAP has a second value in the wiki's text, accepted on reading.
const (
	recordBitmap     = 0xEF2AB8ED
	recordBitmapWiki = 0x3F2AB8ED
	recordTable      = 0xB4E6F7AC
	recordEmpty      = 0xA5A5A5A5

	bitmapRecordSize = 16
	tableRecordHead  = 20 // plus 4 bytes an entry
)

// epoch orders TABLE records, and with the trailer feature journal sectors: the higher one is the later one.
type epoch uint64

// record is one journal record. Exactly one of its two halves is meant.
type record struct {
	table bool

	// TABLE: mappings of the chunks from first on.
	epoch   epoch
	first   uint32
	entries []byte // 4 bytes each, as stored

	// BITMAP: the blocks that these guest sectors touch have left the base image.
	sector  uint64
	sectors uint32
}

func (r *record) count() int        { return len(r.entries) / 4 }
func (r *record) entry(i int) entry { return entry(binary.LittleEndian.Uint32(r.entries[4*i:])) }

// guestRange is the range a BITMAP record speaks of.
func (r *record) guestRange() (off, end guestOffset) {
	off = guestOffset(r.sector) * sectorSize
	return off, off + guestOffset(r.sectors)*sectorSize
}

func appendBitmapRecord(b []byte, sector uint64, sectors uint32) []byte {
	b = binary.LittleEndian.AppendUint32(b, recordBitmap)
	b = binary.LittleEndian.AppendUint32(b, sectors)
	return binary.LittleEndian.AppendUint64(b, sector)
}

// appendTableHead begins a TABLE record; the caller appends n entries.
func appendTableHead(b []byte, e epoch, n, first uint32) []byte {
	b = binary.LittleEndian.AppendUint32(b, recordTable)
	b = binary.LittleEndian.AppendUint64(b, uint64(e))
	b = binary.LittleEndian.AppendUint32(b, n)
	return binary.LittleEndian.AppendUint32(b, first)
}

// recordReader yields the records of one journal sector without its trailer.
type recordReader struct {
	rest []byte
}

// next returns the next record; ok is false at the end of the sector. An error says what is wrong with the
// bytes that follow; nothing after them can be read.
func (r *recordReader) next() (rec record, ok bool, err error) {
	if len(r.rest) < 4 {
		return rec, false, nil
	}
	le := binary.LittleEndian
	switch kind := le.Uint32(r.rest); kind {
	case recordBitmap, recordBitmapWiki:
		if len(r.rest) < bitmapRecordSize {
			return rec, false, fmt.Errorf("BITMAP record of %d bytes ends past its sector", bitmapRecordSize)
		}
		rec.sectors, rec.sector = le.Uint32(r.rest[4:]), le.Uint64(r.rest[8:])
		r.rest = r.rest[bitmapRecordSize:]
		return rec, true, nil
	case recordTable:
		if len(r.rest) < tableRecordHead {
			return rec, false, fmt.Errorf("TABLE record head of %d bytes ends past its sector", tableRecordHead)
		}
		n := le.Uint32(r.rest[12:])
		if n > uint32(len(r.rest)-tableRecordHead)/4 {
			return rec, false, fmt.Errorf("TABLE record of %d entries ends past its sector", n)
		}
		end := tableRecordHead + 4*int(n)
		rec = record{table: true, epoch: epoch(le.Uint64(r.rest[4:])), first: le.Uint32(r.rest[16:]), entries: r.rest[tableRecordHead:end]}
		r.rest = r.rest[end:]
		return rec, true, nil
	case recordEmpty, 0: // zeros: journals that were never filled with EMPTY
		return rec, false, nil
	default:
		return rec, false, fmt.Errorf("unknown record type %#08x", kind)
	}
}

// validate checks a record as a whole against the image, before anything of it is applied.
func (r *record) validate(g *geometry) error {
	if !r.table {
		disk := uint64(g.size) / sectorSize
		if r.sectors == 0 || r.sector > disk || uint64(r.sectors) > disk-r.sector {
			return fmt.Errorf("BITMAP record of %d sectors at %d: the disk has %d sectors", r.sectors, r.sector, disk)
		}
		return nil
	}
	if !g.compact() {
		return fmt.Errorf("TABLE record in an image without a lookup table")
	}
	if r.epoch == 0 || r.epoch >= maxEpoch {
		return fmt.Errorf("TABLE record with epoch %d, want 1 to 2^63-1", r.epoch)
	}
	if n := chunkIndex(r.count()); n == 0 || chunkIndex(r.first) > g.chunks() || n > g.chunks()-chunkIndex(r.first) {
		return fmt.Errorf("TABLE record of %d entries from chunk %d: the disk has %d chunks", n, r.first, g.chunks())
	}
	for i := range r.count() {
		switch e := r.entry(i); {
		case e == entryEmpty && g.unmap:
		case !e.mapped() || e.id() >= maxChunks:
			return fmt.Errorf("TABLE record entry %#08x of chunk %d: want a chunk number below %#x", uint32(e), int(r.first)+i, maxChunks)
		}
	}
	return nil
}
