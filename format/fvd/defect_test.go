package fvd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"github.com/platter-disk/platter/storage"
)

// Tests of the defects that FVD specification 4.2 lists, beyond crash exploration (package internal/crashcases: D-01 to
// D-10) and the record tests (D-17 to D-20, D-22, D-26). docs/fvd.md has the whole list.

var errBroken = errors.New("broken on purpose")

// watchedFile calls hooks before writes and syncs; an error they return is the operation's.
type watchedFile struct {
	storage.File
	onWrite func(off int64, p []byte) error
	onSync  func() error
}

func (f watchedFile) WriteAt(p []byte, off int64) (int, error) {
	if f.onWrite != nil {
		if err := f.onWrite(off, p); err != nil {
			return 0, err
		}
	}
	return f.File.WriteAt(p, off)
}

func (f watchedFile) Sync() error {
	if f.onSync != nil {
		if err := f.onSync(); err != nil {
			return err
		}
	}
	return f.File.Sync()
}

// smallCompact is a compact image of 64 chunks of 4 KiB.
func smallCompact(journal int64) CreateOptions {
	return CreateOptions{Size: 256 << 10, Compact: true, BlockSize: 4 << 10, ChunkSize: 4 << 10, GrowUnit: 256 << 10, JournalSize: journal, JournalBuffer: -1}
}

// made creates an image in memory.
func made(t testing.TB, o CreateOptions) *storage.Memory {
	t.Helper()
	f := storage.NewMemory("image")
	must(t, Create(f, o))
	return f
}

func opened(t testing.TB, f storage.File, o Options) *Image {
	t.Helper()
	im, err := Open(f, o)
	must(t, err)
	return im
}

func put(t testing.TB, im *Image, off int64, p []byte) {
	t.Helper()
	_, err := im.WriteAt(p, off)
	must(t, err)
}

func get(t testing.TB, im *Image, off, n int64) []byte {
	t.Helper()
	p := make([]byte, n)
	_, err := im.ReadAt(p, off)
	must(t, err)
	return p
}

func filled(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

// failingCheckpoint writes chunk after chunk to an image whose table cannot be written, and returns how many were
// acknowledged and flushed, and what a process kill leaves.
func failingCheckpoint(t *testing.T, mutant Mutant) (acked int, left *storage.Memory) {
	f := made(t, smallCompact(4096))
	h, err := ReadHeader(f)
	must(t, err)
	inTable := func(off int64) bool { return off >= int64(h.TableOffset) && off < int64(h.TableOffset+h.TableSize) }
	im := opened(t, watchedFile{File: f, onWrite: func(off int64, _ []byte) error {
		if inTable(off) {
			return errBroken
		}
		return nil
	}}, Options{Mutant: mutant})
	for i := range 40 {
		if _, err := im.WriteAt(filled(byte(i+1), 512), int64(i)*4096); err != nil {
			break
		}
		if im.Flush() != nil {
			break
		}
		acked++
	}
	left = clone(f)
	im.m.fail("the end of the test", errBroken)
	if err := im.Close(); err == nil {
		t.Error("Close of a broken image reports success")
	}
	return acked, left
}

// lost counts how many of the first n chunks do not hold what failingCheckpoint wrote.
func lost(t *testing.T, f *storage.Memory, n int) (bad int) {
	im := opened(t, f, Options{})
	for i := range n {
		if get(t, im, int64(i)*4096, 1)[0] != byte(i+1) {
			bad++
		}
	}
	must(t, im.Close())
	return bad
}

func TestD02_FailedCheckpointKeepsJournal(t *testing.T) {
	acked, left := failingCheckpoint(t, "")
	if acked == 0 || acked == 40 {
		t.Fatalf("%d writes were acknowledged", acked)
	}
	if bad := lost(t, left, acked); bad > 0 {
		t.Errorf("%d of %d flushed chunks are lost", bad, acked)
	}
	acked, left = failingCheckpoint(t, MutantReuseAfterFailure)
	if bad := lost(t, left, acked); bad == 0 {
		t.Error("the mutant that reuses journal sectors loses nothing")
	}
}

// TestD05_LatchStopsEveryChange: after a metadata failure nothing that changes the disk succeeds, whether it needs
// metadata or not; reads go on.
func TestD05_LatchStopsEveryChange(t *testing.T) {
	run := func(mutant Mutant) error {
		f := made(t, smallCompact(4096))
		broken := false
		im := opened(t, watchedFile{File: f, onWrite: func(off int64, p []byte) error {
			if broken && len(p) == journalUnit && off < 64<<10 {
				return errBroken
			}
			return nil
		}}, Options{Mutant: mutant})
		put(t, im, 0, filled(1, 4096))
		broken = true
		if _, err := im.WriteAt(filled(2, 512), 8192); !errors.Is(err, errBroken) {
			t.Fatalf("the write whose record failed: %v", err)
		}
		for name, change := range map[string]func() error{
			"overwrite":   func() error { _, err := im.WriteAt(filled(3, 512), 0); return err },
			"zeroes":      func() error { return im.WriteZeroes(0, 512, 0) },
			"discard":     func() error { return im.Discard(0, 4096) },
			"flush":       im.Flush,
			"checkpoint":  im.Checkpoint,
			"resize":      func() error { return im.Resize(512<<10, 0) },
			"soft write":  func() error { _, err := im.Populate(nil, 0); return err },
			"detach base": im.DetachBase,
		} {
			if err := change(); !errors.Is(err, errBroken) {
				return fmt.Errorf("%s after the failure: %v", name, err)
			}
		}
		if got := get(t, im, 0, 1)[0]; got != 1 {
			return fmt.Errorf("read after the failure: %#x", got)
		}
		if err := im.Close(); err == nil {
			return errors.New("close succeeded")
		}
		h, err := ReadHeader(f)
		if err == nil && h.CleanShutdown {
			err = errors.New("the image is marked clean")
		}
		return err
	}
	must(t, run(""))
	if run(MutantNoLatch) == nil {
		t.Error("without the latch the test passes too")
	}
}

// TestD08_JournalWritesKeepToTheirBlock: a medium that ruins the 4 KiB block it is writing ruins no record that
// was durable before.
func TestD08_JournalWritesKeepToTheirBlock(t *testing.T) {
	run := func(mutant Mutant) (first, second byte) {
		f := made(t, smallCompact(64<<10))
		im := opened(t, f, Options{Mutant: mutant})
		put(t, im, 0, filled(1, 512))
		must(t, im.Flush())
		at := int64(im.m.g.journalAt)
		before := make([]byte, 8192)
		must(t, storage.ReadFull(f, before, at))
		put(t, im, 8192, filled(2, 512)) // its record is on its way when the power fails
		after := make([]byte, 8192)
		must(t, storage.ReadFull(f, after, at))
		left := clone(f)
		for i := range before {
			if before[i] != after[i] {
				_, err := left.WriteAt(filled(0xDB, 4096), at+int64(i/4096*4096))
				must(t, err)
				break
			}
		}
		im.m.fail("the end of the test", errBroken)
		_ = im.Close()
		im = opened(t, left, Options{})
		first, second = get(t, im, 0, 1)[0], get(t, im, 8192, 1)[0]
		must(t, im.Close())
		return first, second
	}
	if first, second := run(""); first != 1 || second != 0 {
		t.Errorf("chunks hold %#x and %#x, want 1, which was flushed, and 0", first, second)
	}
	if first, _ := run(MutantNoPadding); first != 0 {
		t.Error("the mutant without padding loses nothing")
	}
}

// TestD11_DetachLooksAtEveryBit: a block that was passed over keeps the base image needed.
func TestD11_DetachLooksAtEveryBit(t *testing.T) {
	base := newBase(256 << 10)
	o := smallCompact(64 << 10)
	o.Base, o.BaseImage = base, "base"
	f := made(t, o)
	im := opened(t, f, Options{Base: base})
	hold := im.ranges.lock(5, 6) // a write is at work on block 5
	p := make([]byte, 256<<10)
	must(t, im.ReadBase(p, 0))
	kept, err := im.Populate(p, 0)
	must(t, err)
	if want := int64(256-4) << 10; kept != want {
		t.Fatalf("kept %d bytes, want %d", kept, want)
	}
	im.ranges.unlock(hold)
	if err := im.DetachBase(); !errors.Is(err, ErrStillNeeded) || base.closed {
		t.Fatalf("detach with a block in the base: %v, base closed: %v", err, base.closed)
	}
	if start, n := im.NextInBase(0); start != 5*4096 || n != 4096 {
		t.Fatalf("next in base: %d at %d", n, start)
	}
	_, err = im.Populate(p[5*4096:6*4096], 5*4096)
	must(t, err)
	must(t, im.DetachBase())
	must(t, im.DetachBase())
	if !base.closed {
		t.Error("the base image is still open")
	}
	want := get(t, im, 0, 256<<10)
	must(t, im.Close())
	im = opened(t, f, Options{}) // no base needed any more
	must(t, diff(get(t, im, 0, 256<<10), want))
	must(t, diff(want, p))
	must(t, im.Close())
}

// TestD12_InUseBeforeJournal: clean_shutdown=0 is durable before the first record is written.
// TestD13: the header is changed one sector at a time.
func TestD12_D13_HeaderWrites(t *testing.T) {
	f := made(t, smallCompact(64<<10))
	h, err := ReadHeader(f)
	must(t, err)
	marked, durable, records := false, false, 0
	im := opened(t, watchedFile{
		File: f,
		onWrite: func(off int64, p []byte) error {
			switch {
			case off < headerSize:
				if off != mutableSector || len(p) != sectorSize {
					t.Errorf("header write of %d bytes at %d", len(p), off)
				}
				marked = true
			case off >= int64(h.JournalOffset) && off < int64(h.JournalOffset+h.JournalSize):
				records++
				if !durable {
					t.Error("a record is written before clean_shutdown=0 is durable")
				}
			}
			return nil
		},
		onSync: func() error {
			durable = durable || marked
			return nil
		},
	}, Options{})
	put(t, im, 0, filled(1, 512))
	must(t, im.Close())
	if records == 0 || !marked {
		t.Errorf("%d records, marked %v", records, marked)
	}
}

func TestD14_FailedRecoveryFailsOpen(t *testing.T) {
	f := made(t, smallCompact(64<<10))
	im := opened(t, f, Options{})
	put(t, im, 0, filled(1, 512))
	must(t, im.Flush())
	left := clone(f)
	must(t, im.Close())
	at := int64(im.m.g.tableStart)
	_, err := Open(watchedFile{File: left, onWrite: func(off int64, _ []byte) error {
		if off >= at && off < at+4096 {
			return errBroken
		}
		return nil
	}}, Options{})
	if !errors.Is(err, errBroken) {
		t.Fatalf("open: %v", err)
	}
	im = opened(t, left, Options{})
	must(t, diff(get(t, im, 0, 512), filled(1, 512)))
	must(t, im.Close())
}

// TestD15_TornJournalWrite: a record of which only a part got out is ignored, and what was flushed before is there.
func TestD15_TornJournalWrite(t *testing.T) {
	f := made(t, smallCompact(64<<10))
	tear := false
	im := opened(t, watchedFile{File: f, onWrite: func(off int64, p []byte) error {
		if tear && len(p) == journalUnit {
			_, err := f.WriteAt(p[:200], off)
			return errors.Join(err, errBroken)
		}
		return nil
	}}, Options{})
	put(t, im, 0, filled(1, 512))
	must(t, im.Flush())
	tear = true
	if _, err := im.WriteAt(filled(2, 512), 4096); !errors.Is(err, errBroken) {
		t.Fatal(err)
	}
	if err := im.Close(); err == nil {
		t.Fatal("close succeeded")
	}
	im = opened(t, f, Options{})
	if r := im.Replay(); r.Damaged != 1 || r.Records != 1 {
		t.Errorf("replay: %+v", r)
	}
	if a, b := get(t, im, 0, 1)[0], get(t, im, 4096, 1)[0]; a != 1 || b != 0 {
		t.Errorf("chunks hold %#x and %#x", a, b)
	}
	must(t, im.Close())
}

// TestD16_StaleBitmapRecords: a BITMAP record that a checkpoint outdated is not applied again, and changing the
// base image leaves none behind.
func TestD16_StaleBitmapRecords(t *testing.T) {
	base := newBase(256 << 10)
	o := CreateOptions{Size: 256 << 10, BlockSize: 4096, JournalSize: 8192, JournalBuffer: -1, Base: base, BaseImage: "base"}
	f := made(t, o)
	im := opened(t, f, Options{Base: base})
	put(t, im, 0, filled(1, 4096))
	must(t, im.Checkpoint())
	put(t, im, 8192, filled(2, 4096))
	must(t, im.Flush())
	left := clone(f)
	must(t, im.Close())

	im = opened(t, left, Options{Base: base})
	if r := im.Replay(); r.Stale != 1 || r.Records != 1 {
		t.Errorf("replay: %+v, want one stale record and one applied", r)
	}
	must(t, im.Close())

	must(t, Amend(left, []Setting{{"base_img", "other"}}))
	h, err := ReadHeader(left)
	must(t, err)
	journal := make([]byte, h.JournalSize)
	must(t, storage.ReadFull(left, journal, int64(h.JournalOffset)))
	for at := 0; at < len(journal); at += sectorSize {
		if binary.LittleEndian.Uint32(journal[at:]) != recordEmpty {
			t.Errorf("journal sector %d still holds a record", at/sectorSize)
		}
	}
}
