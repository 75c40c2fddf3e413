package fvd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/storage"
)

// TestCost counts what an operation costs once an image is in steady state: numbers that do not depend on the
// machine.
func TestCost(t *testing.T) {
	const ops = 50
	compact := CreateOptions{Size: 256 << 20, Compact: true, BlockSize: 64 << 10, ChunkSize: 64 << 10, GrowUnit: 64 << 20}
	overlay := CreateOptions{Size: 64 << 20, BlockSize: 64 << 10}
	both := compact
	for _, c := range []struct {
		name          string
		create        CreateOptions
		base          int64
		mode          JournalMode
		step          int64 // distance between writes
		syncs, writes int64 // per write of 4 KiB and flush, times ops
		bytes         int64 // at most, an operation
	}{
		{"compact, immediate, allocating", compact, 0, JournalImmediate, 64 << 10, 1, 2, 8 << 10},
		{"compact, buffered, allocating", compact, 0, JournalBuffered, 64 << 10, 1, 2, 8 << 10},
		{"compact, overwriting", compact, 0, JournalBuffered, 0, 1, 1, 4 << 10},
		{"overlay, immediate, copy on write", overlay, 64 << 20, JournalImmediate, 64 << 10, 2, 2, 68 << 10},
		{"overlay, buffered, copy on write", overlay, 64 << 20, JournalBuffered, 64 << 10, 2, 2, 68 << 10},
		{"compact over base, immediate, copy on write", both, 64 << 20, JournalImmediate, 64 << 10, 2, 2, 68 << 10},
	} {
		t.Run(c.name, func(t *testing.T) {
			var o Options
			o.Journal = c.mode
			if c.base > 0 {
				o.Base = newRAM(c.base)
				c.create.Base, c.create.BaseImage = o.Base, "base"
			}
			counter := crashlab.NewCounter(made(t, c.create), false)
			im := opened(t, counter, o)
			p := filled(1, 4096)
			put(t, im, 0, p) // marks the image in use and grows the storage
			must(t, im.Flush())
			counter.Reset()
			for i := range int64(ops) {
				put(t, im, i*c.step+c.step, p)
				must(t, im.Flush())
			}
			syncs, writes := counter.Count(crashlab.KindSync), counter.Count(crashlab.KindWrite)
			if syncs.Ops != ops*c.syncs || writes.Ops != ops*c.writes || writes.Bytes > ops*c.bytes {
				t.Errorf("%d operations: %d syncs, %d writes, %d bytes; want %d, %d, at most %d",
					ops, syncs.Ops, writes.Ops, writes.Bytes, ops*c.syncs, ops*c.writes, ops*c.bytes)
			}
			must(t, im.Close())
		})
	}
}

// TestManyWritesOneFlush: in buffered mode a flush after many allocating writes is one journal write.
func TestManyWritesOneFlush(t *testing.T) {
	counter := crashlab.NewCounter(made(t, CreateOptions{Size: 256 << 20, Compact: true, ChunkSize: 64 << 10, GrowUnit: 64 << 20}), false)
	im := opened(t, counter, Options{})
	p := filled(1, 4096)
	put(t, im, 0, p)
	must(t, im.Flush())
	counter.Reset()
	for i := range int64(64) {
		put(t, im, (i*7+1)%256*65536, p)
	}
	must(t, im.Flush())
	if syncs, writes := counter.Count(crashlab.KindSync).Ops, counter.Count(crashlab.KindWrite).Ops; syncs != 1 || writes != 65 {
		t.Errorf("%d syncs and %d writes for 64 writes and a flush, want 1 and 65", syncs, writes)
	}
	must(t, im.Close())
}

// TestFlushesCombine: flushes that wait while one is under way are served by the next single sync.
func TestFlushesCombine(t *testing.T) {
	const k = 20
	syncs := 0
	first, release := make(chan struct{}), make(chan struct{})
	im := opened(t, watchedFile{File: made(t, CreateOptions{Size: 1 << 20}), onSync: func() error {
		if syncs++; syncs == 1 {
			close(first)
			<-release
		}
		return nil
	}}, Options{})
	var wg sync.WaitGroup
	writeAndFlush := func() {
		_, err := im.WriteAt(filled(1, 512), 0)
		if err = errors.Join(err, im.Flush()); err != nil {
			t.Error(err)
		}
	}
	before := im.m.dataSync.tag()
	wg.Go(writeAndFlush)
	<-first
	for range k {
		wg.Go(writeAndFlush)
	}
	for im.m.dataSync.tag() < before+1+k {
		runtime.Gosched()
	}
	close(release)
	wg.Wait()
	if syncs != 2 {
		t.Errorf("%d syncs for 1+%d flushes, want 2", syncs, k)
	}
	must(t, im.Close())
}

// TestFlushOfNothing: a flush with nothing to make durable, of either file, costs no sync and no wait for one; what was
// not over when a sync began is not covered by it; and a sync that failed covers nothing.
func TestFlushOfNothing(t *testing.T) {
	type files struct{ image, data int } // syncs of each; one file counts as data
	for _, separate := range []bool{false, true} {
		for _, mode := range []JournalMode{JournalImmediate, JournalBuffered} {
			for _, writethrough := range []bool{false, true} {
				t.Run(fmt.Sprintf("data file %v, mode %v, write-through %v", separate, mode, writethrough), func(t *testing.T) {
					var syncs files
					base := newBase(64 << 10)
					o := smallCompact(64 << 10)
					o.Base, o.BaseImage = base, "base"
					oo := Options{Base: base, Journal: mode, Writethrough: writethrough}
					if separate {
						data := storage.NewMemory("data")
						o.Data, o.DataFile = data, "data"
						oo.Data = watchedFile{File: data, onSync: func() error { syncs.data++; return nil }}
					}
					im := opened(t, watchedFile{File: made(t, o), onSync: func() error {
						if separate {
							syncs.image++
						} else {
							syncs.data++
						}
						return nil
					}}, oo)
					costs := func(what string, some bool, op func() error) {
						t.Helper()
						before := syncs
						must(t, op())
						if (syncs != before) != some {
							t.Errorf("%s: %+v syncs, %+v before; want more: %v", what, syncs, before, some)
						}
					}
					write := func() error { _, err := im.WriteAt(filled(1, 512), 128<<10); return err }
					costs("the first flush of what an earlier process may have left", true, im.Flush)
					costs("another", false, im.Flush)
					must(t, write())
					costs("a flush of a write that takes a chunk", !writethrough, im.Flush)
					costs("and again", false, im.Flush)
					must(t, write())
					before := syncs.image
					costs("a flush of an overwrite", !writethrough, im.Flush)
					if syncs.image != before {
						t.Error("an overwrite costs a sync of the image file")
					}
					must(t, im.WriteZeroes(128<<10, 4096, block.MayUnmap))
					costs("a flush of an unmapped chunk", !writethrough, im.Flush)
					for range 2 { // the chunk is punched when no request can know it any more: a flush later
						must(t, im.Flush())
					}
					costs("and again", false, im.Flush)
					p := make([]byte, 4096)
					must(t, im.ReadBase(p, 0))
					_, err := im.Populate(p, 0)
					must(t, err)
					costs("a flush of a copy", true, im.Flush)
					costs("and again", false, im.Flush)
					must(t, im.Checkpoint())
					costs("a flush after a checkpoint", false, im.Flush)
					get(t, im, 0, 64<<10)
					costs("a flush after reads", false, im.Flush)
					must(t, im.Close())
				})
			}
		}
	}
}

// TestSyncCoversWhatWasOver: a write that ends while a sync is under way takes another one.
func TestSyncCoversWhatWasOver(t *testing.T) {
	var syncs int
	var during func() error
	im := opened(t, watchedFile{File: made(t, CreateOptions{Size: 1 << 20}), onSync: func() error {
		syncs++
		if during != nil {
			return during()
		}
		return nil
	}}, Options{})
	put(t, im, 0, filled(1, 512))
	during = func() error {
		during = nil
		_, err := im.WriteAt(filled(2, 512), 4096)
		return err
	}
	must(t, im.Flush())
	must(t, im.Flush())
	must(t, im.Flush())
	if syncs != 2 {
		t.Errorf("%d syncs, want one for each write", syncs)
	}
	put(t, im, 0, filled(3, 512))
	during = func() error { return errors.New("broken") }
	for range 2 {
		if err := im.Flush(); err == nil {
			t.Error("a flush succeeded that could not sync, or after one that could not")
		}
	}
	if err := im.Close(); err == nil {
		t.Error("closing after a failed flush succeeded")
	}
}

// TestTerabyte: a large disk costs its tables, nothing more, on a real file.
func TestTerabyte(t *testing.T) {
	name := filepath.Join(t.TempDir(), "disk.fvd")
	f, err := storage.Open(name, storage.OpenOptions{Create: true})
	must(t, err)
	must(t, Create(f, CreateOptions{Size: 1 << 40, Compact: true}))
	im := opened(t, f, Options{})
	for _, off := range []int64{0, 1<<39 + 12345, 1<<40 - 8192} {
		put(t, im, off, filled(3, 8192))
	}
	must(t, im.Flush())
	must(t, im.Close())
	f, err = storage.Open(name, storage.OpenOptions{})
	must(t, err)
	im = opened(t, f, Options{})
	must(t, diff(get(t, im, 1<<39+12345, 8192), filled(3, 8192)))
	must(t, diff(get(t, im, 1<<38, 8192), make([]byte, 8192)))
	if n := im.m.g.tableMemory(); n > 8<<20 {
		t.Errorf("tables take %d bytes", n)
	}
	must(t, im.Close())
	size, err := os.Stat(name)
	must(t, err)
	if size.Size() > 64<<20 {
		t.Errorf("the image has %d bytes", size.Size())
	}
}

// TestNoAllocation: reading and overwriting what the image holds allocates nothing on the heap.
func TestNoAllocation(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	for _, compact := range []bool{false, true} {
		base := newRAM(16 << 20)
		f := made(t, CreateOptions{Size: 16 << 20, Compact: compact, Base: base, BaseImage: "base"})
		im := opened(t, f, Options{Base: base})
		p := filled(1, 4096)
		put(t, im, 1<<20, p)
		must(t, im.Flush())
		for name, op := range map[string]func() error{
			"read":      func() error { _, err := im.ReadAt(p, 1<<20); return err },
			"try read":  func() error { return im.TryReadAt(p, 1<<20) },
			"overwrite": func() error { _, err := im.WriteAt(p, 1<<20); return err },
			"flush":     im.Flush,
		} {
			if n := testing.AllocsPerRun(100, func() { must(t, op()) }); n != 0 {
				t.Errorf("compact %v: %s allocates %v times", compact, name, n)
			}
		}
		must(t, im.Close())
	}
}
