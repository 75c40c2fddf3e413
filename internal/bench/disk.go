package bench

import (
	"context"
	"fmt"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/storage"
)

// Engine is an image opened in this process, a Disk with a counter under it.
type Engine struct {
	*image.Image
	counts counts
}

// OpenImage opens an image by name. The counter sees what the engine does, before o.Wrap if there is one.
func OpenImage(ctx context.Context, name string, o image.Options) (*Engine, error) {
	e := &Engine{}
	below := o.Wrap
	o.Wrap = func(f storage.File) storage.File {
		if below != nil {
			f = below(f)
		}
		return counter{f, &e.counts}
	}
	img, err := image.Open(ctx, name, o)
	if err != nil {
		return nil, err
	}
	e.Image = img
	return e, nil
}

// Meter measures this process and the image's files.
func (e *Engine) Meter() Meter { return &selfMeter{counts: &e.counts} }

// Unit implements Disk.
func (e *Engine) Unit() int64 { return e.Limits().Preferred }

// Survey implements Disk.
func (e *Engine) Survey(fn func(Span) bool) error {
	return e.Extents(0, e.Size(), func(x block.Extent) bool {
		s := Span{Offset: x.Offset, Length: x.Length, Kind: NoData}
		switch {
		case x.Depth == 0 && x.Allocated && !x.Data:
			return true // allocated as zeros: neither fresh nor data
		case x.Depth == 0 && x.Allocated:
			s.Kind = OwnData
		case x.Data:
			s.Kind = BelowData
		}
		return fn(s)
	})
}

// Remote is an export of an NBD server.
type Remote struct {
	*nbd.Client
	unit    int64
	overlay bool
}

// DialOptions say how an export is used.
type DialOptions struct {
	ReadOnly bool

	// Overlay: what the server says is data lies below the disk, nothing was written to the disk itself. The
	// protocol does not tell the two apart.
	Overlay bool

	// Unit is how many bytes the image allocates at a time, which the protocol does not tell either. 0: as
	// the server prefers, but at least 64 KiB, the default of qcow2.
	Unit int64
}

// DialDisk connects to an export.
func DialDisk(uri string, o DialOptions) (*Remote, error) {
	c, err := nbd.Dial(uri, nbd.ClientOptions{ReadOnly: o.ReadOnly})
	if err != nil {
		return nil, err
	}
	if o.Unit == 0 {
		o.Unit = max(int64(c.Export().Blocks.Preferred), 64<<10)
	}
	return &Remote{Client: c, unit: o.Unit, overlay: o.Overlay}, nil
}

// Flush implements Disk.
func (r *Remote) Flush() error { return r.Sync() }

// Unit implements Disk.
func (r *Remote) Unit() int64 { return r.unit }

// Survey implements Disk.
func (r *Remote) Survey(fn func(Span) bool) error {
	size, err := r.Size()
	if err != nil {
		return err
	}
	return r.DataExtents(0, size, func(x storage.Extent) bool {
		s := Span{Offset: x.Offset, Length: x.Length, Kind: NoData}
		switch {
		case x.Data && r.overlay:
			s.Kind = BelowData
		case x.Data:
			s.Kind = OwnData
		}
		return fn(s)
	})
}

// fill writes [0, length) in pieces of 1 MiB, so that it is allocated data.
func fill(ctx context.Context, d block.Device, length int64) error {
	buf := make([]byte, 1<<20)
	for i := range buf {
		buf[i] = byte(i*11 + 3)
	}
	for at := int64(0); at < length; at += int64(len(buf)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := d.WriteAt(buf[:min(int64(len(buf)), length-at)], at); err != nil {
			return fmt.Errorf("preparing the image: %w", err)
		}
	}
	return d.Flush()
}
