package prefetch

import (
	"fmt"

	"github.com/platter-disk/platter/block"
)

// Overlay is a disk some of whose bytes live in a base image. fvd.Image is one as long as its BaseSize is not 0; Guarded
// makes one of any device. The example of this package has what it takes for an image that package image opened.
// All methods are safe for concurrent use, with each other and with the guest's requests.
type Overlay interface {
	block.Device

	// BaseSize is how many bytes of the disk the base image covers; 0 once it is not needed any more.
	BaseSize() int64

	// CopyUnit is the size in bytes of the blocks that Populate stores whole; 1 or more.
	CopyUnit() int64

	// NextInBase finds the first run of bytes at or after off that still lives in the base image, or may do so:
	// n bytes from start, n == 0 if there is none. It does not wait. A run that does not begin at off begins on a block boundary;
	// it ends on one or with the base image.
	NextInBase(off int64) (start, n int64)

	// ReadBase reads what the base image holds at [off, off+len(p)), which lies below BaseSize. A range that a
	// guest has written meanwhile may read as what it wrote.
	ReadBase(p []byte, off int64) error

	// Populate keeps p, which ReadBase read at off. Blocks that no longer live in the base image, that a write is
	// changing, or that p holds only in part, are passed over. It returns how many bytes it kept.
	Populate(p []byte, off int64) (kept int64, err error)

	// Checkpoint makes what was kept so far durable.
	Checkpoint() error

	// DetachBase makes the disk independent of its base image for good. It fails while anything lives there.
	DetachBase() error
}

// stillNeeded says what keeps a base image needed.
func stillNeeded(start, n int64) error {
	return fmt.Errorf("the base image is still needed: %d bytes at %d live there", n, start)
}

// Remaining is how many bytes of an overlay live in its base image, or may do so.
func Remaining(over Overlay) (bytes int64) {
	for at := int64(0); ; {
		start, n := over.NextInBase(at)
		if n == 0 {
			return bytes
		}
		bytes += n
		at = start + n
	}
}
