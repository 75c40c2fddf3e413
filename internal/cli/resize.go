package cli

import (
	"errors"
	"fmt"
	"math"

	"github.com/spf13/cobra"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/image"
)

func newResizeCommand() *cobra.Command {
	var (
		open     openFlags
		grow     growFlag
		prealloc string
		quiet    bool
		shrink   bool
	)
	cmd := &cobra.Command{
		Use:   "resize [flags] FILENAME [+|-]SIZE",
		Short: "Change the size of a disk",
		Long: `Change the size of a disk, to SIZE or by +SIZE or -SIZE. SIZE is in bytes, or has a
suffix k, M, G, T, P or E (powers of 1024).

The new part of a larger disk reads as zeros. A smaller disk loses what lay past its
new end, which you must confirm with --shrink: make partitions and file systems
smaller first, inside the guest.`,
		Example: `  platter resize disk.qcow2 20G
  platter resize disk.qcow2 +512M
  platter resize --shrink disk.qcow2 -1G`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) < 2 {
				return usagef(cmd, "Not enough arguments")
			}
			mode, err := block.ParsePreallocation(prealloc)
			if err != nil {
				return fmt.Errorf("Invalid preallocation mode '%s'", prealloc)
			}
			if len(args) > 2 {
				return usagef(cmd, "Expecting image file name and size")
			}
			if err := open.check(cmd); err != nil {
				return err
			}
			change, err := parseSizeChange(args[1])
			if err != nil {
				return err
			}
			ctx := cmd.Context()
			img, err := open.open(ctx, args[0], grow.apply(ctx, image.Options{Discard: true, Interrupt: ctx.Err}))
			if err != nil {
				return err
			}
			warnProbedRaw(cmd, img)
			if err := errors.Join(resize(cmd, img, change, mode, shrink), img.Close()); err != nil {
				return err
			}
			if !quiet {
				fmt.Fprintln(cmd.OutOrStdout(), "Image resized.")
			}
			return nil
		},
	}
	open.register(cmd, "`FORMAT` of the image; guessed when not given")
	fs := cmd.Flags()
	grow.register(fs)
	fs.StringVar(&prealloc, "preallocation", "off", "`HOW` to lay out the new part: off, metadata, falloc or full")
	completeWith(cmd, "preallocation", "off", "metadata", "falloc", "full")
	fs.BoolVar(&shrink, "shrink", false, "allow the disk to become smaller; what lies past the new end is lost")
	fs.BoolVarP(&quiet, "quiet", "q", false, "print nothing but errors")
	return cmd
}

// errSizeNotPositive is for sizes beyond 2^63, too, which qemu-img counts as negative.
var errSizeNotPositive = errors.New("New image size must be positive")

// sizeChange is the argument of resize.
type sizeChange struct {
	sign int // 0: size is the new size; otherwise it is to be added or taken away
	size int64
}

func parseSizeChange(s string) (sizeChange, error) {
	c := sizeChange{}
	if s != "" {
		switch s[0] {
		case '+':
			c.sign, s = 1, s[1:]
		case '-':
			c.sign, s = -1, s[1:]
		}
	}
	if _, err := parseSize(s); errors.Is(err, errSizeRange) {
		return c, errSizeNotPositive
	}
	size, err := sizeParameter("size", s)
	c.size = size
	return c, err
}

// from returns the new size of a disk of the given size; ok is false when it would not be positive.
func (c sizeChange) from(size int64) (to int64, ok bool) {
	switch {
	case c.sign == 0:
		to = c.size
	case c.sign < 0:
		to = size - c.size
	case c.size <= math.MaxInt64-size:
		to = size + c.size
	}
	return to, to > 0
}

func resize(cmd *cobra.Command, img *image.Image, change sizeChange, prealloc block.Preallocation, shrink bool) error {
	old := img.Size()
	size, ok := change.from(old)
	if !ok {
		return errSizeNotPositive
	}
	if size <= old && prealloc != block.PreallocOff {
		return fmt.Errorf("Preallocation can only be used for growing images")
	}
	if size < old && !shrink {
		fmt.Fprintln(cmd.ErrOrStderr(), "platter: Use the --shrink option to perform a shrink operation.")
		warn(cmd, "Shrinking an image will delete all data beyond the shrunken image's end. "+
			"Before performing such an operation, make sure there is no important data there.")
		return &exitError{status: statusError}
	}
	return img.Resize(size, prealloc)
}
