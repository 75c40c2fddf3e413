package image

import (
	"fmt"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/storage"
)

// Measurement is how large an image becomes, in bytes.
type Measurement = qcow2.Measurement

// Measure tells how much space a new image in format qcow2 or raw needs, to make a volume for it that is large enough.
// o is what Create is going to get, with a Size; the image is to take over the contents of source, or nothing if that is
// nil. Nothing is opened or made. The error wraps errors.ErrUnsupported for other formats.
func Measure(format string, o CreateOptions, source block.Device) (Measurement, error) {
	switch format {
	case formatRaw:
		size := (o.Size + storage.SectorSize - 1) &^ (storage.SectorSize - 1)
		return Measurement{Required: size, FullyAllocated: size}, nil
	case formatQcow2:
		return o.CreateOptions.Measure(source)
	}
	return Measurement{}, &wordedError{fmt.Sprintf("Block driver '%s' does not support size measurement", format), ErrUnsupportedFormat}
}
