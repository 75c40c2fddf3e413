package cli

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/jobs"
)

// Exit statuses of compare.
const (
	compareDiffer  = 1
	compareOpen    = 2
	compareExtents = 3
	compareRead    = 4
)

func newCompareCommand() *cobra.Command {
	var (
		open     openFlags
		progress progressFlags
		second   string
		cache    string
		strict   bool
	)
	cmd := &cobra.Command{
		Use:   "compare [flags] FILENAME1 FILENAME2",
		Short: "Tell whether two disks have the same contents",
		Long: `Tell whether a guest would read the same from two disks, whatever their formats.

Disks of different sizes count as equal when the rest of the longer one reads as
zeros; with -s they do not, and the same parts must be allocated in both.

Exit status: 0 the same, 1 different, 2 an image cannot be opened, 3 its map or
4 its contents cannot be read.`,
		Example: `  platter compare disk.qcow2 copy.img
  platter compare -f raw -F qcow2 disk.img disk.qcow2
  platter compare disk.qcow2 nbd+unix:///?socket=/tmp/disk.sock`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usagef(cmd, "Expecting two image file names")
			}
			mode, ok := parseCache(cache)
			if !ok {
				return &exitError{compareOpen, fmt.Errorf("Invalid source cache option: %s", cache)}
			}
			if err := errors.Join(open.check(cmd), progress.check(cmd)); err != nil {
				return err
			}
			var imgs [2]*image.Image
			for i, format := range []string{open.format, second} {
				one := open
				one.format = format
				img, err := one.open(cmd.Context(), args[i], mode.apply(image.Options{ReadOnly: true}))
				if err != nil {
					return &exitError{compareOpen, err}
				}
				defer img.Close()
				imgs[i] = img
			}
			return compare(cmd, imgs, args, strict, &progress)
		},
	}
	open.register(cmd, "`FORMAT` of the first image; guessed when not given")
	open.registerShare(cmd.Flags())
	progress.register(cmd.Flags())
	fs := cmd.Flags()
	fs.StringVarP(&second, "second-format", "F", "", "`FORMAT` of the second image; guessed when not given")
	completeWith(cmd, "second-format", image.Formats()...)
	fs.StringVarP(&cache, "source-cache", "T", "writeback", "cache `MODE` of the images: none, writeback, writethrough,\ndirectsync or unsafe")
	completeWith(cmd, "source-cache", cacheNames...)
	fs.BoolVarP(&strict, "strict", "s", false, "fail on different sizes or allocation, too")
	return cmd
}

func compare(cmd *cobra.Command, imgs [2]*image.Image, names []string, strict bool, progress *progressFlags) error {
	m := progress.meter(cmd, "compare")
	result, err := jobs.Compare(cmd.Context(), imgs[0], imgs[1], jobs.CompareOptions{Strict: strict, Progress: updater(m)})
	if m != nil {
		m.end()
	}
	if err != nil {
		return compareError(names, err)
	}
	say := func(format string, args ...any) {
		if !progress.quiet {
			fmt.Fprintf(cmd.OutOrStdout(), format+"\n", args...)
		}
	}
	shorter := min(imgs[0].Size(), imgs[1].Size())
	if result.SizesDiffer && !strict && (result.Difference == jobs.Identical || result.Offset >= shorter) {
		say("Warning: Image size mismatch!")
	}
	switch result.Difference {
	case jobs.Identical:
		say("Images are identical.")
		return nil
	case jobs.SizeDiffers:
		say("Strict mode: Image size mismatch!")
	case jobs.AllocationDiffers:
		say("Strict mode: Offset %d block status mismatch!", result.Offset)
	case jobs.ContentDiffers:
		say("Content mismatch at offset %d!", result.Offset)
	}
	return &exitError{status: compareDiffer}
}

// compareError gives the error of jobs.Compare its exit status and the name of the image.
func compareError(names []string, err error) error {
	var which *jobs.CompareError
	if !errors.As(err, &which) {
		return err
	}
	name := names[0]
	if which.Second {
		name = names[1]
	}
	var read *jobs.ReadError
	if errors.As(err, &read) {
		return &exitError{compareRead, fmt.Errorf("Error while reading offset %d of %s: %w", read.Offset, name, read.Err)}
	}
	return &exitError{compareExtents, fmt.Errorf("Sector allocation test failed for %s: %w", name, which.Err)}
}
