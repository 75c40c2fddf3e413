package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/storage"
)

const (
	filesDisk    = 4 << 30 // bytes of the disk that holds the guest's file system
	filesCount   = 1500    // files created, at scale 1
	filesCostly  = 250     // the same where barriers are slowed down
	filesCounted = 300     // files whose system calls are counted
	probeWrites  = 200     // writes of 4 KiB with a barrier each, to tell what a barrier takes
)

// filesCase is a server and the image that it serves to the guest.
type filesCase struct {
	title   string
	server  Server
	create  func(ctx context.Context, name string) error // nil: the server needs no image
	against bool                                         // the others are compared with it
}

func createQcow2(ctx context.Context, name string) error {
	var o image.CreateOptions
	o.Size = filesDisk
	return image.Create(ctx, "qcow2", name, o)
}

// createFVD makes an FVD image, compact with a lookup table or without one, at fixed places.
func createFVD(compact bool) func(context.Context, string) error {
	return func(ctx context.Context, name string) error {
		var o image.CreateOptions
		o.Size, o.FVD.Compact = filesDisk, compact
		return image.Create(ctx, "fvd", name, o)
	}
}

// platterServe is `platter serve` of an image in any format.
func platterServe(executable, name string, flags ...string) Server {
	return Server{name, func(image, socket string) []string {
		return append([]string{executable, "serve", "--socket", socket, image}, flags...)
	}}
}

// filesCases are the disks on which files are created.
func filesCases(executable string) []filesCase {
	cases := []filesCase{
		{title: "qemu-nbd, qcow2, writethrough", against: true, create: createQcow2, server: Server{"qemu-writethrough",
			QemuNBD("--cache=writethrough").Command}},
		{title: "qemu-nbd, qcow2, writeback", create: createQcow2, server: Server{"qemu-writeback",
			QemuNBD("--cache=writeback").Command}},
	}
	for _, d := range qcow2.Disciplines() {
		cases = append(cases, filesCase{title: "platter, qcow2, " + d, create: createQcow2,
			server: platterServe(executable, "qcow2-"+d, "--discipline", d)})
	}
	return append(cases,
		filesCase{title: "platter, fvd compact, immediate, writethrough", create: createFVD(true),
			server: platterServe(executable, "fvd-writethrough", "--discipline", "immediate", "--cache", "writethrough")},
		filesCase{title: "platter, fvd compact, immediate", create: createFVD(true),
			server: platterServe(executable, "fvd-immediate", "--discipline", "immediate")},
		filesCase{title: "platter, fvd compact, buffered", create: createFVD(true),
			server: platterServe(executable, "fvd-buffered", "--discipline", "buffered")},
		filesCase{title: "platter, fvd", create: createFVD(false),
			server: platterServe(executable, "fvd-plain")},
		filesCase{title: "nbdkit, memory", server: Server{"memory", func(_, socket string) []string {
			return []string{"nbdkit", "--foreground", "--unix", socket, "memory", fmt.Sprint(filesDisk)}
		}}},
	)
}

// slowBarriers is a server whose barriers take d more, as if the image lay on a disk of which that is true. strace
// holds the system calls up; the process that it starts stays the server itself.
func slowBarriers(s Server, d time.Duration) Server {
	if d == 0 {
		return s
	}
	return Server{s.Name, func(image, socket string) []string {
		const calls = "fdatasync,fsync"
		return append([]string{"strace", "-D", "-f", "--seccomp-bpf", "-qqq", "-o", os.DevNull, "-e", "trace=" + calls,
			"-e", fmt.Sprintf("inject=%s:delay_exit=%d", calls, d.Microseconds())}, s.Command(image, socket)...)
	}}
}

// FilesResult is what creating files in a guest's file system took on one disk. Rates are medians of the rounds.
type FilesResult struct {
	Disk         string  `json:"disk"`
	Barrier      float64 `json:"barrier_added_ms"`
	Created      float64 `json:"files_created_per_second"`
	Ratio        float64 `json:"created_ratio"` // to stock qemu-nbd with cache=writethrough and the same barriers
	Transactions float64 `json:"transactions_per_second"`
	Batch        float64 `json:"files_created_per_second_with_one_sync"`
	BatchRatio   float64 `json:"created_ratio_with_one_sync"`
	Syncs        float64 `json:"fdatasyncs_per_file"` // of creation; counted where barriers are not slowed down
	Writes       float64 `json:"write_calls_per_file"`
	Bytes        float64 `json:"bytes_written_per_file"`
	CPU          float64 `json:"server_cpu_us_per_file"`

	Rounds []FilesRound `json:"rounds"`
}

// FilesRound is one run of the workload.
type FilesRound struct {
	Created      float64 `json:"files_created_per_second"`
	Transactions float64 `json:"transactions_per_second"`
	Batch        float64 `json:"files_created_per_second_with_one_sync"`
	CPU          float64 `json:"server_cpu_us_per_file"`
}

// summarize takes the medians.
func (r *FilesResult) summarize() {
	middle := func(of func(FilesRound) float64) float64 {
		var v []float64
		for _, x := range r.Rounds {
			v = append(v, of(x))
		}
		return median(v)
	}
	r.Created = middle(func(x FilesRound) float64 { return x.Created })
	r.Transactions = middle(func(x FilesRound) float64 { return x.Transactions })
	r.Batch = middle(func(x FilesRound) float64 { return x.Batch })
	r.CPU = middle(func(x FilesRound) float64 { return x.CPU })
}

// median is the middle of at least one value.
func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// FilesReport is the file-creation workload on all disks.
type FilesReport struct {
	Storage float64       `json:"fdatasync_ms"` // what a write of 4 KiB and a barrier take where the images lie
	Results []FilesResult `json:"results"`
}

// files measures the creation of small files in a guest's file system, with the barriers of this machine's
// storage and with slower ones.
func (b *FVDBench) files(ctx context.Context) (*FilesReport, error) {
	if err := require(append(guestPrograms(), "qemu-nbd", "nbdkit", "strace")...); err != nil {
		return nil, err
	}
	r := &FilesReport{}
	var err error
	if r.Storage, err = probeBarrier(b.Dir); err != nil {
		return nil, err
	}
	cases := filesCases(b.Executable)
	for _, barrier := range []time.Duration{0, b.Barrier} {
		results := make([]FilesResult, len(cases))
		for round := range b.Rounds {
			for i, c := range cases {
				one, err := b.filesRound(ctx, c, barrier, round)
				if err != nil {
					return nil, fmt.Errorf("%s: %w", c.title, err)
				}
				fmt.Fprintf(b.Notes, "files, barrier +%v, round %d, %s: %.0f/s\n", barrier, round+1, c.title, one.Created)
				results[i].Rounds = append(results[i].Rounds, one)
			}
		}
		peer := slices.IndexFunc(cases, func(c filesCase) bool { return c.against })
		for i, c := range cases {
			x := &results[i]
			x.Disk, x.Barrier = c.title, float64(barrier.Microseconds())/1e3
			x.summarize()
			if barrier > 0 { // counts do not depend on how long a barrier takes
				x.Syncs, x.Writes, x.Bytes = r.Results[i].Syncs, r.Results[i].Writes, r.Results[i].Bytes
			} else if err := b.countFiles(ctx, c, x); err != nil {
				return nil, fmt.Errorf("%s: %w", c.title, err)
			}
		}
		for i := range results {
			results[i].Ratio = results[i].Created / results[peer].Created
			results[i].BatchRatio = results[i].Batch / results[peer].Batch
		}
		r.Results = append(r.Results, results...)
		if b.Barrier == 0 {
			break
		}
	}
	return r, nil
}

// filesRound runs the workload once on a new disk.
func (b *FVDBench) filesRound(ctx context.Context, c filesCase, barrier time.Duration, round int) (r FilesRound, err error) {
	count := filesCount * b.Scale
	if barrier > 0 {
		count = filesCostly * b.Scale
	}
	err = b.onGuest(ctx, c, barrier, count, uint64(round), func(p *process, w *fileWork) error {
		m, err := ProcessMeter(p.cmd.Process.Pid)
		if err != nil {
			return err
		}
		if err := m.Start(); err != nil {
			return err
		}
		creating, err := w.creation(ctx)
		if err != nil {
			return err
		}
		cost, err := m.Stop()
		if err != nil {
			return err
		}
		transacting, err := w.transactions(ctx)
		if err != nil {
			return err
		}
		batching, err := w.batches(ctx)
		if err != nil {
			return err
		}
		r = FilesRound{
			Created:      float64(count) / creating.Seconds(),
			Transactions: float64(count) / transacting.Seconds(),
			Batch:        float64(count*batchFactor) / batching.Seconds(),
			CPU:          float64(cost.CPU.Microseconds()) / float64(count),
		}
		return w.deletion(ctx)
	})
	return r, err
}

// countFiles counts what the server does to its image while files are created.
func (b *FVDBench) countFiles(ctx context.Context, c filesCase, r *FilesResult) error {
	return b.onGuest(ctx, c, 0, filesCounted, 0, func(p *process, w *fileWork) error {
		m := StraceMeter(p.cmd.Process.Pid)
		if err := m.Start(); err != nil {
			return err
		}
		_, err := w.creation(ctx)
		cost, merr := m.Stop() // in any case: it is another process
		if err := errors.Join(err, merr); err != nil {
			return err
		}
		r.Syncs = float64(*cost.Syncs) / filesCounted
		r.Writes = float64(*cost.WriteCalls) / filesCounted
		r.Bytes = float64(*cost.BytesWritten) / filesCounted
		return nil
	})
}

// onGuest calls fn with work in a new file system on a new disk of the case.
func (b *FVDBench) onGuest(ctx context.Context, c filesCase, barrier time.Duration, count int, seed uint64, fn func(*process, *fileWork) error) (err error) {
	dir, err := os.MkdirTemp(b.Dir, "files-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	name := filepath.Join(dir, "image")
	if c.create != nil {
		if err := c.create(ctx, name); err != nil {
			return err
		}
	}
	p, err := slowBarriers(c.server, barrier).start(ctx, dir, name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.stop()) }()
	g, err := newGuestFS(ctx, dir, p.uri)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.close()) }()
	w, err := newFileWork(g.root, count, seed)
	if err != nil {
		return err
	}
	return fn(p, w)
}

// probeBarrier tells how many milliseconds a write of 4 KiB and a barrier take in a directory.
func probeBarrier(dir string) (ms float64, err error) {
	name := filepath.Join(dir, "barrier")
	f, err := storage.Open(name, storage.OpenOptions{Create: true})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(name)) }()
	block := make([]byte, 4096)
	begin := time.Now()
	for i := range int64(probeWrites) {
		if _, err := f.WriteAt(block, i*int64(len(block))); err != nil {
			return 0, err
		}
		if err := f.Sync(); err != nil {
			return 0, err
		}
	}
	return float64(time.Since(begin).Microseconds()) / 1e3 / probeWrites, nil
}
