package qcow2

import (
	"encoding/binary"
	"fmt"
)

// Header extension types of the qcow2 specification, "Header extensions".
const (
	extEnd           uint32 = 0
	extBackingFormat uint32 = 0xE2792ACA
	extFeatureNames  uint32 = 0x6803F857
	extBitmaps       uint32 = 0x23852875
	extCrypto        uint32 = 0x0537BE77
	extDataFile      uint32 = 0x44415441
)

// Extension is one header extension as it stands in the file.
type Extension struct {
	Type uint32
	Data []byte // without the padding to a multiple of 8
}

// BitmapsExtension says where the directory of persistent dirty bitmaps lies.
type BitmapsExtension struct {
	Count           uint32 // bitmaps, 1..65535
	DirectorySize   uint64 // bytes, at most 65535 KiB
	DirectoryOffset uint64 // bytes, cluster-aligned
}

// CryptoExtension says where the LUKS header of an encrypted image lies.
type CryptoExtension struct {
	Offset uint64 // bytes, cluster-aligned
	Length uint64 // bytes
}

// featureKind is the feature word that an entry of the feature name table belongs to.
type featureKind uint8

const (
	featureIncompatible featureKind = iota
	featureCompatible
	featureAutoclear
)

// featureName is one entry of the feature name table: what to call a bit in an error message.
type featureName struct {
	kind featureKind
	bit  uint8 // 0..63
	name string
}

const (
	featureEntrySize = 48
	featureNameSize  = 46

	// minClusterFeatureNames is the smallest cluster whose header gets a whole feature name table; in smaller
	// ones the space is left to the backing file name, as QEMU does.
	minClusterFeatureNames = 4096 + 1

	// Smaller headers name the journal alone, if that leaves room for a backing file name of any length and for
	// the header to be rewritten beside itself.
	minClusterJournalName        = 4096
	minClusterJournalNameWithout = 1024 // a backing file
)

// featureNames is what the feature name table says; nothing means that there is none.
func (h *Header) featureNames() []featureName {
	var names []featureName
	size := h.ClusterSize()
	if h.Version >= 3 && size >= minClusterFeatureNames {
		names = knownFeatures()
	}
	if h.Journal != nil && (size >= minClusterJournalName || h.BackingFile == "" && size >= minClusterJournalNameWithout) {
		names = append(names, featureName{featureIncompatible, journalFeatureBit, journalFeatureName})
	}
	return names
}

// knownFeatures is what the feature name table of a written header says.
func knownFeatures() []featureName {
	return []featureName{
		{featureIncompatible, 0, "dirty bit"},
		{featureIncompatible, 1, "corrupt bit"},
		{featureIncompatible, 2, "external data file"},
		{featureIncompatible, 3, "compression type"},
		{featureIncompatible, 4, "extended L2 entries"},
		{featureCompatible, 0, "lazy refcounts"},
		{featureAutoclear, 0, "bitmaps"},
		{featureAutoclear, 1, "raw external data"},
	}
}

func encodeFeatureNames(names []featureName) []byte {
	out := make([]byte, 0, len(names)*featureEntrySize)
	for _, n := range names {
		var entry [featureEntrySize]byte
		entry[0] = byte(n.kind)
		entry[1] = n.bit
		copy(entry[2:], n.name)
		out = append(out, entry[:]...)
	}
	return out
}

// decodeFeatureNames reads the table of a foreign image. It is used for messages only, so an incomplete
// last entry is ignored rather than refused.
func decodeFeatureNames(data []byte) []featureName {
	var names []featureName
	for ; len(data) >= featureEntrySize; data = data[featureEntrySize:] {
		names = append(names, featureName{
			kind: featureKind(data[0]),
			bit:  data[1],
			name: printable(cString(data[2 : 2+featureNameSize])),
		})
	}
	return names
}

// decodeExtensions splits the extension area, which starts at start and ends before end, into its
// extensions. It stops at the end marker and does not interpret what it finds.
func decodeExtensions(name string, cluster []byte, start, end int) ([]Extension, error) {
	var exts []Extension
	for off := start; off+8 <= end; {
		typ := binary.BigEndian.Uint32(cluster[off:])
		length := int64(binary.BigEndian.Uint32(cluster[off+4:]))
		if typ == extEnd {
			break
		}
		off += 8
		if length > int64(end-off) {
			return nil, &FormatError{
				File: name, Problem: "Header extension too large",
				Field:    fmt.Sprintf("length of header extension 0x%08x at byte %d", typ, off-8),
				Found:    fmt.Sprint(length),
				Expected: fmt.Sprintf("at most %d", end-off),
			}
		}
		exts = append(exts, Extension{Type: typ, Data: append([]byte(nil), cluster[off:off+int(length)]...)})
		off += (int(length) + 7) &^ 7
	}
	return exts, nil
}

// appendExtension appends an extension and its padding to a header that is being built.
func appendExtension(out []byte, typ uint32, data []byte) []byte {
	out = binary.BigEndian.AppendUint32(out, typ)
	out = binary.BigEndian.AppendUint32(out, uint32(len(data)))
	out = append(out, data...)
	return append(out, make([]byte, -len(data)&7)...)
}

// known reports whether Header.Encode writes this extension from fields of the Header.
func (e Extension) known() bool {
	switch e.Type {
	case extBackingFormat, extFeatureNames, extBitmaps, extCrypto, extDataFile, extJournal:
		return true
	}
	return false
}

// applyExtensions interprets the extensions that this package knows.
func (h *Header) applyExtensions(name string) error {
	seen := make(map[uint32]bool)
	for _, e := range h.Extensions {
		if !e.known() {
			continue
		}
		if seen[e.Type] {
			return &FormatError{
				File: name, Problem: fmt.Sprintf("Duplicate header extension 0x%08x", e.Type),
				Field: "header extensions", Found: "the same known type twice", Expected: "each known type at most once",
			}
		}
		seen[e.Type] = true
		var err error
		switch e.Type {
		case extBackingFormat:
			if len(e.Data) > maxBackingFormat {
				err = &FormatError{
					File: name, Problem: fmt.Sprintf("ext_backing_format: len=%d too large (>=%d)", len(e.Data), maxBackingFormat+1),
					Field: "length of the backing format extension", Found: fmt.Sprint(len(e.Data)),
					Expected: fmt.Sprintf("at most %d", maxBackingFormat),
				}
			}
			h.BackingFormat = cString(e.Data)
		case extDataFile:
			h.DataFile = cString(e.Data)
		case extBitmaps:
			err = h.applyBitmaps(name, e.Data)
		case extCrypto:
			err = h.applyCrypto(name, e.Data)
		case extJournal:
			h.Journal, err = h.journalExtension(name, e.Data)
		}
		if err != nil {
			return err
		}
	}
	if h.Incompatible&IncompatJournal != 0 && h.Journal == nil {
		return &FormatError{
			File: name, Problem: "the journal feature bit is set without a journal extension", Field: "header extensions",
			Found: "no journal extension", Expected: fmt.Sprintf("one, because incompatible feature bit %d is set", journalFeatureBit),
		}
	}
	if h.CryptMethod == cryptLUKS && h.Crypto == nil {
		return &FormatError{
			File: name, Problem: "Missing CRYPTO header for crypt method 2",
			Field: "header extensions", Found: "no encryption extension", Expected: "one, because crypt_method is 2",
		}
	}
	return nil
}

// applyBitmaps reads the bitmaps extension, whose values mean something only while the autoclear bit says
// that they are consistent with the disk.
func (h *Header) applyBitmaps(name string, data []byte) error {
	bad := func(problem, field string, found any, expected string) error {
		return &FormatError{File: name, Problem: problem, Field: field, Found: fmt.Sprint(found), Expected: expected}
	}
	if h.Autoclear&AutoclearBitmaps == 0 {
		return nil
	}
	if len(data) != 24 {
		return bad("bitmaps_ext: Invalid extension length", "length of the bitmaps extension", len(data), "24")
	}
	b := &BitmapsExtension{
		Count:           binary.BigEndian.Uint32(data),
		DirectorySize:   binary.BigEndian.Uint64(data[8:]),
		DirectoryOffset: binary.BigEndian.Uint64(data[16:]),
	}
	if r := binary.BigEndian.Uint32(data[4:]); r != 0 {
		return bad("bitmaps_ext: Reserved field is not zero", "reserved field of the bitmaps extension", r, "0")
	}
	if b.Count == 0 {
		return bad("found bitmaps extension with zero bitmaps", "nb_bitmaps", b.Count, "at least 1")
	}
	if b.Count > maxBitmaps {
		return bad(fmt.Sprintf("bitmaps_ext: Image has %d bitmaps, exceeding the QEMU supported maximum of %d", b.Count, maxBitmaps),
			"nb_bitmaps", b.Count, fmt.Sprintf("at most %d", maxBitmaps))
	}
	if b.DirectoryOffset == 0 || b.DirectoryOffset&uint64(h.ClusterSize()-1) != 0 || b.DirectoryOffset > 1<<63-1-maxBitmapDirectoryBytes {
		return bad("bitmaps_ext: invalid bitmap directory offset", "bitmap_directory_offset", b.DirectoryOffset,
			fmt.Sprintf("a multiple of the cluster size %d, not 0", h.ClusterSize()))
	}
	if b.DirectorySize > maxBitmapDirectoryBytes {
		return bad(fmt.Sprintf("bitmaps_ext: bitmap directory size (%d) exceeds the maximum supported size (%d)", b.DirectorySize, maxBitmapDirectoryBytes),
			"bitmap_directory_size", b.DirectorySize, fmt.Sprintf("at most %d", maxBitmapDirectoryBytes))
	}
	if b.DirectorySize == 0 {
		return bad("Requested bitmap directory size is zero", "bitmap_directory_size", 0, "at least 32")
	}
	h.Bitmaps = b
	return nil
}

// journalExtension reads the journal extension. One that is damaged does not matter while there is no journal.
func (h *Header) journalExtension(name string, data []byte) (*JournalExtension, error) {
	live := h.Incompatible&IncompatJournal != 0
	j, err := decodeJournalExtension(name, data, h.ClusterBits, live)
	if err != nil && !live {
		return nil, nil
	}
	return j, err
}

func (h *Header) applyCrypto(name string, data []byte) error {
	if h.CryptMethod != cryptLUKS {
		return &FormatError{
			File: name, Problem: "CRYPTO header extension only expected with LUKS encryption method",
			Field: "crypt_method", Found: fmt.Sprint(h.CryptMethod), Expected: fmt.Sprint(cryptLUKS),
		}
	}
	if len(data) != 16 {
		return &FormatError{
			File: name, Problem: "Invalid CRYPTO header extension length",
			Field: "length of the encryption extension", Found: fmt.Sprint(len(data)), Expected: "16",
		}
	}
	c := &CryptoExtension{Offset: binary.BigEndian.Uint64(data), Length: binary.BigEndian.Uint64(data[8:])}
	if err := h.checkTable(name, "Encryption header", "encryption header offset", c.Offset, c.Length, 1, 1<<40); err != nil {
		return err
	}
	h.Crypto = c
	return nil
}
