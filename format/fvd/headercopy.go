package fvd

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/platter-disk/platter/storage"
)

// The fields of the header lie in its sectors 0 to 6; a crash can tear a write of several of them. A change of more
// than one sector is therefore first made durable as a copy, in sectors 7 to 13, sealed by a checksum in sector 14;
// then the header itself is written, and the copy is cleared. As long as the copy is sealed, it is the header: readers
// take it for that, and whoever opens the image for writing puts it in place first. All of it lies in what the
// proposal reserves, where readers that do not know of it do not look.
const (
	headerSectors   = headerCopyAt                 // bytes of the sectors with fields
	headerCopyAt    = mutableSector + sectorSize   // byte offset of the copy
	headerSealAt    = headerCopyAt + headerSectors // u32 magic, u32 CRC-32C of the copy
	headerCopyEnd   = headerSealAt + sectorSize    // the byte after copy and seal
	headerSealMagic = 0x43445646                   // "FVDC"
)

// sealedHeaderCopy is the sealed copy in the first headerSize bytes of an image; nil if there is none.
func sealedHeaderCopy(b []byte) []byte {
	if len(b) < headerSealAt+8 || binary.LittleEndian.Uint32(b[headerSealAt:]) != headerSealMagic {
		return nil
	}
	sealed := b[headerCopyAt:headerSealAt]
	if binary.LittleEndian.Uint32(b[headerSealAt+4:]) != crc32.Checksum(sealed, castagnoliTable()) {
		return nil
	}
	return sealed
}

// readHeaderBytes reads what there is of the first headerSize bytes.
func readHeaderBytes(f storage.File) ([]byte, error) {
	size, err := f.Size()
	if err != nil {
		return nil, fmt.Errorf("fvd image %s: %w", f.Name(), err)
	}
	b := make([]byte, min(size, headerSize))
	if err := storage.ReadFull(f, b, 0); err != nil {
		return nil, fmt.Errorf("fvd image %s: reading the header: %w", f.Name(), err)
	}
	return b, nil
}

// finishHeader puts a sealed copy of the header in place, durably. Writers call it before they change anything.
func finishHeader(f storage.File) error {
	b, err := readHeaderBytes(f)
	if err != nil {
		return err
	}
	sealed := sealedHeaderCopy(b)
	if sealed == nil {
		return nil
	}
	if err := placeHeader(f, sealed); err != nil {
		return fmt.Errorf("fvd image %s: completing a change of the header: %w", f.Name(), err)
	}
	return nil
}

// placeHeader writes sectors 0 to 6 and then clears their copy.
func placeHeader(f storage.File, sectors []byte) error {
	if _, err := f.WriteAt(sectors, 0); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if _, err := f.WriteAt(make([]byte, headerCopyEnd-headerCopyAt), headerCopyAt); err != nil {
		return err
	}
	return f.Sync()
}

// replaceHeader makes h the header of an image that nobody has open; a crash leaves the old one or h. What it holds
// of an earlier replacement was finished.
func replaceHeader(f storage.File, h *Header) error {
	b, err := h.encode()
	if err != nil {
		return err
	}
	old, err := readHeaderBytes(f)
	if err != nil {
		return err
	}
	sectors := b[:headerSectors]
	changed, last := 0, 0
	for at := 0; at < headerSectors; at += sectorSize {
		if !bytes.Equal(old[at:at+sectorSize], sectors[at:at+sectorSize]) {
			changed, last = changed+1, at
		}
	}
	if changed <= 1 {
		if _, err := f.WriteAt(sectors[last:last+sectorSize], int64(last)); err != nil {
			return err
		}
		return f.Sync()
	}
	sealed := make([]byte, headerCopyEnd-headerCopyAt)
	copy(sealed, sectors)
	binary.LittleEndian.PutUint32(sealed[headerSectors:], headerSealMagic)
	binary.LittleEndian.PutUint32(sealed[headerSectors+4:], crc32.Checksum(sectors, castagnoliTable()))
	if _, err := f.WriteAt(sealed, headerCopyAt); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return placeHeader(f, sectors)
}
