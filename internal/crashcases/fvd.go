package crashcases

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/format/raw"
	"github.com/platter-disk/platter/jobs/prefetch"
	"github.com/platter-disk/platter/storage"
)

// The journal modes of FVD, as disciplines.
const (
	fvdImmediate = "immediate"
	fvdBuffered  = "buffered"
	fvdNone      = "none"
)

// fvdWorkload is a workload and the image that it runs on.
type fvdWorkload struct {
	Workload
	create fvd.CreateOptions
	base   int64 // bytes of a raw base image without two equal sectors; 0: none
	holes  int64 // bytes of each run of sectors in it that are equal after all: zeros
	data   fvdData

	writethrough bool
	copyOnRead   bool
	ruinous      bool // the journal lies on a medium that loses the block it is writing
	repair       bool // the checker's repair, not Open, recovers
	grows        bool // the work changes the size of the disk
	hooks        bool // the work waits for operations on the files

	ranges []crashlab.Range // that are used; nil: the disk
	watch  []crashlab.Range // and watched beyond that
	work   func(seed uint64) func(g *crashlab.Guest) error
}

// fvdData says where the data of an image lie.
type fvdData uint8

const (
	dataInside fvdData = iota // in the image file
	dataFile                  // in a raw data file
	dataDevice                // on a block device full of others' bytes
	dataQcow2                 // in a qcow2 image
)

const (
	fvdSize = 320 * kib
	fvdBase = 200*kib + 512 // ends inside a block
)

func fvdFormat() Format {
	f := Format{
		Name: "fvd", Disciplines: []string{fvdImmediate, fvdBuffered, fvdNone}, Default: fvdImmediate,
		Mutants: fvdMutants(), scenario: fvdScenario,
		// Space whose growth alone survived holds anything.
		models: []crashlab.Model{{Tear: 512, Poison: true}, {Tear: 4096}},
	}
	for _, w := range fvdWorkloads() {
		f.Workloads = append(f.Workloads, w.Workload)
	}
	return f
}

func fvdWorkloads() []fvdWorkload {
	journaled := []string{fvdImmediate, fvdBuffered}
	compact := func(journal int64) fvd.CreateOptions {
		return fvd.CreateOptions{Size: fvdSize, Compact: true, BlockSize: 4 * kib, ChunkSize: 16 * kib, GrowUnit: 64 * kib, JournalSize: journal}
	}
	overlay := fvd.CreateOptions{Size: fvdSize, BlockSize: 4 * kib, JournalSize: 64 * kib}
	odd := fvd.CreateOptions{Size: fvdSize, Compact: true, BlockSize: 7680, ChunkSize: 5 * 7680, GrowUnit: 60 * kib, JournalSize: 20 * kib, JournalBuffer: 200}
	old := compact(16 * kib)
	old.PlainJournal = true
	growing := compact(64 * kib)
	growing.ChunkSize = 4 * kib
	resizedEnds := []crashlab.Range{{Offset: resizedFirst - 8*kib, Length: 8 * kib}, {Offset: resizedTo - 4096, Length: 4096}}
	flat := fvd.CreateOptions{Size: 64 * kib, JournalSize: -1}
	unjournaled, bitmapOnly := compact(-1), overlay
	bitmapOnly.JournalSize = -1
	random := crashlab.Mix{Requests: 10, MaxLength: 24 * kib, Write: 10, Zero: 1, Unmap: 2, Discard: 2, Flush: 4, Check: 1}
	parallel := random // no copies: those have workloads of their own
	parallel.Requests, parallel.Workers = 20, 3
	start := []crashlab.Range{{Offset: 0, Length: 64 * kib}}

	return []fvdWorkload{
		{
			Workload: Workload{Name: "alloc", Description: "allocating writes and flushes on a compact image of its own", Disciplines: journaled},
			create:   compact(64 * kib),
			work:     mixWork(crashlab.Mix{Requests: 60, MaxLength: 24 * kib, Write: 10, Flush: 4, Check: 1}),
		}, {
			Workload: Workload{Name: "mixed", Description: "every kind of change, over a base image and with a table", Disciplines: journaled},
			create:   compact(64 * kib), base: fvdBase, work: fixedWork(mixedSteps),
		}, {
			Workload: Workload{Name: "overlay", Description: "the same with a bitmap alone", Disciplines: journaled},
			create:   overlay, base: fvdBase, work: fixedWork(mixedSteps),
		}, {
			Workload: Workload{Name: "compact", Description: "the same with a table alone", Disciplines: journaled},
			create:   compact(64 * kib), work: fixedWork(mixedSteps),
		}, {
			Workload: Workload{Name: "random", Description: "random changes over a base image, with copies and checkpoints between, on a small journal", Disciplines: journaled},
			create:   compact(16 * kib), base: fvdBase, work: stirredWork(random),
		}, {
			Workload: Workload{Name: "odd", Description: "blocks and chunks that are no powers of two, small buffers and growth", Disciplines: journaled},
			create:   odd, base: fvdBase, work: stirredWork(random),
		}, {
			Workload: Workload{Name: "plain-journal", Description: "the journal of 2011, without checksums", Disciplines: journaled},
			create:   old, base: fvdBase, work: stirredWork(random),
		}, {
			Workload: Workload{Name: "parallel", Description: "three workers at once on a small journal", Disciplines: journaled},
			create:   compact(8 * kib), base: fvdBase, work: mixWork(parallel),
		}, {
			Workload: Workload{Name: "recycle", Description: "a journal of two blocks a half, turned over again and again", Disciplines: journaled},
			create:   compact(16 * kib), work: fixedWork(manySteps),
		}, {
			Workload: Workload{Name: "recycle-one", Description: "a journal too small for halves", Disciplines: journaled},
			create:   compact(4 * kib), base: fvdBase, work: fixedWork(manySteps),
		}, {
			Workload: Workload{Name: "ruinous", Description: "a medium that loses the 4 KiB block of the journal that it is writing", Disciplines: journaled},
			create:   compact(64 * kib), base: fvdBase, ruinous: true, work: fixedWork(mixedSteps),
		}, {
			Workload: Workload{Name: "data-file", Description: "base image, image and data file, each durable for itself", Disciplines: journaled},
			create:   compact(8 * kib), base: fvdBase, data: dataFile, work: stirredWork(random),
		}, {
			Workload: Workload{Name: "data-overlay", Description: "the same without a table", Disciplines: journaled},
			create:   overlay, base: fvdBase, data: dataFile, work: fixedWork(mixedSteps),
		}, {
			Workload: Workload{Name: "data-qcow2", Description: "data in a qcow2 image, which has its own order of updates", Disciplines: journaled},
			create:   compact(64 * kib), base: fvdBase, data: dataQcow2, work: stirredWork(random),
		}, {
			Workload: Workload{Name: "device", Description: "data on a block device full of others' bytes", Disciplines: journaled},
			create:   compact(64 * kib), data: dataDevice, work: fixedWork(mixedSteps),
		}, {
			Workload: Workload{Name: "soft", Description: "copies from the base image, checkpoints and writes in turn", Disciplines: journaled},
			create:   compact(64 * kib), base: fvdBase, work: fixedWork(softSteps),
		}, {
			Workload: Workload{Name: "soft-overlay", Description: "the same with a bitmap alone", Disciplines: journaled},
			create:   overlay, base: fvdBase, work: fixedWork(softSteps),
		}, {
			Workload: Workload{Name: "zeros-and-copies", Description: "copies into chunks of which the journal tells that a part is zero", Disciplines: journaled},
			create:   compact(64 * kib), base: fvdBase, work: fixedWork(zeroCopySteps),
		}, {
			Workload: Workload{Name: "holes", Description: "a base image with zeros in it, of which copies store nothing", Disciplines: journaled},
			create:   compact(16 * kib), base: fvdBase, holes: 9 * kib, work: stirredWork(random),
		}, {
			Workload: Workload{Name: "holes-overlay", Description: "a long hole in the base image, which copies make in an image without a table", Disciplines: journaled},
			create:   overlay, base: fvdBase, holes: 72 * kib, work: fixedWork(holeSteps),
		}, {
			Workload: Workload{Name: "holes-data", Description: "the same in a data file that was used before", Disciplines: journaled},
			create:   overlay, base: fvdBase, data: dataDevice, holes: 72 * kib, work: fixedWork(holeSteps),
		}, {
			Workload: Workload{Name: "copy-on-read", Description: "copy-on-read and prefetching under guest writes, to the end: the base image is let go", Disciplines: journaled},
			create:   compact(16 * kib), base: fvdBase, copyOnRead: true, work: copyOnReadWork,
		}, {
			Workload: Workload{Name: "resize", Description: "the disk outgrows its table, which moves", Disciplines: journaled},
			create:   growing, grows: true, ranges: start, watch: resizedEnds, work: fixedWork(resizeSteps(block.PreallocOff)),
		}, {
			Workload: Workload{Name: "resize-preallocated", Description: "the same, and what is new is laid out before it is there", Disciplines: journaled},
			create:   growing, grows: true, ranges: start, watch: resizedEnds, work: fixedWork(resizeSteps(block.PreallocMetadata)),
		}, {
			Workload: Workload{Name: "repair", Description: "the checker's repair recovers, not opening", Disciplines: journaled},
			create:   compact(64 * kib), base: fvdBase, repair: true, work: fixedWork(mixedSteps),
		}, {
			Workload: Workload{Name: "repair-data", Description: "the same with a data file", Disciplines: journaled},
			create:   compact(8 * kib), base: fvdBase, data: dataFile, repair: true, work: fixedWork(mixedSteps),
		}, {
			Workload: Workload{Name: "failure", Description: "a write of the table fails, and the guest goes on", Disciplines: journaled},
			create:   compact(4 * kib), hooks: true, work: fixedWork(failureSteps),
		}, {
			Workload: Workload{Name: "in-flight", Description: "a checkpoint copies the mapping of a write that is under way, and a flush overtakes it", Disciplines: []string{fvdImmediate}},
			create:   compact(64 * kib), hooks: true, work: fixedWork(inFlightSteps),
		}, {
			Workload: Workload{Name: "settling", Description: "a write to a block that a checkpoint is about to make recoverable", Disciplines: []string{fvdImmediate}},
			create:   overlay, base: fvdBase, hooks: true, work: fixedWork(settlingSteps),
		}, {
			Workload: Workload{Name: "late-copy", Description: "bits set between the data barrier of a checkpoint and its bitmap", Disciplines: []string{fvdImmediate}},
			create:   overlay, base: fvdBase, hooks: true, work: fixedWork(lateCopySteps),
		}, {
			Workload: Workload{Name: "reuse", Description: "a chunk is taken from one place of the disk and needed for another before a flush", Disciplines: journaled},
			create:   compact(64 * kib), work: fixedWork(reuseSteps),
		}, {
			Workload: Workload{Name: "write-through", Description: "each change is durable when it is answered", Disciplines: []string{fvdImmediate}},
			create:   compact(8 * kib), base: fvdBase, writethrough: true, work: writethroughWork,
		}, {
			Workload: Workload{Name: "flat", Description: "neither base image nor table: nothing to journal", Disciplines: []string{fvdNone}},
			create:   flat, work: mixWork(crashlab.Mix{Requests: 60, MaxLength: 8 * kib, Write: 10, Zero: 1, Unmap: 1, Discard: 2, Flush: 4, Check: 1}),
		}, {
			Workload: Workload{Name: "dirty", Description: "tables without a journal: a crash may lose writes, and must say so", Disciplines: []string{fvdNone}},
			create:   unjournaled, base: fvdBase, work: dirtyWork,
		}, {
			Workload: Workload{Name: "dirty-repair", Description: "the same, and the checker's repair comes before opening", Disciplines: []string{fvdNone}},
			create:   unjournaled, base: fvdBase, repair: true, work: dirtyWork,
		}, {
			Workload: Workload{Name: "dirty-overlay", Description: "a bitmap without a journal, where no barrier comes before the first answer but that of the mark", Disciplines: []string{fvdNone}},
			create:   bitmapOnly, base: fvdBase, work: dirtyWork,
		},
	}
}

func fvdScenario(c Case) (crashlab.Scenario, error) {
	w, err := find("workload", c.Workload, fvdWorkloads(), func(w fvdWorkload) string { return w.Name })
	if err != nil {
		return crashlab.Scenario{}, err
	}
	run := &fvdRun{fvdWorkload: w, c: c}
	sc := crashlab.Scenario{
		Name:    c.String(),
		Files:   []crashlab.FileSpec{{Name: "image"}},
		Prepare: run.prepare,
		Open:    run.open,
		Work:    w.work(c.Seed),
		Again:   run.again,
		Judge:   run.judge,
		Closed:  run.closed,
		Watch:   slices.Concat(w.watch, w.ranges),
	}
	switch w.data {
	case dataFile, dataQcow2:
		sc.Files = append(sc.Files, crashlab.FileSpec{Name: "data"})
	case dataDevice:
		sc.Files = append(sc.Files, crashlab.FileSpec{Name: "data", Fixed: true, Size: 2 * fvdSize})
	}
	if w.base > 0 {
		sc.Files = append(sc.Files, crashlab.FileSpec{Name: "base"})
	}
	return sc, nil
}

// fvdRun is an exploration of a workload.
type fvdRun struct {
	fvdWorkload
	c Case

	header []byte      // as created
	broken atomic.Bool // the work made a write of metadata fail
}

// fvdFiles are the files of a scenario by what they are for; nil where there is none.
type fvdFiles struct{ image, data, base storage.File }

func (r *fvdRun) files(files []storage.File) fvdFiles {
	f := fvdFiles{image: files[0]}
	if r.data != dataInside {
		f.data = files[1]
	}
	if r.base > 0 {
		f.base = files[len(files)-1]
	}
	return f
}

func (r *fvdRun) prepare(files []storage.File) error {
	f := r.files(files)
	o := r.create
	if f.base != nil {
		if err := fillUnique(f.base, r.base); err != nil {
			return err
		}
		for at := int64(8 * kib); r.holes > 0 && at < r.base; at += 3*r.holes + kib {
			if err := f.base.PunchHole(at, r.holes); err != nil {
				return err
			}
		}
		dev, err := raw.Open(sealed{f.base}, raw.Options{ReadOnly: true})
		if err != nil {
			return err
		}
		o.BaseImage, o.Base = "base", dev
	}
	if r.data == dataQcow2 {
		if err := qcow2.Create(f.data, qcow2.CreateOptions{ClusterSize: 4 * kib}); err != nil {
			return err
		}
	}
	var err error
	if o.Data, o.DataDevice, err = r.openData(f.data, false); err != nil {
		return err
	}
	if f.data != nil {
		o.DataFile = "data"
	}
	if r.c.Discipline == fvdImmediate {
		o.JournalBuffer = -1
	}
	if err := fvd.Create(f.image, o); err != nil {
		return err
	}
	if o.DataDevice != nil {
		if err := o.DataDevice.Close(); err != nil {
			return err
		}
	}
	r.header = make([]byte, fvdHeaderSize)
	return storage.ReadFull(f.image, r.header, 0)
}

// openData opens where the data lie, outside the image: the file itself, or the disk in it. Both are nil for an image
// with its data inside.
func (r *fvdRun) openData(f storage.File, readOnly bool) (storage.File, block.Device, error) {
	if readOnly && f != nil {
		f = sealed{f}
	}
	if r.data != dataQcow2 {
		return f, nil, nil
	}
	dev, err := qcow2.Open(f, qcow2.Options{ReadOnly: readOnly, Discard: true, Reserve: reserve})
	if err != nil {
		return nil, nil, fmt.Errorf("data file: %w", err)
	}
	return nil, dev, nil
}

// options are those to open the image, whose header is h.
func (r *fvdRun) options(f fvdFiles, h *fvd.Header, readOnly bool) (o fvd.Options, err error) {
	o = fvd.Options{
		ReadOnly: readOnly, Writethrough: r.writethrough, Mutant: fvd.Mutant(r.c.Mutant), StrictJournal: true,
		// No timer: records go when the guest flushes or the buffer is full.
		AfterFunc: func(time.Duration, func()) func() bool { return func() bool { return true } },
	}
	switch r.c.Discipline {
	case fvdImmediate:
		o.Journal = fvd.JournalImmediate
	case fvdBuffered:
		o.Journal = fvd.JournalBuffered
	case fvdNone:
		o.AllowDirty = !h.CleanShutdown
	}
	if o.Data, o.DataDevice, err = r.openData(f.data, readOnly); err != nil {
		return o, err
	}
	if f.base == nil || h.FullyPrefetched { // then the disk has to do without
		return o, nil
	}
	o.Base, err = raw.Open(sealed{f.base}, raw.Options{ReadOnly: true})
	return o, err
}

// open recovers and opens the image, having looked at what the crash left.
func (r *fvdRun) open(files []storage.File) (crashlab.Subject, error) {
	f := r.files(files)
	found, err := r.inspect(f)
	if err != nil {
		return nil, err
	}
	o, err := r.options(f, found.header, false)
	if err != nil {
		return nil, err
	}
	if r.repair {
		if _, err := fvd.Check(f.image, fvd.CheckOptions{Data: o.Data, DataDevice: o.DataDevice, Repair: fvd.RepairAll}); err != nil {
			return nil, err
		}
	}
	s := &fvdSubject{run: r, files: f, found: found, data: fvd.CheckOptions{Data: o.Data, DataDevice: o.DataDevice}}
	image := f.image
	if r.ruinous {
		at := int64(found.header.JournalOffset)
		image = ruinous{File: image, start: at, end: at + int64(found.header.JournalSize), mu: &sync.Mutex{}}
	}
	if r.hooks {
		s.hook = &hook{}
		image = hooked{image, s.hook}
	}
	if s.im, err = fvd.Open(image, o); err != nil {
		return nil, err
	}
	s.Device = s.im
	if r.copyOnRead {
		s.Device = prefetch.NewCopyOnRead(s.im, prefetch.CopyOnReadOptions{})
	}
	return s, nil
}

// again uses a disk that was recovered.
func (r *fvdRun) again(g *crashlab.Guest) error {
	m := crashlab.Mix{Requests: 6, MaxLength: 20 * kib, Ranges: r.ranges, Write: 6, Unmap: 1, Discard: 1, Flush: 2, Seed: r.c.Seed + 1}
	if r.c.Discipline == fvdNone && (r.create.Compact || r.base > 0) {
		m.Flush = 0 // promises nothing
	}
	s := g.Subject().(*fvdSubject)
	if s.foundDirty() {
		g.Note(noteDirty)
	}
	steps := []func() error{
		func() error { return m.Run(g) },
		func() error { return s.copyUp(32*kib, 24*kib) },
		s.im.Checkpoint,
		func() error { return m.Run(g) },
	}
	if r.holes > 24*kib { // a long hole covers what a lost write left there
		steps = append([]func() error{func() error { return s.copyUp(0, r.base) }}, steps...)
	}
	return script(steps...)
}

// fvdSubject is an image with its checker.
type fvdSubject struct {
	block.Device // what the guest uses: im, or copy-on-read in front of it
	im           *fvd.Image
	run          *fvdRun
	files        fvdFiles
	data         fvd.CheckOptions // the open data file, for the checker
	found        *fvdFound
	hook         *hook // of a workload that waits for operations on the files, else nil
}

func (s *fvdSubject) WriteZeroes(off, length int64, unmap bool) error {
	return s.Device.WriteZeroes(off, length, zeroFlags(unmap))
}

// Close closes the image. That the failure which the work provoked keeps it from a clean end is as it should be.
func (s *fvdSubject) Close() error {
	var err error
	if c, ok := s.Device.(*prefetch.CopyOnRead); ok {
		err = closeCopies(c)
	} else {
		err = s.im.Close()
	}
	if errors.Is(err, errProvoked) {
		return nil
	}
	return err
}

// copyUp keeps a copy of what lives in the base image in a part of [off, off+n).
func (s *fvdSubject) copyUp(off, n int64) error {
	n = min(n, s.im.BaseSize()-off)
	if n <= 0 {
		return nil
	}
	p := make([]byte, n)
	if err := s.im.ReadBase(p, off); err != nil {
		return err
	}
	_, err := s.im.Populate(p, off)
	return err
}
