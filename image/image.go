// Package image opens and creates virtual disks by name: it finds out what a name means, what format the file
// has and which files belong to it, and puts the layers together.
//
//	name                                          what it becomes
//	----                                          ---------------
//	disk.qcow2                                    a file, its format found out by looking
//	nbd://host/export, nbd+unix:///?socket=path   an NBD export
//	json:{"driver":"qcow2","file":{…}}            QEMU's description in JSON
//	driver=qcow2,file.filename=disk.qcow2         the same as options
//	              |
//	              v
//	   +--------------------+   refers to    +--------------------+   refers to    +-----------+
//	   | qcow2 top.qcow2    | -------------> | qcow2 mid.qcow2    | -------------> | raw base  |
//	   | writable, locked   |  through the   | read-only, shared  |  through the   |           |
//	   +--------------------+     gate       +--------------------+     gate       +-----------+
//
// Create makes an image, Check examines and repairs one, Open opens it; the Image is a block.Device (package block says
// what can be done with it), and has what only its format can behind Qcow2 and FVD. The examples are whole programs;
// docs/library.md of the repository has them in one place.
//
// A name that comes from somebody else should be made an absolute path first, which is nothing but a path; whatever else
// it looks like is taken for it, files of the host and servers included, and asks no gate.
//
// An image is untrusted: the files it names are opened only through the gate that the caller supplies
// (package gate), chains end (1024 layers) and never form a cycle, and a disk whose format was only guessed to
// be raw cannot be turned into another format by what is written to it (package raw).
//
// Only the top layer is opened for writing (but see Options.WritableBacking). It holds the locks of a writer and the
// layers below those of readers, so that several overlays share a backing file and nobody writes it meanwhile (package storage).
package image

import (
	"context"
	"errors"
	"fmt"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image/gate"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/storage"
)

// Options says how Open opens an image. Where a name that consists of options (json:, driver=) says otherwise,
// the name wins, except that nothing in it makes an image writable that is to be ReadOnly.
type Options struct {
	// Format of the top layer: one of Formats, or "" to find out by looking. With a name that states a driver
	// it must be the same.
	Format string

	// NameIsOptions: name consists of options even if it does not start with "driver=" (--image-opts).
	NameIsOptions bool

	ReadOnly bool
	// Share, with ReadOnly, tolerates that another process is writing the image; without it that is an error that wraps
	// storage.ErrLocked. Tables that change meanwhile are not followed: what is read is from no single moment and may be
	// wrong. It is for looking at an image; to copy a disk that is in use, have its process serve it, or copy a snapshot
	// (qcow2.Image.SnapshotDevice).
	Share bool

	// Gate decides which files the image may refer to. Nil is gate.SameDirectory: a set of files in one
	// directory works, and an image from elsewhere reaches nothing.
	Gate gate.Gate

	NoBacking bool   // read the top layer alone; what it holds no data for reads as zeros
	DataFile  string // path or NBD URI of the external data file, instead of the one that the image names

	// Discipline says how metadata of the top layer becomes durable: one of qcow2.Disciplines, or "immediate" or
	// "buffered" for the journal of an FVD image. "" is the default of its format.
	Discipline string
	// JournalDataChecksums, for qcow2's discipline journal, is that option of package qcow2.
	JournalDataChecksums bool

	L2CacheSize       int64 // bytes, each qcow2 layer, of which there must be one; 0 for its default
	RefcountCacheSize int64 // bytes, likewise; 0 for the default

	// MaxMetadata bounds the memory in bytes for bitmap and table of each FVD image of the chain; 0 is
	// fvd.DefaultMaxMetadata. Such an image keeps them in memory whole, so this is what bounds what a stranger's can take:
	// a small multiple of it at most (fvd.Options.MaxMetadata). One that needs more is refused before they are read, with an
	// error that wraps fvd.ErrMaxMetadata. Other formats have caches of a fixed size instead.
	MaxMetadata int64

	// NBD says how the exports are connected that the name leads to, or a reference in the image (backing file, data
	// file): time limits, connections, TLS, logger. What a URI says itself wins (tls-hostname, tls-certificates,
	// tls-verify-peer); ReadOnly is decided for each of them as for a file. TLS encrypts every one of them, whatever
	// its scheme, and shows its certificates to any server that the gate admits; a ServerName in it is expected of all
	// that have no tls-hostname. The zero value is that of package nbd: no limit on how long a request may take, no TLS but
	// for nbds:// URIs.
	NBD nbd.ClientOptions

	Direct       bool // bypass the page cache of local files
	Writethrough bool // every change is durable when it is reported done
	Discard      bool // give space that a guest discards back to the file system

	// WritableBacking is how many layers below the top are opened for writing too, with the locks of writers;
	// for jobs that write a backing file (commit).
	WritableBacking int

	// AllowDirty opens an FVD image that has no journal and was not closed cleanly, at the operator's risk.
	AllowDirty bool
	// GrowStorage makes storage of an FVD image that cannot be resized (a volume) larger by at least need bytes; full
	// is the path or URI of that storage: the image's, or that of its data file. It is asked for every layer.
	// Nil: writes fail when it is full. The command that an image may name for this is never executed.
	GrowStorage func(full string, need int64) error

	// Interrupt is asked now and then while Resize lays out space; the error that it returns
	// ends that, and the disk keeps its size. Nil never does.
	Interrupt func() error

	// Wrap, unless nil, is put around the file and the external data file of the top layer before the format
	// sees them: to count, record or fail what the format does.
	Wrap func(storage.File) storage.File
}

// Image is an open virtual disk.
type Image struct {
	block.Device
	name   string
	file   storage.File
	layers []Layer
	probed bool

	devices []block.Device // of the layers
	files   []identity     // of the whole chain
}

// Layer describes one image of a chain.
type Layer struct {
	Name          string // path or URI of its file
	Format        string // "fvd", "qcow2", "raw"; where the name asked for a protocol driver, that driver: "file", "nbd"
	Size          int64  // bytes of the virtual disk
	FileSize      int64  // bytes of the file
	ReadOnly      bool
	BackingFile   string // reference to the layer below as the image stores it; "" for none
	BackingFormat string // as the image stores it; "" for none
	FullBacking   string // what BackingFile stands for: path, URI or JSON; "" for none
	DataFile      string // path or URI of the external data file in use; "" for none

	// Offset and Length, in bytes, are the part of its file that the name of a raw disk restricts it to; both 0: all
	// of it. Length 0: to the end.
	Offset, Length int64
}

// Open opens the image called name, and everything below it. An image that was not closed properly is recovered first,
// in memory alone if it is to be ReadOnly. Errors are of type *NameError; IsInvalid, gate.ErrRefused, storage.ErrLocked
// and the errors of the operating system tell why. ctx matters until Open returns.
func Open(ctx context.Context, name string, o Options) (*Image, error) {
	im, err := open(ctx, name, o)
	if err != nil {
		return nil, errOpen(name, err)
	}
	return im, nil
}

// resolve finds out what a name means together with the options, of which it checks and completes those that need it.
func (o *Options) resolve(name string) (*node, error) {
	if o.Format != "" {
		if err := checkFormat(o.Format); err != nil {
			return nil, err
		}
	}
	n, err := parseName(name, o.NameIsOptions)
	if err != nil {
		return nil, err
	}
	switch {
	case n.format == "":
		n.format = o.Format
	case o.Format != "" && o.Format != n.format:
		return nil, fmt.Errorf("the name says that the format is %s, the options say %s", n.format, o.Format)
	}
	if o.Gate == nil {
		o.Gate = gate.SameDirectory{}
	}
	return n, nil
}

func open(ctx context.Context, name string, o Options) (*Image, error) {
	n, err := o.resolve(name)
	if err != nil {
		return nil, err
	}
	c := &chain{ctx: ctx, o: o}
	top, err := c.open(n, nil)
	if err != nil {
		return nil, err
	}
	if !c.cached && (o.L2CacheSize != 0 || o.RefcountCacheSize != 0) {
		return nil, errors.Join(errCaches(n.format, o.L2CacheSize), top.dev.Close())
	}
	return &Image{Device: top.dev, name: name, file: top.file, probed: top.probedRaw, layers: c.layers, devices: c.devices, files: c.seen}, nil
}

// Name is the name that Open was given.
func (im *Image) Name() string { return im.name }

// Format is the format of the top layer.
func (im *Image) Format() string { return im.layers[0].Format }

// ProbedRaw tells that nobody said the image is raw: it was recognised as nothing else. If it is writable,
// writes that would make it look like another format are refused.
func (im *Image) ProbedRaw() bool { return im.probed }

// Chain describes the layers as they were opened, from the top down.
func (im *Image) Chain() []Layer { return append([]Layer(nil), im.layers...) }

// Uses tells whether a path or URI may lead to one of the files that the disk is kept in or read from: those of all
// layers, and those that their data files consist of.
func (im *Image) Uses(name string) bool { return isAmong(im.files, name) }

// File is the file of the top layer. It belongs to the image.
func (im *Image) File() storage.File { return im.file }

// Qcow2 is the top layer if it is a qcow2 image, else nil.
func (im *Image) Qcow2() *qcow2.Image {
	q, _ := im.devices[0].(*qcow2.Image)
	return q
}

// FVD is the top layer if it is an FVD image, else nil.
func (im *Image) FVD() *fvd.Image {
	v, _ := im.devices[0].(*fvd.Image)
	return v
}

// LayerDevice is the disk that a layer of Chain and everything below it make; 0 is the image itself. It belongs
// to the image.
func (im *Image) LayerDevice(layer int) block.Device { return im.devices[layer] }
