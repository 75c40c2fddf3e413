package image

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image/gate"
	"github.com/platter-disk/platter/storage"
)

// The disciplines of FVD: how eagerly its journal is written.
const (
	disciplineImmediate = "immediate"
	disciplineBuffered  = "buffered"
)

func journalMode(discipline string) (fvd.JournalMode, error) {
	switch discipline {
	case "":
		return fvd.JournalAuto, nil
	case disciplineImmediate:
		return fvd.JournalImmediate, nil
	case disciplineBuffered:
		return fvd.JournalBuffered, nil
	}
	return 0, fmt.Errorf("discipline %q: the journal of an image in format fvd is %s or %s", discipline, disciplineImmediate, disciplineBuffered)
}

func (c *chain) openFVD(n *node, f storage.File, layer int) (dev block.Device, err error) {
	h, err := fvd.ReadHeader(f)
	if err != nil {
		return nil, err
	}
	if n.l2Cache != 0 || n.refcountCache != 0 {
		return nil, errCaches(formatFVD, n.l2Cache)
	}
	mode, err := journalMode(c.discipline(n, layer))
	if err != nil {
		return nil, err
	}
	o := fvd.Options{
		ReadOnly: n.readOnly, Writethrough: c.o.Writethrough || n.writethrough, Journal: mode,
		AllowDirty: layer == 0 && c.o.AllowDirty, Interrupt: c.o.Interrupt, MaxMetadata: c.o.MaxMetadata,
	}
	defer func() {
		if err == nil {
			return
		}
		if o.Data != nil {
			o.Data.Close()
		}
		if o.DataDevice != nil {
			o.DataDevice.Close()
		}
		if o.Base != nil {
			o.Base.Close()
		}
	}()
	if err := c.openFVDData(n, h, layer, &o); err != nil {
		return nil, err
	}
	if grow := c.o.GrowStorage; grow != nil {
		full := n.at.String()
		if data := c.layers[layer].DataFile; data != "" {
			full = data
		}
		o.GrowStorage = func(need int64) error { return grow(full, need) }
	}
	ref := backingReference{h.BaseImage, h.BaseFormat}
	c.layers[layer].BackingFile, c.layers[layer].BackingFormat = ref.file, ref.format
	o.NoBase = n.noBacking || layer == 0 && c.o.NoBacking
	// A disk that has moved over whole never touches its base image again; it need not even exist.
	if !o.NoBase && !h.FullyPrefetched {
		if o.Base, err = c.openBacking(n, ref, layer); err != nil {
			return nil, err
		}
	}
	return fvd.Open(f, o)
}

// openFVDData opens the data file: what the caller says, else what the image says; none if it has none.
func (c *chain) openFVDData(n *node, h *fvd.Header, layer int, o *fvd.Options) error {
	at, err := c.dataLocation(n, layer)
	if err != nil {
		return err
	}
	if at == nil {
		if h.DataFile == "" {
			o.DataNotZeroed = isDevice(n.at)
			return nil
		}
		found, ref, err := parseReference(gate.DataFile, n.at, h.DataFile, besideImage)
		if err == nil {
			err = c.o.Gate.Allow(ref)
		}
		if err != nil {
			return err
		}
		at = found.at
	}
	o.DataNotZeroed = isDevice(at)
	c.layers[layer].DataFile = at.String()
	if h.DataFormat != "" && h.DataFormat != formatRaw {
		o.DataDevice, err = c.openDataDisk(n, at, h.DataFormat, layer)
		return err
	}
	if o.Data, err = c.openDataFile(n, at, layer); err != nil || h.DataFormat == formatRaw {
		return err
	}
	// No format is recorded: the guest decides what the first bytes of a raw data file look like.
	if format, err := Probe(o.Data); err != nil {
		return err
	} else if format != formatRaw {
		return fmt.Errorf("data file '%s' looks like an image in format %s, and the image does not say what it is; set data_file_fmt to %s or raw", printable(at.String()), format, format)
	}
	return nil
}

// openDataDisk opens a data file that is a virtual disk itself. Its backing files count as files of the chain,
// not as layers.
func (c *chain) openDataDisk(n *node, at *location, format string, layer int) (block.Device, error) {
	if err := checkFormat(format); err != nil {
		return nil, err
	}
	o := Options{
		ReadOnly: n.readOnly, Share: n.share, Gate: c.o.Gate, Direct: c.o.Direct, Discard: true, NBD: c.o.NBD,
		L2CacheSize: c.o.L2CacheSize, RefcountCacheSize: c.o.RefcountCacheSize, MaxMetadata: c.o.MaxMetadata,
	}
	if layer == 0 {
		o.Wrap = c.o.Wrap
	}
	below := &chain{ctx: c.ctx, o: o, seen: c.seen, depth: c.depth + layer + 1}
	result, err := below.open(&node{format: format, at: at, direct: n.direct}, nil)
	c.seen, c.cached = below.seen, c.cached || below.cached
	if err != nil {
		return nil, fmt.Errorf("data file '%s': %w", printable(at.String()), err)
	}
	return result.dev, nil
}

// isDevice tells whether the bytes at l are those of a block device, which others may have used before.
func isDevice(l *location) bool {
	if !l.local() {
		return false
	}
	info, err := os.Stat(l.path)
	return err == nil && info.Mode()&os.ModeDevice != 0
}

// createFVD makes an image in format FVD. The base image is open all the while: that is what keeps a mistaken
// name from overwriting it.
func createFVD(ctx context.Context, at *location, o CreateOptions, created *newFiles) (err error) {
	fo := o.FVD
	fo.Size, fo.Preallocation, fo.Interrupt = o.Size, o.Preallocation, ctx.Err
	fo.BaseImage, fo.BaseFormat = o.BackingFile, o.BackingFormat
	if o.BackingFile != "" {
		below, _, err := parseReference(gate.Backing, at, o.BackingFile, besideImage)
		if err != nil {
			return err
		}
		below.format = o.BackingFormat
		c := &chain{ctx: ctx, o: Options{ReadOnly: true, Gate: o.gate(), NBD: o.NBD}}
		base, err := c.open(below, nil)
		if err != nil {
			return qemuError("%w\nCould not open backing image.", err)
		}
		defer base.dev.Close()
		fo.Base = base.dev
	}
	f, err := created.create(at, o.NoCoW)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if o.DataFileName == "" {
		return fvd.Create(f, fo)
	}
	return createWithData(f, at, o, fo, created)
}

// createWithData makes the data file too.
func createWithData(f storage.File, at *location, o CreateOptions, fo fvd.CreateOptions, created *newFiles) error {
	fo.DataFile = o.DataFileName
	if fo.DataFormat == "" {
		fo.DataFormat = formatRaw // recorded, for the guest decides what the file looks like
	}
	place, err := o.dataLocation(formatFVD, at)
	if err == nil && !place.local() {
		err = errNoCreation(place)
	}
	if err != nil {
		return fmt.Errorf("data file: %w", err)
	}
	switch fo.DataFormat {
	case formatRaw, formatQcow2:
	default:
		return fmt.Errorf("data file: option data_file_fmt is %q, want %s or %s", fo.DataFormat, formatRaw, formatQcow2)
	}
	data, err := created.create(place, o.NoCoW)
	if err != nil {
		return fmt.Errorf("data file: %w", err)
	}
	if fo.DataFormat == formatRaw {
		fo.Data = data
		return errors.Join(fvd.Create(f, fo), data.Close())
	}
	disk, err := newDataDisk(data)
	if err != nil {
		return fmt.Errorf("data file: %w", errors.Join(err, data.Close()))
	}
	fo.DataDevice = disk
	return errors.Join(fvd.Create(f, fo), disk.Close())
}

// newDataDisk makes an empty qcow2 disk, which grows as the image asks it to.
func newDataDisk(f storage.File) (block.Device, error) {
	if err := qcow2.Create(f, qcow2.CreateOptions{}); err != nil {
		return nil, err
	}
	return qcow2.Open(f, qcow2.Options{})
}
