package fvd

import "fmt"

// The address spaces of an image, a type each.
type (
	guestOffset int64 // byte of the virtual disk
	dataOffset  int64 // byte of the storage that holds the data: the image file itself or the data file
	metaOffset  int64 // byte of the image file
	blockIndex  int64 // block of the base image: one bitmap bit
	chunkIndex  int64 // chunk of the virtual disk: one table entry
)

const (
	sectorSize = 512
	pageSize   = 4096 // unit in which the bitmap and the table are written

	pageEntries = pageSize / 4 // table entries a page
	pageBits    = pageSize * 8 // bitmap bits a page
)

// geometry is what the data path needs of a validated header, as signed numbers that cannot overflow.
type geometry struct {
	size       int64 // virtual disk
	dataStart  dataOffset
	blockSize  int64 // 0: no bitmap
	baseSize   guestOffset
	chunkSize  int64 // 0: no table
	tableStart metaOffset
	tableCap   chunkIndex // entries there is room for
	bitmapAt   metaOffset
	journalAt  metaOffset
	journalLen int64
	trailer    bool
	unmap      bool
}

// geometry may be called on a header that validate accepted.
func (h *Header) geometry() geometry {
	g := geometry{
		size:       int64(h.VirtualSize),
		dataStart:  dataOffset(h.DataOffset),
		journalAt:  metaOffset(h.JournalOffset),
		journalLen: int64(h.JournalSize),
		trailer:    h.Features&FeatureJournalTrailer != 0,
		unmap:      h.Features&FeatureUnmap != 0,
	}
	if h.hasBitmap() {
		g.blockSize, g.baseSize = int64(h.BlockSize), guestOffset(h.BaseSize)
		g.bitmapAt = metaOffset(h.BitmapOffset)
	}
	if h.hasTable() {
		g.chunkSize, g.tableStart = int64(h.ChunkSize), metaOffset(h.TableOffset)
		g.tableCap = chunkIndex(h.TableSize / 4)
	}
	return g
}

func (h *Header) hasBitmap() bool { return h.BaseImage != "" && h.BaseSize > 0 }
func (h *Header) hasTable() bool  { return h.TableOffset > 0 }

func (g *geometry) compact() bool { return g.chunkSize > 0 }

// blocks is the number of bits the bitmap holds.
func (g *geometry) blocks() blockIndex {
	if g.blockSize == 0 {
		return 0
	}
	return blockIndex(ceilDiv(int64(g.baseSize), g.blockSize))
}

// chunks is the number of table entries in use.
func (g *geometry) chunks() chunkIndex {
	if g.chunkSize == 0 {
		return 0
	}
	return chunkIndex(ceilDiv(g.size, g.chunkSize))
}

// blockRange is the run of blocks that the guest range [off, end) touches below the end of the base image;
// first == last when there is none.
func (g *geometry) blockRange(off, end guestOffset) (first, last blockIndex) {
	end = min(end, g.baseSize)
	if off >= end {
		return 0, 0
	}
	return blockIndex(int64(off) / g.blockSize), blockIndex(ceilDiv(int64(end), g.blockSize))
}

// blockStart is the first guest byte of block b; blockEnd(b-1) the byte after the last one, which the end of the
// base image clips.
func (g *geometry) blockStart(b blockIndex) guestOffset { return guestOffset(int64(b) * g.blockSize) }

func (g *geometry) blockEnd(b blockIndex) guestOffset {
	return min(guestOffset((int64(b)+1)*g.blockSize), g.baseSize)
}

// chunkRange is the run of chunks that the guest range [off, end) touches.
func (g *geometry) chunkRange(off, end guestOffset) (first, last chunkIndex) {
	if g.chunkSize == 0 || off >= end {
		return 0, 0
	}
	return chunkIndex(int64(off) / g.chunkSize), chunkIndex(ceilDiv(int64(end), g.chunkSize))
}

func (g *geometry) chunkStart(c chunkIndex) guestOffset { return guestOffset(int64(c) * g.chunkSize) }

// chunkEnd is the guest byte after chunk c, which the end of the disk clips.
func (g *geometry) chunkEnd(c chunkIndex) guestOffset {
	return guestOffset(min((int64(c)+1)*g.chunkSize, g.size))
}

// tableMemory is the memory in bytes that bitmaps and table take once loaded.
func (g *geometry) tableMemory() int64 {
	return 2*ceilDiv(int64(g.blocks()), 8) + 4*int64(g.chunks())
}

// fits refuses tables that take more than limit bytes of memory.
func (g *geometry) fits(limit int64) error {
	if need := g.tableMemory(); need > limit {
		return fmt.Errorf("%w: bitmap and table take %d bytes of memory, the limit is %d; larger blocks and chunks take less", ErrMaxMetadata, need, limit)
	}
	return nil
}

// chunkData is where the physical chunk lies.
func (g *geometry) chunkData(id chunkID) dataOffset {
	return g.dataStart + dataOffset(int64(id)*g.chunkSize)
}

func ceilDiv(a, b int64) int64    { return (a + b - 1) / b }
func roundUp(a, unit int64) int64 { return ceilDiv(a, unit) * unit }
func roundDown(a, u int64) int64  { return a / u * u }
