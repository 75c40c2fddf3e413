package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/format/raw"
	"github.com/platter-disk/platter/image/gate"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/storage"
)

// CreateOptions are the options of a new image. The embedded ones that are not Size or Preallocation, those of
// the backing file, or DataFileName, are of qcow2 only; BackingSize and DataFile are filled in by Create.
//
//	var o image.CreateOptions
//	o.Size = 10 << 30
//	err := image.Create(ctx, "qcow2", "disk.qcow2", o)
type CreateOptions struct {
	// Size is in bytes. Negative, or 0 with a backing file, means that none was given: it is the size of the
	// backing file then, and without one an error.
	qcow2.CreateOptions

	// FVD are the options that only that format has. Size, preallocation, base image and data file are those above.
	FVD fvd.CreateOptions

	NoCoW         bool // ask a copy-on-write file system to write the file in place
	BackingUnseen bool // do not open the backing file: it need not exist, and Size must be given

	// Gate decides about the references that the backing file holds, not about the backing file itself. Nil is
	// gate.SameDirectory.
	Gate gate.Gate

	// NBD says how the exports are connected that the image is made in or has below it, as Options.NBD does.
	NBD nbd.ClientOptions
}

// UnfinishedError is wrapped by the error of a Create that left Name, which was there before or cannot be removed,
// with neither its old contents nor an image.
type UnfinishedError struct {
	Name string // path or URI
	Err  error
}

func (e *UnfinishedError) Error() string { return e.Err.Error() }

// Unwrap returns the reason.
func (e *UnfinishedError) Unwrap() error { return e.Err }

// Create makes a new image called name, a local file or block device; an existing file is overwritten, unless
// somebody has it open. An image in format qcow2 or raw may also be made in an NBD export that is large enough.
//
// After an error, that of ctx included when it ends, no file is left that was not there before, and one that was
// there and lost its contents is told of by an *UnfinishedError. Errors about the file are of type *NameError.
func Create(ctx context.Context, format, name string, o CreateOptions) error {
	o, err := ResolveCreate(ctx, format, name, o)
	if err != nil {
		return err
	}
	at, err := parseNew(name)
	if err != nil {
		return err
	}
	if format == formatFVD && !at.local() {
		return errNoCreation(at)
	}
	created := newFiles{ctx: ctx, nbd: o.NBD}
	switch format {
	case formatRaw:
		err = createRaw(at, o, &created)
	case formatFVD:
		err = createFVD(ctx, at, o, &created)
	default:
		err = createQcow2(at, o, &created)
	}
	if err != nil {
		return created.giveUp(err)
	}
	return nil
}

// CreatedZero tells whether a disk that Create made under that name reads as zeros everywhere, as far as no backing
// file shows through. Only a raw disk in storage of a fixed size does not: it is what that storage held before.
func CreatedZero(format, name string) bool {
	at, err := parseNew(name)
	return err == nil && (format != formatRaw || at.local() && !isDevice(at))
}

func createRaw(at *location, o CreateOptions, created *newFiles) error {
	f, err := created.create(at, o.NoCoW)
	if err != nil {
		return err
	}
	return errors.Join(writeRaw(f, o), f.Close())
}

func writeRaw(f storage.File, o CreateOptions) error {
	// Before anything is lost it turns out whether a file can be that large. What cannot grow is looked at by raw.Create.
	if old, err := f.Size(); err != nil {
		return err
	} else if old > 0 && old < o.Size && o.Preallocation != block.PreallocMetadata {
		if err := f.Truncate(o.Size); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	return raw.Create(f, o.Size, o.Preallocation)
}

func createQcow2(at *location, o CreateOptions, created *newFiles) error {
	f, err := created.create(at, o.NoCoW)
	if err != nil {
		return err
	}
	return errors.Join(writeQcow2(f, o, created), f.Close())
}

func writeQcow2(f storage.File, o CreateOptions, created *newFiles) error {
	if o.DataFileName == "" {
		return qcow2.Create(f, o.CreateOptions)
	}
	at, err := parseLocation(o.DataFileName)
	if err != nil {
		return fmt.Errorf("data file: %w", err)
	}
	if o.DataFile, err = created.create(at, o.NoCoW); err != nil {
		return fmt.Errorf("data file: %w", err)
	}
	return errors.Join(qcow2.Create(f, o.CreateOptions), o.DataFile.Close())
}

// ResolveCreate checks the options of Create against the world and returns them with everything filled in that
// depends on it: Size, BackingSize. Create calls it; a program that wants to show what it is about to create
// calls it first. The words of its errors are those of qemu-img.
func ResolveCreate(ctx context.Context, format, name string, o CreateOptions) (CreateOptions, error) {
	switch format {
	case formatQcow2:
	case formatFVD:
		if o.BackingFile != "" && o.BackingUnseen {
			return o, errors.New("an image in format fvd records the size of its base image, which must be there")
		}
	case formatRaw:
		if o.BackingFile != "" {
			return o, qemuError("Backing file not supported for file format 'raw'")
		}
	default:
		return o, errUnknownFormat("file format", format)
	}
	if o.BackingFile != "" {
		if err := resolveCreateBacking(ctx, format, name, &o); err != nil {
			return o, err
		}
	}
	if o.Size < 0 {
		return o, qemuError("Image creation needs a size parameter")
	}
	return o, nil
}

// resolveCreateBacking learns the size of the backing file, and sees to it that it can be opened.
func resolveCreateBacking(ctx context.Context, format, name string, o *CreateOptions) error {
	at, err := parseNew(name)
	if err != nil {
		return err
	}
	if o.BackingFormat != "" {
		if err := checkFormat(o.BackingFormat); err != nil {
			return errCreateBacking(err)
		}
	}
	below, _, refErr := parseReference(gate.Backing, at, o.BackingFile, besideImage)
	if refErr == nil && mayBeSame(at.String(), below.at.String()) {
		return qemuError("Error: Trying to create an image with the same filename as the backing file")
	}
	if refErr == nil {
		if err := o.sparesChain(format, at, []identity{{name: below.at.String()}}); err != nil {
			return err
		}
	}
	noSize := o.Size <= 0
	switch {
	case o.BackingUnseen && noSize:
		o.Size = -1
		return nil
	case o.BackingUnseen && o.BackingFormat == "":
		return qemuError("Backing file specified without backing format")
	case o.BackingUnseen:
		return nil // even a name that means nothing here may mean something where the image is used
	case refErr != nil:
		return refErr
	}
	if below.format == "" {
		below.format = o.BackingFormat
	}
	c := &chain{ctx: ctx, o: Options{ReadOnly: true, Share: true, Gate: o.gate(), NBD: o.NBD}}
	backing, err := c.open(below, nil)
	if err != nil {
		return errCreateBacking(err)
	}
	if err := o.sparesChain(format, at, c.seen); err != nil {
		return errors.Join(err, backing.dev.Close())
	}
	o.BackingSize = backing.dev.Size()
	if err := backing.dev.Close(); err != nil {
		return err
	}
	if o.BackingFormat == "" && format == formatFVD {
		o.BackingFormat = c.layers[0].Format // recorded, so that nobody guesses again
	}
	if o.BackingFormat == "" {
		return qemuError("Backing file specified without backing format\nDetected format of %s.", c.layers[0].Format)
	}
	if noSize {
		o.Size = o.BackingSize
	}
	return nil
}

func errCreateBacking(err error) error { return qemuError("%w\nCould not open backing image.", err) }

// sparesChain refuses to overwrite a file of the chain that the new image is to lie over.
func (o *CreateOptions) sparesChain(format string, at *location, chain []identity) error {
	made, err := o.filesAt(format, at)
	if err != nil {
		return err
	}
	for _, name := range made {
		if isAmong(chain, name) {
			return qemuError("Error: Trying to create '%s', which is a file of the backing chain", printable(name))
		}
	}
	return nil
}

// Files are the paths or URIs of what Create writes when it makes an image of that name with these options.
func (o *CreateOptions) Files(format, name string) ([]string, error) {
	at, err := parseNew(name)
	if err != nil {
		return nil, err
	}
	return o.filesAt(format, at)
}

func (o *CreateOptions) filesAt(format string, at *location) ([]string, error) {
	files := []string{at.String()}
	if o.DataFileName != "" {
		data, err := o.dataLocation(format, at)
		if err != nil {
			return nil, fmt.Errorf("data file: %w", err)
		}
		files = append(files, data.String())
	}
	return files, nil
}

// dataLocation is where the data file of an image at at is made: FVD looks for it beside the image; qemu-img makes
// that of qcow2 where the name leads from the working directory.
func (o *CreateOptions) dataLocation(format string, at *location) (*location, error) {
	if format != formatFVD {
		return parseLocation(o.DataFileName)
	}
	n, _, err := parseReference(gate.DataFile, at, o.DataFileName, besideImage)
	if err != nil {
		return nil, err
	}
	return n.at, nil
}

// gate is what decides about references.
func (o *CreateOptions) gate() gate.Gate {
	if o.Gate == nil {
		return gate.SameDirectory{}
	}
	return o.Gate
}

// LocalPath is the path of the local file that a name given to Create stands for; ok is false if it stands for none.
func LocalPath(name string) (path string, ok bool) {
	at, err := parseNew(name)
	if err != nil || !at.local() {
		return "", false
	}
	return at.path, true
}

// newFiles are the files that a Create has made so far.
type newFiles struct {
	ctx   context.Context
	nbd   nbd.ClientOptions // of the exports that are written
	files []newFile
}

type newFile struct {
	at   *location
	made bool // it was not there
	*interruptible
}

// create opens the file at l and remembers whether it was there. What it holds is for the format to remove, which
// checks the options first. The file fails its requests once ctx has ended.
func (n *newFiles) create(l *location, noCoW bool) (storage.File, error) {
	if err := n.ctx.Err(); err != nil {
		return nil, err
	}
	for _, f := range n.files {
		if mayBeSame(l.String(), f.at.String()) {
			return nil, fmt.Errorf("'%s' is the image itself", printable(l.String()))
		}
	}
	created := newFile{at: l}
	f, err := created.open(n.ctx, n.nbd, noCoW)
	if err != nil {
		return nil, err
	}
	created.interruptible = &interruptible{File: f, ctx: n.ctx}
	n.files = append(n.files, created)
	return created.interruptible, nil
}

func (n *newFile) open(ctx context.Context, o nbd.ClientOptions, noCoW bool) (storage.File, error) {
	if !n.at.local() {
		return dialNBD(ctx, n.at.uri, o, false)
	}
	path := n.at.path
	_, err := os.Lstat(path)
	n.made = errors.Is(err, fs.ErrNotExist)
	f, err := storage.Open(path, storage.OpenOptions{Create: true, NoCoW: noCoW})
	if err != nil {
		return nil, fileError("create", path, err)
	}
	return f, nil
}

// giveUp removes what was made before err.
func (n *newFiles) giveUp(err error) error {
	for _, f := range n.files {
		left := f.changed.Load()
		if f.made {
			rerr := os.Remove(f.at.path)
			left = rerr != nil && !errors.Is(rerr, fs.ErrNotExist)
		}
		if left {
			err = &UnfinishedError{Name: f.at.String(), Err: err}
		}
	}
	return err
}

// errNoCreation refuses to make an image where only existing ones can be opened.
func errNoCreation(at *location) error {
	return qemuError("Protocol driver '%s' does not support image creation: %w", at.protocol(), errors.ErrUnsupported)
}
