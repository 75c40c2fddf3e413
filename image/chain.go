package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/format/raw"
	"github.com/platter-disk/platter/image/gate"
	"github.com/platter-disk/platter/storage"
)

// MaxDepth is the largest number of layers in a chain.
const MaxDepth = 1024

// ErrCycle is wrapped by the error of opening a chain in which a file occurs twice.
var ErrCycle = errors.New("the file is part of the chain already")

// chain opens the layers of one image.
type chain struct {
	ctx     context.Context
	o       Options
	seen    []identity
	layers  []Layer
	devices []block.Device // of the layers
	depth   int            // layers above this chain, when it is that of a data file
	cached  bool           // a layer has the caches of qcow2
}

// identity tells files apart that have several names.
type identity struct {
	name string
	info fs.FileInfo // nil unless it is a local file
}

func (id identity) same(other identity) bool {
	if id.info != nil && other.info != nil {
		return locate(id.info).overlaps(locate(other.info))
	}
	return id.name == other.name
}

// opened is one layer with everything below it.
type opened struct {
	dev       block.Device
	file      storage.File
	probedRaw bool
}

// openLocation opens the file at l, unless the chain has it already. The files of a chain are distinct: one
// that is its own backing file has no contents, and one that is two layers is written under a reader.
func (c *chain) openLocation(l *location, readOnly, share, direct bool) (storage.File, error) {
	if err := c.ctx.Err(); err != nil {
		return nil, err
	}
	id := identity{name: l.String()}
	if l.local() {
		if info, err := os.Stat(l.path); err == nil {
			id.info = info
		}
	}
	// Before opening: its locks would conflict with those that the chain holds, and say so in other words.
	for _, other := range c.seen {
		if id.same(other) {
			return nil, fmt.Errorf("'%s': %w", printable(l.String()), ErrCycle)
		}
	}
	c.seen = append(c.seen, id)
	if !l.local() {
		return dialNBD(c.ctx, l.uri, c.o.NBD, readOnly)
	}
	f, err := storage.Open(l.path, storage.OpenOptions{
		ReadOnly: readOnly, Share: share, NoLock: l.noLock, Direct: direct || l.direct || c.o.Direct,
	})
	if err != nil {
		return nil, fileError("open", l.path, err)
	}
	return f, nil
}

// open opens a layer and what is below it. parent is the node that refers to it, nil at the top.
func (c *chain) open(n *node, parent *node) (*opened, error) {
	if c.depth+len(c.layers) >= MaxDepth {
		return nil, fmt.Errorf("'%s': the chain has more than %d layers", printable(n.at.String()), MaxDepth)
	}
	layer := len(c.layers)
	n.readOnly = n.readOnly || c.o.ReadOnly || layer > c.o.WritableBacking
	n.share = n.share || c.o.Share
	if parent != nil {
		n.share = n.share || parent.share
	}
	if n.share && !n.readOnly {
		return nil, errShare
	}
	c.layers = append(c.layers, Layer{Name: n.at.String(), ReadOnly: n.readOnly, Offset: n.offset, Length: n.size})
	c.devices = append(c.devices, nil)

	f, err := c.openLocation(n.at, n.readOnly, n.share, n.direct)
	if err != nil {
		return nil, err
	}
	if layer == 0 && c.o.Wrap != nil {
		f = c.o.Wrap(f)
	}
	result, err := c.openFormat(n, f, layer)
	if err != nil {
		f.Close()
		return nil, err
	}
	return result, nil
}

// openFormat opens the device in f; on error f stays the caller's.
func (c *chain) openFormat(n *node, f storage.File, layer int) (*opened, error) {
	probed := n.format == ""
	if probed {
		format, err := Probe(f)
		if err != nil {
			return nil, err
		}
		n.format = format
	}
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	result := &opened{file: f}
	switch n.format {
	case formatRaw:
		result.probedRaw = probed
		result.dev, err = c.openRaw(n, f, layer, probed)
	case formatFVD:
		result.dev, err = c.openFVD(n, f, layer)
	default:
		result.dev, err = c.openQcow2(n, f, layer)
	}
	if err != nil {
		return nil, err
	}
	c.devices[layer] = result.dev
	l := &c.layers[layer]
	l.Format, l.Size, l.FileSize = n.format, result.dev.Size(), size
	if n.shown != "" {
		l.Format = n.shown
	}
	return result, nil
}

func (c *chain) discard(n *node) bool {
	if n.discard != nil {
		return *n.discard
	}
	return c.o.Discard
}

// discipline is how metadata of a layer becomes durable; what the options say is about the top.
func (c *chain) discipline(n *node, layer int) string {
	if n.discipline != "" || layer > 0 {
		return n.discipline
	}
	return c.o.Discipline
}

func (c *chain) openRaw(n *node, f storage.File, layer int, probed bool) (block.Device, error) {
	switch {
	case n.backing != nil:
		return nil, qemuError("Block format 'raw' does not support the option 'backing'")
	case n.dataFile != nil || layer == 0 && c.o.DataFile != "":
		return nil, qemuError("Block format 'raw' does not support the option 'data-file'")
	}
	return raw.Open(f, raw.Options{
		ReadOnly: n.readOnly, Discard: c.discard(n), Writethrough: c.o.Writethrough || n.writethrough,
		ProbedGuard: probed && !n.readOnly, Offset: n.offset, Size: n.size, Interrupt: c.o.Interrupt,
	})
}

func (c *chain) openQcow2(n *node, f storage.File, layer int) (dev block.Device, err error) {
	h, err := qcow2.ReadHeader(f)
	if err != nil {
		return nil, err
	}
	o := qcow2.Options{
		ReadOnly: n.readOnly, Discard: c.discard(n), Writethrough: c.o.Writethrough || n.writethrough,
		Discipline: c.discipline(n, layer), JournalDataChecksums: layer == 0 && c.o.JournalDataChecksums, L2CacheSize: c.o.L2CacheSize, RefcountCacheSize: c.o.RefcountCacheSize,
		Interrupt: c.o.Interrupt,
	}
	c.cached = true
	if n.l2Cache != 0 {
		o.L2CacheSize = n.l2Cache
	}
	if n.refcountCache != 0 {
		o.RefcountCacheSize = n.refcountCache
	}
	defer func() {
		if err == nil {
			return
		}
		if o.DataFile != nil {
			o.DataFile.Close()
		}
		if o.Backing != nil {
			o.Backing.Close()
		}
	}()
	if o.DataFile, err = c.openQcow2Data(n, h, layer); err != nil {
		return nil, err
	}
	ref := backingReference{h.BackingFile, h.BackingFormat}
	c.layers[layer].BackingFile, c.layers[layer].BackingFormat = ref.file, ref.format
	o.NoBacking = n.noBacking || layer == 0 && c.o.NoBacking
	if !o.NoBacking {
		if o.Backing, err = c.openBacking(n, ref, layer); err != nil {
			return nil, err
		}
	}
	return qcow2.Open(f, o)
}

// backingReference is what an image says of the layer below it.
type backingReference struct {
	file   string // "" for none
	format string // "" to find out by looking
}

// openBacking opens the layer below: what the name says, else what the image says; nil for none.
func (c *chain) openBacking(n *node, stored backingReference, layer int) (block.Device, error) {
	below := n.backing
	switch {
	case below == nil && stored.file == "":
		return nil, nil
	case below == nil:
		var err error
		if below, err = c.resolveBacking(n, stored, layer); err != nil {
			return nil, errBacking(err)
		}
	default:
		c.layers[layer].FullBacking = below.at.String()
	}
	result, err := c.open(below, n)
	if err != nil {
		return nil, errBacking(err)
	}
	return result.dev, nil
}

func errBacking(err error) error { return qemuError("Could not open backing file: %w", err) }

// resolveBacking passes the reference that an image holds through the gate.
func (c *chain) resolveBacking(n *node, stored backingReference, layer int) (*node, error) {
	below, ref, err := parseReference(gate.Backing, n.at, stored.file, besideImage)
	if err != nil {
		return nil, err
	}
	c.layers[layer].FullBacking = ref.Name
	if err := c.o.Gate.Allow(ref); err != nil {
		return nil, err
	}
	if below.format == "" && stored.format != "" {
		if err := checkFormat(stored.format); err != nil {
			return nil, err
		}
		below.format = stored.format
	}
	return below, nil
}

// dataLocation is where the caller says that the external data file is; nil to ask the image.
func (c *chain) dataLocation(n *node, layer int) (*location, error) {
	if n.dataFile == nil && layer == 0 && c.o.DataFile != "" {
		return parseLocation(c.o.DataFile)
	}
	return n.dataFile, nil
}

// openQcow2Data opens the external data file: what the caller says, else what the image says; nil for none.
func (c *chain) openQcow2Data(n *node, h *qcow2.Header, layer int) (storage.File, error) {
	at, err := c.dataLocation(n, layer)
	if err != nil {
		return nil, err
	}
	if at == nil && h.HasDataFile() {
		if h.DataFile == "" {
			return nil, errors.New("'data-file' is required for this image")
		}
		// QEMU looks for it from the working directory.
		found, ref, err := parseReference(gate.DataFile, n.at, h.DataFile, fromWorkingDirectory)
		if err == nil {
			err = c.o.Gate.Allow(ref)
		}
		if err != nil {
			return nil, err
		}
		at = found.at
	}
	if at == nil {
		return nil, nil
	}
	c.layers[layer].DataFile = at.String()
	return c.openDataFile(n, at, layer)
}

// openDataFile opens the bytes of a data file.
func (c *chain) openDataFile(n *node, at *location, layer int) (storage.File, error) {
	f, err := c.openLocation(at, n.readOnly, n.share, n.direct)
	if err == nil && layer == 0 && c.o.Wrap != nil {
		f = c.o.Wrap(f)
	}
	return f, err
}
