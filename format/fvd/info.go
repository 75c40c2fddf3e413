package fvd

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/platter-disk/platter/storage"
)

// Info describes an image to people and programs.
type Info struct {
	// What every format has is told beside the rest.
	VirtualSize int64  `json:"-"`
	BaseImage   string `json:"-"`
	BaseFormat  string `json:"-"`

	Compact       bool   `json:"compact-image"`
	ChunkSize     int64  `json:"chunk-size,omitempty"`
	GrowUnit      int64  `json:"storage-grow-unit,omitempty"`
	AddStorageCmd string `json:"add-storage-cmd,omitempty"` // never executed
	BlockSize     int64  `json:"block-size,omitempty"`
	BaseSize      int64  `json:"base-image-size,omitempty"`
	DataFile      string `json:"data-file,omitempty"`
	DataFormat    string `json:"data-file-fmt,omitempty"`

	JournalSize    int64  `json:"journal-size"`
	JournalBuffer  int64  `json:"journal-buffer-size"`
	JournalPeriod  *int64 `json:"journal-buffer-period,omitempty"` // ms; nil without a buffer
	JournalTrailer bool   `json:"journal-checksums"`
	CleanShutdown  bool   `json:"clean-shutdown"`
	NeedZeroInit   bool   `json:"need-zero-init"`

	FullyPrefetched bool          `json:"base-image-fully-prefetched"`
	Prefetch        *PrefetchInfo `json:"prefetching,omitempty"` // only while there is a base image

	// Counts as the tables on disk have them; an image that was not closed cleanly may have more in its journal. Those
	// of chunks are nil without a table, those of blocks without a bitmap.
	Chunks          *int64 `json:"chunks,omitempty"`
	ChunksAllocated *int64 `json:"chunks-allocated,omitempty"`
	Blocks          *int64 `json:"blocks,omitempty"`
	BlocksInBase    *int64 `json:"blocks-in-base,omitempty"`
}

// PrefetchInfo is what an image says of copy-on-read and prefetching. Sizes are bytes, rates KB/s, times ms.
type PrefetchInfo struct {
	CopyOnRead           bool   `json:"copy-on-read"`
	MaxOutstandingCopies uint64 `json:"max-outstanding-copy-on-read-data"`
	StartDelay           int64  `json:"start-delay"` // seconds; 0 and below: no prefetching
	Slots                uint32 `json:"slots"`
	BytesPerPrefetch     uint64 `json:"bytes-per-prefetch"`
	MinRead              uint64 `json:"min-read-throughput"`
	MaxRead              uint64 `json:"max-read-throughput"`
	MinWrite             uint64 `json:"min-write-throughput"`
	MaxWrite             uint64 `json:"max-write-throughput"`
	Alpha                uint32 `json:"perf-calc-alpha"` // percent
	ReadMeasure          uint64 `json:"read-throughput-measure-time"`
	WriteMeasure         uint64 `json:"write-throughput-measure-time"`
	Throttle             uint64 `json:"throttle-time"`
}

func (h *Header) prefetchInfo() *PrefetchInfo {
	return &PrefetchInfo{
		CopyOnRead: h.CopyOnRead, MaxOutstandingCopies: h.MaxOutstandingCopies, StartDelay: h.PrefetchStartDelay,
		Slots: h.PrefetchSlots, BytesPerPrefetch: h.BytesPerPrefetch,
		MinRead: h.PrefetchMinRead, MaxRead: h.PrefetchMaxRead, MinWrite: h.PrefetchMinWrite, MaxWrite: h.PrefetchMaxWrite,
		Alpha: h.PrefetchAlpha, ReadMeasure: h.PrefetchReadMeasure, WriteMeasure: h.PrefetchWriteMeasure,
		Throttle: h.PrefetchThrottle,
	}
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
		JournalSize: g.journalLen, JournalTrailer: g.trailer,
		AddStorageCmd: h.AddStorageCmd, CleanShutdown: h.CleanShutdown, NeedZeroInit: h.NeedZeroInit, FullyPrefetched: h.FullyPrefetched,
	}
	if g.journalLen > 0 {
		info.JournalBuffer = int64(min(h.JournalBuffer, maxVirtualSize))
	}
	if info.JournalBuffer > 0 {
		info.JournalPeriod = new(int64(min(h.JournalBufferPeriod, maxVirtualSize)))
	}
	m := &metadata{g: g, name: f.Name(), file: f, header: h}
	if g.blocks() > 0 {
		inBase := int64(0)
		if !h.FullyPrefetched {
			info.Prefetch = h.prefetchInfo()
			if inBase, err = m.countBase(); err != nil {
				return nil, err
			}
		}
		info.Blocks, info.BlocksInBase = new(int64(g.blocks())), &inBase
	}
	if g.compact() {
		info.GrowUnit = int64(h.GrowUnit)
		mapped, err := m.countMapped()
		if err != nil {
			return nil, err
		}
		info.Chunks, info.ChunksAllocated = new(int64(g.chunks())), &mapped
	}
	return info, nil
}

// countBase counts the blocks that the bitmap on disk leaves to the base image, in no memory to speak of.
func (m *metadata) countBase() (int64, error) {
	blocks := int64(m.g.blocks())
	left := blocks
	err := forEachData(m.file, m.g.bitmapAt, ceilDiv(blocks, 8), 1, func(at int64, p []byte) error {
		for i, b := range p {
			if past := 8*(at+int64(i)+1) - blocks; past > 0 { // bits that describe nothing
				b &= 0xFF >> past
			}
			left -= int64(bits.OnesCount8(b))
		}
		return nil
	})
	if err != nil {
		err = fmt.Errorf("fvd image %s: reading the bitmap: %w", m.name, err)
	}
	return left, err
}

// countMapped counts the entries of the table on disk that name a chunk. Holes, which no writer leaves, name chunk 0.
func (m *metadata) countMapped() (int64, error) {
	mapped := int64(m.g.chunks())
	err := forEachData(m.file, m.g.tableStart, 4*mapped, 4, func(_ int64, p []byte) error {
		for ; len(p) > 0; p = p[4:] {
			if !entry(binary.LittleEndian.Uint32(p)).mapped() {
				mapped--
			}
		}
		return nil
	})
	if err != nil {
		err = fmt.Errorf("fvd image %s: reading the table: %w", m.name, err)
	}
	return mapped, err
}
