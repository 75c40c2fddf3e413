package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
)

// Options says how an image is opened.
type Options struct {
	ReadOnly bool

	// Backing is the device of the backing file; the image takes it over and closes it. Nil is an error for
	// an image that names a backing file, unless NoBacking says that it is to be read without: what the
	// backing file held reads as zeros then.
	Backing   block.Device
	NoBacking bool

	// DataFile is the external data file of an image that has one; the image takes it over.
	DataFile storage.File

	Discipline        string // Ordered; "" is Ordered
	L2CacheSize       int64  // bytes; 0: DefaultL2CacheSize
	RefcountCacheSize int64  // bytes; 0: DefaultRefcountCacheSize

	// Reserve bounds the clusters that are counted or set aside ahead of use, under the disciplines that do so:
	// what a crash may leak. 0: 1024, or 64 MiB where that is less.
	Reserve int64

	Discard      bool // give the space of discarded clusters back to the file system
	Writethrough bool // every change is durable when it returns

	JournalSize int64 // bytes that a new journal takes, from 64 blocks to 1 GiB; 0: what the image prefers, or 16 MiB

	// JournalCommitInterval is the longest that the discipline Journal keeps a change of metadata in memory if
	// nobody flushes. 0: 5 seconds; negative: until something else makes it commit.
	JournalCommitInterval time.Duration

	// JournalDataChecksums has the discipline Journal write checksums of the data that a flush exposes instead
	// of a barrier in front of them. A copy-on-write and a flush then take one barrier rather than two; an
	// overwrite in place of what the newest flush exposed waits for one. An image that crashed can be recovered
	// only by programs that know these checksums.
	JournalDataChecksums bool

	// Interrupt is asked now and then while Resize lays out space, or gives it up; the error that it returns ends
	// that. Nil never does.
	Interrupt func() error

	Mutant Mutant // "": none. For crash exploration only
}

// Image is an open qcow2 image: a block.Device kept in a storage.File.
//
// Locks, in the order they are taken: resizing, the guest range, combiner, mu, a cache set.
type Image struct {
	file    storage.File
	data    storage.File // where guest data lies: file, or the external data file
	backing backingDevice
	geo     geometry
	opts    Options

	size  atomic.Int64 // of the virtual disk, bytes
	locks *rangeLock
	l1    atomic.Pointer[l1Table]

	tables     *tableCache
	partials   partialSet
	inflated   inflateCache
	codec      codec
	discipline discipline
	guard      guard

	// beforeOverwrite returns when guest data in a range of the file may change; nil: at once.
	beforeOverwrite func(at hostOff, n int64) error

	unsynced atomic.Bool // the files hold something that no barrier covers yet
	touched  atomic.Bool // prepareChange has run
	failure  atomic.Pointer[error]
	closed   atomic.Bool

	zeroInit bool       // the disk read as zeros when it was opened
	resizing sync.Mutex // one Resize or operation on snapshots at a time

	mu          sync.Mutex // guards what follows, and the words of all tables
	header      *Header
	alloc       *allocator
	dirtySlices []*tableSlice
	l1Dirty     map[int64]struct{} // sectors of the L1 table
	l1Need      generation
	quarantine  []hostRun // released, but the update that did so may not be durable
	quarantined int64     // clusters in quarantine
	gen         generation
	durable     generation
	viewed      map[string]int // devices of snapshots that are open, by the snapshot's id
}

// l1Table is the active L1 table. It is replaced as a whole when it grows.
type l1Table struct {
	at    hostOff
	words []uint64 // accessed atomically
}

func (t *l1Table) entry(i int64) l1Entry { return l1Entry(atomic.LoadUint64(&t.words[i])) }

var _ block.Device = (*Image)(nil)

// Open opens an image and takes over f, Options.Backing and Options.DataFile; when it fails they stay the
// caller's. A writable open of an image whose dirty bit is set rebuilds its reference counts first; one whose
// corrupt bit is set is refused.
func Open(f storage.File, o Options) (*Image, error) {
	if err := o.Mutant.validate(); err != nil {
		return nil, err
	}
	f, h, err := readForUse(f, &o)
	if err != nil {
		return nil, err
	}
	if h.BackingFile != "" && o.Backing == nil && !o.NoBacking {
		return nil, fmt.Errorf("%s: the image needs its backing file %q", f.Name(), printable(h.BackingFile))
	}
	im := makeImage(f, h, o)
	if h.HasDataFile() {
		if o.DataFile == nil {
			return nil, fmt.Errorf("%s: 'data-file' is required for this image", f.Name())
		}
		im.data = o.DataFile
	} else if o.DataFile != nil {
		return nil, fmt.Errorf("%s: 'data-file' can only be set for images with an external data file", f.Name())
	}
	fileSize, err := f.Size()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	if err := im.openTables(fileSize); err != nil {
		return nil, err
	}
	if !o.ReadOnly {
		if err := im.openForWriting(fileSize); err != nil {
			return nil, err
		}
	}
	return im, nil
}

// readForUse reads the header of an image, and recovers an image that was not closed: in the file, or for a reader in
// the view of the file that it returns.
func readForUse(f storage.File, o *Options) (storage.File, *Header, error) {
	h, err := ReadHeader(f)
	if err != nil {
		return nil, nil, err
	}
	if h.Incompatible&IncompatJournal != 0 {
		if f, h, err = openJournalled(f, h, o); err != nil {
			return nil, nil, err
		}
	}
	if o.ReadOnly {
		return f, h, nil
	}
	if h.Incompatible&IncompatCorrupt != 0 {
		return nil, nil, &FormatError{
			File: f.Name(), Problem: "qcow2: Image is corrupt; cannot be opened read/write", Field: "incompatible_features",
			Found: fmt.Sprintf("%#x", h.Incompatible), Expected: "bit 1 (corrupt) clear",
		}
	}
	if h.Incompatible&IncompatDirty != 0 {
		if err := repairDirty(f, h); err != nil {
			return nil, nil, err
		}
		if h, err = ReadHeader(f); err != nil {
			return nil, nil, err
		}
	}
	return f, h, nil
}

// makeImage makes an image of which no table has been looked at.
func makeImage(f storage.File, h *Header, o Options) *Image {
	im := &Image{
		file: f, data: f, geo: newGeometry(h), opts: o, header: h,
		locks: newRangeLock(), l1Dirty: map[int64]struct{}{}, gen: 1, durable: 1,
	}
	im.backing.set(o.Backing)
	im.size.Store(int64(h.Size) &^ (sectorSize - 1))
	return im
}

// openJournalled makes the metadata of a crashed image readable: by replaying its journal, or, read-only, by
// looking at the file through it.
func openJournalled(f storage.File, h *Header, o *Options) (storage.File, *Header, error) {
	if o.ReadOnly {
		view, _, err := journalOverlay(f, h)
		if err != nil {
			return nil, nil, err
		}
		f = view
	} else if err := recoverJournal(f, h, o.Mutant); err != nil {
		return nil, nil, err
	}
	h, err := ReadHeader(f)
	return f, h, err
}

func (im *Image) openTables(fileSize int64) error {
	h, f := im.header, im.file
	if int64(h.L1Offset) > fileSize {
		return &FormatError{
			File: f.Name(), Problem: "Active L1 table lies past the end of the file", Field: "l1_table_offset",
			Found: fmt.Sprint(h.L1Offset), Expected: fmt.Sprintf("at most the file size %d", fileSize),
		}
	}
	raw := make([]byte, int64(h.L1Size)*8)
	if err := storage.ReadFull(f, raw, int64(h.L1Offset)); err != nil {
		return fmt.Errorf("%s: L1 table at offset %#x: %w", f.Name(), h.L1Offset, err)
	}
	t := &l1Table{at: hostOff(h.L1Offset), words: make([]uint64, h.L1Size)}
	for i := range t.words {
		t.words[i] = binary.BigEndian.Uint64(raw[i*8:])
	}
	im.useTables(t)
	return nil
}

// useTables makes t the active L1 table of an image that is being opened, and makes the caches of what it reaches.
func (im *Image) useTables(t *l1Table) {
	im.l1.Store(t)
	im.zeroInit = im.backing.get() == nil && !slices.ContainsFunc(t.words, func(w uint64) bool { return w != 0 })
	limit := im.opts.L2CacheSize
	if limit <= 0 {
		limit = DefaultL2CacheSize
	}
	im.tables = newTableCache(im.file, im.geo.clusterSize, im.geo.clustersFor(im.size.Load())*im.geo.entrySize(), limit)
	im.inflated.init(im.geo.clusterSize)
	im.codec.kind = im.header.CompressionType
}

func (im *Image) openForWriting(fileSize int64) error {
	limit := im.opts.RefcountCacheSize
	if limit <= 0 {
		limit = DefaultRefcountCacheSize
	}
	if int64(im.header.RefcountTableOffset) > fileSize {
		return &FormatError{
			File: im.file.Name(), Problem: "Reference count table lies past the end of the file", Field: "refcount_table_offset",
			Found: fmt.Sprint(im.header.RefcountTableOffset), Expected: fmt.Sprintf("at most the file size %d", fileSize),
		}
	}
	refs, err := openRefcounts(im.file, &im.geo, im.header, limit)
	if err != nil {
		return err
	}
	refs.store = im.writeMetadata
	im.alloc = newAllocator(im, refs, fileSize)
	im.guard.init(im)
	if err := im.checkPlaces(fileSize); err != nil {
		return err
	}
	im.discipline, err = newDiscipline(im.opts.Discipline, im)
	return err
}

// Size is the size of the virtual disk in bytes, a multiple of 512.
func (im *Image) Size() int64 { return im.size.Load() }

// Limits describes the image to those who plan requests for it.
func (im *Image) Limits() block.Limits {
	return block.Limits{ReadOnly: im.opts.ReadOnly, Preferred: im.geo.clusterSize, Compress: !im.opts.ReadOnly && !im.geo.dataFile, ZeroInit: im.zeroInit}
}

// Header returns a copy of the image's header.
func (im *Image) Header() Header {
	im.mu.Lock()
	defer im.mu.Unlock()
	return *im.header
}

// Flush makes every request that completed before the call durable.
func (im *Image) Flush() error {
	if err := im.errIfClosed(); err != nil || im.opts.ReadOnly {
		return err
	}
	return im.flush()
}

func (im *Image) flush() error {
	if err := im.failed(); err != nil {
		return err
	}
	if err := im.completePartials(); err != nil {
		return err
	}
	return im.discipline.flush()
}

// Close waits for what is under way, flushes, gives the reserve of host clusters back, and closes the image's files
// and its backing device.
func (im *Image) Close() error {
	im.resizing.Lock()
	defer im.resizing.Unlock()
	hold := im.locks.lock(0, 1<<62, true)
	already := im.closed.Swap(true)
	im.locks.unlock(hold)
	if already {
		return nil
	}
	var err error
	if !im.opts.ReadOnly {
		if err = im.failed(); err == nil {
			err = im.completePartials()
		}
		if closed := im.discipline.close(); err == nil {
			err = closed
		}
	}
	if im.data != im.file {
		err = errors.Join(err, im.data.Close())
	}
	err = errors.Join(err, im.file.Close())
	if backing := im.backing.get(); backing != nil {
		err = errors.Join(err, backing.Close())
	}
	return err
}

// hold locks a range of the disk for a request. Close waits for holders; nobody holds anything after it.
func (im *Image) hold(from, to int64, exclusive bool) (rangeHold, error) {
	h := im.locks.lock(from, to, exclusive)
	if err := im.errIfClosed(); err != nil {
		im.locks.unlock(h)
		return rangeHold{}, err
	}
	return h, nil
}

func (im *Image) errIfClosed() error {
	if im.closed.Load() {
		return im.errClosed()
	}
	return nil
}

func (im *Image) errClosed() error { return fmt.Errorf("%s: %w", im.file.Name(), block.ErrClosed) }

// checkRequest refuses what cannot be served at all.
func (im *Image) checkRequest(op string, off, length int64) error {
	if err := im.errIfClosed(); err != nil {
		return err
	}
	return block.CheckRange(op, off, length, im.size.Load())
}

// checkChange is checkRequest for requests that change the image, and prepares the image for its first
// change in this session.
func (im *Image) checkChange(op string, off, length int64) error {
	if err := im.checkRequest(op, off, length); err != nil {
		return err
	}
	if im.opts.ReadOnly {
		return fmt.Errorf("%s: %s: %w", im.file.Name(), op, block.ErrReadOnly)
	}
	if err := im.failed(); err != nil {
		return err
	}
	if im.touched.Load() {
		return nil
	}
	return im.prepareChange()
}

// prepareChange runs before the first change of a session: autoclear bits of what this package does not
// maintain are cleared durably, because it is about to become stale (specification section 3).
func (im *Image) prepareChange() error {
	im.mu.Lock()
	defer im.mu.Unlock()
	if im.touched.Load() {
		return nil
	}
	if keep := im.header.Autoclear & AutoclearRawData; keep != im.header.Autoclear {
		im.header.Autoclear = keep
		if err := im.switchHeader(fieldFeatures); err != nil {
			return err
		}
	}
	im.touched.Store(true)
	return nil
}

// afterChange ends a successful change.
func (im *Image) afterChange() error {
	if im.opts.Writethrough {
		return im.flush()
	}
	return nil
}

// failed returns the error after which the image refuses changes.
func (im *Image) failed() error {
	if p := im.failure.Load(); p != nil {
		return *p
	}
	return nil
}

// fail records that nobody knows any more what is on the disk. The first such error stays.
func (im *Image) fail(err error) error {
	wrapped := fmt.Errorf("%s: the image takes no further changes until it is reopened: %w", im.file.Name(), err)
	im.failure.CompareAndSwap(nil, &wrapped)
	return im.failed()
}

// trim cuts off the end of the file that this session added and does not use.
func (im *Image) trim() error {
	im.mu.Lock()
	defer im.mu.Unlock()
	return im.alloc.trim()
}

// linkUses counts what an update uses and returns what it has to wait for on that account. The caller holds mu.
func (im *Image) linkUses(u *update) (ready generation, err error) {
	for _, r := range u.uses {
		g, err := im.alloc.link(r)
		if err != nil {
			return 0, err
		}
		ready = max(ready, g)
	}
	return ready, nil
}

// changeWords changes words in memory. The caller holds mu and has pinned u.slice.
func (im *Image) changeWords(u *update) {
	if u.slice == nil {
		l1 := im.l1.Load()
		for i, w := range u.words {
			atomic.StoreUint64(&l1.words[u.first+int64(i)], w)
			im.l1Dirty[(u.first+int64(i))/sectorWords] = struct{}{}
		}
		return
	}
	s := u.slice
	for i, w := range u.words {
		atomic.StoreUint64(&s.words[u.first+int64(i)], w)
	}
	if !s.listed {
		s.listed = true
		im.dirtySlices = append(im.dirtySlices, s)
	}
	s.held.Store(true)
	last := u.first + int64(len(u.words)) - 1
	s.dirty |= (1<<(last/sectorWords+1) - 1) &^ (1<<(u.first/sectorWords) - 1)
}

// apply brings an update of consecutive L2 words to the discipline. at is the host offset of the first word;
// all words lie in one slice. The caller holds the guest range exclusively, and no other lock.
func (im *Image) apply(at hostOff, u update) error {
	start := im.tables.start(at)
	s, err := im.pin(start)
	if err != nil {
		return err
	}
	defer s.unpin()
	u.slice, u.first = s, int64(at-start)/8
	if err := im.lockForUpdate(); err != nil {
		return err
	}
	err = im.discipline.accept(&u)
	im.mu.Unlock()
	if err != nil {
		return im.fail(err)
	}
	return im.settle()
}

// lockForUpdate locks mu once the discipline has room for another update. The caller holds no lock but guest
// ranges.
func (im *Image) lockForUpdate() error {
	for {
		im.mu.Lock()
		if !im.discipline.full() {
			return nil
		}
		im.mu.Unlock()
		if err := im.discipline.flush(); err != nil {
			return err
		}
	}
}

// settle runs after an update was accepted. Unless the image failed, the update counts whatever settling it
// came to: it was accepted once, and must not be undone or accepted again. A later flush tries again and tells.
func (im *Image) settle() error {
	if err := im.discipline.settle(); err != nil {
		return im.failed()
	}
	return nil
}

// pin returns the cached slice of an L2 table at start; it stays cached until it is unpinned. The caller holds
// no lock but guest ranges.
func (im *Image) pin(start hostOff) (*tableSlice, error) {
	for {
		s, err := im.tables.pin(start)
		if err != errCacheFull {
			return s, err
		}
		if err := im.discipline.writeback(); err != nil {
			return nil, err
		}
	}
}

// collectTables copies all changed sectors of L1 and L2 tables to a batch and tells which barrier must have
// completed before they may be written. The slices stay cached until writtenBack. The caller holds mu.
func (im *Image) collectTables(w *writeBatch, taken *[]*tableSlice) (need generation) {
	for _, s := range im.dirtySlices {
		s.listed = false
		if s.dirty == 0 {
			continue // dropped with its table
		}
		for s.dirty != 0 {
			from, n := sectorRun(s.dirty)
			lo, hi := from*sectorWords, min((from+n)*sectorWords, len(s.words))
			w.addWords(hostOff(s.where.Load())+hostOff(lo*8), s.words[lo:hi])
			s.dirty &^= (1<<n - 1) << from
		}
		need = max(need, s.need)
		s.need = 0
		*taken = append(*taken, s)
	}
	im.dirtySlices = im.dirtySlices[:0]
	if len(im.l1Dirty) > 0 {
		l1 := im.l1.Load()
		for sector := range im.l1Dirty {
			lo := sector * sectorWords
			w.addWords(l1.at+hostOff(lo*8), l1.words[lo:min(lo+sectorWords, int64(len(l1.words)))])
		}
		clear(im.l1Dirty)
		need = max(need, im.l1Need)
		im.l1Need = 0
	}
	return need
}

// writtenBack lets go of slices whose collected changes are in the file. The caller holds mu.
func (im *Image) writtenBack(taken []*tableSlice) {
	for _, s := range taken {
		if s.dirty == 0 {
			s.held.Store(false)
		}
	}
}

// dropTable forgets what is cached of a cluster that was, or is about to be, an L2 table. The caller holds mu.
func (im *Image) dropTable(at hostOff) {
	im.tables.drop(at, im.geo.clusterSize, func(s *tableSlice) {
		s.dirty, s.need = 0, 0
		s.held.Store(false)
	})
}

// barrier makes everything durable that was written before generation now began, and records that.
func (im *Image) barrier(now generation) error {
	if im.unsynced.Swap(false) {
		if err := im.syncFiles(); err != nil {
			return err
		}
	}
	im.mu.Lock()
	im.durable = max(im.durable, now)
	im.mu.Unlock()
	return nil
}

// wrote records, after a change of a file, that the next barrier has something to do.
func (im *Image) wrote() {
	if !im.unsynced.Load() {
		im.unsynced.Store(true)
	}
}

// syncFiles is a barrier over both files; guest data first, because the tables refer to it.
func (im *Image) syncFiles() error {
	if im.data != im.file {
		if err := im.data.Sync(); err != nil {
			return im.fail(err)
		}
	}
	if err := im.file.Sync(); err != nil {
		return im.fail(err)
	}
	return nil
}

// writeBatch writes collected table sectors.
func (im *Image) writeBatch(w *writeBatch) error {
	if w.empty() {
		return nil
	}
	if err := w.write(im.file); err != nil {
		return im.fail(err)
	}
	im.wrote()
	return nil
}

// writeMetadata writes metadata past the caches.
func (im *Image) writeMetadata(p []byte, at hostOff) error {
	if _, err := im.file.WriteAt(p, int64(at)); err != nil {
		return im.fail(fmt.Errorf("metadata at offset %#x: %w", at, err))
	}
	im.wrote()
	return nil
}

// writeFresh writes metadata to clusters that nothing refers to yet. When that fails, for want of space as a rule,
// nothing is lost: the caller gives the clusters back and whoever needed them may try again.
func (im *Image) writeFresh(p []byte, at hostOff) error {
	if _, err := im.file.WriteAt(p, int64(at)); err != nil {
		return fmt.Errorf("%s: new metadata at offset %#x: %w", im.file.Name(), at, err)
	}
	im.wrote()
	return nil
}

// headerField is a range of header bytes inside the first sector that one write changes atomically
// (specification section 2).
type headerField struct{ from, to int }

var (
	fieldSize          = headerField{24, 32}
	fieldDisk          = headerField{24, 48} // size and L1 table
	fieldL1            = headerField{36, 48}
	fieldTables        = headerField{36, 60} // L1 table and refcount table
	fieldRefcountTable = headerField{48, 60}
	fieldSnapshots     = headerField{60, 72}
	fieldFeatures      = headerField{72, 96}
)

// switchHeader brings fields of the header in memory to the file, between two barriers: what they point to
// is durable before, the switch afterwards. The caller holds mu.
func (im *Image) switchHeader(f headerField) error {
	if err := im.syncFiles(); err != nil {
		return err
	}
	raw := make([]byte, headerLengthOut)
	im.header.encodeFields(raw)
	if err := im.writeMetadata(raw[f.from:f.to], hostOff(f.from)); err != nil {
		return err
	}
	return im.syncFiles()
}
