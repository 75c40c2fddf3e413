package fvd

import (
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
)

// JournalMode says when journal records are written.
type JournalMode uint8

const (
	// JournalAuto follows the image: buffered if its journal_buf_size is not 0 and the cache is not
	// write-through, else immediate.
	JournalAuto JournalMode = iota
	// JournalImmediate writes the record of a request before the request is done.
	JournalImmediate
	// JournalBuffered collects records and writes them when the guest flushes, when the buffer is full, or
	// after a while. Write-through images are immediate all the same.
	JournalBuffered
)

// Defaults of Options and CreateOptions.
const (
	DefaultMaxMetadata  = 512 << 20       // bytes
	DefaultJournalSize  = 16 << 20        // bytes (FVD specification 1.5)
	DefaultJournalDelay = 5 * time.Second // journal_clean_buf_period
	defaultJournalBuf   = 64 << 10        // journal_buf_size
)

// Options says how to open an image.
type Options struct {
	ReadOnly bool // nothing is ever written; an image that was not closed cleanly is replayed in memory

	// Base is the base image. It is needed while the header names one and prefetching is not complete; it may
	// not be smaller than when the image was created. It is never written.
	Base block.Device
	// NoBase opens an image without its base: what lies there reads as zeros. Read-only.
	NoBase bool

	// Data and DataDevice are the two ways to hand in a separate data file: raw, or of another format. One of
	// them is needed when the header names a data file.
	Data       storage.File
	DataDevice block.Device
	// DataNotZeroed says that bytes of the data storage that this image never wrote are not known to be zero
	// (a device that others used before). An image with need_zero_init is then refused.
	DataNotZeroed bool

	Writethrough bool        // every change is durable when its call returns
	Journal      JournalMode // how eagerly the journal is written

	// AllowDirty opens an image without a journal that was not closed cleanly, at the operator's risk. Such
	// an image stays marked as not clean.
	AllowDirty bool
	// StrictJournal refuses an image whose journal holds what no crash explains.
	StrictJournal bool

	// GrowStorage is asked for need more bytes when storage that cannot be resized is full. nil: the write
	// fails with ENOSPC. It must not use the image. The command in an image's add_storage_cmd is never executed.
	GrowStorage func(need int64) error

	// Interrupt is asked now and then while Resize lays out space; the error that it returns ends that, and the disk
	// keeps its size. Nil never does.
	Interrupt func() error

	// MaxMetadata bounds the memory for bitmap and table, in bytes; 0: DefaultMaxMetadata. An image that needs more is
	// refused before they are read (ErrMaxMetadata). What keeps track of the
	// storage takes a bit a chunk more, of which as much is allowed again; replaying a journal that changes
	// mappings takes twice the table for a while.
	MaxMetadata int64

	// AfterFunc runs f after d and returns a way to stop that, true if f will not run. nil: time.AfterFunc.
	AfterFunc func(d time.Duration, f func()) (stop func() bool)

	// Mutant brings a known defect back, so that crash exploration can prove itself; "": none. Tests only.
	Mutant Mutant
}

// Image is an open FVD image. It is a block.Device; see there for what its methods promise.
//
// A read or an overwrite of data that this image holds takes no lock. Other writes allocate a chunk under the
// allocator's lock, or copy up the rest of a block under a lock of that block, and then commit a journal record.
type Image struct {
	m          *metadata
	discipline discipline
	ranges     rangeLock // blocks that still live in the base image

	base     block.Device // nil: none, or NoBase
	baseLive atomic.Bool  // some block may still live in the base image
	emptied  atomic.Bool  // Empty was called: copies of the base image may be older than that
	size     atomic.Int64 // bytes, as m.g.size

	readOnly     bool
	writethrough bool
	zeroInit     bool
	interrupt    func() error // Options.Interrupt
	replay       Replay
	updates      sync.Pool // *update
}

var _ block.Device = (*Image)(nil)

// Size implements block.Device.
func (im *Image) Size() int64 { return im.size.Load() }

// Replay tells what was found in the journal when the image was opened; zero if it was closed cleanly.
func (im *Image) Replay() Replay { return im.replay }

// Header returns a copy of the header as it stands.
func (im *Image) Header() Header { return im.m.headerCopy() }

// Limits implements block.Device.
func (im *Image) Limits() block.Limits {
	preferred := int64(pageSize)
	if unit := im.m.g.blockSize; unit > 0 && im.baseLive.Load() {
		preferred = 1 << bits.TrailingZeros64(uint64(unit)) // blocks need not be powers of two
	}
	return block.Limits{ReadOnly: im.readOnly, Preferred: preferred, ZeroInit: im.zeroInit}
}

// Flush implements block.Device.
func (im *Image) Flush() error {
	pass, ok := im.m.guard.enter(0)
	if !ok {
		return im.errClosed()
	}
	defer im.m.guard.leave(pass)
	if im.readOnly {
		return nil
	}
	return im.flush()
}

// flush makes everything that was acknowledged durable: the data before the records that expose it, the records
// before the metadata barrier (D-07).
func (im *Image) flush() error {
	m := im.m
	if err := m.failed(); err != nil {
		return err
	}
	if err := im.discipline.drain(); err != nil {
		return err
	}
	if m.mutant == MutantMetadataFirst {
		if err := m.metaSync.wait(); err != nil {
			return err
		}
	}
	if err := m.dataSync.wait(); err != nil {
		return err
	}
	if m.separate() {
		if err := m.metaSync.wait(); err != nil {
			return err
		}
	}
	if m.alloc != nil {
		m.alloc.giveBack()
	}
	return nil
}

// Checkpoint brings bitmap and table on disk up to date, soft writes included, so that a crash later on loses
// none of them. Guest writes go on meanwhile.
func (im *Image) Checkpoint() error {
	pass, ok := im.m.guard.enter(0)
	if !ok {
		return im.errClosed()
	}
	defer im.m.guard.leave(pass)
	if im.readOnly || !im.m.inUse.Load() {
		return nil
	}
	return im.discipline.checkpoint(headerChange{})
}

// WriteCompressed implements block.Device: the format has no compression.
func (im *Image) WriteCompressed([]byte, int64) error { return im.unsupported("compressed writes") }

func (im *Image) errClosed() error { return fmt.Errorf("fvd image %s: %w", im.m.name, block.ErrClosed) }

// begin admits a change of [off, off+length). The caller ends it with leave if err is nil.
func (im *Image) begin(op string, off, length int64) (pass, error) {
	p, ok := im.m.guard.enter(off)
	if !ok {
		return p, im.errClosed()
	}
	var err error
	if im.readOnly {
		err = fmt.Errorf("%s on fvd image %s: %w", op, im.m.name, block.ErrReadOnly)
	} else if err = block.CheckRange(op, off, length, im.m.g.size); err == nil {
		err = im.m.failed()
	}
	if err != nil {
		im.m.guard.leave(p)
	}
	return p, err
}

// Close implements block.Device. It writes bitmap and table back and marks the image clean, unless something
// failed before: then the journal is left to the next open.
func (im *Image) Close() error {
	if !im.m.guard.pause() {
		return nil
	}
	var err error
	if !im.readOnly {
		err = im.shutDown()
		im.discipline.close()
	}
	im.m.guard.resume(true)
	keep := func(e error) {
		if err == nil {
			err = e
		}
	}
	keep(im.m.data.close())
	if im.m.separate() {
		keep(im.m.file.Close())
	}
	if im.base != nil {
		keep(im.base.Close())
	}
	return err
}

// shutDown leaves the image clean; the caller has it to itself.
func (im *Image) shutDown() error {
	m := im.m
	if m.inUse.Load() && m.g.compact() {
		if err := m.alloc.trim(); err != nil {
			return err
		}
	}
	if err := im.flush(); err != nil {
		return err
	}
	if !m.inUse.Load() {
		return nil
	}
	if m.g.compact() {
		if err := im.releaseAll(); err != nil {
			return err
		}
	}
	return im.discipline.checkpoint(headerChange{clean: true})
}

// releaseAll gives the space of all unmapped chunks back, durably, so that a clean image leaks nothing.
func (im *Image) releaseAll() error {
	m := im.m
	if m.alloc.holdsQuarantine() || im.discipline.holdsReleases() {
		if err := im.discipline.checkpoint(headerChange{}); err != nil {
			return err
		}
		m.alloc.release()
	}
	return m.dataSync.wait()
}
