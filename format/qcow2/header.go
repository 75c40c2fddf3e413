package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/platter-disk/platter/storage"
)

const (
	magic = 0x514649fb // "QFI\xfb"

	cryptNone = 0
	cryptLUKS = 2
)

// Feature bits (qcow2 specification, "Feature bits").
const (
	IncompatDirty       uint64 = 1 << 0 // reference counts may be stale
	IncompatCorrupt     uint64 = 1 << 1 // any structure may be damaged
	IncompatDataFile    uint64 = 1 << 2 // guest clusters live in an external data file
	IncompatCompression uint64 = 1 << 3 // CompressionType is not CompressionDeflate
	IncompatExtendedL2  uint64 = 1 << 4 // 16-byte L2 entries with 32 subclusters

	CompatLazyRefcounts uint64 = 1 << 0 // counts may be written late while IncompatDirty is set

	AutoclearBitmaps uint64 = 1 << 0 // the bitmaps extension is consistent with the disk
	AutoclearRawData uint64 = 1 << 1 // the external data file is a valid raw image at all times

	knownIncompat = IncompatDirty | IncompatCorrupt | IncompatDataFile | IncompatCompression | IncompatExtendedL2 | IncompatJournal
)

// Values of Header.CompressionType.
const (
	CompressionDeflate uint8 = 0
	CompressionZstd    uint8 = 1
)

var (
	// ErrNotQcow2 is wrapped by the error for a file that does not start as a qcow2 image.
	ErrNotQcow2 = errors.New("not a qcow2 image")

	// ErrUnsupportedFeature is wrapped by the error for an image that needs something this package does not
	// know: an unknown incompatible feature bit, version or compression type, or encryption.
	ErrUnsupportedFeature = errors.New("unsupported qcow2 feature")

	// ErrHeaderFull is wrapped by the error for a change of the header that cluster 0 has no room for.
	ErrHeaderFull = errors.New("the header cluster is full")
)

// FormatError says which part of an image is not as the qcow2 specification or a limit of this package
// demands.
type FormatError struct {
	File     string // the image's storage.File.Name
	Problem  string // one line; the words QEMU uses, where it has some
	Field    string // the field or structure
	Found    string
	Expected string
	Err      error // a sentinel of this package, or nil
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("%s: %s (%s: found %s, expected %s)", e.File, e.Problem, e.Field, e.Found, e.Expected)
}

func (e *FormatError) Unwrap() error { return e.Err }

// headerFullError says that a header does not fit in a cluster.
type headerFullError struct{ bytes, cluster int64 }

func (e *headerFullError) Error() string {
	return fmt.Sprintf("No space left in the file header (header, extensions and backing file name: found %d bytes, expected at most %d)", e.bytes, e.cluster)
}

func (e *headerFullError) Unwrap() error { return ErrHeaderFull }

// Header is the content of cluster 0: the header proper, its extensions and the backing file name. All
// offsets are bytes in the image file.
//
//	byte 0                                72 (v2) / header_length (v3)           BackingFileOffset   cluster size
//	| fixed fields | feature words (v3) | Unknown | extensions … end | name of the backing file | 0 … |
//
// Version 2 has no feature words, counts of 16 bits and deflate compression; its Header says so.
type Header struct {
	Version               uint32 // 2 or 3
	BackingFileOffset     uint64 // 0: no backing file; at most the cluster size
	BackingFileSize       uint32 // bytes, at most 1023
	ClusterBits           uint32 // 9..21, from 14 with extended L2
	Size                  uint64 // of the virtual disk in bytes
	CryptMethod           uint32 // 0 none, 1 AES, 2 LUKS
	L1Size                uint32 // entries, at most 4194304
	L1Offset              uint64 // cluster-aligned
	RefcountTableOffset   uint64 // cluster-aligned
	RefcountTableClusters uint32 // at most 8 MiB
	NbSnapshots           uint32 // at most 65536
	SnapshotsOffset       uint64 // cluster-aligned

	Incompatible, Compatible, Autoclear uint64 // feature words

	RefcountOrder   uint32 // a reference count has 1<<RefcountOrder bits; 0..6
	HeaderLength    uint32 // bytes; 72 in version 2, from 104 in version 3
	CompressionType uint8  // CompressionDeflate or CompressionZstd

	Unknown    []byte      // the bytes of the header past the fields above, kept when it is rewritten
	Extensions []Extension // as found in the file, in its order; Encode takes from it only those it does not know

	BackingFile   string // "" if there is none
	BackingFormat string // "" if the image does not say
	DataFile      string // name of the external data file; "" if the image does not say

	Bitmaps *BitmapsExtension // nil: there are none, or the autoclear bit says that they are stale
	Crypto  *CryptoExtension  // nil unless CryptMethod is 2
	Journal *JournalExtension // nil: the image is not journalled
}

// ClusterSize is the size of a cluster in bytes.
func (h *Header) ClusterSize() int64 { return 1 << h.ClusterBits }

// RefcountBits is the width of a reference count: 1, 2, 4 … 64.
func (h *Header) RefcountBits() int { return 1 << h.RefcountOrder }

// HasDataFile reports whether guest data lives in an external data file.
func (h *Header) HasDataFile() bool { return h.Incompatible&IncompatDataFile != 0 }

// ExtendedL2 reports whether L2 entries are 16 bytes with 32 subclusters.
func (h *Header) ExtendedL2() bool { return h.Incompatible&IncompatExtendedL2 != 0 }

// Probe reports whether a file that starts with head (8 bytes suffice) is a qcow2 image of any version.
func Probe(head []byte) bool {
	return len(head) >= 8 && binary.BigEndian.Uint32(head) == magic && binary.BigEndian.Uint32(head[4:]) >= 2
}

// purpose says what a header is read for; a check must be able to look at images that nothing else may open.
type purpose uint8

const (
	forUse   purpose = iota // guest I/O: everything must hold
	forInfo                 // describing the image: encryption is no obstacle
	forCheck                // and the refcount table may be missing, the snapshot table pointer invalid
)

// ReadHeader reads and validates the header of an image. Every offset, size and count in it is within the
// limits of this package afterwards; whether the tables lie inside the file is for the caller to find out.
// The dirty and corrupt bits are accepted, unknown incompatible feature bits and encryption are not.
// Errors about the contents are of type *FormatError.
func ReadHeader(f storage.File) (*Header, error) { return readHeader(f, forUse) }

func readHeader(f storage.File, why purpose) (*Header, error) {
	var head [headerLengthV2]byte
	n, err := f.ReadAt(head[:], 0)
	if err != nil && err != io.EOF {
		return nil, fmt.Errorf("%s: read the header: %w", f.Name(), err)
	}
	bits, err := clusterBitsOf(f.Name(), head[:n])
	if err != nil {
		return nil, err
	}
	cluster := make([]byte, 1<<bits)
	if err := storage.ReadFull(f, cluster, 0); err != nil {
		return nil, fmt.Errorf("%s: read the header cluster: %w", f.Name(), err)
	}
	return decodeHeader(f.Name(), cluster, why)
}

// clusterBitsOf validates the fields that everything else in the header depends on. head may be cut short.
func clusterBitsOf(name string, head []byte) (uint32, error) {
	if len(head) < 4 || binary.BigEndian.Uint32(head) != magic {
		return 0, &FormatError{
			File: name, Problem: "Image is not in qcow2 format", Field: "magic",
			Found: fmt.Sprintf("%x", head[:min(4, len(head))]), Expected: "514649fb", Err: ErrNotQcow2,
		}
	}
	if len(head) < headerLengthV2 {
		return 0, &FormatError{
			File: name, Problem: "qcow2 header too short", Field: "file size",
			Found: fmt.Sprint(len(head)), Expected: fmt.Sprintf("at least %d", headerLengthV2), Err: ErrNotQcow2,
		}
	}
	if v := binary.BigEndian.Uint32(head[4:]); v != 2 && v != 3 {
		return 0, &FormatError{
			File: name, Problem: fmt.Sprintf("Unsupported qcow2 version %d", v), Field: "version",
			Found: fmt.Sprint(v), Expected: "2 or 3", Err: ErrUnsupportedFeature,
		}
	}
	bits := binary.BigEndian.Uint32(head[20:])
	if bits < minClusterBits || bits > maxClusterBits {
		return 0, &FormatError{
			File: name, Problem: fmt.Sprintf("Unsupported cluster size: 2^%d", bits), Field: "cluster_bits",
			Found: fmt.Sprint(bits), Expected: fmt.Sprintf("%d to %d", minClusterBits, maxClusterBits),
		}
	}
	return bits, nil
}

// DecodeHeader decodes and validates a header from the first cluster of an image, or from what the file has
// of it. name is used in errors. It reads nothing else and keeps no reference to cluster.
func DecodeHeader(name string, cluster []byte) (*Header, error) {
	return decodeHeader(name, cluster, forUse)
}

func decodeHeader(name string, cluster []byte, why purpose) (*Header, error) {
	bits, err := clusterBitsOf(name, cluster)
	if err != nil {
		return nil, err
	}
	if len(cluster) > 1<<bits {
		cluster = cluster[:1<<bits]
	} else if len(cluster) < 1<<bits {
		cluster = append(cluster[:len(cluster):len(cluster)], make([]byte, 1<<bits-len(cluster))...)
	}
	be := binary.BigEndian
	h := &Header{
		Version:               be.Uint32(cluster[4:]),
		BackingFileOffset:     be.Uint64(cluster[8:]),
		BackingFileSize:       be.Uint32(cluster[16:]),
		ClusterBits:           bits,
		Size:                  be.Uint64(cluster[24:]),
		CryptMethod:           be.Uint32(cluster[32:]),
		L1Size:                be.Uint32(cluster[36:]),
		L1Offset:              be.Uint64(cluster[40:]),
		RefcountTableOffset:   be.Uint64(cluster[48:]),
		RefcountTableClusters: be.Uint32(cluster[56:]),
		NbSnapshots:           be.Uint32(cluster[60:]),
		SnapshotsOffset:       be.Uint64(cluster[64:]),
		RefcountOrder:         4,
		HeaderLength:          headerLengthV2,
	}
	if h.Version >= 3 {
		if err := h.decodeV3(name, cluster); err != nil {
			return nil, err
		}
	}
	end := len(cluster)
	if h.BackingFileOffset != 0 {
		if err := h.decodeBackingFile(name, cluster); err != nil {
			return nil, err
		}
		end = int(h.BackingFileOffset)
	}
	// The feature name table is wanted for the message about unknown features, so extensions come first;
	// they are interpreted only when the features are known.
	exts, err := decodeExtensions(name, cluster, int(h.HeaderLength), end)
	if err != nil {
		return nil, err
	}
	h.Extensions = exts
	if err := h.checkFeatures(name); err != nil {
		return nil, err
	}
	if err := h.applyExtensions(name); err != nil {
		return nil, err
	}
	if err := h.validate(name, why); err != nil {
		return nil, err
	}
	return h, nil
}

// decodeV3 decodes what version 3 adds.
func (h *Header) decodeV3(name string, cluster []byte) error {
	be := binary.BigEndian
	h.Incompatible = be.Uint64(cluster[72:])
	h.Compatible = be.Uint64(cluster[80:])
	h.Autoclear = be.Uint64(cluster[88:])
	h.RefcountOrder = be.Uint32(cluster[96:])
	h.HeaderLength = be.Uint32(cluster[100:])
	problem := ""
	switch {
	case h.HeaderLength < headerLengthV3:
		problem = "qcow2 header too short"
	case int64(h.HeaderLength) > int64(len(cluster)):
		problem = "qcow2 header exceeds cluster size"
	default:
		if h.HeaderLength > headerLengthV3 {
			h.CompressionType = cluster[headerLengthV3]
		}
		if h.HeaderLength > headerLengthOut {
			h.Unknown = append([]byte(nil), cluster[headerLengthOut:h.HeaderLength]...)
		}
		return nil
	}
	return &FormatError{
		File: name, Problem: problem, Field: "header_length",
		Found: fmt.Sprint(h.HeaderLength), Expected: fmt.Sprintf("%d to %d", headerLengthV3, len(cluster)),
	}
}

func (h *Header) decodeBackingFile(name string, cluster []byte) error {
	if h.BackingFileOffset > uint64(len(cluster)) {
		return &FormatError{
			File: name, Problem: "Invalid backing file offset", Field: "backing_file_offset",
			Found: fmt.Sprint(h.BackingFileOffset), Expected: fmt.Sprintf("at most the cluster size %d", len(cluster)),
		}
	}
	room := uint64(len(cluster)) - h.BackingFileOffset
	if limit := min(maxBackingName, room); uint64(h.BackingFileSize) > limit {
		return &FormatError{
			File: name, Problem: "Backing file name too long", Field: "backing_file_size",
			Found: fmt.Sprint(h.BackingFileSize), Expected: fmt.Sprintf("at most %d", limit),
		}
	}
	h.BackingFile = cString(cluster[h.BackingFileOffset:][:h.BackingFileSize])
	return nil
}

// checkFeatures refuses what this package does not know, by the names the image has for it.
func (h *Header) checkFeatures(name string) error {
	bad := func(problem, field string, found any, expected string, err error) error {
		return &FormatError{File: name, Problem: problem, Field: field, Found: fmt.Sprint(found), Expected: expected, Err: err}
	}
	if h.CompressionType > CompressionZstd {
		return bad(fmt.Sprintf("unknown compression type: %d", h.CompressionType), "compression_type",
			h.CompressionType, "0 (zlib) or 1 (zstd)", ErrUnsupportedFeature)
	}
	marked := h.Incompatible&IncompatCompression != 0
	if marked && h.CompressionType == CompressionDeflate {
		return bad("Compression type incompatible feature bit must not be set", "incompatible_features",
			fmt.Sprintf("%#x", h.Incompatible), "bit 3 clear, because compression_type is 0", nil)
	}
	if !marked && h.CompressionType != CompressionDeflate {
		return bad("Compression type incompatible feature bit must be set", "incompatible_features",
			fmt.Sprintf("%#x", h.Incompatible), fmt.Sprintf("bit 3 set, because compression_type is %d", h.CompressionType), nil)
	}
	unknown := h.Incompatible &^ knownIncompat
	if unknown == 0 {
		return nil
	}
	var names []string
	rest := unknown
	for _, e := range h.Extensions {
		if e.Type != extFeatureNames {
			continue
		}
		for _, n := range decodeFeatureNames(e.Data) {
			if n.kind == featureIncompatible && n.bit < 64 && rest>>n.bit&1 != 0 {
				names = append(names, n.name)
				rest &^= 1 << n.bit
			}
		}
	}
	if rest != 0 {
		names = append(names, fmt.Sprintf("Unknown incompatible feature: %x", rest))
	}
	return bad("Unsupported qcow2 feature(s): "+strings.Join(names, ", "), "incompatible_features",
		fmt.Sprintf("%#x", h.Incompatible), fmt.Sprintf("no bits but %#x", knownIncompat), ErrUnsupportedFeature)
}

// validate checks the fields that say where the tables are, and that the features go together.
func (h *Header) validate(name string, why purpose) error {
	bad := func(problem, field string, found any, expected string) error {
		return &FormatError{File: name, Problem: problem, Field: field, Found: fmt.Sprint(found), Expected: expected}
	}
	if h.CryptMethod > cryptLUKS {
		return bad(fmt.Sprintf("Unsupported encryption method %d", h.CryptMethod), "crypt_method", h.CryptMethod, "0, 1 or 2")
	}
	if h.CryptMethod != cryptNone && why == forUse {
		return &FormatError{
			File: name, Problem: "Encrypted images are not supported", Field: "crypt_method",
			Found: fmt.Sprint(h.CryptMethod), Expected: "0 (no encryption)", Err: ErrUnsupportedFeature,
		}
	}
	if h.RefcountOrder > maxRefcountOrder {
		return bad("Reference count entry width too large; may not exceed 64 bits", "refcount_order",
			h.RefcountOrder, fmt.Sprintf("at most %d", maxRefcountOrder))
	}
	if h.ExtendedL2() && h.ClusterBits < minClusterBitsExtendedL2 {
		return bad(fmt.Sprintf("Unsupported subcluster size: %d", h.ClusterSize()/subclusters), "cluster_bits",
			h.ClusterBits, fmt.Sprintf("at least %d, because L2 entries are extended", minClusterBitsExtendedL2))
	}
	if h.Autoclear&AutoclearRawData != 0 {
		if !h.HasDataFile() {
			return bad("data-file-raw requires a data file", "autoclear_features", fmt.Sprintf("%#x", h.Autoclear),
				"bit 1 clear, because there is no external data file")
		}
		if h.BackingFile != "" {
			return bad("Backing file and data-file-raw cannot be used at the same time", "autoclear_features",
				fmt.Sprintf("%#x", h.Autoclear), "bit 1 clear, because there is a backing file")
		}
	}
	if err := h.validateL1(name); err != nil {
		return err
	}
	if h.RefcountTableClusters == 0 && why != forCheck {
		return bad("Image does not contain a reference count table", "refcount_table_clusters", 0, "at least 1")
	}
	if err := h.checkTable(name, "Reference count table", "refcount table", h.RefcountTableOffset,
		uint64(h.RefcountTableClusters), uint64(h.ClusterSize()), maxRefcountTableBytes); err != nil {
		return err
	}
	if why == forCheck {
		return nil // the checker reports a damaged pointer itself
	}
	return h.validateSnapshotTable(name)
}

// validateSnapshotTable checks the header's pointer to the snapshot table.
func (h *Header) validateSnapshotTable(name string) error {
	if h.NbSnapshots > maxSnapshots {
		return &FormatError{
			File: name, Problem: "Snapshot table too large", Field: "nb_snapshots",
			Found: fmt.Sprint(h.NbSnapshots), Expected: fmt.Sprintf("at most %d", maxSnapshots),
		}
	}
	return h.checkTable(name, "Snapshot table", "snapshot table", h.SnapshotsOffset,
		uint64(h.NbSnapshots), snapshotFixedSize, maxSnapshotTableBytes)
}

func (h *Header) validateL1(name string) error {
	l2Bits := h.ClusterBits - 3
	if h.ExtendedL2() {
		l2Bits--
	}
	span := h.ClusterBits + l2Bits // log2 of the bytes an L1 entry maps
	var needed uint64
	if h.Size > 0 {
		needed = (h.Size-1)>>span + 1
	}
	if h.Size > 1<<63-1 || needed > maxL1Index {
		return &FormatError{
			File: name, Problem: "Image is too big", Field: "size",
			Found: fmt.Sprint(h.Size), Expected: fmt.Sprintf("at most %d bytes with clusters of %d", min(1<<63-1, uint64(maxL1Index)<<span), h.ClusterSize()),
		}
	}
	if err := h.checkTable(name, "Active L1 table", "L1 table", h.L1Offset, uint64(h.L1Size), 8, maxL1Bytes); err != nil {
		return err
	}
	if uint64(h.L1Size) < needed {
		return &FormatError{
			File: name, Problem: "L1 table is too small", Field: "l1_size",
			Found: fmt.Sprint(h.L1Size), Expected: fmt.Sprintf("at least %d, because the disk has %d bytes", needed, h.Size),
		}
	}
	return nil
}

// checkTable refuses a table of n entries of entrySize bytes at offset that is larger than limit bytes, not
// cluster-aligned, or ends past 2^63-1. what starts QEMU's message, field names the header field.
func (h *Header) checkTable(name, what, field string, offset, n, entrySize, limit uint64) error {
	if n > limit/entrySize {
		return &FormatError{
			File: name, Problem: what + " too large", Field: field + " size",
			Found: fmt.Sprintf("%d entries of %d bytes", n, entrySize), Expected: fmt.Sprintf("at most %d entries", limit/entrySize),
		}
	}
	if offset&uint64(h.ClusterSize()-1) != 0 || offset > 1<<63-1-n*entrySize {
		return &FormatError{
			File: name, Problem: what + " offset invalid", Field: field + " offset",
			Found: fmt.Sprintf("%#x", offset), Expected: fmt.Sprintf("a multiple of the cluster size %d, its end below 2^63", h.ClusterSize()),
		}
	}
	return nil
}

// Encode returns the whole header cluster. It sets HeaderLength, BackingFileOffset and BackingFileSize to
// what it writes. The extensions it knows come from their fields, the feature name table is made anew, and
// those it does not know follow as they were. It is an error if all that does not fit in a cluster.
//
// The first 512 bytes hold every fixed field; a rewrite that must survive a crash changes what they point to
// first (qcow2 specification, "Header").
func (h *Header) Encode() ([]byte, error) { return h.encode(0) }

// encode is Encode with the backing file name at or after the given byte of the cluster.
func (h *Header) encode(nameAt int64) ([]byte, error) {
	if h.Version == 2 && (h.Incompatible|h.Compatible|h.Autoclear != 0 || h.RefcountOrder != 4 ||
		h.CompressionType != CompressionDeflate || len(h.Unknown) != 0) {
		return nil, errors.New("a version 2 header has no place for features, other counts than 16 bits, or compression types")
	}
	if len(h.BackingFile) > maxBackingName {
		return nil, fmt.Errorf("backing file name: %d bytes, at most %d fit", len(h.BackingFile), maxBackingName)
	}
	length := headerLengthV2
	if h.Version >= 3 {
		length = headerLengthOut + (len(h.Unknown)+7)&^7
	}
	out := make([]byte, length, h.ClusterSize())
	if h.Version >= 3 && len(h.Unknown) > 0 {
		copy(out[headerLengthOut:], h.Unknown)
	}
	out = h.appendExtensions(out)
	h.HeaderLength = uint32(length)
	h.BackingFileOffset, h.BackingFileSize = 0, 0
	end := int64(len(out))
	if h.BackingFile != "" {
		end = max(end, nameAt)
		h.BackingFileOffset, h.BackingFileSize = uint64(end), uint32(len(h.BackingFile))
		end += int64(len(h.BackingFile))
	}
	if end > h.ClusterSize() {
		return nil, &headerFullError{end, h.ClusterSize()}
	}
	h.encodeFields(out)
	out = out[:h.ClusterSize()]
	copy(out[h.BackingFileOffset:], h.BackingFile)
	return out, nil
}

// appendExtensions appends the extension area and its end marker.
func (h *Header) appendExtensions(out []byte) []byte {
	if h.BackingFormat != "" {
		out = appendExtension(out, extBackingFormat, []byte(h.BackingFormat))
	}
	if h.DataFile != "" {
		out = appendExtension(out, extDataFile, []byte(h.DataFile))
	}
	if c := h.Crypto; c != nil {
		data := binary.BigEndian.AppendUint64(nil, c.Offset)
		out = appendExtension(out, extCrypto, binary.BigEndian.AppendUint64(data, c.Length))
	}
	if j := h.Journal; j != nil {
		out = appendExtension(out, extJournal, j.encode())
	}
	if names := h.featureNames(); len(names) > 0 {
		out = appendExtension(out, extFeatureNames, encodeFeatureNames(names))
	}
	if b := h.Bitmaps; b != nil {
		data := binary.BigEndian.AppendUint32(nil, b.Count)
		data = binary.BigEndian.AppendUint32(data, 0)
		data = binary.BigEndian.AppendUint64(data, b.DirectorySize)
		out = appendExtension(out, extBitmaps, binary.BigEndian.AppendUint64(data, b.DirectoryOffset))
	}
	for _, e := range h.Extensions {
		if !e.known() {
			out = appendExtension(out, e.Type, e.Data)
		}
	}
	return appendExtension(out, extEnd, nil)
}

// encodeFields writes the fixed fields to the start of the header cluster.
func (h *Header) encodeFields(out []byte) {
	be := binary.BigEndian
	be.PutUint32(out[0:], magic)
	be.PutUint32(out[4:], h.Version)
	be.PutUint64(out[8:], h.BackingFileOffset)
	be.PutUint32(out[16:], h.BackingFileSize)
	be.PutUint32(out[20:], h.ClusterBits)
	be.PutUint64(out[24:], h.Size)
	be.PutUint32(out[32:], h.CryptMethod)
	be.PutUint32(out[36:], h.L1Size)
	be.PutUint64(out[40:], h.L1Offset)
	be.PutUint64(out[48:], h.RefcountTableOffset)
	be.PutUint32(out[56:], h.RefcountTableClusters)
	be.PutUint32(out[60:], h.NbSnapshots)
	be.PutUint64(out[64:], h.SnapshotsOffset)
	if h.Version < 3 {
		return
	}
	be.PutUint64(out[72:], h.Incompatible)
	be.PutUint64(out[80:], h.Compatible)
	be.PutUint64(out[88:], h.Autoclear)
	be.PutUint32(out[96:], h.RefcountOrder)
	be.PutUint32(out[100:], h.HeaderLength)
	out[headerLengthV3] = h.CompressionType
}

// cString cuts a fixed-size or unterminated string at its first NUL byte.
func cString[T string | []byte](b T) string {
	s, _, _ := strings.Cut(string(b), "\x00")
	return s
}

// printable replaces what could garble a terminal in a name that comes from an image.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}
