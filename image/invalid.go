package image

import (
	"errors"

	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
)

// IsInvalid tells whether an error of Open, of what was opened, or of a check says that the contents of an image cannot
// be used: it is damaged, it is not of the format that it was opened as, or it needs a format or a feature that is not
// known here. Trying again is of no use then, and whoever made the image is to be told.
//
// Everything else is not about contents: a file that cannot be found, read or locked, a server that does not answer,
// a reference that the gate refused (gate.ErrRefused), a context that ended.
func IsInvalid(err error) bool {
	var (
		qcow2Error *qcow2.FormatError
		checkError *qcow2.CheckFailure
		fvdError   *fvd.FieldError
	)
	return errors.As(err, &qcow2Error) || errors.As(err, &checkError) || errors.As(err, &fvdError) ||
		errors.Is(err, fvd.ErrDamaged) || errors.Is(err, fvd.ErrFeatures) ||
		errors.Is(err, ErrUnsupportedFormat) || errors.Is(err, ErrCycle)
}
