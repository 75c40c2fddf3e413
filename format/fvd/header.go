package fvd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

const (
	headerSize     = 8192 // bytes written; the fields end at headerEnd, the rest is zero
	headerEnd      = 7412 // bytes needed to decode a header
	headerReserved = 3316 // first byte of the part the proposal reserves

	mutableSector = 3072 // byte offset of header sector 6, which holds every field that changes at run time

	magicFVD        = 0x00445646 // "FVD\0" read as a little-endian u32: what we write
	magicFVDSwapped = 0x46564400 // the other reading of the proposal; accepted
	magicJanuary    = 0x5143F5A9 // images of the January 2011 driver, with another header; refused

	headerVersion = 1

	nameSize   = 1024 // data_file, base_img, add_storage_cmd, the terminating NUL included
	formatSize = 16   // data_file_fmt, base_img_fmt, the terminating NUL included
)

// Features says which additions to the 2011 proposal an image uses. The proposal has no such field; it lies in
// the header's reserved part. An image with an unknown bit of the low half can be read and not written; with an
// unknown bit of the high half it cannot be opened.
type Features uint64

const (
	// FeatureJournalTrailer: journal sectors end with a checksum and a generation.
	FeatureJournalTrailer Features = 1 << 0
	// FeatureTableInData: the lookup table lies inside the data area; an allocator must step around it.
	FeatureTableInData Features = 1 << 1
	// FeatureUnmap: TABLE records may carry the EMPTY entry, which takes a mapping away.
	FeatureUnmap Features = 1 << 32

	knownFeatures      = FeatureJournalTrailer | FeatureTableInData | FeatureUnmap
	featuresReadable   = Features(1<<32 - 1) // unknown bits here: read-only
	featuresMustBeKnow = ^featuresReadable   // unknown bits here: refuse
)

// Header is the image header with every field of the format, as stored. Sizes and offsets are bytes.
type Header struct {
	Version       uint32
	VirtualSize   uint64 // what the guest sees; a multiple of 512
	DataOffset    uint64 // where the data area begins; 0 with a data file
	DataFile      string // empty: the data lies in the image file
	DataFormat    string // empty: probe
	BaseImage     string // empty: no base image
	BaseFormat    string // empty: probe
	BaseSize      uint64 // how much of the disk the base image covers; a multiple of 512
	BitmapOffset  uint64
	BitmapSize    uint64
	BlockSize     uint64 // guest bytes a bitmap bit; a multiple of 512
	TableOffset   uint64 // 0: no lookup table
	TableSize     uint64
	ChunkSize     uint64 // bytes a table entry; a multiple of BlockSize where there is a base image
	GrowUnit      uint64 // by how much the storage grows; at least ChunkSize
	AddStorageCmd string // kept for the 2011 layout's sake, never executed

	JournalOffset        uint64
	JournalSize          uint64 // 0: no journal
	StableEpoch          uint64 // below 2^63
	CleanShutdown        bool
	CopyOnRead           bool
	MaxOutstandingCopies uint64 // bytes of copy-on-read data under way at a time
	PrefetchStartDelay   int64  // seconds; 0 and below: no prefetching
	FullyPrefetched      bool   // the base image is not needed (also when there is none)
	PrefetchSlots        uint32
	BytesPerPrefetch     uint64
	PrefetchMinRead      uint64 // KB/s
	PrefetchMaxRead      uint64 // KB/s
	PrefetchMinWrite     uint64 // KB/s
	PrefetchMaxWrite     uint64 // KB/s
	PrefetchThrottle     uint64 // ms
	PrefetchReadMeasure  uint64 // ms
	PrefetchWriteMeasure uint64 // ms
	NeedZeroInit         bool   // blocks marked at creation rely on storage that reads as zeros

	// The fields below lie in the proposal's reserved part.

	JournalBuffer       uint64 // bytes; 0: immediate mode
	JournalBufferPeriod uint64 // ms after which a journal buffer is written without a guest flush
	PrefetchAlpha       uint32 // percent of the old average kept at a new sample; 0: 80
	Features            Features
	BaseLength          uint64 // length of the base image when this image was created; 0: not recorded
}

// fieldKind says how a header field is stored.
type fieldKind uint8

const (
	kindU32 fieldKind = iota
	kindU64
	kindI64
	kindBool // u32 or i32 holding 0 or 1
	kindText // NUL-terminated in a fixed number of bytes
)

// field ties a member of Header to its place on disk; ptr has the type that kind implies.
type field struct {
	name string
	off  int
	kind fieldKind
	size int // kindText: bytes on disk
	ptr  any
}

// fields lists every header field but the magic, with the names and offsets of the FVD specification.
func (h *Header) fields() []field {
	return []field{
		{"version", 4, kindU32, 4, &h.Version},
		{"virtual_disk_size", 8, kindU64, 8, &h.VirtualSize},
		{"data_offset", 16, kindU64, 8, &h.DataOffset},
		{"data_file", 24, kindText, nameSize, &h.DataFile},
		{"data_file_fmt", 1048, kindText, formatSize, &h.DataFormat},
		{"base_img", 1064, kindText, nameSize, &h.BaseImage},
		{"base_img_fmt", 2088, kindText, formatSize, &h.BaseFormat},
		{"base_img_size", 2104, kindU64, 8, &h.BaseSize},
		{"bitmap_offset", 2112, kindU64, 8, &h.BitmapOffset},
		{"bitmap_size", 2120, kindU64, 8, &h.BitmapSize},
		{"block_size", 2128, kindU64, 8, &h.BlockSize},
		{"table_offset", 2136, kindU64, 8, &h.TableOffset},
		{"table_size", 2144, kindU64, 8, &h.TableSize},
		{"chunk_size", 2152, kindU64, 8, &h.ChunkSize},
		{"storage_grow_unit", 2160, kindU64, 8, &h.GrowUnit},
		{"add_storage_cmd", 2168, kindText, nameSize, &h.AddStorageCmd},
		{"journal_offset", 3192, kindU64, 8, &h.JournalOffset},
		{"journal_size", 3200, kindU64, 8, &h.JournalSize},
		{"stable_journal_epoch", 3208, kindU64, 8, &h.StableEpoch},
		{"clean_shutdown", 3216, kindBool, 4, &h.CleanShutdown},
		{"copy_on_read", 3220, kindBool, 4, &h.CopyOnRead},
		{"max_outstanding_copy_on_read_data", 3224, kindU64, 8, &h.MaxOutstandingCopies},
		{"prefetch_start_delay", 3232, kindI64, 8, &h.PrefetchStartDelay},
		{"base_img_fully_prefetched", 3240, kindBool, 4, &h.FullyPrefetched},
		{"num_prefetch_slots", 3244, kindU32, 4, &h.PrefetchSlots},
		{"bytes_per_prefetch", 3248, kindU64, 8, &h.BytesPerPrefetch},
		{"prefetch_min_read_throughput", 3256, kindU64, 8, &h.PrefetchMinRead},
		{"prefetch_max_read_throughput", 3264, kindU64, 8, &h.PrefetchMaxRead},
		{"prefetch_min_write_throughput", 3272, kindU64, 8, &h.PrefetchMinWrite},
		{"prefetch_max_write_throughput", 3280, kindU64, 8, &h.PrefetchMaxWrite},
		{"prefetch_throttle_time", 3288, kindU64, 8, &h.PrefetchThrottle},
		{"prefetch_read_throughput_measure_time", 3296, kindU64, 8, &h.PrefetchReadMeasure},
		{"prefetch_write_throughput_measure_time", 3304, kindU64, 8, &h.PrefetchWriteMeasure},
		{"need_zero_init", 3312, kindBool, 4, &h.NeedZeroInit},
		{"journal_buf_size", 3320, kindU64, 8, &h.JournalBuffer},
		{"journal_clean_buf_period", 3328, kindU64, 8, &h.JournalBufferPeriod},
		{"prefetch_perf_calc_alpha", 3336, kindU32, 4, &h.PrefetchAlpha},
		{"features", 3344, kindU64, 8, (*uint64)(&h.Features)},
		{"base_length", 3352, kindU64, 8, &h.BaseLength},
	}
}

// ErrDamaged is wrapped by the errors of opening an image whose table or journal cannot be; errors about the header
// are of type *FieldError.
var ErrDamaged = errors.New("the image is damaged")

// FieldError reports a header field that cannot be, or a file that is too short for a header.
type FieldError struct {
	Field  string // name in the FVD specification; "header" for all of it
	Offset int    // byte in the header
	Found  string
	Want   string
}

func (e *FieldError) Error() string {
	return fmt.Sprintf("fvd header: field %s (byte %d) is %s, want %s", e.Field, e.Offset, e.Found, e.Want)
}

// Probe reports whether head, the first bytes of a file, looks like an FVD image. It also says yes to images of
// the January 2011 driver and to versions that are not known here, so that opening them explains itself.
func Probe(head []byte) bool {
	if len(head) < 8 {
		return false
	}
	switch binary.LittleEndian.Uint32(head) {
	case magicFVD, magicFVDSwapped, magicJanuary:
		return true
	}
	return false
}

// decodeHeader reads a header from the first headerEnd bytes of an image. It checks what it needs to decode:
// magic, version, booleans, terminated strings. Header.validate checks the rest.
func decodeHeader(b []byte) (*Header, error) {
	if len(b) < headerEnd {
		return nil, &FieldError{"header", 0, fmt.Sprintf("%d bytes long", len(b)), fmt.Sprintf("%d bytes", headerEnd)}
	}
	le := binary.LittleEndian
	switch m := le.Uint32(b); m {
	case magicFVD, magicFVDSwapped:
	case magicJanuary:
		return nil, &FieldError{"magic", 0, fmt.Sprintf("%#08x, of the January 2011 FVD driver, whose header and journal differ", m),
			fmt.Sprintf("%#08x", magicFVD)}
	default:
		return nil, &FieldError{"magic", 0, fmt.Sprintf("%#08x", m), fmt.Sprintf("%#08x (\"FVD\\0\")", magicFVD)}
	}
	if v := le.Uint32(b[4:]); v != headerVersion { // before any field whose meaning may be another one
		return nil, &FieldError{"version", 4, fmt.Sprint(v), fmt.Sprint(headerVersion)}
	}
	h := &Header{}
	for _, f := range h.fields() {
		raw := b[f.off : f.off+f.size]
		switch p := f.ptr.(type) {
		case *uint32:
			*p = le.Uint32(raw)
		case *uint64:
			*p = le.Uint64(raw)
		case *int64:
			*p = int64(le.Uint64(raw))
		case *bool:
			v := le.Uint32(raw)
			if v > 1 {
				return nil, &FieldError{f.name, f.off, fmt.Sprint(v), "0 or 1"}
			}
			*p = v == 1
		case *string:
			n := bytes.IndexByte(raw, 0)
			if n < 0 {
				return nil, &FieldError{f.name, f.off, fmt.Sprintf("%d bytes without an end", f.size), "a NUL-terminated string"}
			}
			*p = string(raw[:n])
		}
	}
	return h, nil
}

// encode returns the header as it is written: headerSize bytes. It fails on strings that do not fit.
func (h *Header) encode() ([]byte, error) {
	b := make([]byte, headerSize)
	le := binary.LittleEndian
	le.PutUint32(b, magicFVD)
	for _, f := range h.fields() {
		raw := b[f.off : f.off+f.size]
		switch p := f.ptr.(type) {
		case *uint32:
			le.PutUint32(raw, *p)
		case *uint64:
			le.PutUint64(raw, *p)
		case *int64:
			le.PutUint64(raw, uint64(*p))
		case *bool:
			if *p {
				le.PutUint32(raw, 1)
			}
		case *string:
			if len(*p) >= f.size || bytes.IndexByte([]byte(*p), 0) >= 0 {
				return nil, &FieldError{f.name, f.off, fmt.Sprintf("%d bytes", len(*p)), fmt.Sprintf("at most %d bytes without a NUL", f.size-1)}
			}
			copy(raw, *p)
		}
	}
	return b, nil
}
