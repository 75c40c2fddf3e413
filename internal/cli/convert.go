package cli

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/spf13/cobra"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/jobs"
	"github.com/platter-disk/platter/nbd"
)

const (
	maxSparse     = 16 << 20 // bytes, as qemu-img
	maxCoroutines = 16       // as qemu-img
)

// convertFlags are the flags of convert.
type convertFlags struct {
	open     openFlags
	progress progressFlags
	grow     growFlag
	cache    string
	srcCache string

	outputFormat  string
	options       []string
	backing       string
	backingFormat string
	compress      bool
	noCreate      bool
	targetOpts    bool
	targetIsZero  bool

	sparse     string
	rate       string
	coroutines int
	outOfOrder bool
	copyRange  bool
	salvage    bool

	snapshot    string
	bitmaps     bool
	skipBitmaps bool
}

func newConvertCommand() *cobra.Command {
	var f convertFlags
	cmd := &cobra.Command{
		Use:   "convert [flags] FILENAME [FILENAME2 ...] OUTPUT_FILENAME",
		Short: "Copy a disk into a new image, of any format",
		Long: `Copy a disk into a new image, of the same or another format. Several sources
become one disk, one after the other.

Only what is not zero is read and written, so a large disk that is nearly empty is
copied quickly and stays small. A backing chain is flattened into one image unless
-B names a backing file for the copy.

When the copy fails or is interrupted, the unfinished target is removed again,
unless it was there before.`,
		Example: `  platter convert -O qcow2 disk.img disk.qcow2
  platter convert -O qcow2 -c -o compression_type=zstd disk.img small.qcow2
  platter convert -O qcow2 -B base.qcow2 -F qcow2 overlay.qcow2 copy.qcow2
  platter convert -n -O raw disk.qcow2 /dev/vg0/guest
  platter convert -f raw -O qcow2 nbd+unix:///?socket=/tmp/disk.sock disk.qcow2`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error { return f.run(cmd, args) },
	}
	f.register(cmd)
	return cmd
}

func (f *convertFlags) register(cmd *cobra.Command) {
	f.open.register(cmd, "`FORMAT` of the sources; guessed when not given")
	f.open.registerShare(cmd.Flags())
	f.progress.register(cmd.Flags())
	f.grow.register(cmd.Flags())
	fs := cmd.Flags()
	fs.StringVarP(&f.outputFormat, "output-format", "O", "", "`FORMAT` of the target (default raw)")
	completeWith(cmd, "output-format", image.Formats()...)
	fs.StringArrayVarP(&f.options, "options", "o", nil, "`OPTIONS` of the target's format, name=value between commas;\n\"-o help\" lists them")
	fs.StringVarP(&f.backing, "backing", "B", "", "backing `FILE` of the target: what it holds is not copied")
	fs.StringVarP(&f.backingFormat, "backing-format", "F", "", "`FORMAT` of the backing file")
	completeWith(cmd, "backing-format", image.Formats()...)
	fs.BoolVarP(&f.compress, "compress", "c", false, "store every cluster compressed")
	fs.BoolVarP(&f.noCreate, "no-create", "n", false, "the target exists: write into it")
	fs.BoolVar(&f.targetOpts, "target-image-opts", false, "the target's name is an option string (with -n)")
	fs.BoolVar(&f.targetIsZero, "target-is-zero", false, "the target is known to read as zeros (with -n)")
	fs.StringVarP(&f.sparse, "sparse", "S", "", "leave out runs of zeros of `SIZE` bytes (default 4k); 0 writes everything")
	fs.StringVarP(&f.rate, "rate-limit", "r", "", "write at most `SIZE` bytes a second")
	fs.IntVarP(&f.coroutines, "parallel", "m", jobs.DefaultWorkers, "how many parts (`N`) of the disk are in work at a time, 1 to 16")
	fs.BoolVarP(&f.outOfOrder, "out-of-order", "W", false, "write parts as soon as they are read: faster on devices")
	fs.BoolVarP(&f.copyRange, "copy-range", "C", false, "let the file system copy (accepted; Platter copies by itself)")
	fs.BoolVar(&f.salvage, "salvage", false, "read errors become zeros, and warnings")
	fs.StringVarP(&f.cache, "cache", "t", "unsafe", "cache `MODE` of the target: none, writeback, writethrough,\ndirectsync, or unsafe: do not wait until the copy is on\nthe disk")
	fs.StringVarP(&f.srcCache, "source-cache", "T", "writeback", "cache `MODE` of the sources")
	completeWith(cmd, "cache", cacheNames...)
	completeWith(cmd, "source-cache", cacheNames...)
	fs.StringVarP(&f.snapshot, "snapshot", "l", "", "copy the `SNAPSHOT` with this id or name, or\nsnapshot.id=ID,snapshot.name=NAME, not the disk as it is now")
	fs.BoolVar(&f.bitmaps, "bitmaps", false, "copy persistent bitmaps, if there are any (refused then: not supported yet)")
	fs.BoolVar(&f.skipBitmaps, "skip-broken-bitmaps", false, "with --bitmaps: leave out broken ones")
	for _, name := range []string{"bitmaps", "skip-broken-bitmaps"} {
		hide(fs, name)
	}
}

// plan is what the flags come to, before anything is opened.
type plan struct {
	job         jobs.ConvertOptions
	target      cacheMode
	source      cacheMode
	create      *createValues
	sources     []string
	snapshot    *snapshotParam // nil: the disk as it is now
	destination string
}

// plan checks the flags and arguments, in the order in which qemu-img does.
func (f *convertFlags) plan(cmd *cobra.Command, args []string) (*plan, error) {
	p := &plan{}
	if f.sparse != "" {
		n, err := sizeArgument("buffer size for sparse output", f.sparse)
		switch {
		case err != nil:
			return nil, err
		case n%512 != 0 || n > maxSparse:
			return nil, fmt.Errorf("Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to %d. "+
				"Select 0 to disable sparse detection (fully allocates output).", maxSparse)
		}
		p.job.SparseSize, p.job.NoSparse = n, n == 0
	}
	if f.rate != "" {
		n, err := sizeArgument("rate limit", f.rate)
		if err != nil {
			return nil, err
		}
		p.job.RateLimit = n
	}
	if f.coroutines < 1 || f.coroutines > maxCoroutines {
		return nil, fmt.Errorf("Invalid number of coroutines. Allowed number of coroutines is between 1 and %d", maxCoroutines)
	}
	if err := errors.Join(f.open.check(cmd), f.progress.check(cmd)); err != nil {
		return nil, err
	}
	switch {
	case f.skipBitmaps && !f.bitmaps:
		return nil, fmt.Errorf("Use of --skip-broken-bitmaps requires --bitmaps")
	case f.targetOpts && f.outputFormat != "":
		return nil, fmt.Errorf("--image-opts and --format are mutually exclusive")
	case f.targetOpts && !f.noCreate:
		return nil, fmt.Errorf("--target-image-opts requires use of -n flag")
	case f.targetIsZero && !f.noCreate:
		return nil, fmt.Errorf("--target-is-zero requires use of -n flag")
	case f.noCreate && len(f.options) > 0:
		return nil, fmt.Errorf("-o has no effect when skipping image creation")
	case f.copyRange && f.sparse != "":
		return nil, fmt.Errorf("Cannot enable copy offloading when -S is used")
	}
	if len(args) < 2 {
		return nil, fmt.Errorf("Must specify image file name")
	}
	p.sources, p.destination = args[:len(args)-1], args[len(args)-1]
	if f.snapshot != "" {
		if len(p.sources) > 1 {
			return nil, fmt.Errorf("No support for concatenating multiple snapshot")
		}
		param, err := parseSnapshotParam(f.snapshot)
		if err != nil {
			return nil, err
		}
		p.snapshot = &param
	}
	if f.backing != "" && len(p.sources) > 1 {
		return nil, fmt.Errorf("Having a backing file for the target makes no sense when concatenating multiple input images")
	}
	if f.bitmaps && len(p.sources) > 1 {
		return nil, fmt.Errorf("Copying bitmaps only possible with single source")
	}
	var ok bool
	if p.source, ok = parseCache(f.srcCache); !ok {
		return nil, fmt.Errorf("Invalid source cache option: %s", f.srcCache)
	}
	if p.target, ok = parseCache(f.cache); !ok {
		return nil, fmt.Errorf("Invalid cache option: %s", f.cache)
	}
	if f.noCreate || (nbd.IsURI(p.destination) && f.format() == "raw" && len(f.options) == 0) {
		return p, nil
	}
	var err error
	p.create, err = f.createValues()
	return p, err
}

// format is the format of a target that is to be created.
func (f *convertFlags) format() string {
	if f.outputFormat == "" {
		return "raw"
	}
	return f.outputFormat
}

// createValues reads -o, -B and -F.
func (f *convertFlags) createValues() (*createValues, error) {
	params, _, err := parseOptionLists(f.options)
	if err != nil {
		return nil, err
	}
	values, err := newCreateValues(f.format())
	if err != nil {
		return nil, err
	}
	for _, p := range params {
		if err := values.set(p); err != nil {
			return nil, err
		}
	}
	if err := values.setBacking(f.backing, f.backingFormat); err != nil {
		return nil, err
	}
	preallocation := values.get("preallocation")
	switch {
	case values.get("backing_file") != "" && values.get("backing_fmt") == "":
		return nil, fmt.Errorf("Use of backing file requires explicit backing format")
	case f.compress && (values.format != "qcow2" || values.get("data_file") != ""):
		return nil, fmt.Errorf("Compression not supported for this file format")
	case f.compress && preallocation != "" && preallocation != block.PreallocOff.String():
		return nil, fmt.Errorf("Compression and preallocation not supported at the same time")
	case f.bitmaps && (values.format != "qcow2" || compatVersion(values.get("compat")) == 2):
		return nil, errNoBitmaps(values.format)
	}
	return values, nil
}

func (f *convertFlags) run(cmd *cobra.Command, args []string) (err error) {
	if wantsOptionHelp(f.options) {
		return printCreateHelp(cmd.OutOrStdout(), f.format())
	}
	p, err := f.plan(cmd, args)
	if err != nil {
		return err
	}
	ctx := cmd.Context()
	src, sources, err := f.openSources(ctx, p)
	if err != nil {
		return err
	}
	defer src.Close()

	t := &target{cmd: cmd, flags: f, plan: p}
	defer func() { err = t.finish(err) }()
	if err := t.prepare(ctx, src.Size(), sources); err != nil {
		return err
	}
	o := p.job
	o.Workers = f.coroutines
	if f.compress && !cmd.Flags().Changed("parallel") {
		o.Workers = 0 // as many as there are processors
	}
	o.Compressed = f.compress
	o.OutOfOrder = f.outOfOrder
	t.describe(&o, sources)
	if f.salvage {
		o.Salvage = f.salvageReport(cmd)
	}
	m := f.progress.meter(cmd, "convert")
	o.Progress = updater(m)
	err = jobs.Convert(ctx, src, t.img, o)
	if m != nil {
		m.end()
	}
	return err
}

// salvageReport prints what could not be read.
func (f *convertFlags) salvageReport(cmd *cobra.Command) func(off, length int64, err error) {
	var mu sync.Mutex
	return func(off, _ int64, err error) {
		if f.progress.quiet {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		warn(cmd, "error while reading offset %d: %s", off, message(err))
	}
}

// openSources opens what is to be copied, and returns it as one disk and as the images.
func (f *convertFlags) openSources(ctx context.Context, p *plan) (block.Device, []*image.Image, error) {
	var imgs []*image.Image
	var devs []block.Device
	fail := func(err error) (block.Device, []*image.Image, error) {
		for _, img := range imgs {
			img.Close()
		}
		return nil, nil, err
	}
	for _, name := range p.sources {
		img, err := f.open.open(ctx, name, p.source.apply(image.Options{ReadOnly: true}))
		if err != nil {
			return fail(err)
		}
		imgs, devs = append(imgs, img), append(devs, img)
	}
	if f.bitmaps {
		if err := sparesBitmaps(imgs[0]); err != nil {
			return fail(err)
		}
	}
	if p.snapshot != nil {
		dev, err := p.snapshot.open(imgs[0])
		if err != nil {
			return fail(err)
		}
		return &snapshotSource{dev, imgs[0]}, imgs, nil
	}
	if len(imgs) == 1 {
		return imgs[0], imgs, nil
	}
	joined, err := jobs.NewConcat(devs...)
	if err != nil {
		return fail(err)
	}
	return joined, imgs, nil
}

func errNoBitmaps(format string) error {
	return fmt.Errorf("Format driver '%s' does not support bitmaps", format)
}

// sparesBitmaps refuses a source whose persistent bitmaps would have to be copied.
func sparesBitmaps(img *image.Image) error {
	switch {
	case !keepsBitmaps(img):
		return fmt.Errorf("Source lacks bitmap support")
	case img.Qcow2().Header().Bitmaps != nil:
		return fmt.Errorf("--bitmaps: copying the persistent bitmaps of '%s' is not supported yet", img.Name())
	}
	return nil
}

// keepsBitmaps tells whether the format of an image has persistent bitmaps.
func keepsBitmaps(img *image.Image) bool {
	return img.Qcow2() != nil && img.Qcow2().Header().Version >= 3
}
