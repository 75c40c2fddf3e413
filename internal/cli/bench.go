package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"

	"github.com/spf13/cobra"

	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/internal/bench"
	"github.com/platter-disk/platter/nbd"
)

// benchFlags are the flags of bench.
type benchFlags struct {
	open       openFlags
	output     outputFlag
	workloads  []string
	depths     []int
	operations int
	seed       uint64
	write      bool
	pid        int
	strace     bool
	dir        string
	against    string
	rounds     int
	cache      string
	metadata   metadataFlags

	disciplines disciplineFlags
	fvd         fvdFlags
}

func newBenchCommand() *cobra.Command {
	f := &benchFlags{}
	cmd := &cobra.Command{
		Use:   "bench [flags] [IMAGE | URI]",
		Short: "Measure what a disk costs: CPU, allocations, writes, syncs",
		Long: `Measure what a disk costs an operation: CPU time, heap allocations, write calls, bytes
and fdatasyncs. The workloads are

` + benchHelp() + `

Without an argument they run on new images in a temporary directory (--dir), in this
process. With an image they run on that image, in this process; with an NBD URI on a
server, whose process --pid names if its CPU time is to be measured (Linux), with
--strace also its system calls. On an image or a server of yours only the workloads
that read are run, unless you allow with --write that its contents are DESTROYED.

With --against qemu-nbd, platter serve and qemu-nbd serve equal images in turn to the
same client, and the result is a table with the ratios.

With --disciplines, the disciplines of qcow2 metadata are compared: fdatasyncs, write
calls and bytes of metadata an operation, with --against qemu-nbd those of qemu-nbd as
well, and with --recovery what the next open does after a crash.

With --fvd, what FVD promises is measured (docs/fvd-performance.md); --workload chooses from
` + strings.Join(bench.FVDMeasures(), ", ") + `.

  files   small files created, written, synced, deleted in a guest's file system, on
          qemu-nbd's qcow2, Platter's and FVD (Linux, as root: nbdfuse, losetup, strace)
  boot    the start of a machine whose base image is far away (nbdkit)
  load    a guest at work while its disk is prefetched
  clones  many machines that start from one base image

Times depend on the machine; compare only those of one run.`,
		Example: `  platter bench
  platter bench --workload read-4k --depth 32 disk.qcow2
  platter bench --pid $(pidof qemu-nbd) "nbd+unix:///?socket=/run/disk.sock"
  platter bench --against qemu-nbd --strace
  platter bench --disciplines --against qemu-nbd --recovery=1G,100G
  platter bench --fvd --workload boot --rounds 3`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.run(cmd, args)
		},
	}
	f.open.register(cmd, "format of the image; guessed when not given")
	f.output.register(cmd)
	fs := cmd.Flags()
	fs.StringSliceVarP(&f.workloads, "workload", "w", nil, "run only these workloads")
	completeWith(cmd, "workload", bench.Names()...)
	fs.IntSliceVarP(&f.depths, "depth", "d", []int{1, 32}, "requests in flight")
	fs.IntVarP(&f.operations, "operations", "n", 0, "operations of each run (default: by workload)")
	fs.Uint64Var(&f.seed, "seed", 1, "seed of the random places")
	fs.BoolVar(&f.write, "write", false, "run the workloads that write, too: the contents of IMAGE are lost")
	fs.IntVar(&f.pid, "pid", 0, "process of the server, to measure its CPU time")
	fs.BoolVar(&f.strace, "strace", false, "count the system calls of the server with strace")
	fs.StringVar(&f.dir, "dir", "", "make new images in this directory (default: a temporary one)")
	fs.StringVar(&f.against, "against", "", "compare platter serve with this server: qemu-nbd")
	completeWith(cmd, "against", "qemu-nbd")
	fs.IntVar(&f.rounds, "rounds", 2, "with --against and --fvd: how often each that is compared has its turn")
	fs.StringVar(&f.cache, "cache", "writeback", "writeback, none or writethrough")
	completeWith(cmd, "cache", "writeback", "none", "writethrough")
	f.metadata.register(cmd)
	f.disciplines.register(cmd)
	f.fvd.register(cmd)
	return cmd
}

func benchHelp() string {
	var b strings.Builder
	for _, w := range bench.Workloads() {
		fmt.Fprintf(&b, "  %-18s %s\n", w.Name, w.Title)
	}
	return strings.TrimRight(b.String(), "\n")
}

func (f *benchFlags) run(cmd *cobra.Command, args []string) error {
	if f.fvd.wanted {
		return f.runFVD(cmd, args)
	}
	if f.disciplines.wanted {
		return f.runDisciplines(cmd, args)
	}
	if len(f.disciplines.recovery) > 0 {
		return usagef(cmd, "--recovery needs --disciplines")
	}
	if err := errors.Join(f.open.check(cmd), f.output.check()); err != nil {
		return err
	}
	workloads, err := bench.Select(f.workloads)
	if err != nil {
		return usagef(cmd, "%s", err)
	}
	for _, d := range f.depths {
		if d < 1 || d > 1024 {
			return usagef(cmd, "--depth %d: expected 1 to 1024", d)
		}
	}
	if f.operations < 0 || f.rounds < 1 {
		return usagef(cmd, "--operations must not be negative and --rounds must be at least 1")
	}
	mode, ok := parseCache(f.cache)
	if !ok || mode.unsafe {
		return usagef(cmd, "--cache must be used with writeback, none or writethrough as argument")
	}
	options := f.metadata.apply(mode.apply(image.Options{Discard: true}))
	switch {
	case len(args) > 1:
		return usagef(cmd, "Expecting at most one image file name")
	case f.against != "" && (len(args) > 0 || f.against != "qemu-nbd"):
		return usagef(cmd, "--against must be used with qemu-nbd as argument, and without an image")
	case f.against != "":
		return f.runAgainst(cmd, workloads)
	case len(args) == 0:
		return f.runScratch(cmd, workloads, options)
	case nbd.IsURI(args[0]):
		return f.runRemote(cmd, args[0], workloads)
	default:
		return f.runImage(cmd, args[0], workloads, options)
	}
}

// each runs every workload at every depth.
func (f *benchFlags) each(cmd *cobra.Command, workloads []bench.Workload, one func(bench.Workload, bench.Options) error) error {
	for _, w := range workloads {
		for _, depth := range f.depths {
			if err := cmd.Context().Err(); err != nil {
				return err
			}
			if err := one(w, bench.Options{Depth: depth, Operations: f.operations, Seed: f.seed}); err != nil {
				return err
			}
		}
	}
	return nil
}

// inDir calls fn with the directory for new images.
func (f *benchFlags) inDir(fn func(dir string) error) error {
	parent := f.dir
	if parent == "" {
		parent = os.TempDir()
	}
	dir, err := os.MkdirTemp(parent, "platter-bench-")
	if err != nil {
		return err
	}
	return errors.Join(fn(dir), os.RemoveAll(dir))
}

// runScratch measures the engine in this process on new images.
func (f *benchFlags) runScratch(cmd *cobra.Command, workloads []bench.Workload, o image.Options) error {
	o.Format = "qcow2"
	var results []bench.Result
	err := f.inDir(func(dir string) error {
		scratch := &bench.Scratch{Dir: dir}
		return f.each(cmd, workloads, func(w bench.Workload, bo bench.Options) error {
			name, err := scratch.Make(cmd.Context(), w, bo)
			if err != nil {
				return err
			}
			r, err := measureImage(cmd.Context(), name, o, w, bo)
			if err != nil {
				return err
			}
			results = append(results, r)
			return scratch.Remove(name)
		})
	})
	if err != nil {
		return err
	}
	return f.print(cmd.OutOrStdout(), results)
}

func measureImage(ctx context.Context, name string, o image.Options, w bench.Workload, bo bench.Options) (bench.Result, error) {
	d, err := bench.OpenImage(ctx, name, o)
	if err != nil {
		return bench.Result{}, err
	}
	r, err := bench.Run(ctx, d, w, bo, d.Meter())
	return r, errors.Join(err, d.Close())
}

// runImage measures the engine in this process on an image of the user's.
func (f *benchFlags) runImage(cmd *cobra.Command, name string, workloads []bench.Workload, o image.Options) error {
	g, err := f.open.gate()
	if err != nil {
		return err
	}
	o.Gate, o.Format, o.NameIsOptions, o.ReadOnly = g, f.open.format, f.open.imageOpts, !f.write
	return f.suitable(cmd, workloads, func(w bench.Workload, bo bench.Options) (bench.Result, error) {
		return measureImage(cmd.Context(), name, o, w, bo)
	})
}

// runRemote measures a server.
func (f *benchFlags) runRemote(cmd *cobra.Command, uri string, workloads []bench.Workload) error {
	if f.strace && f.pid == 0 {
		return usagef(cmd, "--strace needs --pid")
	}
	return f.suitable(cmd, workloads, func(w bench.Workload, bo bench.Options) (bench.Result, error) {
		var meter bench.Meter = noMeter{}
		var err error
		switch {
		case f.strace:
			meter = bench.StraceMeter(f.pid)
		case f.pid != 0:
			if meter, err = bench.ProcessMeter(f.pid); err != nil {
				return bench.Result{}, err
			}
		}
		d, err := bench.DialDisk(uri, bench.DialOptions{ReadOnly: !f.write})
		if err != nil {
			return bench.Result{}, err
		}
		defer d.Close()
		return bench.Run(cmd.Context(), d, w, bo, meter)
	})
}

// suitable runs those workloads that a disk of the user's allows, and says which it does not.
func (f *benchFlags) suitable(cmd *cobra.Command, workloads []bench.Workload, one func(bench.Workload, bench.Options) (bench.Result, error)) error {
	var results []bench.Result
	err := f.each(cmd, workloads, func(w bench.Workload, o bench.Options) error {
		if w.Writes && !f.write {
			if len(f.workloads) > 0 {
				return fmt.Errorf("%s destroys what is on the disk: allow it with --write", w.Name)
			}
			return nil
		}
		r, err := one(w, o)
		if errors.Is(err, bench.ErrNoSpace) && len(f.workloads) == 0 {
			warn(cmd, "%s", err)
			return nil
		}
		if err == nil {
			results = append(results, r)
		}
		return err
	})
	if err != nil {
		return err
	}
	return f.print(cmd.OutOrStdout(), results)
}

// noMeter measures nothing but the time.
type noMeter struct{}

func (noMeter) Start() error              { return nil }
func (noMeter) Stop() (bench.Cost, error) { return bench.Cost{}, nil }

// runAgainst measures platter serve and qemu-nbd in turn.
func (f *benchFlags) runAgainst(cmd *cobra.Command, workloads []bench.Workload) error {
	if _, err := exec.LookPath("qemu-nbd"); err != nil {
		return fmt.Errorf("--against qemu-nbd: %w (Debian: qemu-utils)", err)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	flags := []string{"--cache", f.cache}
	flags = append(flags, f.metadata.arguments()...)
	v := &bench.Versus{
		Servers: []bench.Server{bench.Platter(self, flags...), bench.QemuNBD("--cache=" + f.cache)},
		Rounds:  f.rounds,
		Trace:   f.strace,
		Notes:   cmd.ErrOrStderr(),
	}
	var results []bench.VersusResult
	err = f.inDir(func(dir string) error {
		v.Scratch = &bench.Scratch{Dir: dir}
		return f.each(cmd, workloads, func(w bench.Workload, o bench.Options) error {
			r, err := v.Run(cmd.Context(), w, o)
			results = append(results, r)
			return err
		})
	})
	if err != nil {
		return err
	}
	if f.output.json() {
		return printJSON(cmd.OutOrStdout(), results)
	}
	return v.WriteMarkdown(cmd.OutOrStdout(), results)
}

func (f *benchFlags) print(w io.Writer, results []bench.Result) error {
	if f.output.json() {
		return printJSON(w, results)
	}
	return bench.WriteTable(w, results)
}
