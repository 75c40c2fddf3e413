package qcow2

import (
	"encoding/binary"
	"fmt"

	"github.com/platter-disk/platter/storage"
)

const (
	bitmapFixedSize = 24 // bytes of a directory entry before its extra data
	bitmapTypeDirty = 1  // the only type the qcow2 specification knows

	bitmapInUse           = 1 << 0 // was not stored after its last use: inconsistent
	bitmapAuto            = 1 << 1 // tracks every write
	bitmapExtraCompatible = 1 << 2 // may be used although the extra data is not understood
	bitmapKnownFlags      = bitmapInUse | bitmapAuto | bitmapExtraCompatible
)

// Bitmap is one entry of the directory of persistent dirty bitmaps. Platter keeps bitmaps that it is not
// asked to change, and does not use them.
type Bitmap struct {
	Name            string
	GranularityBits uint8  // a bit stands for 1<<GranularityBits bytes of the disk; 9..31
	Flags           uint32 // in-use, auto, extra-data-compatible: bits 0 to 2
	TableOffset     uint64 // bytes in the image file, cluster-aligned
	TableSize       uint32 // entries: clusters of bits
	ExtraSize       uint32 // bytes of extra data in the entry
}

// InUse reports that the bitmap was not stored after its last use and does not match the disk.
func (b *Bitmap) InUse() bool { return b.Flags&bitmapInUse != 0 }

// Auto reports that the bitmap tracks every write to the disk.
func (b *Bitmap) Auto() bool { return b.Flags&bitmapAuto != 0 }

// bitmapEntrySize is the size of the entry that starts with b (bitmapFixedSize bytes), padding included.
func bitmapEntrySize(b []byte) int64 {
	n := bitmapFixedSize + int64(binary.BigEndian.Uint32(b[20:])) + int64(binary.BigEndian.Uint16(b[18:]))
	return (n + 7) &^ 7
}

// decodeBitmap decodes and validates the directory entry that starts with b (bitmapFixedSize bytes), whose
// name was fetched separately. Errors name the field.
func decodeBitmap(b []byte, name string, clusterSize int64) (Bitmap, error) {
	be := binary.BigEndian
	m := Bitmap{
		Name:            name,
		TableOffset:     be.Uint64(b[0:]),
		TableSize:       be.Uint32(b[8:]),
		Flags:           be.Uint32(b[12:]),
		GranularityBits: b[17],
		ExtraSize:       be.Uint32(b[20:]),
	}
	bad := func(field string, found, expected any) error {
		return fmt.Errorf("bitmap %q: %s is %v, expected %v", printable(name), field, found, expected)
	}
	switch {
	case name == "" || len(name) > maxBitmapName:
		return m, bad("name_size", len(name), fmt.Sprintf("1 to %d", maxBitmapName))
	case b[16] != bitmapTypeDirty:
		return m, bad("type", b[16], bitmapTypeDirty)
	case m.Flags&^bitmapKnownFlags != 0:
		return m, bad("flags", fmt.Sprintf("%#x", m.Flags), fmt.Sprintf("no bits but %#x", bitmapKnownFlags))
	case m.GranularityBits < minBitmapGranularityBits || m.GranularityBits > maxBitmapGranularityBits:
		return m, bad("granularity_bits", m.GranularityBits, fmt.Sprintf("%d to %d", minBitmapGranularityBits, maxBitmapGranularityBits))
	case m.TableSize == 0 || m.TableSize > maxBitmapTableEntries || int64(m.TableSize) > maxBitmapBytes/clusterSize:
		return m, bad("table_size", m.TableSize, fmt.Sprintf("1 to %d", min(maxBitmapTableEntries, maxBitmapBytes/clusterSize)))
	case m.TableOffset == 0 || m.TableOffset&uint64(clusterSize-1) != 0 || m.TableOffset > entryOffsetMask:
		return m, bad("table_offset", fmt.Sprintf("%#x", m.TableOffset), fmt.Sprintf("a multiple of %d below 2^56, not 0", clusterSize))
	}
	return m, nil
}

// bitmapTableEntry splits an entry of a bitmap table: the cluster of bits, 0 if all its bits are equal.
func bitmapTableEntry(e uint64, clusterSize int64) (hostOff, error) {
	off := e & entryOffsetMask
	if e&^(entryOffsetMask|1) != 0 || off&uint64(clusterSize-1) != 0 || off != 0 && e&1 != 0 {
		return 0, fmt.Errorf("bitmap table entry is %#x, expected a multiple of %d below 2^56, 0 or 1", e, clusterSize)
	}
	return hostOff(off), nil
}

// forEachBitmap reads the bitmap directory entry by entry, in bounded memory, and calls fn for each. A
// directory that breaks a rule of the qcow2 specification is an error of type *FormatError.
func forEachBitmap(f storage.File, h *Header, fn func(Bitmap) error) error {
	if h.Bitmaps == nil {
		return nil
	}
	bad := func(field, found, expected string) error {
		return &FormatError{File: f.Name(), Problem: "Broken bitmap directory", Field: field, Found: found, Expected: expected}
	}
	start, end := int64(h.Bitmaps.DirectoryOffset), int64(h.Bitmaps.DirectorySize)
	var pos int64
	for i := range h.Bitmaps.Count {
		what := fmt.Sprintf("entry %d", i)
		if end-pos < bitmapFixedSize {
			return bad(what, fmt.Sprintf("the end of the directory at byte %d", end), fmt.Sprintf("%d entries", h.Bitmaps.Count))
		}
		var fixed [bitmapFixedSize]byte
		if err := storage.ReadFull(f, fixed[:], start+pos); err != nil {
			return fmt.Errorf("%s: read the bitmap directory: %w", f.Name(), err)
		}
		size := bitmapEntrySize(fixed[:])
		if size > end-pos {
			return bad(what, fmt.Sprintf("%d bytes", size), fmt.Sprintf("at most %d, where the directory ends", end-pos))
		}
		extra := int64(binary.BigEndian.Uint32(fixed[20:]))
		name := make([]byte, binary.BigEndian.Uint16(fixed[18:]))
		if err := storage.ReadFull(f, name, start+pos+bitmapFixedSize+extra); err != nil {
			return fmt.Errorf("%s: read the bitmap directory: %w", f.Name(), err)
		}
		m, err := decodeBitmap(fixed[:], string(name), h.ClusterSize())
		if err != nil {
			return &FormatError{File: f.Name(), Problem: "Broken bitmap directory", Field: what, Found: err.Error(), Expected: "a valid entry"}
		}
		if err := fn(m); err != nil {
			return err
		}
		pos += size
	}
	if pos != end {
		return bad("bitmap_directory_size", fmt.Sprint(end), fmt.Sprintf("%d, the size of its %d entries", pos, h.Bitmaps.Count))
	}
	return nil
}
