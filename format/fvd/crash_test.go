package fvd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/storage"
)

// crashCase is an image shape and what its guest does while crashes are recorded.
type crashCase struct {
	name   string
	create CreateOptions
	base   int64 // bytes; 0: none
	data   bool  // a data file of its own
	fixed  bool  // the data lie on a block device full of others' bytes
	open   Options
	once   bool // the work counts on a new disk
	watch  []crashlab.Range
	repair bool // the checker's repair, not Open, recovers
	work   func(g *crashlab.Guest, d crashDisk) error
}

// crashDisk is an Image as crashlab wants it.
type crashDisk struct {
	*Image
	file, data storage.File
	fixed      bool // the data storage cannot tell what is stored, so that free chunks look leaked
	hook       *hook
}

func (d crashDisk) WriteZeroes(off, n int64, unmap bool) error {
	var flags block.ZeroFlags
	if unmap {
		flags = block.MayUnmap
	}
	return d.Image.WriteZeroes(off, n, flags)
}

// Check wants no finding but the traces of the crash, and the invariants of memory.
func (d crashDisk) Check() error {
	res, err := Check(d.file, CheckOptions{Data: d.data})
	if err != nil {
		return err
	}
	if res.Corruptions > 0 || res.Leaks > 0 && !d.fixed {
		return fmt.Errorf("%d corruptions, %d leaks: %v", res.Corruptions, res.Leaks, res.Findings)
	}
	return (&rig{im: d.Image}).injective()
}

// hook calls a function, once, when the image is about to write to a file, or has just synced it.
type hook struct {
	mu    sync.Mutex
	wants func(file string, write bool, off int64) bool
	call  func()
}

func (h *hook) set(wants func(file string, write bool, off int64) bool, call func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.wants, h.call = wants, call
}

func (h *hook) at(file string, write bool, off int64) {
	h.mu.Lock()
	call := h.call
	if call == nil || !h.wants(file, write, off) {
		call = nil
	} else {
		h.call = nil
	}
	h.mu.Unlock()
	if call != nil {
		call()
	}
}

type hookFile struct {
	storage.File
	hook *hook
}

func (f hookFile) WriteAt(p []byte, off int64) (int, error) {
	f.hook.at(f.Name(), true, off)
	return f.File.WriteAt(p, off)
}

func (f hookFile) Sync() error {
	err := f.File.Sync()
	f.hook.at(f.Name(), false, 0)
	return err
}

const crashSize = 512 << 10

func (c crashCase) scenario() crashlab.Scenario {
	files := []crashlab.FileSpec{{Name: "image"}}
	if c.data {
		spec := crashlab.FileSpec{Name: "data", Fixed: c.fixed}
		if c.fixed {
			spec.Size = 2 * crashSize
		}
		files = append(files, spec)
	}
	create := c.create
	create.Size = crashSize
	base := func() *ram { return newBase(c.base) }
	shared := base()
	data := func(files []storage.File) storage.File {
		if c.data {
			return files[1]
		}
		return nil
	}
	work := func(g *crashlab.Guest) error {
		d, ok := g.Subject().(crashDisk)
		if !ok {
			return errors.New("not a crashDisk")
		}
		return c.work(g, d)
	}
	again := work
	if c.once {
		again = nil
	}
	return crashlab.Scenario{
		Name:  "fvd " + c.name,
		Files: files,
		Prepare: func(files []storage.File) error {
			o := create
			if c.base > 0 {
				o.BaseImage, o.Base = "base", shared
			}
			if c.data {
				o.DataFile, o.Data = "data", files[1]
			}
			return Create(files[0], o)
		},
		Open: func(files []storage.File) (crashlab.Subject, error) {
			o := c.open
			if c.base > 0 {
				o.Base = borrowedDevice{shared}
			}
			if c.data {
				o.Data = data(files)
			}
			if c.repair {
				if _, err := Check(files[0], CheckOptions{Data: data(files), Repair: RepairAll}); err != nil {
					return nil, err
				}
			}
			h := &hook{}
			if c.data {
				o.Data = hookFile{o.Data, h}
			}
			im, err := Open(hookFile{files[0], h}, o)
			if err != nil {
				return nil, err
			}
			return crashDisk{im, files[0], data(files), c.fixed, h}, nil
		},
		Work:  work,
		Again: again,
		Watch: c.watch,
	}
}

// script runs steps on the guest until one fails.
func script(steps ...func() error) error {
	for _, s := range steps {
		if err := s(); err != nil {
			return err
		}
	}
	return nil
}

// mixedWork allocates, overwrites, zeroes, discards and reuses, with flushes between.
func mixedWork(g *crashlab.Guest, _ crashDisk) error {
	w := func(off, n int64) func() error { return func() error { return g.Write(off, n) } }
	return script(
		w(0, 512), w(70<<10, 1024), g.Flush,
		w(512, 1024), w(3<<10, 20<<10), g.Flush,
		func() error { return g.WriteZeroes(16<<10, 24<<10, true) },
		w(20<<10, 512), g.Flush,
		func() error { return g.Discard(64<<10, 32<<10) },
		g.Flush,
		w(200<<10, 512), w(64<<10, 2048), g.Flush,
		w(201<<10, 8<<10), func() error { return g.WriteZeroes(0, 4<<10, false) },
	)
}

// softWork mixes copies from the base image into the writes.
func softWork(g *crashlab.Guest, im crashDisk) error {
	w := func(off, n int64) func() error { return func() error { return g.Write(off, n) } }
	soft := func(off, n int64) func() error {
		return func() error {
			p := make([]byte, n)
			if im.BaseSize() < off+n {
				return nil
			}
			if err := im.ReadBase(p, off); err != nil {
				return err
			}
			_, err := im.Populate(p, off)
			return err
		}
	}
	return script(
		soft(0, 16<<10), w(1<<10, 512), g.Flush,
		soft(16<<10, 16<<10), w(40<<10, 512), soft(32<<10, 32<<10), g.Flush,
		im.Checkpoint, w(18<<10, 512), w(64<<10, 1024), g.Flush,
		soft(64<<10, 64<<10), w(100<<10, 512),
	)
}

// manyWork allocates enough to turn a small journal over several times.
func manyWork(g *crashlab.Guest, _ crashDisk) error {
	for i := range int64(24) {
		if err := g.Write(i*12<<10, 512); err != nil {
			return err
		}
		if i%4 == 3 {
			if err := g.Flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

// resizeWork lets a disk outgrow its table.
func resizeWork(g *crashlab.Guest, d crashDisk) error {
	const size = 5 << 20
	return script(
		func() error { return g.Write(0, 512) },
		func() error { return g.Write(30<<10, 8<<10) },
		g.Flush,
		func() error { return g.Write(8<<10, 512) },
		func() error { return g.Resize(size, func() error { return d.Resize(size, block.PreallocOff) }) },
		func() error { return g.Write(size-512, 512) },
		g.Flush,
		func() error { return g.Write(16<<10, 8<<10) },
	)
}

// parallelWork has several guests' worth of requests in flight.
func parallelWork(g *crashlab.Guest, _ crashDisk) error {
	var wg sync.WaitGroup
	errs := make([]error, 3)
	for k := range errs {
		wg.Go(func() {
			at := int64(k) * 128 << 10
			for i := range int64(5) {
				errs[k] = errors.Join(errs[k], g.Write(at+i*7<<10, 1024))
				if i == 2 {
					errs[k] = errors.Join(errs[k], g.Flush())
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func crashCases() []crashCase {
	compact := func(journal, buffer int64) CreateOptions {
		return CreateOptions{Compact: true, BlockSize: 4 << 10, ChunkSize: 16 << 10, GrowUnit: 64 << 10, JournalSize: journal, JournalBuffer: buffer}
	}
	overlay := func(journal, buffer int64) CreateOptions {
		return CreateOptions{BlockSize: 4 << 10, JournalSize: journal, JournalBuffer: buffer}
	}
	return []crashCase{
		{name: "compact immediate", create: compact(64<<10, -1), work: mixedWork},
		{name: "compact buffered", create: compact(64<<10, 0), work: mixedWork},
		{name: "compact over base immediate", create: compact(64<<10, -1), base: 300 << 10, work: mixedWork},
		{name: "compact over base buffered", create: compact(64<<10, 0), base: 300 << 10, work: mixedWork},
		{name: "overlay immediate", create: overlay(64<<10, -1), base: 300<<10 + 512, work: mixedWork},
		{name: "overlay buffered", create: overlay(64<<10, 0), base: 300<<10 + 512, work: mixedWork},
		{name: "soft writes compact", create: compact(64<<10, -1), base: 300 << 10, work: softWork},
		{name: "soft writes overlay", create: overlay(64<<10, 0), base: 300 << 10, work: softWork},
		{name: "small journal", create: compact(8<<10, -1), base: 300 << 10, work: manyWork},
		{name: "journal of two blocks a half", create: compact(16<<10, -1), base: 300 << 10, work: manyWork},
		{name: "one-half journal", create: compact(4<<10, -1), base: 300 << 10, work: manyWork},
		{name: "small journal buffered", create: compact(8<<10, 0), work: manyWork},
		{name: "data file", create: compact(64<<10, -1), base: 300 << 10, data: true, work: mixedWork},
		{name: "data file buffered", create: compact(8<<10, 0), base: 300 << 10, data: true, work: mixedWork},
		{name: "device", create: compact(64<<10, 0), data: true, fixed: true, work: mixedWork},
		{name: "parallel immediate", create: compact(8<<10, -1), base: 300 << 10, work: parallelWork},
		{name: "parallel buffered", create: compact(8<<10, 0), base: 300 << 10, work: parallelWork},
		{name: "resize", create: CreateOptions{Compact: true, BlockSize: 4 << 10, ChunkSize: 4 << 10, GrowUnit: 64 << 10, JournalSize: 64 << 10, JournalBuffer: -1},
			once: true, watch: []crashlab.Range{{Offset: 0, Length: 64 << 10}, {Offset: 5<<20 - 4096, Length: 4096}}, work: resizeWork},
		{name: "repair", create: compact(64<<10, -1), base: 300 << 10, repair: true, work: mixedWork},
		{name: "repair with a data file", create: compact(8<<10, 0), base: 300 << 10, data: true, repair: true, work: mixedWork},
		{name: "write-through", create: compact(8<<10, 0), base: 300 << 10, open: Options{Writethrough: true}, work: mixedWork},
	}
}

// crashStates is the number of states explored a case; PLATTER_CRASH_STATES raises it.
func crashStates(t *testing.T) int {
	v := os.Getenv("PLATTER_CRASH_STATES")
	if v == "" {
		if raceEnabled { // an order of magnitude slower; the order of writes is the same
			return 15
		}
		return 120
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 {
		t.Fatalf("PLATTER_CRASH_STATES is %q, want a positive number", v)
	}
	return n
}

// TestCrashes explores what a power cut can leave of each case.
func TestCrashes(t *testing.T) {
	for _, c := range crashCases() {
		t.Run(c.name, func(t *testing.T) { explore(t, c, crashStates(t)) })
	}
}

// crashModels tear at both units; space whose growth alone survived holds anything.
func crashModels() []crashlab.Model {
	return []crashlab.Model{{Tear: 512, Poison: true}, {Tear: 4096}}
}

func explore(t *testing.T, c crashCase, states int) {
	rep, err := crashlab.Explore(context.Background(), c.scenario(), crashlab.Options{States: states, Seed: 1, Models: crashModels()})
	if err != nil {
		t.Fatal(err)
	}
	if len(rep.Violations) > 0 {
		var b strings.Builder
		must(t, rep.WriteText(&b))
		t.Error(b.String())
	}
	t.Logf("%d of %v states", rep.Explored, rep.Possible)
}
