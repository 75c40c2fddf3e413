package fvd

import (
	"errors"
	"fmt"
	"time"

	"github.com/platter-disk/platter/storage"
)

// ErrDirty is wrapped when an image without a journal was not closed cleanly: its tables cannot be trusted.
var ErrDirty = errors.New("the image has no journal and was not closed cleanly")

// ErrMaxMetadata is wrapped by the error of opening, making, resizing or checking an image whose tables, or what
// keeps track of its storage, take more memory than the option MaxMetadata allows. It says nothing about the image but its
// size.
var ErrMaxMetadata = errors.New("the tables are too large")

// ReadHeader reads and validates the header of an image, to learn what it refers to before opening it.
func ReadHeader(f storage.File) (*Header, error) {
	h, err := readHeader(f)
	if err != nil {
		return nil, err
	}
	size, err := f.Size()
	if err != nil {
		return nil, fmt.Errorf("fvd image %s: %w", f.Name(), err)
	}
	if err := h.validate(size); err != nil {
		return nil, fmt.Errorf("fvd image %s: %w", f.Name(), err)
	}
	return h, nil
}

// readHeader decodes the header without judging its contents.
func readHeader(f storage.File) (*Header, error) {
	b, err := readHeaderBytes(f)
	if err != nil {
		return nil, err
	}
	copy(b, sealedHeaderCopy(b))
	h, err := decodeHeader(b)
	if err != nil {
		return nil, fmt.Errorf("fvd image %s: %w", f.Name(), err)
	}
	return h, nil
}

// Open opens the image in f. On success the Image owns f and the base and data of the options and closes them; on
// error the caller keeps them. An image that was not closed cleanly is recovered from its journal.
func Open(f storage.File, o Options) (*Image, error) {
	if err := o.Mutant.validate(); err != nil {
		return nil, err
	}
	h, err := ReadHeader(f)
	if err != nil {
		return nil, err
	}
	im, err := assemble(f, h, &o)
	if err != nil {
		return nil, err
	}
	if err := im.attachBase(&o); err != nil {
		return nil, fmt.Errorf("fvd image %s: %w", f.Name(), err)
	}
	if !o.ReadOnly {
		if err := finishHeader(f); err != nil {
			return nil, err
		}
	}
	if err := im.load(&o); err != nil {
		return nil, err
	}
	return im, nil
}

// assemble checks the options against the header and builds the Image without reading any table.
func assemble(f storage.File, h *Header, o *Options) (*Image, error) {
	fail := func(format string, args ...any) (*Image, error) {
		return nil, fmt.Errorf("fvd image %s: %w", f.Name(), fmt.Errorf(format, args...))
	}
	m := &metadata{g: h.geometry(), name: f.Name(), file: f, header: h, guard: newGuard(), crc: castagnoliTable(), mutant: o.Mutant}
	im := &Image{m: m, readOnly: o.ReadOnly, writethrough: o.Writethrough, interrupt: o.Interrupt}
	im.updates.New = func() any { return new(update) }
	im.size.Store(m.g.size)

	if !o.ReadOnly {
		if err := h.writable(); err != nil {
			return fail("%w", err)
		}
	}
	switch {
	case h.DataFile == "" && (o.Data != nil || o.DataDevice != nil):
		return fail("a data file was given, the image has none")
	case h.DataFile == "":
		m.data = fileStore{f}
	case o.Data != nil:
		m.data = fileStore{o.Data}
	case o.DataDevice != nil:
		m.data = deviceStore{o.DataDevice}
	default:
		return fail("its data file %q is needed", h.DataFile)
	}
	m.initBarriers(h.DataFile == "")
	if h.NeedZeroInit && o.DataNotZeroed {
		return fail("field need_zero_init is set, and the data storage does not read as zeros where nothing was written")
	}
	m.maxMemory = orDefault(o.MaxMetadata, DefaultMaxMetadata)
	if err := m.g.fits(m.maxMemory); err != nil {
		return fail("%w", err)
	}
	return im, nil
}

// attachBase takes the base image, which is needed as long as blocks may live in it.
func (im *Image) attachBase(o *Options) error {
	h := im.m.header
	im.base = o.Base // also if it is not needed: it is closed with the image
	if !h.hasBitmap() || h.FullyPrefetched {
		return nil
	}
	switch {
	case o.Base != nil:
		if err := checkBase(h, o.Base.Size()); err != nil {
			return err
		}
	case !o.NoBase:
		return fmt.Errorf("its base image %q is needed", h.BaseImage)
	case !o.ReadOnly:
		return fmt.Errorf("without its base image %q it can only be read", h.BaseImage)
	}
	im.baseLive.Store(true)
	return nil
}

// checkBase compares the base image with what the image was made for (D-34).
func checkBase(h *Header, size int64) error {
	if h.BaseLength != 0 && uint64(size) != h.BaseLength {
		return fmt.Errorf("base image %q has %d bytes, it had %d when this image began to use it: it was changed", h.BaseImage, size, h.BaseLength)
	}
	if uint64(roundUp(size, sectorSize)) < h.BaseSize {
		return fmt.Errorf("base image %q has %d bytes, base_img_size is %d", h.BaseImage, size, h.BaseSize)
	}
	return nil
}

// load reads the tables, replays the journal, and starts the discipline (FVD specification 1.7).
func (im *Image) load(o *Options) error {
	m := im.m
	m.initTables()
	if m.fresh.n > 0 {
		if _, err := m.loadBitmap(); err != nil {
			return err
		}
	}
	if m.g.compact() {
		if err := m.loadTable(); err != nil {
			return err
		}
	}
	next, err := im.recover(o)
	if err != nil {
		return err
	}
	if err := im.loadStorage(o); err != nil {
		return err
	}
	copy(m.stale.words, m.fresh.words)
	if im.readOnly {
		im.discipline = &nojournal{m: m}
		return nil
	}
	im.zeroInit = im.freshlyCreated()
	im.discipline = im.newDiscipline(o, next)
	if !m.inUse.Load() || m.g.journalLen == 0 {
		return nil
	}
	// Recovery ends with a checkpoint, which outdates everything in the journal. If it fails, so does the open
	// (D-14); the next one starts over.
	if err := im.discipline.checkpoint(headerChange{}); err != nil {
		im.discipline.close()
		return err
	}
	return nil
}

// recover replays the journal of an image that was not closed cleanly and returns the next epoch to use.
func (im *Image) recover(o *Options) (epoch, error) {
	m := im.m
	next := epoch(m.header.StableEpoch) + 1
	m.inUse.Store(!m.header.CleanShutdown)
	if m.header.CleanShutdown {
		return next, im.epochsLeft(next)
	}
	if m.g.journalLen == 0 {
		m.doubtful = m.untold()
		if m.doubtful && !o.AllowDirty {
			return 0, fmt.Errorf("fvd image %s: %w; it may have lost writes; check it, and then open it all the same (--allow-dirty) or mark it clean (amend -o clean_shutdown=on)", m.name, ErrDirty)
		}
		return next, nil
	}
	replay, highest, err := m.replayJournal()
	if err != nil {
		return 0, err
	}
	im.replay = replay
	if o.StrictJournal && replay.anomalies > 0 {
		return 0, fmt.Errorf("fvd image %s: %w: %d anomalies in the journal, the first: %s", m.name, ErrDamaged, replay.anomalies, replay.Anomalies[0])
	}
	next = max(next, highest+1)
	return next, im.epochsLeft(next)
}

// epochsLeft refuses to open an image for writing that has not enough epochs left (D-22).
func (im *Image) epochsLeft(next epoch) error {
	if next > maxEpoch-epochReserve && !im.readOnly && im.m.g.journalLen > 0 {
		return fmt.Errorf("fvd image %s: %w: journal epochs are used up (next is %d)", im.m.name, ErrDamaged, next)
	}
	return nil
}

// loadStorage checks the table against the data storage and makes the allocator.
func (im *Image) loadStorage(o *Options) error {
	m := im.m
	if !m.g.compact() {
		if im.readOnly {
			return nil
		}
		return im.growIdentity()
	}
	a := &allocator{m: m, grow: o.GrowStorage, reserved: m.reservedChunk}
	stored, err := a.stored()
	if err != nil {
		return err
	}
	var bad error
	u, err := m.scanTable(stored, func(c chunkIndex, e entry, fault tableFault) bool {
		bad = fmt.Errorf("fvd image %s: %w: table entry of chunk %d names chunk %#x, which %s; checking the image tells more",
			m.name, ErrDamaged, c, uint32(e), tableFaultNames[fault])
		return false
	})
	if err = errors.Join(err, bad); err != nil {
		return err
	}
	m.alloc = a
	a.next, a.limit = u.next, u.next
	if im.readOnly {
		return nil
	}
	a.adoptFree(u.used)
	if m.inUse.Load() { // a crash may have left bytes there
		a.punchFree()
	}
	// Whatever lies above the high-water mark was never recorded: soft writes, failed writes, storage grown
	// ahead. Cut off, it comes back as zeros. Storage of a fixed size keeps it; the allocator zeroes there.
	return a.trim()
}

// growIdentity makes the storage of an image without table as long as its disk. Storage that cannot grow must be
// long enough.
func (im *Image) growIdentity() error {
	m := im.m
	need := int64(m.g.dataStart) + m.g.size
	size, err := m.data.size()
	if err != nil {
		return fmt.Errorf("fvd image %s: size of the data storage: %w", m.name, err)
	}
	if size >= need {
		return nil
	}
	if err := m.data.resize(need); err != nil {
		return fmt.Errorf("fvd image %s: the data storage has %d bytes, the disk needs %d: %w", m.name, size, need, err)
	}
	return nil
}

// freshlyCreated reports whether nothing was ever written to the disk.
func (im *Image) freshlyCreated() bool {
	m := im.m
	if !m.g.compact() || m.fresh.n > 0 || m.inUse.Load() {
		return false
	}
	return m.alloc.next == 0
}

// newDiscipline chooses between the journal modes (FVD specification 1.11).
func (im *Image) newDiscipline(o *Options, next epoch) discipline {
	m := im.m
	if m.g.journalLen == 0 {
		return &nojournal{m: m}
	}
	j := newJournal(m, next)
	limit := int64(min(m.header.JournalBuffer, journalBatch))
	period := time.Duration(min(m.header.JournalBufferPeriod, uint64(time.Hour/time.Millisecond))) * time.Millisecond
	switch {
	case o.Journal == JournalImmediate || o.Writethrough || o.Journal == JournalAuto && limit == 0:
		return newImmediate(j)
	case limit == 0:
		limit, period = defaultJournalBuf, DefaultJournalDelay
	}
	after := o.AfterFunc
	if after == nil {
		after = func(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop }
	}
	return newBuffered(j, limit, period, after)
}

// unsupported is the error for what the format cannot do.
func (im *Image) unsupported(what string) error {
	return fmt.Errorf("fvd image %s: %s: %w", im.m.name, what, errors.ErrUnsupported)
}
