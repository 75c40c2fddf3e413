package crashcases

import (
	"fmt"
	"slices"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/format/raw"
	"github.com/platter-disk/platter/storage"
)

// qcow2Workload is a workload and the image that it runs on.
type qcow2Workload struct {
	Workload
	create  qcow2.CreateOptions
	backing int64 // bytes of a raw backing file; 0: none
	data    bool  // the clusters are in an external data file
	discard bool
	caches  int64 // bytes of the table caches; 0: the default
	watch   []crashlab.Range
	ranges  []crashlab.Range // that are used and watched; nil: the disk, or watch
	work    func(seed uint64) func(g *crashlab.Guest) error

	copyOnRead bool             // what is read of the backing file is kept
	snapshots  *snapshotHistory // nil: none are taken
	emptied    bool             // the image is emptied, which a crash may interrupt
}

const (
	kib = 1 << 10

	// reserve is small, so that clusters are used again soon.
	reserve = 2

	growSteps, growBy = 4, 96 * kib
	shrinkSteps       = 4

	// journalSums is the discipline journal with checksums of the data that a commit exposes.
	journalSums = "journal-data-checksums"
)

// mixWork is a workload of random requests.
func mixWork(m crashlab.Mix) func(uint64) func(*crashlab.Guest) error {
	return func(seed uint64) func(*crashlab.Guest) error {
		m.Seed = seed
		return m.Run
	}
}

func qcow2Workloads() []qcow2Workload {
	// So far apart that their L1 entries lie in sectors of their own.
	apart := []crashlab.Range{{Offset: 0, Length: 6 * kib}, {Offset: 2048 * kib, Length: 6 * kib}, {Offset: 4096 * kib, Length: 6 * kib}}
	snapshots, applied := newSnapshotHistory(apart), newSnapshotHistory(apart)
	cow, long, shrunk := newSnapshotHistory(nil), newSnapshotHistory(nil), newSnapshotHistory(nil)
	return []qcow2Workload{
		{
			Workload: Workload{Name: "alloc", Description: "allocating writes and flushes on a stand-alone image"},
			create:   qcow2.CreateOptions{Size: 256 * kib, ClusterSize: 4096},
			work:     mixWork(crashlab.Mix{Requests: 60, MaxLength: 12 * kib, Write: 10, Flush: 4, Check: 1}),
		}, {
			Workload: Workload{Name: "mixed", Description: "writes, zeroing and discards over the same few clusters, so that they are freed and used again"},
			create:   qcow2.CreateOptions{Size: 32 * kib, ClusterSize: 1024},
			discard:  true,
			work:     mixWork(crashlab.Mix{Requests: 90, MaxLength: 4 * kib, Write: 8, Zero: 1, Unmap: 2, Discard: 3, Flush: 3, Check: 1}),
		}, {
			Workload: Workload{Name: "overlay", Description: "small writes over a backing file: copy-up, delayed and not"},
			create:   qcow2.CreateOptions{Size: 64 * kib, ClusterSize: 4096},
			backing:  64 * kib,
			work:     mixWork(crashlab.Mix{Requests: 60, MaxLength: 6 * kib, Write: 10, Zero: 1, Unmap: 1, Discard: 1, Flush: 4, Check: 1}),
		}, {
			Workload: Workload{Name: "overwrite", Description: "whole clusters over a backing file and over each other, so that what lies underneath is never zeros"},
			create:   qcow2.CreateOptions{Size: 16 * kib, ClusterSize: 1024},
			backing:  16 * kib,
			work:     mixWork(crashlab.Mix{Requests: 60, Align: 1024, MaxLength: 4 * kib, Write: 10, Unmap: 1, Discard: 3, Flush: 4, Check: 1}),
		}, {
			Workload: Workload{Name: "churn", Description: "a flush after almost every small write, so that a journal wraps"},
			create:   qcow2.CreateOptions{Size: 12 * kib, ClusterSize: 512},
			discard:  true,
			work:     mixWork(crashlab.Mix{Requests: 200, MaxLength: 1 * kib, Write: 8, Discard: 5, Flush: 12, Check: 1}),
		}, {
			Workload: Workload{Name: "extended", Description: "an overlay with subclusters"},
			create:   qcow2.CreateOptions{Size: 128 * kib, ClusterSize: 16 * kib, ExtendedL2: true},
			backing:  100 * kib,
			discard:  true,
			work:     mixWork(crashlab.Mix{Requests: 60, MaxLength: 8 * kib, Write: 10, Zero: 1, Unmap: 1, Discard: 1, Flush: 4, Check: 1}),
		}, {
			Workload: Workload{Name: "parallel", Description: "three workers at once, tables that do not fit the cache"},
			create:   qcow2.CreateOptions{Size: 128 * kib, ClusterSize: 512},
			discard:  true, caches: 1,
			work: mixWork(crashlab.Mix{Requests: 30, Workers: 3, MaxLength: 4 * kib, Write: 8, Unmap: 1, Discard: 2, Flush: 2, Check: 1}),
		}, {
			Workload: Workload{
				Name: "parallel-overlay", Description: "three workers at once over a backing file, each flushing and overwriting what was just copied up",
				Disciplines: []string{qcow2.Journal, journalSums},
			},
			create:  qcow2.CreateOptions{Size: 24 * kib, ClusterSize: 1024},
			backing: 24 * kib, discard: true,
			work: mixWork(crashlab.Mix{Requests: 30, Workers: 3, MaxLength: 3 * kib, Write: 10, Zero: 1, Unmap: 1, Discard: 1, Flush: 5, Check: 1}),
		}, {
			Workload: Workload{Name: "compressed", Description: "packed compressed clusters, overwritten and written again"},
			create:   qcow2.CreateOptions{Size: 32 * kib, ClusterSize: 4096, RefcountBits: 8},
			work:     compressedWork,
		}, {
			Workload: Workload{Name: "data-file", Description: "small writes over a backing file, into an external data file"},
			create:   qcow2.CreateOptions{Size: 32 * kib, ClusterSize: 4096},
			backing:  32 * kib, data: true, discard: true,
			work: mixWork(crashlab.Mix{Requests: 60, MaxLength: 6 * kib, Write: 10, Zero: 1, Unmap: 2, Discard: 2, Flush: 4, Check: 1}),
		}, {
			Workload: Workload{Name: "data-file-raw", Description: "an external data file that is the disk at all times"},
			create:   qcow2.CreateOptions{Size: 32 * kib, ClusterSize: 4096, DataFileRaw: true},
			data:     true, discard: true,
			work: mixWork(crashlab.Mix{Requests: 60, MaxLength: 6 * kib, Write: 10, Zero: 1, Unmap: 2, Discard: 2, Flush: 4, Check: 1}),
		}, {
			Workload: Workload{Name: "grow", Description: "refcount blocks and table, L1 table and disk grow"},
			create:   qcow2.CreateOptions{Size: 64 * kib, ClusterSize: 512, RefcountBits: 64},
			watch:    []crashlab.Range{{Offset: 0, Length: 64*kib + growSteps*growBy}},
			work:     growWork,
		}, {
			Workload: Workload{Name: "snapshot", Description: "snapshots taken, applied and deleted between writes, on a disk with an L1 table of several sectors"},
			create:   qcow2.CreateOptions{Size: 6144 * kib, ClusterSize: 512},
			discard:  true, ranges: apart, snapshots: snapshots,
			work: snapshots.work("??????????", crashlab.Mix{Requests: 5, MaxLength: 3 * kib, Write: 8, Unmap: 1, Discard: 1, Flush: 1}),
		}, {
			Workload: Workload{Name: "snapshot-apply", Description: "one snapshot, applied again and again"},
			create:   qcow2.CreateOptions{Size: 6144 * kib, ClusterSize: 512},
			ranges:   apart, snapshots: applied,
			work: applied.work("caaa", crashlab.Mix{Requests: 3, MaxLength: 2 * kib, Write: 1}),
		}, {
			Workload: Workload{Name: "snapshot-cow", Description: "many copy-on-writes a flush of what snapshots share"},
			create:   qcow2.CreateOptions{Size: 48 * kib, ClusterSize: 1024},
			discard:  true, snapshots: cow,
			work: cow.work("c?????", crashlab.Mix{Requests: 24, MaxLength: 4 * kib, Write: 12, Zero: 1, Discard: 1, Flush: 1}),
		}, {
			Workload:  Workload{Name: "snapshot-long", Description: "operations on snapshots that take a journal several transactions"},
			create:    qcow2.CreateOptions{Size: 128 * kib, ClusterSize: 512, RefcountBits: 64},
			snapshots: long,
			work:      long.work("cadc", crashlab.Mix{Requests: 8, MaxLength: 48 * kib, Write: 1}),
		},
		{
			Workload: Workload{Name: "empty", Description: "an image is emptied, its tables move to the start of the file, and it is used and emptied again"},
			create:   qcow2.CreateOptions{Size: 64 * kib, ClusterSize: 1024},
			discard:  true, emptied: true, work: emptyWork,
		}, {
			Workload: Workload{Name: "empty-tables", Description: "the same with refcount blocks all over the file"},
			create:   qcow2.CreateOptions{Size: 96 * kib, ClusterSize: 512, RefcountBits: 64},
			emptied:  true, work: emptyWork,
		},
		{
			Workload: Workload{Name: "shrink", Description: "the disk becomes smaller and larger again, and its tables come and go"},
			create:   qcow2.CreateOptions{Size: 96 * kib, ClusterSize: 512, RefcountBits: 64},
			discard:  true, work: shrinkWork(nil),
		}, {
			Workload: Workload{Name: "shrink-snapshot", Description: "the same with snapshots, which keep what the disk gives up"},
			create:   qcow2.CreateOptions{Size: 96 * kib, ClusterSize: 512},
			discard:  true, snapshots: shrunk, work: shrinkWork(shrunk),
		}, {
			Workload: Workload{Name: "shrink-overlay", Description: "the same over a backing file, which must not show through"},
			create:   qcow2.CreateOptions{Size: 64 * kib, ClusterSize: 1024},
			backing:  64 * kib, discard: true, work: shrinkWork(nil),
		}, {
			Workload: Workload{Name: "shrink-data-file", Description: "the same with an external data file that is the disk at all times"},
			create:   qcow2.CreateOptions{Size: 64 * kib, ClusterSize: 1024, DataFileRaw: true},
			data:     true, discard: true, work: shrinkWork(nil),
		},
		qcow2CopyOnRead(),
	}
}

// compressedWork writes whole clusters compressed, and plain data over them.
func compressedWork(seed uint64) func(g *crashlab.Guest) error {
	return func(g *crashlab.Guest) error {
		const cluster = 4096
		r := newRand(seed)
		im := g.Subject().(*qcow2Subject).Image
		for range 50 {
			off := r.Int64N(g.Subject().Size()/cluster) * cluster
			var err error
			switch r.IntN(6) {
			case 0, 1, 2:
				err = g.WriteWith("compressed write", off, cluster, func(p []byte) error { return im.WriteCompressed(p, off) })
			case 3:
				err = g.Write(off+r.Int64N(6)*512, 1024)
			case 4:
				err = g.Discard(off, cluster)
			case 5:
				err = g.Flush()
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
}

// shrinkWork lets a disk become smaller, down to nothing but its first clusters, and larger again between writes. With
// a history the larger disks have snapshots.
func shrinkWork(h *snapshotHistory) func(uint64) func(*crashlab.Guest) error {
	return func(seed uint64) func(*crashlab.Guest) error {
		return func(g *crashlab.Guest) error {
			r := newRand(seed)
			im := g.Subject().(*qcow2Subject).Image
			size := im.Size()
			resize := func(to int64) func() error {
				return func() error {
					return g.Resize(to, func() error { return im.Resize(to, block.PreallocOff) })
				}
			}
			nothing := func() error { return nil }
			for i := range shrinkSteps {
				large := crashlab.Mix{Requests: 12, MaxLength: 16 * kib, Write: 8, Unmap: 1, Flush: 1, Seed: r.Uint64()}
				small := crashlab.Mix{Requests: 4, MaxLength: 2 * kib, Write: 8, Unmap: 1, Flush: 1, Seed: r.Uint64()}
				take, drop := nothing, nothing
				if h != nil {
					take = func() error { return h.create(g, fmt.Sprint("s", i)) }
					if i%2 == 1 {
						drop = func() error { return h.delete(g, fmt.Sprint("s", i/2)) }
					}
				}
				err := script(
					func() error { return large.Run(g) }, take, resize((1+r.Int64N(size/512-1))*512),
					func() error { return small.Run(g) }, drop, resize(size),
				)
				if err != nil {
					return err
				}
			}
			return nil
		}
	}
}

// emptyWork empties an image that holds nothing but zeros, so that the guest sees no difference.
func emptyWork(seed uint64) func(g *crashlab.Guest) error {
	return func(g *crashlab.Guest) error {
		im := g.Subject().(*qcow2Subject).Image
		fill := crashlab.Mix{Requests: 16, MaxLength: 16 * kib, Write: 8, Unmap: 1, Flush: 2, Seed: seed}
		for range 2 {
			err := script(
				func() error { return fill.Run(g) },
				func() error { return g.WriteZeroes(0, im.Size(), false) },
				g.Flush,
				func() error { return g.FlushWith("empty", im.Empty) },
			)
			if err != nil {
				return err
			}
			fill.Seed += 100
		}
		fill.Requests = 6
		return fill.Run(g)
	}
}

// growWork makes every structure of an image grow.
func growWork(seed uint64) func(g *crashlab.Guest) error {
	return func(g *crashlab.Guest) error {
		r := newRand(seed)
		im := g.Subject().(*qcow2Subject).Image
		for range growSteps {
			grow := crashlab.Mix{Requests: 10, MaxLength: 16 * kib, Write: 6, Flush: 2, Seed: r.Uint64()}
			if err := grow.Run(g); err != nil {
				return err
			}
			size := g.Subject().Size() + growBy
			if err := g.Resize(size, func() error { return im.Resize(size, block.PreallocOff) }); err != nil {
				return err
			}
		}
		return nil
	}
}

func qcow2Format() Format {
	f := Format{Name: "qcow2", Disciplines: append(qcow2.Disciplines(), journalSums), Default: qcow2.Ordered, scenario: qcow2Scenario}
	for _, w := range qcow2Workloads() {
		f.Workloads = append(f.Workloads, w.Workload)
	}
	catch := map[qcow2.Mutant]string{
		qcow2.MutantNoCopyUp: "overlay", qcow2.MutantLinkFirst: "overwrite", qcow2.MutantHistorical: "overwrite",
		qcow2.MutantReuseEarly: "overwrite", qcow2.MutantPunchEarly: "compressed", qcow2.MutantLowerEarly: "overwrite",
		qcow2.MutantNoWAL: "churn", qcow2.MutantNoCheckpointB: "churn", qcow2.MutantRingEarly: "churn",
		qcow2.MutantRevokeIgnored: "grow", qcow2.MutantStaleCopied: "snapshot", qcow2.MutantInPlaceL1: "snapshot-apply",
		qcow2.MutantMoveEarly:      "empty",
		qcow2.MutantShrinkLate:     "shrink",
		qcow2.MutantOpstateIgnored: "snapshot-long",
		qcow2.MutantSumsIgnored:    "overlay", qcow2.MutantOverwriteEarly: "overlay",
	}
	for m, disciplines := range qcow2.Mutants() {
		workload := catch[m]
		if workload == "" {
			workload = "mixed"
		}
		if m == qcow2.MutantSumsIgnored || m == qcow2.MutantOverwriteEarly {
			disciplines = []string{journalSums}
		}
		f.Mutants = append(f.Mutants, Mutant{Name: string(m), Disciplines: disciplines, Workload: workload})
	}
	slices.SortFunc(f.Mutants, func(a, b Mutant) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	return f
}

func qcow2Scenario(c Case) (crashlab.Scenario, error) {
	w, err := find("workload", c.Workload, qcow2Workloads(), func(w qcow2Workload) string { return w.Name })
	if err != nil {
		return crashlab.Scenario{}, err
	}
	sc := crashlab.Scenario{
		Name:        c.String(),
		Files:       []crashlab.FileSpec{{Name: "image"}},
		Prepare:     w.prepare,
		Open:        func(files []storage.File) (crashlab.Subject, error) { return w.open(files, c) },
		Work:        w.work(c.Seed),
		Again:       mixWork(crashlab.Mix{Requests: 8, MaxLength: 4 * kib, Ranges: w.ranges, Write: 6, Discard: 1, Flush: 2})(c.Seed + 1),
		Closed:      func(files []storage.File) error { return w.check(files[0], c.Discipline) },
		Watch:       slices.Concat(w.watch, w.ranges),
		DiscardUnit: w.create.ClusterSize,
	}
	if w.snapshots != nil {
		sc.Judge = w.snapshots.judge
	}
	if w.backing > 0 {
		sc.Files = append(sc.Files, crashlab.FileSpec{Name: "backing"})
	}
	if w.data {
		sc.Files = append(sc.Files, crashlab.FileSpec{Name: "data"})
	}
	return sc, nil
}

// prepare makes the image, and a backing file without a zero sector.
func (w *qcow2Workload) prepare(files []storage.File) error {
	o := w.create
	if w.backing > 0 {
		o.BackingFile, o.BackingFormat, o.BackingSize = "backing", "raw", w.backing
		if err := fillUnique(files[1], w.backing); err != nil {
			return err
		}
	}
	if w.data {
		o.DataFileName, o.DataFile = "data", files[len(files)-1]
	}
	return qcow2.Create(files[0], o)
}

func (w *qcow2Workload) open(files []storage.File, c Case) (crashlab.Subject, error) {
	o := qcow2.Options{
		Discipline: c.Discipline, L2CacheSize: w.caches, RefcountCacheSize: w.caches, Discard: w.discard,
		Reserve: reserve, JournalSize: 1, JournalCommitInterval: -1, Mutant: qcow2.Mutant(c.Mutant),
	}
	if c.Discipline == journalSums {
		o.Discipline, o.JournalDataChecksums = qcow2.Journal, true
	}
	h, err := qcow2.ReadHeader(files[0])
	if err != nil {
		return nil, err
	}
	if h.BackingFile != "" { // once it is let go the disk has to do without
		backing, err := raw.Open(sealed{files[1]}, raw.Options{ReadOnly: true})
		if err != nil {
			return nil, err
		}
		o.Backing = backing
	}
	if w.data {
		o.DataFile = files[len(files)-1]
	}
	im, err := qcow2.Open(files[0], o)
	if err != nil {
		return nil, err
	}
	s := &qcow2Subject{Image: im, check: func() error { return w.check(files[0], c.Discipline) }}
	if w.copyOnRead {
		return s.keepCopies(w.create.ClusterSize, w.backing), nil
	}
	return s, nil
}

// check finds nothing but what the discipline may leave.
func (w *qcow2Workload) check(f storage.File, discipline string) error {
	leaks := leakBound(discipline)
	if (w.snapshots != nil || w.emptied) && leaks > 0 {
		return checkInterrupted(f)
	}
	return checkQcow2(f, leaks)
}

// leakBound is the number of clusters that two crashes, one of the disk that was recovered from the other, may
// leak under a discipline, by its promise.
func leakBound(discipline string) int64 {
	switch discipline {
	case qcow2.Journal, journalSums, qcow2.Lazy:
		return 0
	}
	// The reserve, what is in transit and in quarantine, and what the operations in flight take.
	return 2 * (2*reserve + 64 + 64 + 64)
}

// qcow2Subject is an image with its checker.
type qcow2Subject struct {
	*qcow2.Image
	check func() error
}

func (s *qcow2Subject) WriteZeroes(off, length int64, unmap bool) error {
	return s.Image.WriteZeroes(off, length, zeroFlags(unmap))
}

// Check finds nothing but what the discipline may leave.
func (s *qcow2Subject) Check() error { return s.check() }

func checkQcow2(f storage.File, leaks int64) error {
	first := ""
	res, err := qcow2.Check(f, qcow2.CheckOptions{Report: func(found qcow2.Finding) {
		if first == "" && (found.Kind != qcow2.FindingLeak || leaks == 0) {
			first = found.Message
		}
	}})
	if err != nil {
		return err
	}
	if res.Corruptions+res.CheckErrors+res.Collisions > 0 || res.Leaks > leaks {
		return fmt.Errorf("%d corruptions, %d leaks (at most %d allowed), %d errors; first: %s",
			res.Corruptions, res.Leaks, leaks, res.CheckErrors, first)
	}
	return nil
}
