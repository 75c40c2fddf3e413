package fvd

import (
	"fmt"

	"github.com/platter-disk/platter/storage"
)

// Info describes an image to people and programs.
type Info struct {
	VirtualSize int64  `json:"virtual-size"`
	Compact     bool   `json:"compact-image"`
	ChunkSize   int64  `json:"chunk-size,omitempty"`
	GrowUnit    int64  `json:"storage-grow-unit,omitempty"`
	BlockSize   int64  `json:"block-size,omitempty"`
	BaseImage   string `json:"backing-file,omitempty"`
	BaseFormat  string `json:"backing-fmt,omitempty"`
	BaseSize    int64  `json:"base-image-size,omitempty"`
	DataFile    string `json:"data-file,omitempty"`
	DataFormat  string `json:"data-file-fmt,omitempty"`

	JournalSize     int64 `json:"journal-size"`
	JournalBuffer   int64 `json:"journal-buffer-size"`
	JournalTrailer  bool  `json:"journal-checksums"`
	CleanShutdown   bool  `json:"clean-shutdown"`
	NeedZeroInit    bool  `json:"need-zero-init"`
	CopyOnRead      bool  `json:"copy-on-read"`
	PrefetchDelay   int64 `json:"prefetch-start-delay"` // seconds; 0 and below: no prefetching
	FullyPrefetched bool  `json:"base-image-fully-prefetched"`

	// Counts as the tables on disk have them; an image that was not closed cleanly may have more in its journal.
	Chunks          int64 `json:"chunks,omitempty"`
	ChunksAllocated int64 `json:"chunks-allocated,omitempty"`
	Blocks          int64 `json:"blocks,omitempty"`
	BlocksInBase    int64 `json:"blocks-in-base,omitempty"`
}

// ReadInfo describes the image in f without opening anything it refers to.
func ReadInfo(f storage.File) (*Info, error) {
	h, err := ReadHeader(f)
	if err != nil {
		return nil, err
	}
	g := h.geometry()
	info := &Info{
		VirtualSize: g.size, Compact: g.compact(), ChunkSize: g.chunkSize, BlockSize: g.blockSize,
		BaseImage: h.BaseImage, BaseFormat: h.BaseFormat, BaseSize: int64(h.BaseSize), DataFile: h.DataFile, DataFormat: h.DataFormat,
		JournalSize: g.journalLen, JournalBuffer: int64(min(h.JournalBuffer, maxVirtualSize)), JournalTrailer: g.trailer,
		CleanShutdown: h.CleanShutdown, NeedZeroInit: h.NeedZeroInit, CopyOnRead: h.CopyOnRead,
		PrefetchDelay: h.PrefetchStartDelay, FullyPrefetched: h.FullyPrefetched,
		Chunks: int64(g.chunks()), Blocks: int64(g.blocks()),
	}
	m := &metadata{g: g, name: f.Name(), file: f, header: h}
	if g.compact() {
		info.GrowUnit = int64(h.GrowUnit)
	}
	if need := m.tableMemory(); need > DefaultMaxMetadata {
		return nil, fmt.Errorf("fvd image %s: bitmap and table take %d bytes of memory, the limit is %d", m.name, need, int64(DefaultMaxMetadata))
	}
	m.initTables()
	if m.fresh.n > 0 {
		if _, err := m.loadBitmap(); err != nil {
			return nil, err
		}
		if !h.FullyPrefetched {
			info.BlocksInBase = int64(m.fresh.n - m.fresh.count())
		}
	}
	if g.compact() {
		if err := m.loadTable(); err != nil {
			return nil, err
		}
		for c := range g.chunks() {
			if m.table.get(c).mapped() {
				info.ChunksAllocated++
			}
		}
	}
	return info, nil
}
