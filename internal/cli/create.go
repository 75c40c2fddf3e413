package cli

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/platter-disk/platter/image"
)

func newCreateCommand() *cobra.Command {
	var (
		open          openFlags
		format        string
		options       optionsFlag
		backing       string
		backingFormat string
		unsafe        bool
		quiet         bool
	)
	cmd := &cobra.Command{
		Use:   "create [flags] FILENAME [SIZE]",
		Short: "Make a new, empty disk",
		Long: `Make a new, empty disk of SIZE bytes in an image file. SIZE may have a suffix k, M, G,
T, P or E (powers of 1024). A file of that name is overwritten.

With -b the disk is an overlay: it begins with the contents of the backing file, which
is never changed, and stores only what differs. SIZE is then that of the backing file
unless you say otherwise.`,
		Example: `  platter create -f qcow2 disk.qcow2 10G
  platter create -f qcow2 -o cluster_size=128k,extended_l2=on disk.qcow2 1T
  platter create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
  platter create -f fvd -o compact_image=on,copy_on_read=on -b base.qcow2 -F qcow2 clone.fvd
  platter create -f qcow2 -o help`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			params, help, err := options.read(cmd, &open)
			if err != nil {
				return err
			}
			switch {
			case help:
				return printCreateHelp(cmd.OutOrStdout(), format)
			case len(args) == 0:
				return usagef(cmd, "Expecting image file name")
			case len(args) > 2:
				return usagef(cmd, "Unexpected argument: %s", args[2])
			}
			name := args[0]
			if len(args) == 2 {
				n, err := sizeArgument("image size", args[1])
				if err != nil {
					return err
				}
				args[1] = fmt.Sprint(n)
			}
			values, err := newCreateValues(format)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			if err := values.fill(args[1:], params, backing, backingFormat); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			say := cmd.OutOrStdout()
			if quiet {
				say = io.Discard
			}
			if err := createImage(cmd.Context(), &open, values, name, unsafe, say); err != nil {
				warnUnfinished(cmd, err)
				return fmt.Errorf("%s: %w", name, withoutName(err, name))
			}
			return nil
		},
	}
	open.registerReferences(cmd)
	fs := cmd.Flags()
	fs.StringVarP(&format, "format", "f", "raw", "`FORMAT` of the new image: fvd, qcow2 or raw")
	completeWith(cmd, "format", image.Formats()...)
	options.register(cmd, "`OPTIONS` of the format, name=value between commas;\n\"-o help\" lists them")
	fs.StringVarP(&backing, "backing", "b", "", "backing `FILE`")
	fs.StringVarP(&backingFormat, "backing-format", "F", "", "`FORMAT` of the backing file")
	completeWith(cmd, "backing-format", image.Formats()...)
	fs.BoolVarP(&unsafe, "unsafe", "u", false, "do not look whether the backing file exists")
	fs.BoolVarP(&quiet, "quiet", "q", false, "print nothing but errors")
	return cmd
}

// createImage makes a new image, after it has said what it is about to make.
func createImage(ctx context.Context, open *openFlags, values *createValues, name string, backingUnseen bool, say io.Writer) error {
	g, err := open.gate()
	if err != nil {
		return err
	}
	o, err := values.options(g)
	if err != nil {
		return err
	}
	o.BackingUnseen = backingUnseen
	resolved, err := image.ResolveCreate(ctx, values.format, name, o)
	if err != nil {
		return err
	}
	if _, given := values.values["size"]; !given {
		values.values["size"] = fmt.Sprint(resolved.Size)
	}
	fmt.Fprintf(say, "Formatting '%s', fmt=%s%s\n", name, values.format, values)
	return image.Create(ctx, values.format, name, o)
}
