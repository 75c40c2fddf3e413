package fvd

import (
	"encoding/binary"
	"errors"
	"math"
	"runtime"
	"strings"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
)

// Images made to hurt whoever opens them: small files, mostly holes, that call for much memory or time.

// craft writes a header with its regions as the caller wants them; the file is as large as size.
func craft(t *testing.T, h *Header, size int64) *storage.Memory {
	t.Helper()
	f := storage.NewMemory("hostile")
	must(t, f.Truncate(size))
	b, err := h.encode()
	must(t, err)
	_, err = f.WriteAt(b, 0)
	must(t, err)
	return f
}

// allocated is how many bytes fn allocates on the heap, whether they are kept or not.
func allocated(fn func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	fn()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// farChunk is an image whose storage is a hole of 1 TiB and whose table names the last of its 2^31 chunks; with the
// race detector, of its 2^25.
func farChunk(t *testing.T, clean bool) *storage.Memory {
	h := &Header{
		Version: 1, CleanShutdown: clean, FullyPrefetched: true, VirtualSize: 64 << 10, ChunkSize: 512, GrowUnit: 512,
		JournalOffset: 8192, JournalSize: 8192, TableOffset: 16384, TableSize: 4096, DataOffset: 20480,
	}
	last := int64(maxChunks - 1)
	if raceEnabled {
		last >>= 6
	}
	f := craft(t, h, int64(h.DataOffset)+(last+1)*512)
	must(t, fillJournal(f, h))
	must(t, fill(f, h.TableOffset, h.TableSize, table{}.encodePage))
	setEntry(t, f, h, 5, uint32(last))
	return f
}

func TestFarChunk(t *testing.T) {
	for _, clean := range []bool{true, false} {
		f := farChunk(t, clean)
		spent := allocated(func() {
			_, err := Open(f, Options{MaxMetadata: 1 << 20})
			if !errors.Is(err, ErrMaxMetadata) {
				t.Errorf("clean %v: opened within 1 MiB: %v", clean, err)
			}
		})
		if spent > 4<<20 {
			t.Errorf("clean %v: refusing it took %d bytes", clean, spent)
		}
		spent = allocated(func() {
			im := opened(t, f, Options{})
			put(t, im, 0, filled(1, 512))
			must(t, diff(get(t, im, 0, 512), filled(1, 512)))
			must(t, im.Close())
		})
		if spent > 300<<20 { // a bit a chunk, 256 MiB
			t.Errorf("clean %v: opening it took %d bytes", clean, spent)
		}
	}
}

// extentCounter counts the questions for extents, and the bytes that they are about.
type extentCounter struct {
	*storage.Memory
	n     int
	asked int64
}

func (f *extentCounter) DataExtents(off, n int64, fn func(storage.Extent) bool) error {
	f.n++
	f.asked += n
	return f.Memory.DataExtents(off, n, fn)
}

// TestCheckOfFarChunk: looking for leaks takes a question a run of free chunks, not one a chunk.
func TestCheckOfFarChunk(t *testing.T) {
	f := farChunk(t, true)
	for _, at := range []int64{100, 101, 5_000_000} { // leaked chunks, in two pages of the file
		_, err := f.WriteAt(filled(1, 512), 20480+at*512)
		must(t, err)
	}
	counter := &extentCounter{Memory: f}
	res, err := Check(counter, CheckOptions{Repair: RepairLeaks})
	must(t, err)
	if counter.n > 100 {
		t.Errorf("%d questions for extents", counter.n)
	}
	// Memory keeps pages of eight such chunks.
	if res.LeaksFixed != 16 || res.Leaks != 0 || res.Corruptions != 0 {
		t.Errorf("%+v", res)
	}
	if res, err = Check(f, CheckOptions{}); err != nil || res.Leaks != 0 {
		t.Errorf("again: %+v, %v", res, err)
	}
}

// TestJournalOfHugeRanges: a journal full of records that each set all bits of a large bitmap takes the time of
// reading it. Record by record it would take hours.
func TestJournalOfHugeRanges(t *testing.T) {
	const bits, journal = 1 << 27, 4 << 20
	h := &Header{
		Version: 1, VirtualSize: bits * 512, BaseImage: "base", BaseSize: bits * 512, BlockSize: 512, BytesPerPrefetch: 512, PrefetchSlots: 1,
		BitmapOffset: 8192, BitmapSize: bits / 8, JournalOffset: 8192 + bits/8, JournalSize: journal, DataOffset: 8192 + bits/8 + journal,
	}
	f := craft(t, h, int64(h.DataOffset)+4096)
	sector := make([]byte, 0, sectorSize)
	for len(sector)+bitmapRecordSize <= sectorSize {
		sector = appendBitmapRecord(sector, uint64(len(sector)), bits-uint32(2*len(sector)))
	}
	for off := int64(0); off < int64(h.JournalSize); off += sectorSize {
		_, err := f.WriteAt(sector, int64(h.JournalOffset)+off)
		must(t, err)
	}
	im := opened(t, f, Options{ReadOnly: true, NoBase: true})
	if n := im.m.fresh.count(); n != bits {
		t.Errorf("%d bits are set, want %d", n, bits)
	}
	must(t, im.Close())
}

// TestInfoOfHugeTables: what there is to tell of an image does not take the memory of its tables.
func TestInfoOfHugeTables(t *testing.T) {
	const entries = 1 << 28
	h := &Header{
		Version: 1, CleanShutdown: true, FullyPrefetched: true, VirtualSize: entries * 4096, ChunkSize: 4096, GrowUnit: 4096,
		TableOffset: 8192, TableSize: 4 * entries, DataOffset: 8192 + 4*entries,
	}
	f := craft(t, h, int64(h.DataOffset))
	setEntry(t, f, h, 1<<20, 0xFFFFFFFF) // in a page of its own: 1023 entries that name chunk 0, as do those of the hole
	spent := allocated(func() {
		info, err := ReadInfo(f)
		must(t, err)
		if *info.Chunks != entries || *info.ChunksAllocated != entries-1 {
			t.Errorf("%+v", info)
		}
	})
	if spent > 8<<20 {
		t.Errorf("it took %d bytes", spent)
	}
	if _, err := Open(f, Options{ReadOnly: true}); err == nil || !strings.Contains(err.Error(), "memory") {
		t.Errorf("opening it: %v", err)
	}
}

// TestLargestFields: a header with the largest numbers that are let through has arithmetic that holds.
func TestLargestFields(t *testing.T) {
	for _, size := range []uint64{maxVirtualSize, 1 << 62, 1 << 61, 1 << 60} {
		for _, at := range []uint64{maxVirtualSize, 1 << 62, 1 << 61, 1 << 60, 8192} {
			h := &Header{Version: 1, CleanShutdown: true, FullyPrefetched: true, VirtualSize: size, DataOffset: at}
			f := craft(t, h, 8192)
			if _, err := ReadHeader(f); err != nil {
				var field *FieldError
				if !errors.As(err, &field) {
					t.Errorf("size %d, data at %d: %v", size, at, err)
				}
				continue
			}
			if end := at + size; end > math.MaxInt64 {
				t.Fatalf("size %d, data at %d is let through", size, at)
			}
			im, err := Open(f, Options{ReadOnly: true})
			if err != nil {
				continue
			}
			must(t, diff(get(t, im, im.Size()-512, 512), make([]byte, 512)))
			must(t, im.Close())
		}
	}
}

// TestEpochsUsedUpCleanly: an image whose epochs are used up is not opened for writing, closed cleanly or not, and
// repairing one leaves a header that can be read.
func TestEpochsUsedUpCleanly(t *testing.T) {
	f := made(t, smallCompact(64<<10))
	h, err := ReadHeader(f)
	must(t, err)
	h.StableEpoch = maxEpoch - 1
	rewrite := func() {
		b, err := h.encode()
		must(t, err)
		_, err = f.WriteAt(b, 0)
		must(t, err)
	}
	rewrite()
	if im, err := Open(f, Options{}); err == nil {
		must(t, im.WriteZeroes(0, im.Size(), block.MayUnmap))
		_, _ = im.WriteAt(filled(1, 512), 0)
		_, _ = im.Checkpoint(), im.Close()
		t.Error("it was opened for writing")
	} else if !strings.Contains(err.Error(), "epochs are used up") {
		t.Errorf("open: %v", err)
	}
	_, err = ReadHeader(f)
	must(t, err)
	im := opened(t, f, Options{ReadOnly: true})
	must(t, im.Close())

	h.CleanShutdown, h.StableEpoch = false, 7
	rewrite()
	sec := make([]byte, sectorSize)
	n := len(binary.LittleEndian.AppendUint32(appendTableHead(sec[:0], maxEpoch-1, 1, 0), uint32(entryDirty)))
	sealSector(sec, n, true, maxEpoch-1, castagnoliTable())
	_, err = f.WriteAt(sec, int64(h.JournalOffset))
	must(t, err)
	_, err = Check(f, CheckOptions{Repair: RepairAll})
	must(t, err)
	_, err = ReadHeader(f)
	must(t, err)
}

// TestTooLargeForItsMemory: neither Create nor Resize makes an image that Open, with the same limit, refuses.
func TestTooLargeForItsMemory(t *testing.T) {
	f := storage.NewMemory("image")
	err := Create(f, CreateOptions{Size: 1 << 46, Compact: true, ChunkSize: 64 << 10})
	if !errors.Is(err, ErrMaxMetadata) {
		t.Errorf("create: %v", err)
	}
	o := smallCompact(64 << 10)
	im := opened(t, made(t, o), Options{MaxMetadata: 4 << 10})
	if err := im.Resize(16<<20, 0); !errors.Is(err, ErrMaxMetadata) {
		t.Errorf("resize: %v", err)
	}
	put(t, im, 0, filled(1, 512))
	must(t, im.Close())
}

// TestExtentsOfFragments: finding a batch of extents takes no look at the whole rest of the table.
func TestExtentsOfFragments(t *testing.T) {
	const chunks = 60_000
	f := made(t, CreateOptions{Size: chunks * 4096, Compact: true, ChunkSize: 4096, GrowUnit: chunks * 4096, Preallocation: block.PreallocMetadata})
	h, err := ReadHeader(f)
	must(t, err)
	for c := int64(0); c < chunks; c += 2 {
		_, err := f.WriteAt([]byte{1}, int64(h.DataOffset)+c*4096)
		must(t, err)
	}
	counter := &extentCounter{Memory: f}
	im, err := Open(counter, Options{ReadOnly: true})
	must(t, err)
	n, at := 0, int64(0)
	must(t, im.Extents(0, im.Size(), func(e block.Extent) bool {
		if e.Offset != at {
			t.Fatalf("extent at %d, want %d", e.Offset, at)
		}
		at += e.Length
		n++
		return true
	}))
	most := int64(n/extentBatch+2) * lookAhead * 4096
	if n < chunks || at != im.Size() || counter.asked > most {
		t.Errorf("%d extents to %d, for which %d bytes were asked about, at most %d", n, at, counter.asked, most)
	}
	must(t, im.Close())
}

// TestAllocationAfterMassDiscard: a chunk is not sought among all those that wait to be used again, which would take
// longer than a test may.
func TestAllocationAfterMassDiscard(t *testing.T) {
	const chunks = 1 << 20
	f := made(t, CreateOptions{Size: chunks * 512, Compact: true, ChunkSize: 4096, GrowUnit: chunks * 512})
	im := opened(t, f, Options{})
	a := im.m.alloc
	put(t, im, chunks*512-4096, filled(1, 512)) // grows the storage; no barrier is due after that
	a.mu.Lock()
	for range 2 {
		for id := range chunkID(chunks) {
			a.punched = append(a.punched, retired{id: id + 1<<24, tag: im.m.dataSync.tag()})
			a.quarantine = append(a.quarantine, retired{id: id + 1<<25, tag: im.m.metaSync.tag(), age: im.m.guard.age.Load()})
		}
	}
	a.mu.Unlock()
	for i := range int64(20_000) {
		put(t, im, i*4096, filled(1, 512))
	}
	im.m.fail("the end of the test", errBroken) // the chunks above are made up
	if err := im.Close(); !errors.Is(err, errBroken) {
		t.Errorf("close: %v", err)
	}
}

// TestScrubOfSparseJournal: clearing a journal that is mostly a hole does not fill the hole.
func TestScrubOfSparseJournal(t *testing.T) {
	const journal = 1 << 40
	h := &Header{
		Version: 1, CleanShutdown: true, VirtualSize: 64 << 10, BaseImage: "base", BaseSize: 64 << 10, BlockSize: 4096,
		BytesPerPrefetch: 4096, PrefetchSlots: 1, BitmapOffset: 8192, BitmapSize: 4096, JournalOffset: 12288, JournalSize: journal, DataOffset: 12288 + journal,
	}
	f := craft(t, h, int64(h.DataOffset))
	sector := make([]byte, sectorSize)
	sealSector(sector, len(appendBitmapRecord(sector[:0], 0, 8)), false, 0, nil)
	places := []int64{0, 1 << 30, journal - sectorSize}
	for _, at := range places {
		_, err := f.WriteAt(sector, int64(h.JournalOffset)+at)
		must(t, err)
	}
	written := 0
	watched := watchedFile{File: f, onWrite: func(_ int64, p []byte) error {
		if written += len(p); written > 1<<20 {
			return errBroken
		}
		return nil
	}}
	must(t, Amend(watched, []Setting{{"base_img", "other"}}))
	for _, at := range places {
		_, err := f.ReadAt(sector, int64(h.JournalOffset)+at)
		must(t, err)
		if state, _, _ := openSector(sector, false, nil); state != sectorBlank {
			t.Errorf("the record at %d is still there", at)
		}
	}
}
