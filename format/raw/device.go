// Package raw is a virtual disk whose bytes lie in a file at the offsets where the guest sees them.
//
//	file    |<------------ 1000 bytes ------------>|
//	disk    |<------------ 1024 bytes --------------->|   rounded up to a sector; the rest reads as zeros
//
// There is no metadata, hence nothing to keep in order: holes of the file are the unused parts of the disk, a
// discard punches one, a flush is one Sync of the file.
//
// # Probing
//
// A raw image has no magic number either: raw is what is left when no other format is recognised. A guest that
// writes another format's header into its first sector would so turn its disk into an image of that format the
// next time somebody opens it without naming the format, with references to any file of the host. A device
// that was opened on such a guess ([Options].ProbedGuard) therefore refuses those writes; see [Foreign].
package raw

import (
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"sync/atomic"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/bufpool"
	"github.com/platter-disk/platter/storage"
)

const (
	sector = 512

	// pageSize is the unit in bytes in which a file system keeps data and holes apart.
	pageSize = 4096

	// chunkSize bounds the buffer in bytes from which zeros are written out.
	chunkSize = 1 << 20

	// maxSize is the largest disk in bytes: the largest file offset, cut to a sector.
	maxSize = math.MaxInt64 / sector * sector
)

// Options says how Open presents a file.
type Options struct {
	ReadOnly     bool
	Discard      bool // give space back to the file on Discard, and on WriteZeroes with block.MayUnmap
	Writethrough bool // make each change durable before it is reported done

	// ProbedGuard: nobody said that the file is raw, it was only not recognised as anything else. Writes that
	// would change that are refused.
	ProbedGuard bool

	// Interrupt is asked now and then while Resize preallocates; the error that it returns ends that. Nil never does.
	Interrupt func() error

	// Offset and Size, in bytes, restrict the disk to a part of the file. Size 0 is everything from Offset on.
	// Such a disk cannot be resized.
	Offset, Size int64
}

// Device is a raw disk. It implements block.Device.
type Device struct {
	f       storage.File
	o       Options
	fresh   bool // held no data when it was opened
	size    atomic.Int64
	flusher flusher
	closed  atomic.Bool

	// changes is held shared by every change of the contents, and exclusively by Resize, Close, and changes of
	// the first sector of a guarded device, which look before they write.
	changes sync.RWMutex
}

var _ block.Device = (*Device)(nil)

// Open presents f as a disk and takes ownership of it; on error the caller keeps it.
func Open(f storage.File, o Options) (*Device, error) {
	length, err := f.Size()
	if err != nil {
		return nil, err
	}
	if o.Offset != 0 || o.Size != 0 {
		if f, length, err = window(f, o, length); err != nil {
			return nil, err
		}
	}
	size, err := diskSize(length)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	d := &Device{f: f, o: o, fresh: true}
	d.flusher.init(f)
	d.size.Store(size)
	err = f.DataExtents(0, length, func(e storage.Extent) bool {
		d.fresh = !e.Data
		return d.fresh
	})
	return d, err
}

// window restricts f, of the given length, to the part that o names.
func window(f storage.File, o Options, length int64) (storage.File, int64, error) {
	switch {
	case o.Offset < 0 || o.Size < 0:
		return nil, 0, fmt.Errorf("%s: raw offset %d and size %d must not be negative", f.Name(), o.Offset, o.Size)
	case o.Offset > length:
		return nil, 0, fmt.Errorf("offset (%d) cannot be greater than size of the containing file (%d)", o.Offset, length)
	case o.Size > length-o.Offset:
		return nil, 0, fmt.Errorf("the sum of offset (%d) and size (%d) has to be smaller or equal to the actual size of the containing file (%d)", o.Offset, o.Size, length)
	case o.Size%sector != 0:
		return nil, 0, errors.New("specified size is not multiple of 512")
	}
	if o.Size == 0 {
		o.Size = length - o.Offset
	}
	return storage.NewSection(f, o.Offset, o.Size), o.Size, nil
}

// diskSize is the size of the disk in a file of that length.
func diskSize(length int64) (int64, error) {
	if length < 0 || length > maxSize {
		return 0, fmt.Errorf("a size of %d bytes: want 0 to %d", length, int64(maxSize))
	}
	return (length + sector - 1) / sector * sector, nil
}

// ReadAt implements block.Device.
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	if d.closed.Load() {
		return 0, d.errClosed("read")
	}
	want := len(p)
	if size := d.size.Load(); off < 0 || int64(want) > size-off {
		if off < 0 || off > size {
			return 0, block.CheckRange("read", off, int64(want), size)
		}
		p = p[:size-off]
	}
	n, err := d.f.ReadAt(p, off)
	if err == io.EOF {
		err = d.pastFile(p, n, off)
	}
	if err != nil {
		return n, err
	}
	if len(p) < want {
		return len(p), io.EOF
	}
	return want, nil
}

// pastFile completes a read of p at off that met the end of the file after n bytes. Only the rest of the last
// sector lies past it; a file that ends earlier was cut off by somebody else, and what it held is no zeros.
func (d *Device) pastFile(p []byte, n int, off int64) error {
	length, err := d.f.Size()
	if err != nil {
		return err
	}
	end := off + int64(len(p))
	if (length+sector-1)/sector*sector < end && d.size.Load() >= end { // of a smaller disk Resize has cut it off
		return d.errCutOff("read", off, int64(len(p)), length)
	}
	clear(p[n:])
	return nil
}

func (d *Device) errCutOff(op string, off, length, end int64) error {
	return fmt.Errorf("%s of %d bytes at %d of %s: the file ends at %d, it was made smaller while it was open: %w", op, length, off, d.f.Name(), end, io.ErrUnexpectedEOF)
}

// TryReadAt implements block.Device.
func (d *Device) TryReadAt(p []byte, off int64) error {
	if d.closed.Load() {
		return d.errClosed("read")
	}
	if err := block.CheckRange("read", off, int64(len(p)), d.size.Load()); err != nil {
		return err
	}
	n, err := d.f.TryReadAt(p, off)
	switch err {
	case io.EOF:
		err = d.pastFile(p, n, off)
	case storage.ErrWouldBlock:
		err = block.ErrWouldBlock
	}
	return err
}

// WriteAt implements block.Device.
func (d *Device) WriteAt(p []byte, off int64) (int, error) {
	unlock, err := d.begin("write", off, int64(len(p)), p)
	if err != nil {
		return 0, err
	}
	n, err := d.f.WriteAt(p, off)
	d.end(unlock)
	if err == nil {
		err = d.writtenThrough()
	}
	return n, err
}

// WriteCompressed implements block.Device; raw cannot compress.
func (d *Device) WriteCompressed(_ []byte, off int64) error {
	return fmt.Errorf("compressed write at %d of %s: the format is raw: %w", off, d.f.Name(), errors.ErrUnsupported)
}

// WriteZeroes implements block.Device. With MayUnmap, where Options.Discard allows it, the range becomes a
// hole, otherwise space stays reserved for it.
func (d *Device) WriteZeroes(off, length int64, flags block.ZeroFlags) error {
	unlock, err := d.begin("write zeroes", off, length, nil)
	if err != nil {
		return err
	}
	err = d.zero(off, length, flags)
	d.end(unlock)
	if err == nil {
		err = d.writtenThrough()
	}
	return err
}

func (d *Device) zero(off, length int64, flags block.ZeroFlags) error {
	if length == 0 {
		return nil
	}
	err := errors.ErrUnsupported
	if flags&block.MayUnmap != 0 && d.o.Discard {
		err = d.f.PunchHole(off, length)
	}
	if errors.Is(err, errors.ErrUnsupported) {
		err = d.f.ZeroRange(off, length)
	}
	if errors.Is(err, errors.ErrUnsupported) && flags&block.FastOnly == 0 {
		err = writeZeros(d.f, off, length)
	}
	return err
}

// writeZeros writes zeros out in chunks.
func writeZeros(f storage.File, off, length int64) error {
	zeros := bufpool.Get(int(min(length, chunkSize)))
	defer zeros.Put()
	clear(zeros.B)
	for length > 0 {
		n, err := f.WriteAt(zeros.B[:min(length, chunkSize)], off)
		if err != nil {
			return err
		}
		off, length = off+int64(n), length-int64(n)
	}
	return nil
}

// Discard implements block.Device: whole pages inside the range become holes where the file can have them.
func (d *Device) Discard(off, length int64) error {
	unlock, err := d.begin("discard", off, length, nil)
	if err != nil {
		return err
	}
	err = d.discard(off, length)
	d.end(unlock)
	if err == nil {
		err = d.writtenThrough()
	}
	return err
}

func (d *Device) discard(off, length int64) error {
	first, last := (off+pageSize-1)/pageSize*pageSize, (off+length)/pageSize*pageSize
	if off+length == d.size.Load() {
		last = off + length // no half page is lost at the end
	}
	if !d.o.Discard || first >= last {
		return nil
	}
	err := d.f.PunchHole(first, last-first)
	if errors.Is(err, errors.ErrUnsupported) {
		err = nil
	}
	return err
}

// Flush implements block.Device.
func (d *Device) Flush() error {
	if d.closed.Load() {
		return d.errClosed("flush")
	}
	if d.o.ReadOnly {
		return nil
	}
	return d.flusher.flush()
}

func (d *Device) writtenThrough() error {
	if d.o.Writethrough {
		return d.flusher.flush()
	}
	return nil
}

// Extents implements block.Device. The whole disk counts as allocated, because the bytes of a hole have their
// place in the file as well; that is also what qemu-img map prints.
func (d *Device) Extents(off, length int64, fn func(block.Extent) bool) error {
	if d.closed.Load() {
		return d.errClosed("map")
	}
	if err := block.CheckRange("map", off, length, d.size.Load()); err != nil {
		return err
	}
	more := true
	run := func(e storage.Extent) bool {
		more = fn(block.Extent{Offset: e.Offset, Length: e.Length, Allocated: true, Zero: !e.Data, Data: e.Data, HostOffset: e.Offset})
		off, length = off+e.Length, length-e.Length
		return more
	}
	if err := d.f.DataExtents(off, length, run); err != nil {
		return err
	}
	switch {
	case !more || length == 0:
	case length >= sector && d.size.Load() >= off+length:
		return d.errCutOff("map", off, length, off)
	default: // the rest of the last sector, past the end of the file
		run(storage.Extent{Offset: off, Length: length})
	}
	return nil
}

// Size implements block.Device.
func (d *Device) Size() int64 { return d.size.Load() }

// Limits implements block.Device.
func (d *Device) Limits() block.Limits {
	return block.Limits{ReadOnly: d.o.ReadOnly, Preferred: pageSize, ZeroInit: d.fresh}
}

// Close implements block.Device.
func (d *Device) Close() error {
	d.changes.Lock()
	defer d.changes.Unlock()
	if d.closed.Swap(true) {
		return nil
	}
	var err error
	if !d.o.ReadOnly {
		err = d.flusher.flush()
	}
	return errors.Join(err, d.f.Close())
}

func (d *Device) errClosed(op string) error {
	return fmt.Errorf("%s of %s: %w", op, d.f.Name(), block.ErrClosed)
}

// usable says why the device takes no change, if so. The caller holds changes.
func (d *Device) usable(op string) error {
	switch {
	case d.closed.Load():
		return d.errClosed(op)
	case d.o.ReadOnly:
		return fmt.Errorf("%s of %s: %w", op, d.f.Name(), block.ErrReadOnly)
	}
	return d.flusher.failed()
}

// hold says how changes is held.
type hold uint8

const (
	shared hold = iota
	exclusive
)

// begin checks a change of the contents and, unless it fails, holds changes until end. p is what is written,
// nil for zeros.
func (d *Device) begin(op string, off, length int64, p []byte) (hold, error) {
	if d.o.ProbedGuard && off < probeSize && length > 0 {
		d.changes.Lock()
		err := d.check(op, off, length)
		if err == nil {
			err = d.guard(p, off, length)
		}
		if err != nil {
			d.changes.Unlock()
		}
		return exclusive, err
	}
	d.changes.RLock()
	err := d.check(op, off, length)
	if err != nil {
		d.changes.RUnlock()
	}
	return shared, err
}

func (d *Device) check(op string, off, length int64) error {
	if err := d.usable(op); err != nil {
		return err
	}
	return block.CheckRange(op, off, length, d.size.Load())
}

func (d *Device) end(h hold) {
	if h == exclusive {
		d.changes.Unlock()
		return
	}
	d.changes.RUnlock()
}
