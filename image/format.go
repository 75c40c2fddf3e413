package image

import (
	"errors"
	"fmt"

	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/format/raw"
	"github.com/platter-disk/platter/storage"
)

const (
	formatFVD   = "fvd"
	formatRaw   = "raw"
	formatQcow2 = "qcow2"
)

// ErrUnsupportedFormat is wrapped by the error of opening an image that was recognised and cannot be used.
var ErrUnsupportedFormat = errors.New("the image format is not supported")

// Formats returns the names of the formats that Open and Create know, in alphabetical order.
func Formats() []string { return []string{formatFVD, formatQcow2, formatRaw} }

// Disciplines returns the names that Options.Discipline takes, those of qcow2 first.
func Disciplines() []string {
	return append(qcow2.Disciplines(), disciplineImmediate, disciplineBuffered)
}

// checkFormat accepts the names of formats, as given by users and by images.
func checkFormat(name string) error {
	for _, known := range Formats() {
		if name == known {
			return nil
		}
	}
	return errUnknownFormat("driver", name)
}

// probeSize is how many bytes from the start of a file decide its format.
const probeSize = 512

// Probe finds out the format of an image by looking at its first sector. What no format claims is raw. An
// image in a format that is recognised but not supported is an error that wraps ErrUnsupportedFormat: taking
// it for a raw disk would hand its metadata to a guest.
func Probe(f storage.File) (string, error) {
	head := make([]byte, probeSize)
	if err := storage.ReadFull(f, head, 0); err != nil {
		return "", err
	}
	if qcow2.Probe(head) {
		return formatQcow2, nil
	}
	if fvd.Probe(head) {
		return formatFVD, nil
	}
	if foreign := raw.Foreign(head); foreign != "" {
		return "", fmt.Errorf("%s looks like an image in format %q; name the format raw to use its bytes as they are: %w", f.Name(), foreign, ErrUnsupportedFormat)
	}
	return formatRaw, nil
}
