package fvd

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/platter-disk/platter/storage"
)

// ruled is an image file that refuses writes of metadata which break the rules of FVD specification 5; numbers in
// brackets are its invariants. What needs the data as well is for crash exploration.
type ruled struct {
	storage.File

	mu      sync.Mutex
	h       *Header // as in the file
	highest epoch   // of all epochs and generations written so far
	journal []epoch // the highest in each sector
	durable Header  // what a completed Sync covered
}

// newRuled takes f as it is.
func newRuled(f storage.File) (*ruled, error) {
	h, err := ReadHeader(f)
	if err != nil {
		return nil, err
	}
	r := &ruled{File: f, h: h, highest: epoch(h.StableEpoch), journal: make([]epoch, h.JournalSize/sectorSize), durable: *h}
	p := make([]byte, h.JournalSize)
	if err := storage.ReadFull(f, p, int64(h.JournalOffset)); err != nil {
		return nil, err
	}
	for i := range r.journal {
		for _, e := range epochsOf(p[i*sectorSize:(i+1)*sectorSize], h) {
			r.journal[i] = max(r.journal[i], e)
		}
		r.highest = max(r.highest, r.journal[i])
	}
	return r, nil
}

// epochsOf lists the epochs in a journal sector in order, its generation last.
func epochsOf(sec []byte, h *Header) (all []epoch) {
	state, rest, generation := openSector(sec, h.Features&FeatureJournalTrailer != 0, castagnoliTable())
	if state != sectorLive {
		return nil
	}
	rd := recordReader{rest: rest}
	for {
		rec, ok, err := rd.next()
		if err != nil || !ok {
			break
		}
		if rec.table {
			all = append(all, rec.epoch)
		}
	}
	if generation > 0 {
		all = append(all, generation)
	}
	return all
}

func within(off, n int64, start, length uint64) bool {
	return off >= int64(start) && off+n <= int64(start+length)
}

func (r *ruled) WriteAt(p []byte, off int64) (int, error) {
	r.mu.Lock()
	h := r.h
	var check func(p []byte, off int64) error
	switch n := int64(len(p)); {
	case off < headerSize:
		check = r.headerWrite
	case within(off, n, h.JournalOffset, h.JournalSize):
		check = r.journalWrite
	case h.hasBitmap() && within(off, n, h.BitmapOffset, h.BitmapSize):
		check = r.bitmapWrite
	case h.hasTable() && within(off, n, h.TableOffset, h.TableSize):
		check = r.tableWrite
	default:
		r.mu.Unlock()
		return r.File.WriteAt(p, off)
	}
	defer r.mu.Unlock()
	if err := check(p, off); err != nil {
		return 0, fmt.Errorf("against the rules: write of %d bytes at %d: %w", len(p), off, err)
	}
	return r.File.WriteAt(p, off)
}

func (r *ruled) Sync() error {
	r.mu.Lock()
	h := *r.h
	r.mu.Unlock()
	if err := r.File.Sync(); err != nil {
		return err
	}
	r.mu.Lock()
	r.durable = h
	r.mu.Unlock()
	return nil
}

// headerWrite wants the stable epoch to grow [16] and to be one that was handed out.
func (r *ruled) headerWrite(p []byte, off int64) error {
	b := make([]byte, headerSize)
	if err := storage.ReadFull(r.File, b, 0); err != nil {
		return err
	}
	copy(b[off:], p)
	h, err := decodeHeader(b)
	if err != nil {
		return err
	}
	if h.StableEpoch < r.h.StableEpoch {
		return fmt.Errorf("stable_journal_epoch goes back from %d to %d", r.h.StableEpoch, h.StableEpoch)
	}
	r.h = h
	r.highest = max(r.highest, epoch(h.StableEpoch))
	return nil
}

// journalWrite wants whole sectors of valid records.
func (r *ruled) journalWrite(p []byte, off int64) error {
	if r.durable.CleanShutdown {
		return fmt.Errorf("a journal write before clean_shutdown=0 is durable [21]")
	}
	g := r.h.geometry()
	for ; len(p) > 0; p, off = p[sectorSize:], off+sectorSize {
		sec := p[:sectorSize]
		if err := r.sectorWrite(sec, &g); err != nil {
			return fmt.Errorf("journal sector %d: %w", (off-int64(g.journalAt))/sectorSize, err)
		}
		was := &r.journal[(off-int64(g.journalAt))/sectorSize]
		if *was > epoch(r.durable.StableEpoch) {
			return fmt.Errorf("overwrites epoch %d, checkpoints are durable up to %d [18]", *was, r.durable.StableEpoch)
		}
		*was = 0
		for _, e := range epochsOf(sec, r.h) {
			if e <= r.highest || e <= epoch(r.h.StableEpoch) {
				return fmt.Errorf("epoch %d, want more than %d [16]", e, max(r.highest, epoch(r.h.StableEpoch)))
			}
			*was, r.highest = e, e
		}
	}
	return nil
}

// sectorWrite wants records, then EMPTY or the exact end, and bits only with the mappings of their range [15].
func (r *ruled) sectorWrite(sec []byte, g *geometry) error {
	state, rest, _ := openSector(sec, g.trailer, castagnoliTable())
	if state == sectorDamaged {
		return fmt.Errorf("its checksum is wrong")
	}
	var mapped []chunkIndex // told in this sector
	rd := recordReader{rest: rest}
	for {
		rec, ok, err := rd.next()
		if err == nil && ok {
			err = rec.validate(g)
		}
		if err != nil {
			return err
		}
		if !ok {
			return nil
		}
		if rec.table {
			for i := range rec.count() {
				mapped = append(mapped, chunkIndex(rec.first)+chunkIndex(i))
			}
			continue
		}
		if !g.unmap { // runs that were never mapped are told by their bits alone
			continue
		}
		off, end := rec.guestRange()
		first, last := g.chunkRange(off, end)
		for c := first; c < last; c++ { // of which only a part was zeroed: likewise
			whole := off <= g.chunkStart(c) && g.chunkEnd(c) <= end
			if whole && !slices.Contains(mapped, c) {
				return fmt.Errorf("bits of chunk %d without its mapping", c)
			}
		}
	}
}

// bitmapWrite wants bits to stay [10], and none past the last block [7].
func (r *ruled) bitmapWrite(p []byte, off int64) error {
	old := make([]byte, len(p))
	if err := storage.ReadFull(r.File, old, off); err != nil {
		return err
	}
	g := r.h.geometry()
	for i := range p {
		at := off - int64(r.h.BitmapOffset) + int64(i)
		if old[i]&^p[i] != 0 {
			return fmt.Errorf("byte %d of the bitmap goes from %#x to %#x: bits are cleared", at, old[i], p[i])
		}
		if beyond := max(0, min(8, 8*(at+1)-int64(g.blocks()))); p[i]>>(8-beyond) != 0 {
			return fmt.Errorf("byte %d of the bitmap is %#x: there are %d blocks", at, p[i], g.blocks())
		}
	}
	return nil
}

// tableWrite wants no entry with a DIRTY mark [11].
func (r *ruled) tableWrite(p []byte, off int64) error {
	for i := 0; i+4 <= len(p); i += 4 {
		if e := entry(binary.LittleEndian.Uint32(p[i:])); e != entryEmpty && e&entryDirty != 0 {
			return fmt.Errorf("entry %d is %#x, with its DIRTY mark", (off-int64(r.h.TableOffset))/4+int64(i)/4, uint32(e))
		}
	}
	return nil
}

// TestRulesNotice: the rules that TestModel and TestLinearizable run under refuse what breaks them.
func TestRulesNotice(t *testing.T) {
	base := newBase(200 << 10)
	o := smallCompact(8192)
	o.Base, o.BaseImage = base, "base"
	f := made(t, o)
	im := opened(t, f, Options{Base: borrowedDevice{base}})
	put(t, im, 0, filled(1, 4096))
	must(t, im.Checkpoint())
	put(t, im, 8192, filled(2, 4096)) // its record lies in the second half of the journal
	must(t, im.Flush())
	h, g := im.Header(), im.m.g
	free, used := int64(g.journalAt), int64(g.journalAt)+4096
	sector := func(generation epoch, records []byte) []byte {
		sec := make([]byte, sectorSize)
		sealSector(sec, copy(sec, records), true, generation, castagnoliTable())
		return sec
	}
	bits := appendBitmapRecord(nil, 0, 8)
	dirty := binary.LittleEndian.AppendUint32(nil, 1|uint32(entryDirty))
	outdated := h
	outdated.StableEpoch--
	back, err := outdated.encode()
	must(t, err)
	torn := sector(1<<40, bits)
	torn[0]++
	mixed := append(binary.LittleEndian.AppendUint32(appendTableHead(nil, 1<<39, 1, 0), 0), bits...)
	for _, c := range []struct {
		what string
		p    []byte
		off  int64
		want string
	}{
		{"stable epoch", back[mutableSector:][:sectorSize], mutableSector, "goes back"},
		{"bits alone", sector(1<<40, bits), free, "without its mapping"},
		{"torn", torn, free, "checksum"},
		{"old epoch", sector(2, mixed), free, "[16]"},
		{"reuse", sector(1<<40, mixed), used, "[18]"},
		{"a bit cleared", make([]byte, pageSize), int64(g.bitmapAt), "cleared"},
		{"a stray bit", filled(0xFF, pageSize), int64(g.bitmapAt), "there are 50 blocks"},
		{"DIRTY mark", dirty, int64(g.tableStart), "DIRTY"},
		{"nothing wrong", sector(1<<40, mixed), free, ""},
	} {
		t.Run(c.what, func(t *testing.T) {
			left := clone(f)
			if c.want == "cleared" {
				_, err := left.WriteAt([]byte{1}, int64(g.bitmapAt))
				must(t, err)
			}
			r, err := newRuled(left)
			must(t, err)
			_, err = r.WriteAt(c.p, c.off)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
	must(t, im.Close())
	r, err := newRuled(f)
	must(t, err)
	if _, err := r.WriteAt(sector(1<<40, mixed), free); err == nil || !strings.Contains(err.Error(), "[21]") {
		t.Errorf("a record in a clean image: %v", err)
	}
}
