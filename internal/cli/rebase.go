package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/jobs"
)

// rebaseFlags are the flags of rebase.
type rebaseFlags struct {
	open     openFlags
	progress progressFlags
	grow     growFlag
	cache    string
	srcCache string
	base     string
	format   string
	unsafe   bool

	baseLength int64 // bytes of the new backing file; 0: nobody looked
}

func newRebaseCommand() *cobra.Command {
	var f rebaseFlags
	cmd := &cobra.Command{
		Use:   "rebase [flags] -b BACKING_FILE FILENAME",
		Short: "Give an overlay another backing file",
		Long: `Give an overlay another backing file. The disk stays the same: what the overlay gets
from its present backing file and would not find in the new one is copied into it
first. With -b "" it needs no backing file any more.

With -u nothing is copied and no backing file is opened; only the reference changes.
That is for a backing file that was moved, renamed or converted. A file that holds
something else makes the disk unusable.

Snapshots inside the overlay read what they do not hold from the backing file, too: a
new one that is different changes what they show.

An image in format fvd records when it is created how much of its base image it
covers: a new one must not be shorter, and an image made without one cannot get one.`,
		Example: `  platter rebase -b new-base.qcow2 -F qcow2 overlay.qcow2
  platter rebase -b "" overlay.qcow2           independent of any other file
  platter rebase -u -b /mnt/base.qcow2 -F qcow2 overlay.qcow2`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error { return f.run(cmd, args) },
	}
	f.open.register(cmd, "`FORMAT` of the overlay; guessed when not given")
	f.progress.register(cmd.Flags())
	f.grow.register(cmd.Flags())
	fs := cmd.Flags()
	fs.StringVarP(&f.base, "backing", "b", "", "the new backing `FILE`, as seen from the directory of FILENAME;\n\"\" for none")
	fs.StringVarP(&f.format, "backing-format", "F", "", "`FORMAT` of the new backing file")
	completeWith(cmd, "backing-format", image.Formats()...)
	fs.BoolVarP(&f.unsafe, "unsafe", "u", false, "only change the reference: you answer for the contents")
	fs.StringVarP(&f.cache, "cache", "t", "writeback", "cache `MODE` of the overlay: none, writeback, writethrough,\ndirectsync or unsafe")
	fs.StringVarP(&f.srcCache, "source-cache", "T", "writeback", "cache `MODE` of the new backing file")
	completeWith(cmd, "cache", cacheNames...)
	completeWith(cmd, "source-cache", cacheNames...)
	return cmd
}

func (f *rebaseFlags) run(cmd *cobra.Command, args []string) error {
	if err := errors.Join(f.open.check(cmd), f.progress.check(cmd)); err != nil {
		return err
	}
	if len(args) != 1 {
		return usagef(cmd, "Expecting one image file name")
	}
	if !f.unsafe && !cmd.Flags().Changed("backing") {
		return usagef(cmd, "Must specify backing file (-b) or use unsafe mode (-u)")
	}
	mode, ok := parseCache(f.cache)
	if !ok {
		return fmt.Errorf("Invalid cache option: %s", f.cache)
	}
	source, ok := parseCache(f.srcCache)
	if !ok {
		return fmt.Errorf("Invalid source cache option: %s", f.srcCache)
	}
	if f.format != "" && !slices.Contains(image.Formats(), f.format) {
		return fmt.Errorf("Invalid format name: '%s'", f.format)
	}
	if f.base == "" {
		f.format = ""
	}
	if f.unsafe {
		return f.changeReference(cmd.Context(), args[0], mode)
	}
	img, err := f.open.open(cmd.Context(), args[0], f.grow.apply(cmd.Context(), mode.apply(image.Options{Discard: true})))
	if err != nil {
		return err
	}
	if err := f.rebase(cmd, img, source); err != nil {
		return errors.Join(err, img.Close())
	}
	if img.Qcow2() != nil {
		return errors.Join(f.setBacking(img), img.Close())
	}
	if err := img.Close(); err != nil {
		return err
	}
	return f.changeReference(cmd.Context(), args[0], mode)
}

// rebase copies into the overlay what it would lose.
func (f *rebaseFlags) rebase(cmd *cobra.Command, img *image.Image, source cacheMode) (err error) {
	if err := f.checkReference(img.Format()); err != nil {
		return err
	}
	var newBase block.Device
	job := jobs.RebaseOptions{}
	if f.base != "" {
		below, err := f.openBase(cmd.Context(), img.Chain()[0].Name, source)
		if err != nil {
			return fmt.Errorf("Could not open new backing file '%s': %w", f.base, err)
		}
		defer func() { err = errors.Join(err, below.Close()) }()
		if below.Uses(img.Chain()[0].Name) { // which locks say, too, where there are any
			return fmt.Errorf("Could not change the backing file to '%s': it is read from the image itself", f.base)
		}
		newBase, job.SameDepth, f.baseLength = below, f.commonDepth(img, below), below.Size()
	}
	m := f.progress.meter(cmd, "rebase")
	job.Progress = updater(m)
	switch q, v := img.Qcow2(), img.FVD(); {
	case q != nil:
		job.HoldZeroes = q.HoldZeroes
		err = jobs.Rebase(cmd.Context(), img, newBase, job)
	default:
		err = rebaseFVD(cmd.Context(), v, newBase, job)
	}
	if m != nil {
		m.end()
	}
	return err
}

// commonDepth returns the layer of the chain of img from which on it consists of the layers of the new base; 0 if there
// is none. A name that consists of options may show another part of a file, or put another one below it: then nothing
// counts as the same.
func (f *rebaseFlags) commonDepth(img, base *image.Image) int {
	chain, layers := img.Chain(), base.Chain()
	depth := len(chain) - len(layers)
	if depth < 1 || f.open.imageOpts || hasOptions(img.Name()) || hasOptions(base.Name()) {
		return 0
	}
	for _, l := range slices.Concat(chain, layers) {
		if hasOptions(l.FullBacking) {
			return 0
		}
	}
	for i, l := range layers {
		if old := chain[depth+i]; old.Format != l.Format || !image.SameFile(old.Name, l.Name) {
			return 0
		}
	}
	return depth
}

// openBase opens the new backing file, which is named as seen from the image at a path.
func (f *rebaseFlags) openBase(ctx context.Context, path string, source cacheMode) (*image.Image, error) {
	opened := f.open
	opened.imageOpts, opened.format = false, f.format
	img, err := opened.open(ctx, fullBackingName(path, f.base), source.apply(image.Options{ReadOnly: true}))
	var named *image.NameError
	if errors.As(err, &named) {
		err = named.Err
	}
	return img, err
}

// rebaseFVD is jobs.Rebase within the limits of the format.
func rebaseFVD(ctx context.Context, im *fvd.Image, newBase block.Device, job jobs.RebaseOptions) error {
	h := im.Header()
	switch {
	case h.BaseImage == "" && newBase == nil:
		return nil
	case h.BaseImage == "":
		return errors.New("the image was created without a base image and cannot get one")
	case newBase != nil && (newBase.Size()+511)&^511 < int64(h.BaseSize):
		return fmt.Errorf("the new base image has %d bytes, fewer than the %d that the image covers (base_img_size), which cannot change", newBase.Size(), h.BaseSize)
	}
	job.Backed = im.BaseSize()
	if job.Backed > 0 {
		if err := jobs.Rebase(ctx, im, newBase, job); err != nil {
			return err
		}
	}
	if newBase != nil {
		return im.ForgetBaseLength()
	}
	// What is left in the base image are zeros.
	for off := int64(0); ; {
		start, n := im.NextInBase(off)
		if n == 0 {
			break
		}
		if err := im.WriteZeroes(start, min(n, im.Size()-start), block.MayUnmap); err != nil {
			return err
		}
		off = start + n
	}
	return im.DetachBase()
}

// checkReference refuses what an image in a format cannot refer to.
func (f *rebaseFlags) checkReference(format string) error {
	switch {
	case format != "qcow2" && format != "fvd":
		return fmt.Errorf("Could not change the backing file to '%s': Operation not supported", f.base)
	case f.base != "" && f.format == "":
		return fmt.Errorf("Could not change the backing file to '%s': backing format must be specified", f.base)
	}
	return nil
}

// changeReference makes an image refer to another backing file, without opening either.
func (f *rebaseFlags) changeReference(ctx context.Context, name string, mode cacheMode) error {
	img, err := f.open.open(ctx, name, mode.apply(image.Options{NoBacking: true, ReadOnly: true}))
	if err != nil {
		return err
	}
	format := img.Format()
	if err := errors.Join(f.checkReference(format), img.Close()); err != nil {
		return err
	}
	if format == "fvd" {
		return f.amend(ctx, name)
	}
	if img, err = f.open.open(ctx, name, mode.apply(image.Options{NoBacking: true})); err != nil {
		return err
	}
	return errors.Join(f.setBacking(img), img.Close())
}

// setBacking changes the reference of an open qcow2 image.
func (f *rebaseFlags) setBacking(img *image.Image) error {
	return f.changed(img.Name(), img.Qcow2().SetBacking(f.base, f.format))
}

// amend changes the reference of an FVD image that nobody has open.
func (f *rebaseFlags) amend(ctx context.Context, name string) error {
	file, _, err := f.open.openFile(ctx, name, false)
	if err != nil {
		return err
	}
	err = fvd.Amend(file.File(), []fvd.Setting{{Name: "base_img", Value: f.base}, {Name: "base_img_fmt", Value: f.format},
		{Name: "base_length", Value: strconv.FormatInt(f.baseLength, 10)}})
	return errors.Join(f.changed(name, err), file.Close())
}

// changed is the error of a change of the reference in the words of qemu-img.
func (f *rebaseFlags) changed(name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("Could not change the backing file to '%s': %w", f.base, withoutName(err, name))
}
