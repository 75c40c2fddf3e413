package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/storage"
)

// Repair says what Check may change.
type Repair = qcow2.Repair

// What Check may change. Package fvd tells what these mean for its format (fvd.RepairLeaks, fvd.RepairAll).
const (
	RepairNone  = qcow2.RepairNone  // nothing: the files are only read
	RepairLeaks = qcow2.RepairLeaks // give back space that nothing refers to
	RepairAll   = qcow2.RepairAll   // everything that can be repaired
)

// ErrNoChecker is wrapped by the error of checking an image in a format that has nothing to check. It wraps
// errors.ErrUnsupported.
var ErrNoChecker = fmt.Errorf("the image format has nothing to check: %w", errors.ErrUnsupported)

// CheckOptions are the options of Check.
type CheckOptions struct {
	Repair Repair // what to repair

	// Memory bounds in bytes what the check keeps of an image: qcow2.CheckOptions.Memory, or what MaxMetadata bounds
	// of an FVD image. 0: the default of qcow2, or Options.MaxMetadata. An image that takes more is an error that wraps
	// qcow2.ErrCheckMemory or fvd.ErrMaxMetadata.
	Memory int64

	// DiscardJournal drops a metadata journal that cannot be replayed, with RepairAll only. Of qcow2 only.
	DiscardJournal bool

	// Report is called for every inconsistency of a qcow2 image as it is found, from the goroutine that called Check.
	// Those of an FVD image are in its result. May be nil.
	Report func(qcow2.Finding)
}

// CheckResult is what Check found: one of the two.
type CheckResult struct {
	Format string             `json:"format"` // "qcow2" or "fvd"
	Qcow2  *qcow2.CheckResult `json:"qcow2,omitempty"`
	FVD    *fvd.CheckResult   `json:"fvd,omitempty"`
}

// Clean reports that nothing is wrong (any more).
func (r *CheckResult) Clean() bool {
	if r.FVD != nil {
		return r.FVD.Clean()
	}
	return r.Qcow2.Clean()
}

// Damaged is how many places are corrupt (still), or could not be examined. Leaks, which only waste space, are not among
// them.
func (r *CheckResult) Damaged() int64 {
	if r.FVD != nil {
		return r.FVD.Corruptions
	}
	return r.Qcow2.Corruptions + r.Qcow2.CheckErrors
}

// Check examines the tables of the image called name, and repairs what it finds if it is told to; the checkers of the
// formats (qcow2.Check, fvd.Check) say what they look for, and what can be relied on when a repair is interrupted.
// Guest data is not looked at. The backing file is not needed; the data file of an FVD image is, and is opened through
// the gate. The image must not be in use for writing: it is opened with the locks of a reader (but see Options.Share),
// or of a writer if something is to be repaired. Of the options those count that say how names, formats, files, exports
// and references are understood and opened, and MaxMetadata.
//
// An image that can be examined yields a result, whatever is wrong with it. Errors are of type *NameError: IsInvalid is
// true where the contents keep the check from being made, a format without tables is ErrNoChecker, and once ctx has
// ended it is its error.
func Check(ctx context.Context, name string, o Options, co CheckOptions) (*CheckResult, error) {
	k, err := openForCheck(ctx, name, o, co)
	if err != nil {
		return nil, errOpen(name, err)
	}
	result, err := k.run()
	if err := errors.Join(err, k.file.Close()); err != nil {
		var header *qcow2.FormatError
		if errors.As(err, &header) { // in QEMU's words it does not come to a check then
			return nil, errOpen(name, err)
		}
		return nil, &NameError{Verb: "check", Name: name, Err: err}
	}
	if result.Qcow2 != nil {
		result.Qcow2.Filename = name
	}
	return result, nil
}

// checking is one run of Check.
type checking struct {
	c    *chain
	n    *node
	file storage.File
	o    CheckOptions
}

// openForCheck opens the file of an image as it is.
func openForCheck(ctx context.Context, name string, o Options, co CheckOptions) (*checking, error) {
	n, err := o.resolve(name)
	if err != nil {
		return nil, err
	}
	n.readOnly, n.share = n.readOnly || o.ReadOnly, n.share || o.Share
	switch repairs := co.Repair != RepairNone; {
	case repairs && n.share:
		return nil, errShare
	case repairs && n.readOnly:
		return nil, fmt.Errorf("a repair changes the image: %w", block.ErrReadOnly)
	case !repairs:
		n.readOnly = true
	}
	c := &chain{ctx: ctx, o: o, layers: make([]Layer, 1)}
	f, err := c.openLocation(n.at, n.readOnly, n.share, n.direct)
	if err != nil {
		return nil, err
	}
	if o.Wrap != nil {
		f = o.Wrap(f)
	}
	k := &checking{c: c, n: n, file: f, o: co}
	if n.format == "" {
		if n.format, err = Probe(f); err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	return k, nil
}

func (k *checking) run() (*CheckResult, error) {
	var err error
	result := &CheckResult{Format: k.n.format}
	switch k.n.format {
	case formatQcow2:
		result.Qcow2, err = qcow2.Check(k.file, qcow2.CheckOptions{
			Repair: k.o.Repair, Memory: k.o.Memory, DiscardJournal: k.o.DiscardJournal, Report: k.o.Report, Interrupt: k.c.ctx.Err,
		})
	case formatFVD:
		result.FVD, err = k.runFVD()
	default:
		err = fmt.Errorf("%s: %w", k.n.format, ErrNoChecker)
	}
	return result, err
}

// runFVD checks an FVD image with the data file that it may have.
func (k *checking) runFVD() (*fvd.CheckResult, error) {
	if k.o.DiscardJournal {
		return nil, fmt.Errorf("discarding the journal is for qcow2 images: %w", errors.ErrUnsupported)
	}
	// The checker asks nobody whether to go on; its files do.
	interrupt := func(f storage.File) storage.File { return &interruptible{File: f, ctx: k.c.ctx} }
	f, outer := interrupt(k.file), k.c.o.Wrap
	k.c.o.Wrap = func(f storage.File) storage.File {
		if outer != nil {
			f = outer(f)
		}
		return interrupt(f)
	}
	h, err := fvd.ReadHeader(f)
	if err != nil {
		return nil, err
	}
	var files fvd.Options
	var result *fvd.CheckResult
	if err = k.c.openFVDData(k.n, h, 0, &files); err == nil {
		o := fvd.CheckOptions{Data: files.Data, DataDevice: files.DataDevice, MaxMetadata: cmp.Or(k.o.Memory, k.c.o.MaxMetadata)}
		switch k.o.Repair {
		case RepairLeaks:
			o.Repair = fvd.RepairLeaks
		case RepairAll:
			o.Repair = fvd.RepairAll
		}
		result, err = fvd.Check(f, o)
	}
	if files.Data != nil {
		err = errors.Join(err, files.Data.Close())
	}
	if files.DataDevice != nil {
		err = errors.Join(err, files.DataDevice.Close())
	}
	return result, err
}
