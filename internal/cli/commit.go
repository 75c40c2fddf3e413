package cli

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/jobs"
)

// commitFlags are the flags of commit.
type commitFlags struct {
	open     openFlags
	progress progressFlags
	grow     growFlag
	cache    string
	base     string
	rate     string
	drop     bool
}

func newCommitCommand() *cobra.Command {
	var f commitFlags
	cmd := &cobra.Command{
		Use:   "commit [flags] FILENAME",
		Short: "Write what an overlay holds into its backing file",
		Long: `Write what an overlay holds into its backing file, and empty the overlay. A backing
file that is smaller than the overlay grows.

With -b the changes go to a file deeper in the chain, and the overlay is not emptied:
the files in between become invalid, because what they were made over has changed. So
does every other overlay of the file that is written, and what snapshots inside the
overlay read from it.

The disk that the overlay shows stays the same all the while, whatever happens: the
backing file is flushed before anything is taken from the overlay.`,
		Example: `  platter commit overlay.qcow2
  platter commit -d overlay.qcow2              keep what the overlay holds
  platter commit -b base.qcow2 top.qcow2       past the files between`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error { return f.run(cmd, args) },
	}
	f.open.register(cmd, "`FORMAT` of the overlay; guessed when not given")
	f.progress.register(cmd.Flags())
	f.grow.register(cmd.Flags())
	fs := cmd.Flags()
	fs.StringVarP(&f.base, "base", "b", "", "the `FILE` of the chain to write to (default: the backing file of\nFILENAME); implies -d")
	fs.BoolVarP(&f.drop, "drop", "d", false, "do not empty the overlay")
	fs.StringVarP(&f.cache, "cache", "t", "writeback", "cache `MODE`: none, writeback, writethrough, directsync or unsafe")
	completeWith(cmd, "cache", cacheNames...)
	fs.StringVarP(&f.rate, "rate-limit", "r", "", "write at most `SIZE` bytes a second")
	return cmd
}

func (f *commitFlags) run(cmd *cobra.Command, args []string) error {
	job := jobs.CommitOptions{Depth: 1}
	if f.rate != "" {
		n, err := sizeArgument("rate limit", f.rate)
		if err != nil {
			return err
		}
		job.RateLimit = n
	}
	if err := errors.Join(f.open.check(cmd), f.progress.check(cmd)); err != nil {
		return err
	}
	if len(args) != 1 {
		return usagef(cmd, "Expecting one image file name")
	}
	mode, ok := parseCache(f.cache)
	if !ok {
		return fmt.Errorf("Invalid cache option: %s", f.cache)
	}
	if f.base != "" {
		depth, err := f.find(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		job.Depth = depth
	}
	img, err := f.open.open(cmd.Context(), args[0], f.grow.apply(cmd.Context(), mode.apply(image.Options{Discard: true, WritableBacking: job.Depth})))
	if err != nil {
		return err
	}
	if err := errors.Join(f.commit(cmd, img, job), img.Close()); err != nil {
		return err
	}
	if !f.progress.quiet {
		fmt.Fprintln(cmd.OutOrStdout(), "Image committed.")
	}
	return nil
}

// find returns the layer of the chain of an image that -b names.
func (f *commitFlags) find(ctx context.Context, name string) (int, error) {
	img, err := f.open.open(ctx, name, image.Options{ReadOnly: true})
	if err != nil {
		return 0, err
	}
	chain := img.Chain()
	if err := img.Close(); err != nil {
		return 0, err
	}
	found := 0
	for depth := 1; depth < len(chain); depth++ {
		above := chain[depth-1]
		if f.base != above.BackingFile && f.base != above.FullBacking && !image.SameFile(f.base, chain[depth].Name) {
			continue
		}
		if found > 0 { // a name that an image stores and one as seen from here
			return 0, fmt.Errorf("'%s' stands for two files of the backing chain of '%s': '%s' and '%s'", f.base, name, chain[found].Name, chain[depth].Name)
		}
		found = depth
	}
	if found > 0 {
		return found, nil
	}
	return 0, fmt.Errorf("Did not find '%s' in the backing chain of '%s'", f.base, name)
}

// commit does the work on an open image.
func (f *commitFlags) commit(cmd *cobra.Command, img *image.Image, job jobs.CommitOptions) error {
	chain := img.Chain()
	if len(chain) <= job.Depth {
		return fmt.Errorf("Image does not have a backing file")
	}
	base := img.LayerDevice(job.Depth)
	if base.Limits().ReadOnly {
		return fmt.Errorf("'%s' is read-only", chain[job.Depth].Name)
	}
	above, isFVD := img.LayerDevice(job.Depth - 1).(*fvd.Image)
	grows := isFVD && base.Size() < img.Size()
	if grows {
		if err := above.ForgetBaseLength(); err != nil {
			return err
		}
	}
	m := f.progress.meter(cmd, "commit")
	job.Progress = updater(m)
	err := jobs.Commit(cmd.Context(), img, base, job)
	if m != nil {
		m.end()
	}
	if err == nil && grows {
		err = above.RecordBaseLength(base.Size())
	}
	if err != nil || f.drop || f.base != "" {
		return err
	}
	if overlay, ok := img.LayerDevice(0).(interface{ Empty() error }); ok {
		if err := overlay.Empty(); err != nil {
			return fmt.Errorf("Could not empty %s: %w", img.Name(), err)
		}
	}
	return nil
}
