package fvd

import (
	"bytes"
	"errors"
	"fmt"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/bufpool"
	"github.com/platter-disk/platter/storage"
)

// Defaults of CreateOptions, those of the 2011 driver (FVD specification 2.12).
const (
	DefaultChunkSize = 1 << 20
	DefaultGrowUnit  = 100 << 20

	defaultCopyLimit    = 2_000_000 // bytes
	defaultSlots        = 2
	defaultPerPrefetch  = 1 << 20 // bytes
	defaultThrottle     = 30_000  // ms
	defaultMeasure      = 100     // ms
	defaultMinRate      = 5120    // KB/s
	defaultMaxRate      = 1_000_000_000
	defaultAlpha        = 80 // percent
	defaultTableGrowth  = 4  // tables are laid out with room for a disk that many times as large ...
	maxSpareTable       = 4 << 20
	leastBlock          = pageSize // of automatic block sizes
	mostBitmap          = 4 << 20  // bytes, likewise
	longestAddStorageCd = nameSize - 1
)

// CreateOptions describes a new image. Zero values mean the defaults of the 2011 driver.
type CreateOptions struct {
	Size int64 // bytes, rounded up to 512; 0 with a base image: as large as that

	Compact bool // a lookup table: space is used as it is written
	// BlockSize is the bytes of the base image that a bitmap bit stands for, a multiple of 512. 0: the smallest
	// 4 KiB * 2^k for which the bitmap takes at most 4 MiB, the rule of the 2011 driver (FVD specification 1.3) from a
	// guest's page on, and never more than a chunk. Small blocks spare the base image: a guest's write of 4 KiB needs
	// nothing of it, and copy-on-read reads what the guest reads. Larger ones act as read-ahead.
	BlockSize int64
	ChunkSize int64 // bytes, rounded up to whole blocks and 4 KiB; 0: 1 MiB
	GrowUnit  int64 // bytes, at least a chunk of a compact image; 0: 100 MiB, or a chunk if that is more

	AddStorageCmd string // stored, never executed

	BaseImage, BaseFormat string       // as written into the header
	Base                  block.Device // the base image, where the header names one; not closed
	// DetectSparseHole looks for zeros in the base image in units of that many bytes, rounded up to whole
	// blocks: blocks found zero never touch the base image. 0: does not look.
	DetectSparseHole int64

	DataFile, DataFormat string       // as written into the header
	Data                 storage.File // the data file, if it is raw; cut to nothing first; not closed
	DataDevice           block.Device // the data file, if it is of another format; made to read as zeros; not closed

	CopyOnRead         bool
	PrefetchStartDelay int64 // seconds; 0: no prefetching

	// JournalSize is bytes, rounded up to 4 KiB and to what the table needs; 0: 16 MiB or what the table needs, and room to
	// grow; negative: no journal. An image with neither bitmap nor table has none in any case (FVD specification 1.5).
	JournalSize        int64
	JournalBuffer      int64         // bytes of records kept between flushes, at most 64 KiB; 0: 64 KiB; negative: immediate mode
	JournalBufferDelay time.Duration // after which they are written at the latest; 0: 5 s

	// PlainJournal leaves checksums and the records that unmap chunks out, as in 2011.
	PlainJournal bool

	Preallocation block.Preallocation
	// Interrupt is asked now and then while zeros are looked for and space is laid out; the error that it returns ends
	// that. Nil never does.
	Interrupt func() error

	MaxMetadata int64 // bytes: an image that Open would refuse with this limit is not made; 0: DefaultMaxMetadata
}

// Create makes an image in f, whatever f held before. It does not close f.
func Create(f storage.File, o CreateOptions) error {
	h, err := o.header()
	if err != nil {
		return fmt.Errorf("fvd image %s: %w", f.Name(), err)
	}
	if err := create(f, h, &o); err != nil {
		return fmt.Errorf("fvd image %s: %w", f.Name(), err)
	}
	if o.Preallocation == block.PreallocOff {
		return nil
	}
	im, err := Open(borrowedFile{f}, o.reopen())
	if err != nil {
		return err
	}
	err = im.preallocate(0, im.Size(), o.Preallocation)
	return errors.Join(err, im.Close())
}

// reopen are the options to open the image just created without taking anything over.
func (o *CreateOptions) reopen() Options {
	oo := Options{MaxMetadata: o.MaxMetadata, Interrupt: o.Interrupt}
	if o.Base != nil {
		oo.Base = borrowedDevice{o.Base}
	}
	if o.Data != nil {
		oo.Data = borrowedFile{o.Data}
	}
	if o.DataDevice != nil {
		oo.DataDevice = borrowedDevice{o.DataDevice}
	}
	return oo
}

// borrowedFile and borrowedDevice keep what they wrap from being closed.
type borrowedFile struct{ storage.File }

func (borrowedFile) Close() error { return nil }

type borrowedDevice struct{ block.Device }

func (borrowedDevice) Close() error { return nil }

// header lays the image out in the order of the wiki's drawing: header, bitmap, journal, table, data.
func (o *CreateOptions) header() (*Header, error) {
	h := &Header{
		Version: headerVersion, CleanShutdown: true, FullyPrefetched: o.BaseImage == "",
		DataFile: o.DataFile, DataFormat: o.DataFormat, BaseImage: o.BaseImage, BaseFormat: o.BaseFormat,
		AddStorageCmd: o.AddStorageCmd, CopyOnRead: o.CopyOnRead, PrefetchStartDelay: o.PrefetchStartDelay,
		MaxOutstandingCopies: defaultCopyLimit, PrefetchSlots: defaultSlots,
		PrefetchMinRead: defaultMinRate, PrefetchMaxRead: defaultMaxRate,
		PrefetchMinWrite: defaultMinRate, PrefetchMaxWrite: defaultMaxRate,
		PrefetchThrottle: defaultThrottle, PrefetchReadMeasure: defaultMeasure, PrefetchWriteMeasure: defaultMeasure,
		PrefetchAlpha: defaultAlpha,
	}
	if o.PrefetchStartDelay == 0 {
		h.PrefetchStartDelay = -1
	}
	if err := o.check(); err != nil {
		return nil, err
	}
	size := o.Size
	if size == 0 && o.Base != nil {
		size = o.Base.Size()
	}
	h.VirtualSize = uint64(roundUp(size, sectorSize))
	at := int64(headerSize)
	place := func(offset, length *uint64, n int64) {
		*offset, *length = uint64(at), uint64(roundUp(n, pageSize))
		at += int64(*length)
	}
	block := o.BlockSize
	if o.Base != nil {
		h.BaseLength = uint64(o.Base.Size())
		h.BaseSize = uint64(roundUp(min(int64(h.VirtualSize), o.Base.Size()), sectorSize))
		if block == 0 {
			block = o.automaticBlock(int64(h.BaseSize))
		}
		h.BlockSize = uint64(block)
		h.BytesPerPrefetch = uint64(roundUp(defaultPerPrefetch, block))
		if h.hasBitmap() {
			place(&h.BitmapOffset, &h.BitmapSize, ceilDiv(ceilDiv(int64(h.BaseSize), block), 8))
		}
	}
	if !o.PlainJournal {
		h.Features |= FeatureJournalTrailer | FeatureUnmap
	}
	var entries, room int64
	if o.Compact {
		unit := int64(pageSize)
		if h.hasBitmap() {
			unit = lcm(block, pageSize)
		}
		h.ChunkSize = uint64(roundUp(orDefault(o.ChunkSize, DefaultChunkSize), unit))
		h.GrowUnit = uint64(orDefault(o.GrowUnit, max(DefaultGrowUnit, int64(h.ChunkSize))))
		if h.GrowUnit < h.ChunkSize {
			return nil, fmt.Errorf("option storage_grow_unit is %d, want at least the chunk_size of %d", h.GrowUnit, h.ChunkSize)
		}
		entries = ceilDiv(int64(h.VirtualSize), int64(h.ChunkSize))
		// Room in the table and the journal lets the disk grow without moving anything.
		room = max(entries, 1) + min(entries*(defaultTableGrowth-1), maxSpareTable/4)
	}
	if o.JournalSize >= 0 && (h.hasBitmap() || o.Compact) {
		least := minJournalSize(room, !o.PlainJournal)
		if o.JournalSize > 0 {
			least = max(o.JournalSize, minJournalSize(entries, !o.PlainJournal))
		} else {
			least = max(least, DefaultJournalSize)
		}
		place(&h.JournalOffset, &h.JournalSize, least)
		if o.JournalBuffer >= 0 {
			h.JournalBuffer = uint64(orDefault(o.JournalBuffer, defaultJournalBuf))
			delay := o.JournalBufferDelay
			if delay == 0 {
				delay = DefaultJournalDelay
			}
			h.JournalBufferPeriod = uint64(delay.Milliseconds())
		}
	}
	if o.Compact {
		place(&h.TableOffset, &h.TableSize, 4*room)
	}
	if h.DataFile == "" {
		h.DataOffset = uint64(at)
	}
	h.NeedZeroInit = o.DetectSparseHole > 0 && h.hasBitmap() && !o.Compact && o.DataDevice == nil
	if err := h.validate(at); err != nil {
		return nil, err
	}
	g := h.geometry()
	return h, g.fits(orDefault(o.MaxMetadata, DefaultMaxMetadata))
}

// automaticBlock is the block size for that many bytes of a base image where the options name none.
func (o *CreateOptions) automaticBlock(base int64) int64 {
	most := int64(maxBlockSize)
	if o.Compact {
		most = min(most, orDefault(o.ChunkSize, DefaultChunkSize))
	}
	block := int64(leastBlock)
	for ceilDiv(ceilDiv(base, block), 8) > mostBitmap && 2*block <= most {
		block *= 2
	}
	return block
}

// check refuses options whose arithmetic would not hold or that contradict each other. What the header's own
// validation catches is left to it.
func (o *CreateOptions) check() error {
	for _, n := range []struct {
		name       string
		v, lo, max int64
	}{
		{"size", o.Size, 0, maxVirtualSize},
		{"block_size", o.BlockSize, 0, maxBlockSize},
		{"chunk_size", o.ChunkSize, 0, maxChunkSize},
		{"storage_grow_unit", o.GrowUnit, 0, maxVirtualSize},
		{"detect_sparse_hole", o.DetectSparseHole, 0, maxVirtualSize},
		{"journal_size", o.JournalSize, -maxVirtualSize, maxVirtualSize},
		{"journal_buf_size", o.JournalBuffer, -maxVirtualSize, journalBatch},
	} {
		switch {
		case n.v > n.max && n.lo < 0:
			return fmt.Errorf("option %s is %d, want at most %d", n.name, n.v, n.max)
		case n.v < n.lo || n.v > n.max:
			return fmt.Errorf("option %s is %d, want %d to %d", n.name, n.v, n.lo, n.max)
		}
	}
	if o.BlockSize%sectorSize != 0 {
		return fmt.Errorf("option block_size is %d, want a multiple of %d", o.BlockSize, sectorSize)
	}
	if len(o.AddStorageCmd) > longestAddStorageCd {
		return fmt.Errorf("option add_storage_cmd has %d bytes, want at most %d", len(o.AddStorageCmd), longestAddStorageCd)
	}
	switch {
	case (o.BaseImage == "") != (o.Base == nil):
		return errors.New("a base image takes both its name and the open image")
	case (o.DataFile == "") != (o.Data == nil && o.DataDevice == nil):
		return errors.New("a data file takes both its name and the open file")
	case o.Data != nil && o.DataDevice != nil:
		return errors.New("the data file is raw or of another format, not both")
	case o.Base == nil && o.DetectSparseHole > 0:
		return errors.New("option detect_sparse_hole looks at a base image, none is given")
	}
	return nil
}

func orDefault(v, def int64) int64 {
	if v == 0 {
		return def
	}
	return v
}

func lcm(a, b int64) int64 {
	x, y := a, b
	for y != 0 {
		x, y = y, x%y
	}
	return a / x * b
}

// create writes an image with header h: data storage, tables, and the header last.
func create(f storage.File, h *Header, o *CreateOptions) error {
	g := h.geometry()
	if err := o.fit(f, h); err != nil {
		return err
	}
	fixed := f.Truncate(0) != nil // a block device
	if err := zeroStore(fileStore{f}, 0, headerSize, false, false); err != nil {
		return err
	}
	if err := o.createData(f, h, fixed); err != nil {
		return err
	}
	m := &metadata{g: g, name: f.Name(), file: f, header: h}
	m.fresh = newBitset(g.blocks())
	if o.DetectSparseHole > 0 && h.hasBitmap() {
		if err := m.detectHoles(o.Base, roundUp(o.DetectSparseHole, g.blockSize), o.Interrupt); err != nil {
			return err
		}
	}
	if err := m.layOutRegions(); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	b, err := h.encode()
	if err != nil {
		return err
	}
	if _, err := f.WriteAt(b, 0); err != nil {
		return err
	}
	return f.Sync()
}

// fit finds out whether the files can hold the image, while they still hold what they held before.
func (o *CreateOptions) fit(f storage.File, h *Header) error {
	meta, data := int64(headerSize), int64(0)
	for _, r := range h.regions() {
		meta = max(meta, int64(r.off+r.size))
	}
	switch g := h.geometry(); {
	case !g.compact():
		data = g.size
	case o.Preallocation != block.PreallocOff:
		data = int64(g.chunks()) * g.chunkSize
	}
	if o.Data != nil {
		if err := fitFile(o.Data, data); err != nil {
			return err
		}
	} else if o.DataDevice == nil && data > 0 {
		meta = max(meta, int64(h.DataOffset)+data)
	}
	return fitFile(f, meta)
}

// fitFile makes f at least need bytes long, if it can be.
func fitFile(f storage.File, need int64) error {
	have, err := f.Size()
	if err != nil || have >= need {
		return err
	}
	if err := f.Truncate(need); err != nil {
		return fmt.Errorf("%s has %d bytes, it needs %d: %w", f.Name(), have, need, err)
	}
	return nil
}

// createData makes the data storage read as zeros. Where the storage has a fixed size and a past, that is done
// now for disks without table; the allocator of compact ones does it chunk by chunk.
func (o *CreateOptions) createData(f storage.File, h *Header, fixed bool) error {
	size := int64(h.VirtualSize)
	var data store = fileStore{f}
	switch {
	case o.Data != nil:
		data = fileStore{o.Data}
		fixed = o.Data.Truncate(0) != nil
	case o.DataDevice != nil:
		data, fixed = deviceStore{o.DataDevice}, true
	}
	if h.hasTable() {
		return nil
	}
	end := int64(h.DataOffset) + size
	have, err := data.size()
	if err != nil {
		return err
	}
	if have < end {
		if err := data.resize(end); err != nil {
			return fmt.Errorf("making the data storage %d bytes long: %w", end, err)
		}
	}
	if !fixed || o.DataDevice != nil && o.DataDevice.Limits().ZeroInit {
		return nil
	}
	h.NeedZeroInit = false
	if err := zeroStore(data, dataOffset(h.DataOffset), size, true, false); err != nil {
		return err
	}
	return data.sync()
}

// detectHoles marks the blocks of every unit of the base image that is zero (FVD specification 2.8); what is
// left over at its end is not looked at.
func (m *metadata) detectHoles(base block.Device, unit int64, interrupt func() error) error {
	buf := bufpool.Get(int(min(unit, ioUnit)))
	defer buf.Put()
	whole := roundDown(min(base.Size(), int64(m.g.baseSize)), unit)
	for off := int64(0); off < whole; off += unit {
		if interrupt != nil {
			if err := interrupt(); err != nil {
				return err
			}
		}
		zero, err := isZero(base, off, unit, buf.B)
		if err != nil {
			return fmt.Errorf("looking for zeros in the base image: %w", err)
		}
		if zero {
			m.fresh.setRange(m.g.blockRange(guestOffset(off), guestOffset(off+unit)))
		}
	}
	return nil
}

// isZero reports whether the range reads as zeros, by what d knows of itself, then by reading through buf.
func isZero(d block.Device, off, n int64, buf []byte) (bool, error) {
	zero := true
	var readErr error
	err := d.Extents(off, n, func(e block.Extent) bool {
		for at := e.Offset; !e.Zero && zero && at < e.Offset+e.Length; {
			p := buf[:min(int64(len(buf)), e.Offset+e.Length-at)]
			if _, readErr = d.ReadAt(p, at); readErr != nil {
				return false
			}
			zero = bytes.Count(p, []byte{0}) == len(p)
			at += int64(len(p))
		}
		return zero
	})
	return zero && err == nil, errors.Join(err, readErr)
}

// layOutRegions writes bitmap, journal and table of a new image.
func (m *metadata) layOutRegions() error {
	h := m.header
	if h.hasBitmap() {
		if err := fill(m.file, h.BitmapOffset, h.BitmapSize, func(page int, p []byte) { m.fresh.encodePage(page, p) }); err != nil {
			return err
		}
	}
	if err := fillJournal(m.file, h); err != nil {
		return err
	}
	if !h.hasTable() {
		return nil
	}
	none := table{}
	return fill(m.file, h.TableOffset, h.TableSize, none.encodePage)
}

// fillJournal writes a journal without a record: every sector begins with EMPTY.
func fillJournal(f storage.File, h *Header) error {
	return fillBlank(f, h.JournalOffset, h.JournalSize)
}

// fillBlank writes size bytes of journal sectors without a record.
func fillBlank(f storage.File, off, size uint64) error {
	if size == 0 {
		return nil
	}
	return fill(f, off, size, func(_ int, p []byte) {
		for sec := p; len(sec) > 0; sec = sec[sectorSize:] {
			sealSector(sec[:sectorSize], 0, false, 0, nil)
		}
	})
}

// fill writes a region page by page; its last page may be cut off.
func fill(f storage.File, off, size uint64, encode func(page int, p []byte)) error {
	buf := bufpool.Get(int(min(roundUp(int64(size), pageSize), ioUnit)))
	defer buf.Put()
	for done := uint64(0); done < size; {
		part := buf.B[:min(uint64(len(buf.B)), size-done)]
		for i := 0; i < len(part); i += pageSize {
			encode(int(done/pageSize)+i/pageSize, buf.B[i:i+pageSize])
		}
		if _, err := f.WriteAt(part, int64(off+done)); err != nil {
			return err
		}
		done += uint64(len(part))
	}
	return nil
}
