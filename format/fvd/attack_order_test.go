package fvd

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/platter-disk/platter/storage"
)

// Tests of orders of events that need several requests to meet at the wrong moment. Each brings them together by
// holding one of them up.

// awaitEntry waits until chunk c's entry is as ok wants it.
func awaitEntry(t *testing.T, im *Image, c chunkIndex, ok func(entry) bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(im.m.table.get(c)); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("entry %d is %#x", c, im.m.table.get(c))
		}
	}
}

// TestZeroesBehindACheckpoint: zeroes that find a chunk unmapped by a request that is still under way must not be
// acknowledged on the word of a checkpoint that copied an earlier unmapping of that chunk.
func TestZeroesBehindACheckpoint(t *testing.T) {
	f := made(t, smallCompact(64<<10))
	im := opened(t, f, Options{})
	d, ok := im.discipline.(*immediate)
	if !ok {
		t.Fatalf("discipline is %T", im.discipline)
	}
	results := make(chan error, 2)
	discard := func() { results <- im.Discard(0, 4096) }
	unmapped := func(e entry) bool { return e == entryUnmapped }

	put(t, im, 0, filled(1, 4096))
	must(t, im.Flush())

	// The journal's halves change between a discard's unmapping and its record.
	d.lead.Lock()
	go discard()
	awaitEntry(t, im, 0, unmapped)
	d.awaitIdle()
	full := d.active
	copies := im.m.snapshotTables()
	change := headerChange{seal: d.switchHalf()}
	d.lead.Unlock()
	must(t, <-results)

	put(t, im, 0, filled(2, 4096)) // recorded in the new half
	must(t, im.Flush())

	// The checkpoint ends between another discard's unmapping and its record.
	d.lead.Lock()
	go discard()
	awaitEntry(t, im, 0, unmapped)
	must(t, im.m.checkpoint(copies, change))
	d.checkpointed(full)

	zeroed := make(chan error, 1)
	go func() { zeroed <- im.WriteZeroes(0, 4096, 0) }()
	select {
	case err := <-zeroed:
		must(t, err)
		must(t, im.Flush())
		left := opened(t, clone(f), Options{})
		if err := diff(get(t, left, 0, 4096), make([]byte, 4096)); err != nil {
			t.Errorf("after a crash, zeroes that were flushed are lost: %v", err)
		}
		must(t, left.Close())
		d.lead.Unlock()
	case <-time.After(100 * time.Millisecond): // it waits for a record of its own
		d.lead.Unlock()
		must(t, <-zeroed)
	}
	must(t, <-results)
	must(t, im.Close())
}

// TestOverwriteOfAChunkThatMoves: a write that found its chunks in place, one of which was discarded and given a
// new place meanwhile by a write that has not ended, answers for the new place.
func TestOverwriteOfAChunkThatMoves(t *testing.T) {
	f := made(t, smallCompact(64<<10))
	type hold struct{ reached, release chan struct{} }
	held := map[byte]hold{}
	for _, tag := range []byte{0x11, 0x22} {
		held[tag] = hold{make(chan struct{}), make(chan struct{})}
	}
	armed := false
	im := opened(t, watchedFile{File: f, onWrite: func(_ int64, p []byte) error {
		if h, ok := held[p[0]]; ok && armed && len(bytes.TrimLeft(p, string(p[:1]))) == 0 {
			select {
			case <-h.reached: // only the first piece waits
			default:
				close(h.reached)
				<-h.release
			}
		}
		return nil
	}}, Options{})
	put(t, im, 4096, filled(1, 4096)) // chunks 1 and 0, not neighbours in the storage
	put(t, im, 0, filled(1, 4096))
	must(t, im.Flush())
	armed = true
	results := make(chan error, 2)
	write := func(tag byte, off int64, n int) {
		_, err := im.WriteAt(filled(tag, n), off)
		results <- err
	}
	go write(0x11, 0, 8192)
	<-held[0x11].reached
	must(t, im.Discard(4096, 4096))
	go write(0x22, 4096+2048, 512)
	<-held[0x22].reached
	close(held[0x11].release)
	must(t, <-results)
	want := get(t, im, 4096, 2048)
	must(t, im.Flush())
	left := opened(t, clone(f), Options{})
	if err := diff(get(t, left, 4096, 2048), want); err != nil {
		t.Errorf("a crash takes back what was read, and flushed: %v", err)
	}
	must(t, left.Close())
	close(held[0x22].release)
	must(t, <-results)
	must(t, im.Close())
}

// TestEmptyForgetsPlainRecords: a journal without generations does not bring back the bits of blocks that were
// given up to the base image.
func TestEmptyForgetsPlainRecords(t *testing.T) {
	for _, compact := range []bool{false, true} {
		base := newBase(256 << 10)
		o := smallCompact(64 << 10)
		o.Compact, o.PlainJournal, o.Base, o.BaseImage = compact, true, base, "base"
		f := made(t, o)
		im := opened(t, f, Options{Base: base})
		put(t, im, 8192, filled(1, 4096))
		must(t, im.Flush())
		_, err := base.WriteAt(filled(1, 4096), 8192)
		must(t, err)
		must(t, im.Empty())
		put(t, im, 64<<10, filled(2, 4096))
		must(t, im.Flush())
		left := opened(t, clone(f), Options{Base: base})
		if err := diff(get(t, left, 8192, 4096), filled(1, 4096)); err != nil {
			t.Errorf("compact %v: after a crash: %v", compact, err)
		}
		must(t, left.Close())
		must(t, im.Close())
	}
}

// TestTableMovesTwice: the place of a table that moved on is not handed out as fresh chunks.
func TestTableMovesTwice(t *testing.T) {
	f := made(t, smallCompact(256<<10))
	im := opened(t, f, Options{})
	want := make([]byte, 20<<20)
	touch := func(from, to int64) {
		for c := from; c < to; c++ {
			put(t, im, c*4096, filled(byte(c)|1, 512))
			copy(want[c*4096:], filled(byte(c)|1, 512))
		}
	}
	touch(0, 8)
	for _, size := range []int64{6 << 20, 20 << 20} {
		must(t, im.Resize(size, 0))
		touch(im.m.g.size/4096-4, im.m.g.size/4096)
	}
	if h := im.Header(); h.Features&FeatureTableInData == 0 {
		t.Fatal("the table did not move into the data area")
	}
	touch(100, 400)
	must(t, diff(get(t, im, 0, im.Size()), want))
	must(t, im.Audit())
	must(t, im.Close())
	res, err := Check(f, CheckOptions{})
	must(t, err)
	if res.Corruptions > 0 {
		t.Errorf("%+v", res)
	}
	im = opened(t, f, Options{})
	touch(500, 700)
	must(t, diff(get(t, im, 0, im.Size()), want))
	must(t, im.Close())
}

// TestResizeShowsZeros: what lies in the storage past the end of the disk, whoever left it there, does not show when
// the disk grows.
func TestResizeShowsZeros(t *testing.T) {
	const old, grown = 64 << 10, 128 << 10
	for name, wrap := range map[string]func(*storage.Memory) storage.File{
		"fixed size": func(m *storage.Memory) storage.File { return &fixedFile{m} },
		"file":       func(m *storage.Memory) storage.File { return m },
	} {
		m := storage.NewMemory("data")
		must(t, m.Truncate(grown))
		data := wrap(m)
		f := made(t, CreateOptions{Size: old, DataFile: "data", Data: data})
		must(t, storageFill(m, 0xDB, old, grown-old))
		im := opened(t, f, Options{Data: data})
		put(t, im, 0, filled(1, 512))
		must(t, im.Resize(grown, 0))
		if err := diff(get(t, im, old, grown-old), make([]byte, grown-old)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		must(t, diff(get(t, im, 0, 512), filled(1, 512)))
		must(t, im.Close())
	}
}

func storageFill(f storage.File, b byte, off, n int64) error {
	_, err := f.WriteAt(filled(b, int(n)), off)
	return err
}

// TestResizeRespectsRegions: regions may lie behind the data area; a disk does not grow over them.
func TestResizeRespectsRegions(t *testing.T) {
	base := newBase(32 << 10)
	f := made(t, CreateOptions{Size: 64 << 10, BlockSize: 4096, JournalSize: 8192, Base: base, BaseImage: "base"})
	h, err := ReadHeader(f)
	must(t, err)
	end := h.DataOffset + h.VirtualSize
	h.BitmapOffset = uint64(roundUp(int64(end), pageSize))
	must(t, f.Truncate(int64(h.BitmapOffset+h.BitmapSize)))
	b, err := h.encode()
	must(t, err)
	_, err = f.WriteAt(b, 0)
	must(t, err)
	im := opened(t, f, Options{Base: base})
	put(t, im, 0, filled(1, 4096))
	want := get(t, im, 0, im.Size())
	var field *FieldError
	if err := im.Resize(128<<10, 0); !errors.As(err, &field) || !strings.Contains(err.Error(), "bitmap_offset") {
		t.Errorf("growing over the bitmap: %v", err)
	}
	must(t, diff(get(t, im, 0, int64(len(want))), want))
	must(t, im.Close())
	im = opened(t, f, Options{Base: base})
	must(t, diff(get(t, im, 0, int64(len(want))), want))
	must(t, im.Close())
}
