package cli

import (
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/image"
)

func newAmendCommand() *cobra.Command {
	var (
		open    openFlags
		options []string
		quiet   bool
	)
	cmd := &cobra.Command{
		Use:   "amend [flags] -o OPTIONS FILENAME",
		Short: "Change what an FVD image says about itself",
		Long: `Change settings in the header of an image in format fvd that nobody has open: its base
image and data file, copy-on-read and prefetching, the journal's buffer, its size.
Sizes are in bytes, or have a suffix k, M, G …; rates are in KB/s, times in ms.

base_img names another copy of the same bytes; nothing is copied ("platter rebase"
copies what differs). An empty name is accepted once nothing lives there any more.

clean_shutdown=on marks an image without a journal as usable after a crash, and may
hide lost writes: check it first.

Images in format qcow2 have no such settings here.`,
		Example: `  platter amend -o help
  platter amend -o copy_on_read=on,prefetch_start_delay=30 clone.fvd
  platter amend -o base_img=/mnt/images/base.qcow2 clone.fvd`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if wantsOptionHelp(options) {
				printAmendHelp(cmd.OutOrStdout())
				return nil
			}
			params, _, err := parseOptionLists(options)
			if err != nil {
				return err
			}
			if err := open.check(cmd); err != nil {
				return err
			}
			switch {
			case len(params) == 0:
				return usagef(cmd, "Must specify options (-o)")
			case len(args) != 1:
				return usagef(cmd, "Expecting one image file name")
			}
			a, err := newAmendment(params)
			if err != nil {
				return err
			}
			if err := a.apply(cmd, &open, args[0]); err != nil {
				return err
			}
			if !quiet {
				fmt.Fprintln(cmd.OutOrStdout(), "Image amended.")
			}
			return nil
		},
	}
	open.register(cmd, "`FORMAT` of the image; guessed when not given")
	fs := cmd.Flags()
	fs.StringArrayVarP(&options, "options", "o", nil, "`OPTIONS` to change, name=value between commas;\n\"-o help\" lists them")
	fs.BoolVarP(&quiet, "quiet", "q", false, "print nothing but errors")
	return cmd
}

// amendSize is the setting that is not a field of its own: changing it lays out the new part of the disk.
const amendSize = "size"

// amendSizes are the settings that are sizes in bytes.
var amendSizes = []string{"max_outstanding_copy_on_read_data", "bytes_per_prefetch", "storage_grow_unit", "journal_buf_size"}

// amendment is what amend is to change.
type amendment struct {
	size     int64 // 0: stays
	settings []fvd.Setting
}

func newAmendment(params []parameter) (*amendment, error) {
	a := &amendment{}
	for _, p := range params {
		switch {
		case p.name == amendSize:
			n, err := sizeParameter(p.name, p.value)
			if err != nil {
				return nil, err
			}
			if n == 0 {
				return nil, errSizeNotPositive
			}
			a.size = n
		case !slices.Contains(fvd.SettingNames(), p.name):
			return nil, fmt.Errorf("Invalid parameter '%s'", p.name)
		case slices.Contains(amendSizes, p.name):
			n, err := sizeParameter(p.name, p.value)
			if err != nil {
				return nil, err
			}
			p.value = fmt.Sprint(n)
			fallthrough
		default:
			a.settings = append(a.settings, fvd.Setting{Name: p.name, Value: p.value})
		}
	}
	return a, nil
}

func (a *amendment) apply(cmd *cobra.Command, open *openFlags, name string) error {
	img, format, err := open.openFile(cmd.Context(), name, false)
	if err != nil {
		return err
	}
	if format != "fvd" {
		return errors.Join(fmt.Errorf("'%s' is in format %s, which has no settings to amend; only fvd has", name, format), img.Close())
	}
	if len(a.settings) > 0 {
		err = fvd.Amend(img.File(), a.settings)
	}
	if err := errors.Join(err, img.Close()); err != nil || a.size == 0 {
		return err
	}
	disk, err := open.open(cmd.Context(), name, image.Options{})
	if err != nil {
		return err
	}
	return errors.Join(disk.Resize(a.size, block.PreallocOff), disk.Close())
}

// printAmendHelp answers -o help.
func printAmendHelp(out io.Writer) {
	fmt.Fprintln(out, "Supported fvd options:")
	names := append([]string{amendSize}, fvd.SettingNames()...)
	slices.Sort(names)
	for _, name := range names {
		fmt.Fprintf(out, "  %s\n", name)
	}
}
