package fvd

import (
	"fmt"
	"hash/crc32"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/platter-disk/platter/storage"
)

// metadata is the bitmap and the table of an open image, and the means to make changes of them durable.
//
// Two bitmaps: fresh says where the valid bytes of a block are now, and reads and copy-up go by it; stale says
// what a crash would leave recoverable. stale is a subset of fresh. A block copied up without being written by
// the guest is fresh and not stale until a checkpoint.
type metadata struct {
	g    geometry // size, tableStart and tableCap change, under guard.pause only; the rest never does
	name string
	file storage.File
	data store

	fresh, stale bitset
	// local is a block below which every fresh bit is set, for those who look for one that is not. Bits are only
	// set: it only rises. Who clears them puts another one in its place; a search under way may raise the old one.
	local atomic.Pointer[atomic.Int64]
	table table

	bitmapPages, tablePages pageSet // changed since they were last written

	// dataSync and metaSync are one barrier when the data lies in the image file.
	dataSync, metaSync *barrier

	headerMu sync.Mutex
	header   *Header
	inUse    atomic.Bool // clean_shutdown is durably 0
	doubtful bool        // opened in spite of an unclean end without a journal: never becomes clean by itself

	latch atomic.Pointer[failure]

	maxMemory int64 // bytes for bitmap and table

	alloc  *allocator
	guard  *guard
	crc    *crc32.Table
	mutant Mutant
}

// writingTable is how metadata.fail calls the part of a checkpoint that a mutant forgives.
const writingTable = "writing the table"

// failure is the first error after which nobody knows what is on the disk.
type failure struct{ err error }

// initTables makes an empty bitmap and table; geometry.fits was asked.
func (m *metadata) initTables() {
	m.fresh = newBitset(m.g.blocks())
	m.stale = newBitset(m.g.blocks())
	m.local.Store(new(atomic.Int64))
	m.bitmapPages = newPageSet(int(ceilDiv(int64(m.fresh.n), pageBits)))
	m.table = newTable(m.g.chunks())
	m.tablePages = newPageSet(int(ceilDiv(int64(len(m.table)), pageEntries)))
}

// fail latches err: from now on every change and flush is refused with it (defects D-04, D-05, D-14).
func (m *metadata) fail(doing string, err error) error {
	f := &failure{fmt.Errorf("fvd image %s: %s failed, what is on the disk is unknown, reopen the image: %w", m.name, doing, err)}
	if m.mutant == MutantNoLatch || m.mutant == MutantReuseAfterFailure && doing == writingTable {
		return f.err
	}
	if !m.latch.CompareAndSwap(nil, f) {
		f = m.latch.Load()
	}
	return f.err
}

// failed returns the latched error.
func (m *metadata) failed() error {
	if f := m.latch.Load(); f != nil {
		return f.err
	}
	return nil
}

// separate reports whether the data lies in a file of its own.
func (m *metadata) separate() bool { return m.dataSync != m.metaSync }

// initBarriers sets up the barriers and has the data storage count its changes; sameFile says that data is the image
// file.
func (m *metadata) initBarriers(sameFile bool) {
	data := m.data
	m.dataSync = newBarrier(func() error {
		if err := data.sync(); err != nil {
			return m.fail("flushing the data", err)
		}
		return nil
	})
	m.data = countedStore{data, m.dataSync}
	m.metaSync = m.dataSync
	if sameFile {
		return
	}
	m.metaSync = newBarrier(func() error {
		if err := m.file.Sync(); err != nil {
			return m.fail("flushing the metadata", err)
		}
		return nil
	})
}

// writeMeta writes metadata; a failure is latched.
func (m *metadata) writeMeta(doing string, p []byte, off metaOffset) error {
	defer m.metaSync.changed()
	if _, err := m.file.WriteAt(p, int64(off)); err != nil {
		return m.fail(doing, err)
	}
	return nil
}

// writeHeader changes the fields of header sector 6 and writes that one sector (defect D-13). It is durable
// after the next metaSync.
func (m *metadata) writeHeader(change func(*Header)) error {
	m.headerMu.Lock()
	defer m.headerMu.Unlock()
	change(m.header)
	b, err := m.header.encode()
	if err != nil {
		return err
	}
	return m.writeMeta("writing the header", b[mutableSector:mutableSector+sectorSize], mutableSector)
}

// headerCopy returns the header as it stands.
func (m *metadata) headerCopy() Header {
	m.headerMu.Lock()
	defer m.headerMu.Unlock()
	return *m.header
}

// markInUse makes clean_shutdown=0 durable, before the first change of metadata or allocation since the image
// was opened (defect D-12).
func (m *metadata) markInUse() error {
	if m.inUse.Load() {
		return nil
	}
	if err := m.writeHeader(func(h *Header) { h.CleanShutdown = false }); err != nil {
		return err
	}
	if m.mutant != MutantInUseNotDurable {
		if err := m.metaSync.wait(); err != nil {
			return err
		}
	}
	m.inUse.Store(true)
	return nil
}

// untold reports whether the tables on the disk may lack what was acknowledged, with no journal to tell: the image has
// tables, no journal, and was not closed cleanly (FVD specification 1.12).
func (m *metadata) untold() bool {
	return m.inUse.Load() && m.g.journalLen == 0 && (m.fresh.n > 0 || m.g.compact())
}

// setFresh notes that the blocks hold valid bytes in this image.
func (m *metadata) setFresh(first, last blockIndex) {
	if first >= last {
		return
	}
	m.fresh.setRange(first, last)
	m.bitmapPages.mark(int(first/pageBits), int((last-1)/pageBits))
}

// clearBits gives all blocks back to the base image. The caller has the image to itself, but for searches for blocks
// of the base image.
func (m *metadata) clearBits() {
	m.fresh.clear()
	m.stale.clear()
	m.local.Store(new(atomic.Int64))
	m.bitmapPages.mark(0, int((m.fresh.n-1)/pageBits))
}

// firstInBase finds the first block from b on that lives in the base image; the number of blocks if there is none.
// Asked again and again from the beginning, it looks at no block twice that has left the base image.
func (m *metadata) firstInBase(b blockIndex) blockIndex {
	local := m.local.Load()
	low := blockIndex(local.Load())
	found := max(b, low)
	if found < m.fresh.n {
		if n, set := m.fresh.run(found, m.fresh.n); set {
			found += n
		}
	}
	for b <= low && low < found && !local.CompareAndSwap(int64(low), int64(found)) {
		low = blockIndex(local.Load())
	}
	return found
}

// setEntry changes a table entry; the caller holds alloc.mu.
func (m *metadata) setEntry(c chunkIndex, e entry) {
	m.table.set(c, e)
	m.tablePages.mark(int(c/pageEntries), int(c/pageEntries))
}

// mapChunks gives every chunk of [first, last) a place in the storage. Places that are new read as zeros, and
// durably so.
func (m *metadata) mapChunks(first, last chunkIndex) error {
	c := first
	for c < last && m.table.get(c).mapped() {
		c++
	}
	if c == last {
		return nil
	}
	m.alloc.mu.Lock()
	defer m.alloc.mu.Unlock()
	for ; c < last; c++ {
		if m.table.get(c).mapped() {
			continue
		}
		id, err := m.alloc.take()
		if err != nil {
			return err
		}
		m.setEntry(c, entry(id)|entryDirty)
	}
	return nil
}

// reserve makes room in the storage for what mapChunks will place there, all at once.
func (m *metadata) reserve(first, last chunkIndex) error {
	need := int64(0)
	for c := first; c < last; c++ {
		if !m.table.get(c).mapped() {
			need++
		}
	}
	return m.alloc.reserve(need)
}

// unmapChunk takes the mapping of a chunk away and returns what it named; ok is false if there was none.
func (m *metadata) unmapChunk(c chunkIndex) (id chunkID, ok bool) {
	m.alloc.mu.Lock()
	defer m.alloc.mu.Unlock()
	e := m.table.get(c)
	if !e.mapped() {
		return 0, false
	}
	m.setEntry(c, entryUnmapped)
	return e.id(), true
}

// pageSet is a set of 4 KiB pages of the bitmap or the table.
type pageSet []uint64

func newPageSet(pages int) pageSet { return make(pageSet, (pages+63)/64) }

// mark adds pages first to last.
func (s pageSet) mark(first, last int) {
	for i := first; i <= last; i++ {
		if bit := uint64(1) << (i & 63); atomic.LoadUint64(&s[i>>6])&bit == 0 {
			atomic.OrUint64(&s[i>>6], bit)
		}
	}
}

// drain empties the set and calls fn for each page that was in it, in order.
func (s pageSet) drain(fn func(page int)) {
	for i := range s {
		for w := atomic.SwapUint64(&s[i], 0); w != 0; w &= w - 1 {
			fn(i<<6 + bits.TrailingZeros64(w))
		}
	}
}
