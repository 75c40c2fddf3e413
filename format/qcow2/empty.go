package qcow2

import (
	"errors"
	"fmt"
)

// Empty makes the image hold nothing, durably and as one change: everything is read from the backing file then, or
// as zeros. It is for an image whose contents were committed to its backing file. Clusters that only the disk used
// become free; the snapshots keep theirs. Requests wait meanwhile. A crash leaves the image as it was or empty,
// in the latter case with leaked clusters under disciplines that allow them.
//
// Close then cuts the file off behind what is left, unless the image has snapshots, leaked clusters, or something
// else that is counted and that no table of the disk leads to.
func (im *Image) Empty() error {
	done, err := im.alone("empty")
	if err != nil {
		return err
	}
	defer done()
	if im.rawData() {
		return fmt.Errorf("%s: empty: the external data file is the disk: %w", im.file.Name(), errors.ErrUnsupported)
	}
	size := im.size.Load()
	t, err := im.newTree(nil, max(im.geo.l1Needed(size), 1))
	if err != nil {
		return err
	}
	if err := im.replaceTree(t, treePos{}, size); err != nil {
		return err
	}
	if im.geo.dataFile && im.opts.Discard {
		// No entry refers to the data file any more.
		if err := im.data.PunchHole(0, size); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return fmt.Errorf("%s: data file: %w", im.file.Name(), err)
		}
	}
	if err := im.discipline.quiesced(im.compact); err != nil {
		return fmt.Errorf("emptied, and not made small: %w", err)
	}
	return nil
}
