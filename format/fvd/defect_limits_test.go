package fvd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
)

// The second half of the defects of FVD specification 4.2, from D-21 on; see defect_test.go.

// TestD21_StrictMode: what no crash explains is reported, and refused where that is asked for.
func TestD21_StrictMode(t *testing.T) {
	o := smallCompact(64 << 10)
	o.PlainJournal = true
	f := made(t, o)
	im := opened(t, f, Options{})
	put(t, im, 0, filled(1, 512))
	must(t, im.Flush())
	left := clone(f)
	must(t, im.Close())
	_, err := left.WriteAt([]byte("garbage!"), int64(im.m.g.journalAt)+3*sectorSize)
	must(t, err)
	if _, err := Open(left, Options{StrictJournal: true, ReadOnly: true}); err == nil || !strings.Contains(err.Error(), "journal sector 3: unknown record type") {
		t.Errorf("strict open: %v", err)
	}
	res, err := Check(left, CheckOptions{})
	must(t, err)
	if res.Corruptions != 1 || !slices.ContainsFunc(res.Findings, func(f Finding) bool { return f.Kind == FindingJournal }) {
		t.Errorf("check: %+v", res)
	}
	im = opened(t, left, Options{})
	if r := im.Replay(); len(r.Anomalies) != 1 || r.Records != 1 {
		t.Errorf("replay: %+v", r)
	}
	must(t, im.Close())
}

func TestD22_EpochsUsedUp(t *testing.T) {
	f := made(t, smallCompact(64<<10))
	h, err := ReadHeader(f)
	must(t, err)
	h.StableEpoch, h.CleanShutdown = maxEpoch-2, false
	b, err := h.encode()
	must(t, err)
	_, err = f.WriteAt(b, 0)
	must(t, err)
	if _, err := Open(f, Options{}); err == nil || !strings.Contains(err.Error(), "epochs are used up") {
		t.Errorf("open: %v", err)
	}
	im := opened(t, f, Options{ReadOnly: true})
	must(t, im.Close())
}

func TestD23_ChunkNumbersEnd(t *testing.T) {
	im := opened(t, made(t, smallCompact(64<<10)), Options{})
	im.m.alloc.next, im.m.alloc.limit = maxChunks, maxChunks
	if _, err := im.WriteAt(filled(1, 512), 0); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write without a chunk number left: %v", err)
	}
	im.m.alloc.next, im.m.alloc.limit = 0, 0
	must(t, im.Close())
}

// TestD24_LargeUpdatesAreSplit: an update larger than the journal goes through it in parts.
func TestD24_LargeUpdatesAreSplit(t *testing.T) {
	o := smallCompact(8192)
	o.Size, o.ChunkSize = 8<<20, 4096
	f := made(t, o)
	im := opened(t, f, Options{})
	if got := im.m.g.journalLen; got > 16<<10 {
		t.Fatalf("the journal has %d bytes, too many for the test", got)
	}
	put(t, im, 0, filled(7, 8<<20))
	must(t, im.WriteZeroes(0, 4<<20, block.MayUnmap))
	must(t, im.Flush())
	left := clone(f)
	must(t, im.Close())
	im = opened(t, left, Options{})
	must(t, diff(get(t, im, 0, 8<<20), append(make([]byte, 4<<20), filled(7, 4<<20)...)))
	must(t, im.Close())
}

// TestD25_ResizeMovesTable: a disk that outgrows its table region gets another one, in the data area or, with a
// data file, in the image file; chunks never land on it.
func TestD25_ResizeMovesTable(t *testing.T) {
	for _, data := range []bool{false, true} {
		o := smallCompact(1 << 20)
		var dataFile storage.File
		if data {
			o.Data, o.DataFile = storage.NewMemory("data"), "data"
			dataFile = o.Data
		}
		f := made(t, o)
		im := opened(t, f, Options{Data: dataFile})
		put(t, im, 0, filled(1, 256<<10))
		before := im.Header()
		must(t, im.Resize(32<<20, block.PreallocOff))
		if h := im.Header(); h.TableOffset == before.TableOffset || (h.Features&FeatureTableInData != 0) == data {
			t.Errorf("data file %v: table at %d, features %#x", data, h.TableOffset, h.Features)
		}
		put(t, im, 256<<10, filled(2, 8<<20))
		must(t, im.Flush())
		want := append(append(filled(1, 256<<10), filled(2, 8<<20)...), make([]byte, 24<<20-256<<10)...)
		must(t, diff(get(t, im, 0, 32<<20), want))
		must(t, im.Close())
		res, err := Check(f, CheckOptions{Data: dataFile})
		must(t, err)
		if len(res.Findings) > 0 {
			t.Errorf("check: %+v", res.Findings)
		}
		im = opened(t, f, Options{Data: dataFile})
		must(t, diff(get(t, im, 0, 32<<20), want))
		put(t, im, 16<<20, filled(3, 8<<20))
		must(t, im.Close())
	}
}

// TestD29_WaitersInOrder: those who wait for a block get it in the order they came.
func TestD29_WaitersInOrder(t *testing.T) {
	var l rangeLock
	first := l.lock(0, 10)
	var order []int
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range 5 {
		wg.Go(func() {
			h := l.lock(blockIndex(i), blockIndex(i+6))
			mu.Lock()
			order = append(order, i)
			mu.Unlock()
			l.unlock(h)
		})
		for queued := 0; queued < i+2; { // until it waits
			l.mu.Lock()
			queued = len(l.queue)
			l.mu.Unlock()
		}
	}
	if l.tryLock(9, 20) != nil {
		t.Error("tryLock passed those who wait")
	}
	l.unlock(first)
	wg.Wait()
	if !slices.IsSorted(order) || len(order) != 5 {
		t.Errorf("order is %v", order)
	}
	if h := l.tryLock(0, 100); h == nil {
		t.Error("the lock is still held")
	}
}

// TestD30_CheckpointStallsNobody: while a checkpoint cannot get on, writes that need the journal succeed; and it
// writes the pages that changed, no others.
func TestD30_CheckpointStallsNobody(t *testing.T) {
	o := smallCompact(64 << 10)
	o.Size = 16 << 20 // 4 table pages
	f := made(t, o)
	h, err := ReadHeader(f)
	must(t, err)
	reached, release := make(chan struct{}), make(chan struct{})
	var pages []int64
	im := opened(t, watchedFile{File: f, onWrite: func(off int64, p []byte) error {
		if off >= int64(h.TableOffset) && off < int64(h.TableOffset+h.TableSize) {
			if len(pages) == 0 {
				close(reached)
				<-release
			}
			pages = append(pages, (off-int64(h.TableOffset))/pageSize)
			if len(p) != pageSize {
				t.Errorf("table write of %d bytes", len(p))
			}
		}
		return nil
	}}, Options{})
	put(t, im, 9<<20, filled(1, 512)) // an entry of page 2
	done := make(chan error)
	go func() { done <- im.Checkpoint() }()
	<-reached
	for i := range 5 {
		put(t, im, int64(i)*8192, filled(2, 512))
		must(t, im.Flush())
	}
	close(release)
	must(t, <-done)
	if !slices.Equal(pages, []int64{2}) {
		t.Errorf("pages written: %v, want page 2", pages)
	}
	must(t, im.Close())
}

// TestD30_WaitingCheckpointStallsNobody: nor does a checkpoint that waits for another one. Both begin while a journal
// write is under way, so that neither sees the other when it looks whether there is one to wait for.
func TestD30_WaitingCheckpointStallsNobody(t *testing.T) {
	f := made(t, smallCompact(64<<10))
	h, err := ReadHeader(f)
	must(t, err)
	type gate struct{ reached, release chan struct{} }
	var journalGate, headerGate atomic.Pointer[gate]
	pass := func(p *atomic.Pointer[gate]) {
		if g := p.Swap(nil); g != nil {
			close(g.reached)
			<-g.release
		}
	}
	closed := func(p *atomic.Pointer[gate]) *gate {
		g := &gate{make(chan struct{}), make(chan struct{})}
		p.Store(g)
		return g
	}
	im := opened(t, watchedFile{File: f, onWrite: func(off int64, _ []byte) error {
		switch {
		case off >= int64(h.JournalOffset) && off < int64(h.JournalOffset+h.JournalSize):
			pass(&journalGate)
		case off == mutableSector: // the end of a checkpoint
			pass(&headerGate)
		}
		return nil
	}}, Options{})
	put(t, im, 0, filled(1, 512))
	journal, header := closed(&journalGate), closed(&headerGate)
	done := make(chan error, 4)
	write := func(off int64) {
		_, err := im.WriteAt(filled(2, 512), off)
		done <- errors.Join(err, im.Flush())
	}
	go write(8192)
	<-journal.reached
	for range 2 {
		go func() { done <- im.Checkpoint() }()
	}
	time.Sleep(50 * time.Millisecond) // for both to come to wait for the journal
	close(journal.release)
	must(t, <-done)
	<-header.reached
	time.Sleep(20 * time.Millisecond) // for the other one to take what it likes
	go write(16384)
	left := 2
	select {
	case err := <-done:
		must(t, err)
	case <-time.After(testenv.Patience):
		t.Error("a write and a flush wait for a checkpoint that waits for another")
		left++
	}
	close(header.release)
	for range left {
		must(t, <-done)
	}
	must(t, im.Close())
}

// TestD31_GroupCommit: updates that wait while a journal write is under way share the next one, and its sectors.
func TestD31_GroupCommit(t *testing.T) {
	const k = 24
	base := newBase(1 << 20)
	o := CreateOptions{Size: 1 << 20, Compact: true, BlockSize: 4096, ChunkSize: 4096, GrowUnit: 1 << 20, JournalSize: 64 << 10, JournalBuffer: -1, Base: base, BaseImage: "base"}
	f := made(t, o)
	h, err := ReadHeader(f)
	must(t, err)
	reached, release := make(chan struct{}), make(chan struct{})
	writes, sectors := 0, 0
	im := opened(t, watchedFile{File: f, onWrite: func(off int64, p []byte) error {
		if off >= int64(h.JournalOffset) && off < int64(h.JournalOffset+h.JournalSize) {
			if writes == 0 {
				close(reached)
				<-release
			}
			writes++
			for at := 0; at < len(p); at += sectorSize {
				if binary.LittleEndian.Uint32(p[at:]) == recordTable {
					sectors++
				}
			}
		}
		return nil
	}}, Options{Base: base})
	var wg sync.WaitGroup
	write := func(i int) {
		wg.Go(func() {
			_, err := im.WriteAt(filled(1, 4096), int64(i)*8192)
			if err != nil {
				t.Error(err)
			}
		})
	}
	write(0)
	<-reached
	for i := range k {
		write(i + 1)
	}
	d, ok := im.discipline.(*immediate)
	if !ok {
		t.Fatalf("discipline is %T", im.discipline)
	}
	for queued := 0; queued < k; time.Sleep(time.Millisecond) {
		d.mu.Lock()
		queued = len(d.queue)
		d.mu.Unlock()
	}
	close(release)
	wg.Wait()
	// One write for the first update, bits and mapping together; then at most k/8, in fact one, for all others:
	// 12 records of 40 bytes share a sector.
	if writes != 2 || sectors != 1+k/12 {
		t.Errorf("%d journal writes with %d sectors for 1+%d updates, want 2 with %d", writes, sectors, k, 1+k/12)
	}
	must(t, im.Close())
}

// TestD32_FreeChunksAreReused: chunks that a crash left unused and discarded ones come back.
func TestD32_FreeChunksAreReused(t *testing.T) {
	f := made(t, smallCompact(64<<10))
	im := opened(t, f, Options{})
	for round := range 10 {
		put(t, im, 0, filled(byte(round+1), 256<<10))
		must(t, im.Flush())
		must(t, im.Discard(0, 256<<10))
		must(t, im.Flush())
		must(t, im.Checkpoint()) // one that runs in the background keeps chunks back as long as it takes
		must(t, im.Flush())
	}
	if next := im.m.alloc.next; next > 130 {
		t.Errorf("the high-water mark is %d after writing 64 chunks again and again", next)
	}
	put(t, im, 0, filled(1, 512))
	must(t, im.Close())
	size, err := f.Size()
	must(t, err)
	var stored int64
	must(t, f.DataExtents(int64(im.m.g.dataStart), size-int64(im.m.g.dataStart), func(e storage.Extent) bool {
		if e.Data {
			stored += e.Length
		}
		return true
	}))
	if stored > 64<<10 {
		t.Errorf("%d bytes of chunks are stored, one chunk is mapped", stored)
	}
}

// TestD33_AddStorageCommandIsNotRun: the command in the image is data; the caller's function is what grows storage.
func TestD33_AddStorageCommandIsNotRun(t *testing.T) {
	trace := filepath.Join(t.TempDir(), "ran")
	o := smallCompact(64 << 10)
	o.GrowUnit = 64 << 10
	o.AddStorageCmd = "touch " + trace
	dev := &fixedFile{Memory: storage.NewMemory("device")}
	must(t, dev.Memory.Truncate(32<<10))
	o.Data, o.DataFile = dev, "device"
	f := made(t, o)
	im := opened(t, f, Options{Data: dev})
	if h := im.Header(); h.AddStorageCmd != o.AddStorageCmd {
		t.Fatalf("the header holds %q", h.AddStorageCmd)
	}
	put(t, im, 0, filled(1, 32<<10))
	if _, err := im.WriteAt(filled(1, 4096), 64<<10); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write to full storage: %v", err)
	}
	must(t, im.Close())
	var asked []int64
	im = opened(t, f, Options{Data: dev, GrowStorage: func(need int64) error {
		asked = append(asked, need)
		size, err := dev.Size()
		if err != nil {
			return err
		}
		if err := dev.Memory.Truncate(size + need); err != nil {
			return err
		}
		_, err = dev.Memory.WriteAt(filled(0xDB, int(need)), size) // a device holds what it held
		return err
	}})
	put(t, im, 64<<10, filled(2, 512))
	if !slices.Equal(asked, []int64{64 << 10}) {
		t.Errorf("asked for %v", asked)
	}
	must(t, diff(get(t, im, 64<<10, 4096), append(filled(2, 512), make([]byte, 4096-512)...)))
	must(t, im.Close())
	if _, err := os.Stat(trace); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the command was run: %v", err)
	}
}

// fixedFile is storage whose size its user cannot change.
type fixedFile struct{ *storage.Memory }

func (f *fixedFile) Truncate(int64) error { return fmt.Errorf("fixed size: %w", errors.ErrUnsupported) }

func (f *fixedFile) WriteAt(p []byte, off int64) (int, error) {
	size, err := f.Size()
	if err == nil && off+int64(len(p)) > size {
		err = syscall.ENOSPC
	}
	if err != nil {
		return 0, err
	}
	return f.Memory.WriteAt(p, off)
}

func TestD34_ChangedBaseIsNoticed(t *testing.T) {
	base := newBase(64 << 10)
	o := smallCompact(64 << 10)
	o.Base, o.BaseImage = base, "base"
	f := made(t, o)
	for _, size := range []int64{32 << 10, 128 << 10} {
		if _, err := Open(f, Options{Base: newBase(size)}); err == nil || !strings.Contains(err.Error(), "it was changed") {
			t.Errorf("base of %d bytes: %v", size, err)
		}
	}
	if _, err := Open(f, Options{}); err == nil || !strings.Contains(err.Error(), `base image "base" is needed`) {
		t.Errorf("no base: %v", err)
	}
	if _, err := Open(f, Options{NoBase: true}); err == nil || !strings.Contains(err.Error(), "only be read") {
		t.Errorf("no base, writable: %v", err)
	}
	im := opened(t, f, Options{NoBase: true, ReadOnly: true})
	must(t, diff(get(t, im, 0, 4096), make([]byte, 4096)))
	must(t, im.Close())
}

// TestD36_SettleComparesValues: an entry that changed since it was recorded stays pending.
func TestD36_SettleComparesValues(t *testing.T) {
	tab := newTable(1)
	for _, c := range []struct{ now, recorded, want entry }{
		{5 | entryDirty, 5, 5},
		{6 | entryDirty, 5, 6 | entryDirty},
		{entryUnmapped, 5, entryUnmapped},
		{entryUnmapped, entryEmpty, entryEmpty},
		{7 | entryDirty, entryEmpty, 7 | entryDirty},
		{entryEmpty, entryEmpty, entryEmpty},
	} {
		tab.set(0, c.now)
		tab.settle(0, c.recorded)
		if got := tab.get(0); got != c.want {
			t.Errorf("entry %#x, recorded %#x: %#x, want %#x", c.now, c.recorded, got, c.want)
		}
	}
}

// TestD37_BufferedMode: records wait in memory until a flush, a full buffer or the timer.
func TestD37_BufferedMode(t *testing.T) {
	o := smallCompact(64 << 10)
	o.JournalBuffer, o.JournalBufferDelay = 200, 3*time.Second
	f := made(t, o)
	h, err := ReadHeader(f)
	must(t, err)
	writes := 0
	var fire func()
	var delay time.Duration
	stopped := 0
	im := opened(t, watchedFile{File: f, onWrite: func(off int64, _ []byte) error {
		if off >= int64(h.JournalOffset) && off < int64(h.JournalOffset+h.JournalSize) {
			writes++
		}
		return nil
	}}, Options{AfterFunc: func(d time.Duration, fn func()) func() bool {
		fire, delay = fn, d
		return func() bool {
			stopped++
			return true
		}
	}})
	expect := func(what string, n int) {
		t.Helper()
		if writes != n {
			t.Errorf("%s: %d journal writes, want %d", what, writes, n)
		}
	}
	for i := range 4 {
		put(t, im, int64(i)*8192, filled(1, 512))
	}
	expect("after four writes", 0)
	must(t, im.Flush())
	expect("after a flush", 1)
	if stopped != 1 {
		t.Errorf("the timer was stopped %d times", stopped)
	}
	must(t, im.Flush())
	expect("after a flush with nothing new", 1)
	put(t, im, 100<<10, filled(1, 512))
	if delay != 3*time.Second {
		t.Errorf("the timer runs %v", delay)
	}
	stopped = -1000 // what fires is not stopped
	func() {
		d, ok := im.discipline.(*buffered)
		if !ok {
			t.Fatalf("discipline is %T", im.discipline)
		}
		d.mu.Lock()
		d.stop = func() bool { return false }
		d.mu.Unlock()
		fire()
	}()
	expect("after the timer", 2)
	for i := range 12 {
		put(t, im, 128<<10+int64(i)*8192, filled(1, 512))
	}
	if writes < 3 {
		t.Errorf("a full buffer was not written")
	}
	must(t, im.Close())
}
