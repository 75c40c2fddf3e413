package crashcases

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/format/raw"
	"github.com/platter-disk/platter/jobs"
	"github.com/platter-disk/platter/storage"
)

// chainWorkload commits an overlay to its base or moves it to another one. The files are judged together: whatever a
// crash leaves in each of them, the disk that the overlay shows is the guest's.
type chainWorkload struct {
	Workload
	fvd       bool // the overlay is an FVD image, else qcow2
	table     bool // with a table
	plain     bool // with the journal of 2011, whose records bear no checksums
	qcow2Base bool // the base is a qcow2 image, else raw
	size      int64
	base      int64 // bytes of the base
	work      func(g *crashlab.Guest, s *chainSubject) error
}

const (
	chainSize    = 48 * kib
	chainCluster = 1 * kib

	namedBase, namedOther = "base", "other" // what an overlay calls the files below it
)

func chainWorkloads() []chainWorkload {
	return []chainWorkload{
		{
			Workload: Workload{Name: "commit", Description: "a qcow2 overlay is committed to a raw base, twice, and the base grows"},
			size:     chainSize, base: 30*kib + 512, work: commitSteps,
		}, {
			Workload:  Workload{Name: "commit-qcow2", Description: "a qcow2 overlay is committed to a qcow2 base that is larger"},
			qcow2Base: true, size: chainSize, base: 64 * kib, work: commitSteps,
		}, {
			Workload: Workload{Name: "rebase", Description: "a qcow2 overlay gets another backing file, and then none"},
			size:     chainSize, base: 30*kib + 512, work: rebaseSteps,
		},
	}
}

func fvdChainWorkloads() []chainWorkload {
	return []chainWorkload{
		{
			Workload: Workload{Name: "commit", Description: "an FVD overlay with a table is committed to a raw base, twice, and the base grows"},
			fvd:      true, table: true, size: chainSize, base: 30*kib + 512, work: commitSteps,
		}, {
			Workload: Workload{Name: "commit-flat", Description: "the same without a table, to a qcow2 base"},
			fvd:      true, qcow2Base: true, size: chainSize, base: 32 * kib, work: commitSteps,
		}, {
			Workload: Workload{Name: "commit-plain", Description: "the same with a table and the journal of 2011, to a raw base"},
			fvd:      true, table: true, plain: true, size: chainSize, base: 32 * kib, work: commitSteps,
		}, {
			Workload: Workload{Name: "rebase", Description: "an FVD overlay gets another base image, and then none"},
			fvd:      true, table: true, size: chainSize, base: 24 * kib, work: rebaseSteps,
		},
	}
}

// chainFormat and fvdChainFormat are chains by the format of the overlay.
func chainFormat() Format {
	return newChainFormat("qcow2-chain", qcow2.Disciplines(), qcow2.Ordered, chainWorkloads())
}

func fvdChainFormat() Format {
	return newChainFormat("fvd-chain", []string{fvdImmediate, fvdBuffered}, fvdImmediate, fvdChainWorkloads())
}

func newChainFormat(name string, disciplines []string, first string, all []chainWorkload) Format {
	f := Format{Name: name, Disciplines: disciplines, Default: first}
	for _, w := range all {
		f.Workloads = append(f.Workloads, w.Workload)
	}
	f.scenario = func(c Case) (crashlab.Scenario, error) {
		w, err := find("workload", c.Workload, all, func(w chainWorkload) string { return w.Name })
		if err != nil {
			return crashlab.Scenario{}, err
		}
		run := &chainRun{chainWorkload: w, c: c}
		return crashlab.Scenario{
			Name:    c.String(),
			Files:   []crashlab.FileSpec{{Name: "overlay"}, {Name: namedBase}, {Name: namedOther}},
			Prepare: run.prepare,
			Open:    run.open,
			Work:    func(g *crashlab.Guest) error { return w.work(g, g.Subject().(*chainSubject)) },
			Closed:  run.check,
			Again:   mixWork(crashlab.Mix{Requests: 8, MaxLength: 4 * kib, Write: 6, Unmap: 1, Flush: 2})(c.Seed + 1),
		}, nil
	}
	return f
}

// chainRun is an exploration of a workload.
type chainRun struct {
	chainWorkload
	c      Case
	opened atomic.Bool
}

// chainSubject is an overlay over its base.
type chainSubject struct {
	block.Device
	run   *chainRun
	files []storage.File
	below block.Device // nil: none
}

// prepare makes a base without a zero sector, another that agrees with it here and there, and the overlay.
func (r *chainRun) prepare(files []storage.File) error {
	content := storage.NewMemory("content")
	if err := fillUnique(content, r.base); err != nil {
		return err
	}
	p := make([]byte, r.base)
	if err := storage.ReadFull(content, p, 0); err != nil {
		return err
	}
	if !r.qcow2Base {
		if _, err := files[1].WriteAt(p, 0); err != nil {
			return err
		}
	} else if err := r.prepareQcow2Base(files[1], p); err != nil {
		return err
	}
	other := append(p, make([]byte, 6*kib)...)
	for i := range other {
		switch i / (2 * kib) % 4 {
		case 1:
			other[i] = 0
		case 2:
			other[i] ^= 0x55
		}
	}
	if _, err := files[2].WriteAt(other, 0); err != nil {
		return err
	}
	base, err := r.openBelow(files, namedBase, false)
	if err != nil {
		return err
	}
	format := "raw"
	if r.qcow2Base {
		format = "qcow2"
	}
	if !r.fvd {
		return qcow2.Create(files[0], qcow2.CreateOptions{
			Size: r.size, ClusterSize: chainCluster, BackingFile: namedBase, BackingFormat: format, BackingSize: base.Size(),
		})
	}
	o := fvd.CreateOptions{
		Size: r.size, BaseImage: namedBase, BaseFormat: format, Base: base, Compact: r.table, BlockSize: 2 * kib, JournalSize: 32 * kib, PlainJournal: r.plain,
	}
	if r.table {
		o.ChunkSize, o.GrowUnit = 4*kib, 16*kib
	}
	return fvd.Create(files[0], o)
}

func (r *chainRun) prepareQcow2Base(f storage.File, p []byte) error {
	if err := qcow2.Create(f, qcow2.CreateOptions{Size: int64(len(p)), ClusterSize: chainCluster}); err != nil {
		return err
	}
	im, err := qcow2.Open(shared{f}, qcow2.Options{})
	if err != nil {
		return err
	}
	if _, err := im.WriteAt(p, 0); err != nil {
		return err
	}
	return im.Close()
}

// shared is a file that stays open when an image closes it.
type shared struct{ storage.File }

func (shared) Close() error { return nil }

// openBelow opens what an overlay calls by a name; nil for "".
func (r *chainRun) openBelow(files []storage.File, name string, writable bool) (block.Device, error) {
	f := files[1]
	switch name {
	case "":
		return nil, nil
	case namedOther:
		f = files[2]
	case namedBase:
	default:
		return nil, fmt.Errorf("the overlay names base %q", name)
	}
	if writable {
		f = shared{f}
	} else {
		f = sealed{f}
	}
	if name == namedBase && r.qcow2Base {
		o := qcow2.Options{ReadOnly: !writable, Reserve: reserve, JournalSize: 1, Discard: true}
		if !r.fvd {
			o.Discipline = r.c.Discipline
		}
		return qcow2.Open(f, o)
	}
	return raw.Open(f, raw.Options{ReadOnly: !writable, Discard: true})
}

// open opens the chain; for the work with a base that can be written, after a crash as anybody opens a disk.
func (r *chainRun) open(files []storage.File) (crashlab.Subject, error) {
	s := &chainSubject{run: r, files: files}
	return s, s.open(!r.opened.Swap(true))
}

func (s *chainSubject) open(writableBase bool) (err error) {
	f, r := shared{s.files[0]}, s.run
	if r.fvd {
		return s.openFVD(f, writableBase)
	}
	h, err := qcow2.ReadHeader(f)
	if err != nil {
		return err
	}
	if s.below, err = r.openBelow(s.files, h.BackingFile, writableBase); err != nil {
		return err
	}
	s.Device, err = qcow2.Open(f, qcow2.Options{
		Discipline: r.c.Discipline, Backing: s.below, Reserve: reserve, JournalSize: 1, Discard: true,
	})
	return err
}

func (s *chainSubject) openFVD(f storage.File, writableBase bool) error {
	h, err := fvd.ReadHeader(f)
	if err != nil {
		return err
	}
	o := fvd.Options{
		Journal: fvd.JournalImmediate, StrictJournal: true,
		AfterFunc: func(time.Duration, func()) func() bool { return func() bool { return true } },
	}
	if s.run.c.Discipline == fvdBuffered {
		o.Journal = fvd.JournalBuffered
	}
	name := h.BaseImage
	if h.FullyPrefetched {
		name = ""
	}
	if s.below, err = s.run.openBelow(s.files, name, writableBase); err != nil {
		return err
	}
	o.Base = s.below
	s.Device, err = fvd.Open(f, o)
	return err
}

func (s *chainSubject) WriteZeroes(off, length int64, unmap bool) error {
	return s.Device.WriteZeroes(off, length, zeroFlags(unmap))
}

// Check looks at a qcow2 overlay; what opening an FVD overlay leaves is judged when it is closed.
func (s *chainSubject) Check() error {
	if s.run.fvd {
		return nil
	}
	return s.run.check(s.files)
}

// check finds nothing wrong with the overlay but what a crash may leave that interrupts its emptying: leaks, under
// disciplines that allow them.
func (r *chainRun) check(files []storage.File) error {
	if !r.fvd {
		if leakBound(r.c.Discipline) > 0 {
			return checkInterrupted(files[0])
		}
		return checkQcow2(files[0], 0)
	}
	res, err := fvd.Check(sealed{files[0]}, fvd.CheckOptions{})
	if err == nil && len(res.Findings) > 0 {
		err = fmt.Errorf("the checker finds %+v", res.Findings[0])
	}
	return err
}

// commit writes the overlay to its base and empties it.
func (s *chainSubject) commit() error {
	if im, ok := s.Device.(*fvd.Image); ok && s.below.Size() < im.Size() {
		if err := im.ForgetBaseLength(); err != nil {
			return err
		}
	}
	err := jobs.Commit(context.Background(), s.Device, s.below, jobs.CommitOptions{Depth: 1, Workers: 2, BufferSize: 8 * kib})
	if err != nil {
		return err
	}
	return s.Device.(interface{ Empty() error }).Empty()
}

// rebase moves the overlay to another base, "" for none.
func (s *chainSubject) rebase(name string) error {
	other, err := s.run.openBelow(s.files, name, false)
	if err != nil {
		return err
	}
	o := jobs.RebaseOptions{Workers: 2, BufferSize: 8 * kib}
	im, ok := s.Device.(*fvd.Image)
	if !ok {
		q := s.Device.(*qcow2.Image)
		o.HoldZeroes = q.HoldZeroes
		if err := jobs.Rebase(context.Background(), q, other, o); err != nil {
			return err
		}
		format := ""
		if name != "" {
			format = "raw"
		}
		return q.SetBacking(name, format)
	}
	if o.Backed = im.BaseSize(); o.Backed > 0 {
		if err := jobs.Rebase(context.Background(), im, other, o); err != nil {
			return err
		}
	}
	if other != nil {
		err = im.ForgetBaseLength()
	} else {
		err = detach(im)
	}
	if err != nil {
		return err
	}
	if err := im.Close(); err != nil {
		return err
	}
	if err := fvd.Amend(s.files[0], []fvd.Setting{{Name: "base_img", Value: name}}); err != nil {
		return err
	}
	return s.open(false)
}

// detach has an FVD image hold everything that its base still covers, which are zeros.
func detach(im *fvd.Image) error {
	for off := int64(0); ; {
		start, n := im.NextInBase(off)
		if n == 0 {
			return im.DetachBase()
		}
		if err := im.WriteZeroes(start, n, block.MayUnmap); err != nil {
			return err
		}
		off = start + n
	}
}

func commitSteps(g *crashlab.Guest, s *chainSubject) error {
	m := crashlab.Mix{Requests: 10, MaxLength: 6 * kib, Write: 8, Unmap: 2, Flush: 1, Seed: s.run.c.Seed}
	return script(
		func() error { return m.Run(g) },
		func() error { return g.FlushWith("commit", s.commit) },
		func() error { m.Seed += 100; return m.Run(g) },
		func() error { return g.FlushWith("commit again", s.commit) },
		func() error { m.Requests = 4; return m.Run(g) },
		g.Check,
	)
}

func rebaseSteps(g *crashlab.Guest, s *chainSubject) error {
	m := crashlab.Mix{Requests: 6, MaxLength: 6 * kib, Write: 8, Unmap: 2, Flush: 1, Seed: s.run.c.Seed}
	return script(
		func() error { return m.Run(g) },
		func() error { return g.FlushWith("rebase", func() error { return s.rebase(namedOther) }) },
		func() error { m.Seed += 100; return m.Run(g) },
		func() error { return g.FlushWith("make independent", func() error { return s.rebase("") }) },
		func() error { m.Requests = 4; return m.Run(g) },
		g.Check,
	)
}
