package cli

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/image"
)

// measureFlags are the flags of measure.
type measureFlags struct {
	open     openFlags
	output   outputFlag
	options  optionsFlag
	format   string
	size     string
	snapshot string
}

func newMeasureCommand() *cobra.Command {
	var f measureFlags
	cmd := &cobra.Command{
		Use:   "measure [flags] [FILENAME]",
		Short: "Tell how much space a new image needs",
		Long: `Tell how much space an image needs that is made with the given options, before it is
made: of a disk of --size bytes, or of one that takes over the contents of FILENAME.

  required size         what convert writes
  fully allocated size  what it becomes once the guest has written all of the disk
  bitmaps size          what copies of the persistent bitmaps of FILENAME take besides`,
		Example: `  platter measure -O qcow2 --size 10G
  platter measure -O qcow2 -o cluster_size=128k disk.img
  platter measure --output=json -O qcow2 -l before-upgrade disk.qcow2`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error { return f.run(cmd, args) },
	}
	f.open.register(cmd, "`FORMAT` of FILENAME; guessed when not given")
	f.open.registerShare(cmd.Flags())
	f.output.register(cmd)
	f.options.register(cmd, "`OPTIONS` of the new image, name=value between commas;\n\"-o help\" lists them")
	fs := cmd.Flags()
	fs.StringVarP(&f.format, "target-format", "O", "raw", "`FORMAT` of the new image: qcow2 or raw")
	completeWith(cmd, "target-format", "qcow2", "raw")
	fs.StringVar(&f.size, "size", "", "`SIZE` of the disk, in bytes or with a suffix k, M, G …")
	fs.StringVarP(&f.snapshot, "snapshot", "l", "", "measure the `SNAPSHOT` with this id or name, or\nsnapshot.id=ID,snapshot.name=NAME, not the disk as it is now")
	return cmd
}

func (f *measureFlags) run(cmd *cobra.Command, args []string) error {
	if err := f.output.check(); err != nil {
		return err
	}
	params, help, err := f.options.read(cmd, &f.open)
	sized := cmd.Flags().Changed("size")
	switch {
	case err != nil:
		return err
	case help:
		return printCreateHelp(cmd.OutOrStdout(), f.format)
	case len(args) > 1:
		return errors.New("At most one filename argument is allowed.")
	case len(args) == 0 && (f.open.imageOpts || f.open.format != "" || f.snapshot != ""):
		return errors.New("--image-opts, -f, and -l require a filename argument.")
	case len(args) == 0 && !sized:
		return errors.New("Either --size N or one filename must be specified.")
	case len(args) > 0 && sized:
		return errors.New("--size N cannot be used together with a filename.")
	}
	values, err := newCreateValues(f.format)
	if err != nil {
		return err
	}
	if err := values.fill(nil, params, "", ""); err != nil {
		return err
	}
	g, err := f.open.gate()
	if err != nil {
		return err
	}
	o, err := values.options(g)
	if err != nil {
		return err
	}
	if len(args) == 0 {
		if o.Size, err = sizeArgument("image size", f.size); err != nil {
			return err
		}
		m, err := image.Measure(f.format, o, nil)
		if err != nil {
			return err
		}
		return f.print(cmd.OutOrStdout(), m, nil)
	}
	return f.measureSource(cmd, args[0], o)
}

// measureSource measures an image that takes over the contents of another.
func (f *measureFlags) measureSource(cmd *cobra.Command, name string, o image.CreateOptions) error {
	var snapshot snapshotParam
	if f.snapshot != "" {
		var err error
		if snapshot, err = parseSnapshotParam(f.snapshot); err != nil {
			return err
		}
	}
	img, err := f.open.open(cmd.Context(), name, image.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	defer img.Close()
	var source block.Device = img
	if f.snapshot != "" {
		dev, err := snapshot.open(img)
		if err != nil {
			return err
		}
		defer dev.Close()
		source = dev
	}
	o.Size = source.Size()
	m, err := image.Measure(f.format, o, source)
	if err != nil {
		return err
	}
	var bitmaps *int64
	if keepsBitmaps(img) && f.format == "qcow2" && o.Version != 2 {
		n, err := img.Qcow2().BitmapsSize(o.CreateOptions)
		if err != nil {
			return err
		}
		bitmaps = &n
	}
	return f.print(cmd.OutOrStdout(), m, bitmaps)
}

// print tells the sizes; bitmaps is nil where the source or the new image has no persistent bitmaps.
func (f *measureFlags) print(out io.Writer, m image.Measurement, bitmaps *int64) error {
	if f.output.json() {
		return printJSON(out, struct {
			Bitmaps        *int64 `json:"bitmaps,omitempty"`
			Required       int64  `json:"required"`
			FullyAllocated int64  `json:"fully-allocated"`
		}{bitmaps, m.Required, m.FullyAllocated})
	}
	fmt.Fprintf(out, "required size: %d\nfully allocated size: %d\n", m.Required, m.FullyAllocated)
	if bitmaps != nil {
		fmt.Fprintf(out, "bitmaps size: %d\n", *bitmaps)
	}
	return nil
}
