package fvd

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/storage"
)

// TestResizeInterrupted: who interrupts a Resize keeps the disk he had, in order, and the space is given back.
func TestResizeInterrupted(t *testing.T) {
	const small, large = 1<<20 + 512, 2*layOutStep + 512
	stop := errors.New("enough")
	for _, compact := range []bool{false, true} {
		for _, separate := range []bool{false, true} {
			for how := block.PreallocMetadata; how <= block.PreallocFull; how++ {
				if !compact && how == block.PreallocMetadata {
					continue // nothing to lay out
				}
				t.Run(fmt.Sprintf("compact %v separate %v %v", compact, separate, how), func(t *testing.T) {
					// The table, which has room for one page of entries, is moved.
					o := CreateOptions{Size: small, Compact: compact, ChunkSize: 64 << 10, GrowUnit: 128 << 10, JournalSize: 64 << 10}
					data := storage.NewMemory("data")
					if separate {
						o.DataFile, o.Data = "data", data
					}
					f := storage.NewMemory("image")
					must(t, Create(f, o))
					left := 0
					im := opened(t, f, Options{Data: o.Data, Interrupt: func() error {
						if left--; left < 0 {
							return stop
						}
						return nil
					}})
					p := filled(1, 100_000)
					put(t, im, small-100_000, p)
					for _, left = range []int{0, 2} {
						if err := im.Resize(large, how); !errors.Is(err, stop) {
							t.Fatalf("not interrupted: %v", err)
						}
						if im.Size() != small {
							t.Fatalf("the disk has %d bytes", im.Size())
						}
						must(t, diff(get(t, im, small-100_000, 100_000), p))
						if stored := storedBytes(t, f) + storedBytes(t, data); stored > 2<<20 {
							t.Errorf("%d bytes are stored", stored)
						}
						left := opened(t, clone(f), Options{Data: clone(data), NoBase: true, ReadOnly: true}.when(separate))
						if left.Size() != small {
							t.Errorf("after a crash the disk has %d bytes", left.Size())
						}
						must(t, left.Close())
					}
					left = 100
					must(t, im.Resize(large, how))
					must(t, diff(get(t, im, small, 1<<20), make([]byte, 1<<20)))
					must(t, im.Close())
					result, err := Check(f, CheckOptions{Data: o.Data})
					must(t, err)
					if len(result.Findings) > 0 {
						t.Errorf("findings: %v", result.Findings)
					}
					info, err := ReadInfo(f)
					must(t, err)
					// The old part of the disk holds two chunks.
					if compact && *info.Chunks-*info.ChunksAllocated != small>>16-2 || info.VirtualSize != large {
						t.Errorf("a disk of %d bytes, %d of %d chunks", info.VirtualSize, *info.ChunksAllocated, *info.Chunks)
					}
				})
			}
		}
	}
}

// when are the options of an image that has a data file or not.
func (o Options) when(separate bool) Options {
	if !separate {
		o.Data = nil
	}
	return o
}

func storedBytes(t *testing.T, f *storage.Memory) (n int64) {
	t.Helper()
	size, err := f.Size()
	must(t, err)
	must(t, f.DataExtents(0, size, func(e storage.Extent) bool {
		if e.Data {
			n += e.Length
		}
		return true
	}))
	return n
}

// TestResizeThatFailsKeepsTheSize: storage that is full ends a Resize as an interruption does.
func TestResizeThatFailsKeepsTheSize(t *testing.T) {
	for compact, room := range map[bool]int64{false: 4 << 20, true: 20 << 20} { // behind the tables
		full := errors.New("no space")
		failing := false
		f := storage.NewMemory("image")
		must(t, Create(f, CreateOptions{Size: 1 << 20, Compact: compact, ChunkSize: 64 << 10, GrowUnit: 128 << 10}))
		im := opened(t, watchedFile{File: f, onWrite: func(off int64, p []byte) error {
			if failing && off > room && len(p) >= 64<<10 {
				return full
			}
			return nil
		}}, Options{})
		p := filled(1, 1<<20)
		put(t, im, 0, p)
		failing = true
		if err := im.Resize(16<<20, block.PreallocFull); !errors.Is(err, full) || im.Size() != 1<<20 {
			t.Errorf("compact %v: %v, the disk has %d bytes", compact, err, im.Size())
		}
		failing = false
		must(t, diff(get(t, im, 0, 1<<20), p))
		must(t, im.Resize(16<<20, block.PreallocFull))
		must(t, diff(get(t, im, 1<<20, 1<<20), make([]byte, 1<<20)))
		must(t, im.Close())
	}
}

// TestCrashWhilePreallocating: whatever part of a Resize has reached the disk, in order, the disk has its old size or its
// new one, and reads as it did.
func TestCrashWhilePreallocating(t *testing.T) {
	for _, chunk := range []int64{4 << 10, 64 << 10} { // the table moves, and stays
		f := storage.NewMemory("image")
		must(t, Create(f, CreateOptions{Size: 1 << 20, Compact: true, ChunkSize: chunk, GrowUnit: 128 << 10, JournalSize: 64 << 10}))
		var states []*storage.Memory
		recording := false
		im := opened(t, watchedFile{File: f, onWrite: func(int64, []byte) error {
			if recording {
				states = append(states, clone(f))
			}
			return nil
		}}, Options{})
		p := filled(1, 300_000)
		put(t, im, 0, p)
		must(t, im.Flush())
		recording = true
		must(t, im.Resize(8<<20, block.PreallocMetadata))
		recording = false
		must(t, im.Close())
		if len(states) < 5 {
			t.Errorf("%d states", len(states))
		}
		for i, state := range states {
			left := opened(t, state, Options{StrictJournal: true})
			if size := left.Size(); size != 1<<20 && size != 8<<20 {
				t.Errorf("state %d: the disk has %d bytes", i, size)
			}
			must(t, diff(get(t, left, 0, 300_000), p))
			must(t, left.Resize(12<<20, block.PreallocOff))
			put(t, left, 11<<20, p)
			must(t, diff(get(t, left, 300_000, 10<<20), make([]byte, 10<<20)))
			must(t, left.Close())
			result, err := Check(state, CheckOptions{})
			must(t, err)
			if len(result.Findings) > 0 {
				t.Errorf("state %d: findings: %v", i, result.Findings)
			}
		}
	}
}

// TestPreallocatingHugeDisk: the storage of all chunks is made at once, and the table written once.
func TestPreallocatingHugeDisk(t *testing.T) {
	const size, entries = 1 << 37, 1 << 17
	counter := crashlab.NewCounter(storage.NewMemory("image"), false)
	must(t, Create(counter, CreateOptions{Size: size, Compact: true, Preallocation: block.PreallocMetadata}))
	if syncs, written := counter.Count(crashlab.KindSync).Ops, counter.Count(crashlab.KindWrite).Bytes; syncs > 20 || written > 12*entries+40<<20 {
		t.Errorf("%d syncs, %d bytes written", syncs, written)
	}
}

// TestRecordLooksAtNoMoreThanItTells: a span of many chunks is asked about for every sector of records that it takes;
// looking at all that is left each time takes minutes for a disk of some TiB.
func TestRecordLooksAtNoMoreThanItTells(t *testing.T) {
	const chunks = 1 << 10
	im := opened(t, made(t, CreateOptions{Size: chunks * 4096, Compact: true, ChunkSize: 4096}), Options{Journal: JournalImmediate})
	must(t, im.m.markInUse())
	must(t, im.m.mapChunks(0, chunks))
	p := packer{j: im.discipline.(*immediate).journal}
	if part := p.recordable(span{end: chunks * 4096, entries: true}); part.off != 0 || part.end != sectorSize/4*4096 {
		t.Errorf("it looked at [%d, %d)", part.off, part.end)
	}
	must(t, im.discipline.commit(&update{span: span{end: chunks * 4096, entries: true}}))
	if im.m.table.anyPending(0, chunks) {
		t.Error("chunks are left untold")
	}
	must(t, im.Close())
}

// TestCreateWhereTooLittleRoom: storage that cannot hold the image keeps what it holds.
func TestCreateWhereTooLittleRoom(t *testing.T) {
	const room = 1 << 20
	old := filled(7, room)
	for _, c := range []struct {
		name     string
		o        CreateOptions
		separate bool // the data file is what is too small
		fits     bool
	}{
		{"flat", CreateOptions{Size: room}, false, false},
		{"flat that fits", CreateOptions{Size: 900 << 10}, false, true},
		{"metadata", CreateOptions{Size: 64 << 40, Compact: true, MaxMetadata: 1 << 40}, false, false},
		{"chunks in advance", CreateOptions{Size: 4 << 20, Compact: true, JournalSize: 64 << 10, Preallocation: block.PreallocMetadata}, false, false},
		{"chunks as they are needed", CreateOptions{Size: 4 << 20, Compact: true, JournalSize: 64 << 10}, false, true},
		{"data", CreateOptions{Size: room + 512}, true, false},
		{"chunks of data", CreateOptions{Size: room + 512, Compact: true, Preallocation: block.PreallocFull}, true, false},
	} {
		f, data := storage.NewMemory("image"), storage.NewMemory("data")
		for _, m := range []*storage.Memory{f, data} {
			_, err := m.WriteAt(old, 0)
			must(t, err)
		}
		if c.separate {
			c.o.DataFile, c.o.Data = "data", &fixedFile{Memory: data}
		}
		err := Create(&fixedFile{Memory: f}, c.o)
		if c.fits {
			if err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		if !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%s: %v", c.name, err)
		}
		for _, m := range []*storage.Memory{f, data} {
			now := make([]byte, room)
			must(t, storage.ReadFull(m, now, 0))
			if !bytes.Equal(now, old) {
				t.Errorf("%s: %s was written to", c.name, m.Name())
			}
		}
	}
}
