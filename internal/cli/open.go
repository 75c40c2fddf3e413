package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/image/gate"
	"github.com/platter-disk/platter/storage"
)

// openFlags are the flags of every command that opens images.
type openFlags struct {
	format     string
	imageOpts  bool
	forceShare bool
	references string
	allowDirty bool
	objects    []string
}

// register adds the flags.
func (f *openFlags) register(cmd *cobra.Command, formatUsage string) {
	fs := cmd.Flags()
	fs.StringVarP(&f.format, "format", "f", "", formatUsage)
	completeWith(cmd, "format", image.Formats()...)
	fs.BoolVar(&f.imageOpts, "image-opts", false, "image names are option strings:\ndriver=qcow2,file.filename=disk.qcow2")
	fs.BoolVar(&f.allowDirty, "allow-dirty", false, "open an fvd image that has no journal and was not closed cleanly:\nit may have lost writes")
	f.registerReferences(cmd)
}

// registerReferences adds the flags that every command has that opens an image, be it to look at it.
func (f *openFlags) registerReferences(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVar(&f.references, "references", "any",
		"`WHICH` files an image may refer to (backing file, data file):\nany, same-directory or deny")
	completeWith(cmd, "references", "any", "same-directory", "deny")
	fs.StringArrayVar(&f.objects, "object", nil, "QEMU object definition (refused: there is nothing to use it for yet)")
	hide(fs, "object")
}

// registerShare adds -U, for commands that can open an image without changing it.
func (f *openFlags) registerShare(fs *pflag.FlagSet) {
	fs.BoolVarP(&f.forceShare, "force-share", "U", false, "open the image although another process is writing to it")
}

// check refuses combinations of flags that mean nothing.
func (f *openFlags) check(cmd *cobra.Command) error {
	if len(f.objects) > 0 {
		return fmt.Errorf("--object %s: QEMU objects are not supported", f.objects[0])
	}
	if f.imageOpts && f.format != "" {
		return fmt.Errorf("--image-opts and --format are mutually exclusive")
	}
	if _, err := f.gate(); err != nil {
		return usagef(cmd, "%s", err)
	}
	return nil
}

func (f *openFlags) gate() (gate.Gate, error) {
	switch f.references {
	case "any":
		return gate.Any{}, nil
	case "same-directory":
		return gate.SameDirectory{}, nil
	case "deny":
		return gate.Deny{}, nil
	default:
		return nil, fmt.Errorf("--references must be used with any, same-directory or deny as argument.")
	}
}

// open opens an image as the flags say; the rest of how is in o. A command with several images opens those of
// other formats through a copy of its flags.
func (f *openFlags) open(ctx context.Context, name string, o image.Options) (*image.Image, error) {
	g, err := f.gate()
	if err != nil {
		return nil, err
	}
	o.Gate, o.AllowDirty = g, f.allowDirty
	o.Format = f.format
	if f.forceShare && !o.ReadOnly {
		return nil, fmt.Errorf("Could not open '%s': force-share=on can only be used with read-only images", name)
	}
	o.Share = f.forceShare
	o.NameIsOptions = f.imageOpts
	return image.Open(ctx, name, o)
}

// openFile opens the bytes of an image without looking into them, and tells its format. The caller closes the
// result, an image whose File it is.
func (f *openFlags) openFile(ctx context.Context, name string, readOnly bool) (img *image.Image, format string, err error) {
	o := image.Options{ReadOnly: readOnly, NoBacking: true}
	if f.imageOpts || hasOptions(name) {
		if !readOnly {
			return nil, "", fmt.Errorf("Could not open '%s': to change the image as a file, a file name or URI is needed, not options", name)
		}
		img, err = f.open(ctx, name, o)
		if err != nil {
			return nil, "", err
		}
		return img, img.Format(), nil
	}
	bytes := *f
	bytes.format = "raw"
	if img, err = bytes.open(ctx, name, o); err != nil {
		return nil, "", err
	}
	format = f.format
	if format == "" {
		format, err = image.Probe(img.File())
	} else if !slices.Contains(image.Formats(), format) {
		err = fmt.Errorf("Unknown driver '%s'", format)
	}
	if err != nil {
		return nil, "", errors.Join(fmt.Errorf("Could not open '%s': %w", name, err), img.Close())
	}
	return img, format, nil
}

// hasOptions tells whether a name consists of options.
func hasOptions(name string) bool {
	return strings.HasPrefix(name, "json:") || strings.HasPrefix(name, "driver=")
}

// warnProbedRaw warns, as qemu-img does, when an image that is to be changed was only guessed to be raw.
func warnProbedRaw(cmd *cobra.Command, img *image.Image) {
	if !img.ProbedRaw() {
		return
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "WARNING: Image format was not specified for '%s' and probing guessed raw.\n"+
		"         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.\n"+
		"         Specify the 'raw' format explicitly to remove the restrictions.\n", img.Name())
}

// cacheMode is what -t and -T choose.
type cacheMode struct {
	direct       bool // past the page cache (O_DIRECT)
	writethrough bool // every write durable before it is acknowledged
	unsafe       bool // never wait for the disk: what was written may be lost if the machine fails soon after
}

var cacheNames = []string{"none", "writeback", "writethrough", "directsync", "unsafe"}

// parseCache reads a cache mode; ok is false for a name that is none.
func parseCache(name string) (mode cacheMode, ok bool) {
	switch name {
	case "none", "off":
		return cacheMode{direct: true}, true
	case "writeback":
		return cacheMode{}, true
	case "writethrough":
		return cacheMode{writethrough: true}, true
	case "directsync":
		return cacheMode{direct: true, writethrough: true}, true
	case "unsafe":
		return cacheMode{unsafe: true}, true
	default:
		return cacheMode{}, false
	}
}

// apply sets what of the cache mode concerns opening.
func (m cacheMode) apply(o image.Options) image.Options {
	o.Direct, o.Writethrough = m.direct, m.writethrough
	if m.unsafe {
		o.Wrap = func(f storage.File) storage.File { return unsyncedFile{f} }
	}
	return o
}

// unsyncedFile is a file that does not wait until its bytes are durable.
type unsyncedFile struct{ storage.File }

func (unsyncedFile) Sync() error { return nil }

// outputFlag is --output of commands that report something.
type outputFlag struct{ form string }

func (f *outputFlag) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.form, "output", "human", "`FORM` of the output: human or json")
	completeWith(cmd, "output", "human", "json")
}

func (f *outputFlag) check() error {
	if f.form != "human" && f.form != "json" {
		return fmt.Errorf("--output must be used with human or json as argument.")
	}
	return nil
}

func (f *outputFlag) json() bool { return f.form == "json" }

// completeWith offers the values of a flag to the shell.
func completeWith(cmd *cobra.Command, flag string, values ...string) {
	// The only errors are mistakes in this package: no such flag, or registered twice. The completion test
	// finds those.
	_ = cmd.RegisterFlagCompletionFunc(flag, func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return slices.Clone(values), cobra.ShellCompDirectiveNoFileComp
	})
}

// hide keeps a flag that exists only to be refused clearly out of the help.
func hide(fs *pflag.FlagSet, name string) {
	fs.Lookup(name).Hidden = true
}
