package qcow2

import (
	"fmt"

	"github.com/platter-disk/platter/block"
)

// Measurement is how large an image becomes, in bytes. With an external data file it counts that, too.
type Measurement struct {
	Required       int64 // with what is to be copied into it
	FullyAllocated int64 // once the guest has written all of the disk
}

// Measure tells how large an image made with these options becomes that takes over the contents of source, plain and
// in order; nil: that stays empty. What source reads as zeros takes no space, nor does what is shared with a backing
// file of the new image, of which nobody knows here how much that is: with one, Required allows for all of the disk.
// An image with snapshots, compressed clusters, or rewritten while it is full becomes larger or smaller.
func (o CreateOptions) Measure(source block.Device) (Measurement, error) {
	layout := o
	layout.Preallocation = block.PreallocOff // how much there is, not when
	h, _, err := layout.header()
	if err != nil {
		return Measurement{}, err
	}
	h.Incompatible &^= IncompatDataFile
	c := &creation{h: h, g: newGeometry(h), prealloc: block.PreallocFull}
	c.layout()
	if !c.addressable() {
		return Measurement{}, fmt.Errorf("a disk of %d bytes: %s", h.Size, problemTooLarge)
	}
	full := int64(c.g.offsetOf(c.end))
	m := Measurement{Required: full, FullyAllocated: full}
	switch {
	case o.Preallocation >= block.PreallocFalloc, source != nil && o.BackingFile != "":
		return m, nil
	case source == nil:
		m.Required -= c.mapped << c.g.clusterBits
		return m, nil
	}
	empty, err := c.g.emptyClusters(source)
	m.Required -= empty << c.g.clusterBits
	return m, err
}

// emptyClusters counts the clusters of a disk that read as zeros for certain.
func (g *geometry) emptyClusters(d block.Device) (int64, error) {
	size := d.Size()
	used, next := int64(0), int64(0) // clusters; the first one that was not counted yet
	err := d.Extents(0, size, func(e block.Extent) bool {
		if !e.Zero {
			first, end := max(e.Offset>>g.clusterBits, next), g.clustersFor(e.Offset+e.Length)
			used += max(end-first, 0)
			next = max(next, end)
		}
		return true
	})
	return g.clustersFor(size) - used, err
}

// BitmapsSize is how many bytes copies of the image's persistent dirty bitmaps take in an image made with options o.
func (im *Image) BitmapsSize(o CreateOptions) (int64, error) {
	target, _, err := o.header()
	if err != nil {
		return 0, err
	}
	g := newGeometry(target)
	directory, total := int64(0), int64(0) // bytes, clusters
	h := im.Header()
	err = forEachBitmap(im.file, &h, func(b Bitmap) error {
		bits := (int64(h.Size) + 1<<b.GranularityBits - 1) >> b.GranularityBits
		data := g.clustersFor((bits + 7) / 8)
		total += data + g.clustersFor(8*data)
		directory += (bitmapFixedSize + int64(len(b.Name)) + 7) &^ 7
		return nil
	})
	return (total + g.clustersFor(directory)) << g.clusterBits, err
}
