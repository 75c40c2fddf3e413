package cli

import (
	"errors"

	"github.com/platter-disk/platter/storage"
)

// errTrial is what the first change of an image ends with that is only tried.
var errTrial = errors.New("the image is not to be changed yet")

// refused is what an operation on a trialFile was refused for, nil if it would have begun its changes.
func refused(err error) error {
	if errors.Is(err, errTrial) {
		return nil
	}
	return err
}

// trialFile is a file of an image in which an operation is tried, to learn whether it is refused: once begun is true
// nothing is changed any more. Formats refuse what they cannot do before their first change.
type trialFile struct {
	storage.File
	begun *bool // set while nobody uses the file
}

// err is errTrial once the trial has begun.
func (f trialFile) err() error {
	if *f.begun {
		return errTrial
	}
	return nil
}

func (f trialFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.err(); err != nil {
		return 0, err
	}
	return f.File.WriteAt(p, off)
}

func (f trialFile) Truncate(size int64) error {
	if err := f.err(); err != nil {
		return err
	}
	return f.File.Truncate(size)
}

func (f trialFile) PunchHole(off, length int64) error {
	if err := f.err(); err != nil {
		return err
	}
	return f.File.PunchHole(off, length)
}

func (f trialFile) ZeroRange(off, length int64) error {
	if err := f.err(); err != nil {
		return err
	}
	return f.File.ZeroRange(off, length)
}

func (f trialFile) Allocate(off, length int64) error {
	if err := f.err(); err != nil {
		return err
	}
	return f.File.Allocate(off, length)
}
