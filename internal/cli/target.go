package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/jobs"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/storage"
)

// target is the image that convert writes.
type target struct {
	cmd   *cobra.Command
	flags *convertFlags
	plan  *plan
	img   *image.Image

	created []string // files that were not there before, to be removed when the copy fails
	touched []string // files that were there before and no longer hold what they did
}

// prepare creates the target, unless it exists, and opens it. size is that of the source in bytes, sources are the
// images that it is read from.
func (t *target) prepare(ctx context.Context, size int64, sources []*image.Image) error {
	f, p := t.flags, t.plan
	opened := f.open
	opened.imageOpts, opened.forceShare, opened.format = f.targetOpts, false, f.format()
	if f.targetOpts {
		opened.format = ""
	}
	if p.create != nil {
		if err := t.create(ctx, size, sources); err != nil {
			return fmt.Errorf("%s: error while converting %s: %w", p.destination, p.create.format, withoutName(err, p.destination))
		}
	}
	img, err := opened.open(ctx, p.destination, f.grow.apply(ctx, p.target.apply(image.Options{})))
	if errors.Is(err, storage.ErrLocked) {
		t.created = nil // somebody else uses what is there now
	}
	if err != nil {
		return err
	}
	t.img = img
	own := img.Chain()[0]
	if err := t.spare(sources, own.Name, own.DataFile); err != nil {
		return err
	}
	switch {
	case img.Size() < size:
		return fmt.Errorf("output file is smaller than input file")
	case f.compress && !img.Limits().Compress:
		return fmt.Errorf("Compression not supported for this file format")
	case f.targetIsZero && len(img.Chain()) > 1:
		return fmt.Errorf("Cannot use --target-is-zero when the destination image has a backing file")
	case f.bitmaps && !keepsBitmaps(img):
		return errNoBitmaps(img.Format())
	}
	if p.create == nil {
		t.touched = []string{p.destination}
	}
	return nil
}

// spare refuses to write to a file that the copy is read from. Locks refuse that, too, but not where the user or the
// file system does without.
func (t *target) spare(sources []*image.Image, names ...string) error {
	for _, name := range names {
		for _, source := range sources {
			if name != "" && source.Uses(name) {
				return fmt.Errorf("'%s' is a file of the source: it would be overwritten while it is read", name)
			}
		}
	}
	return nil
}

func (t *target) create(ctx context.Context, size int64, sources []*image.Image) error {
	p := t.plan
	// The size of the copy is that of the source, whatever -o says.
	p.create.values["size"] = fmt.Sprint(size)
	o, err := p.create.options(nil)
	if err != nil {
		return err
	}
	names, err := o.Files(p.create.format, p.destination)
	if err == nil {
		err = t.spare(sources, names...)
	}
	if err != nil {
		return err
	}
	var existing []string
	for _, name := range names {
		if _, err := os.Lstat(name); errors.Is(err, os.ErrNotExist) && !nbd.IsURI(name) {
			t.created = append(t.created, name)
		} else {
			existing = append(existing, name)
		}
	}
	err = createImage(ctx, &t.flags.open, p.create, p.destination, false, io.Discard)
	if errors.Is(err, storage.ErrLocked) {
		t.created = nil // somebody else made it in the meantime
	}
	if err == nil {
		t.touched = existing
	}
	return err
}

// describe tells the job what is known about the target.
func (t *target) describe(o *jobs.ConvertOptions, sources []*image.Image) {
	layers := t.img.Chain()
	o.TargetIsZero = t.flags.targetIsZero
	overlay := t.flags.backing != ""
	switch {
	case t.plan.create == nil:
	case len(layers) > 1:
		overlay = true
		o.TargetBackingSize = layers[1].Size
	default: // whether or not it is preallocated
		o.TargetIsZero = image.CreatedZero(t.img.Format(), t.plan.destination)
	}
	chain := sources[0].Chain()
	if !overlay || len(layers) < 2 || len(sources) > 1 || len(chain) < 2 {
		return
	}
	// What the source has from the target's backing file need not be copied. Unless that file is found deeper
	// down the source's chain, it is taken for a copy of the source's own backing file.
	o.SkipDepth = 1
	for depth := 1; depth < len(chain); depth++ {
		if image.SameFile(chain[depth].Name, layers[1].Name) {
			o.SkipDepth = depth
		}
	}
}

// finish closes the target after the copy ended with err, and leaves no half copy behind unannounced.
func (t *target) finish(err error) error {
	if t.img != nil {
		// After a failed copy closing fails, too, and for the same reason.
		if cerr := t.img.Close(); err == nil {
			err = cerr
		}
	}
	if err == nil {
		return nil
	}
	for _, name := range t.created {
		if rerr := os.Remove(name); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
			warn(t.cmd, "'%s' holds an unfinished copy and cannot be removed: %v", name, rerr)
		}
	}
	warnUnfinished(t.cmd, err)
	for _, name := range t.touched {
		warn(t.cmd, "'%s' holds an unfinished copy", name)
	}
	return err
}
