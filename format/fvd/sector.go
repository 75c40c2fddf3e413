package fvd

import (
	"encoding/binary"
	"hash/crc32"
)

// The trailer of a journal sector (FVD specification 4.2). A parser that does not know it stops at the EMPTY
// record that always precedes it.
const (
	trailerAt    = 496 // u32 magic, u32 CRC-32C, u64 generation
	trailerMagic = 0x4C545646

	sectorRoomTrailer = trailerAt - 4 // bytes for records: EMPTY follows them
)

// sectorState says what a journal sector is before its records are looked at.
type sectorState uint8

const (
	sectorBlank   sectorState = iota // EMPTY or zeros from the first byte on
	sectorLive                       // holds records
	sectorDamaged                    // trailer missing or wrong: torn, or never ours
)

// sectorRoom is how many bytes of records fit into a journal sector.
func sectorRoom(trailer bool) int {
	if trailer {
		return sectorRoomTrailer
	}
	return sectorSize
}

// sealSector finishes a sector whose records end at byte n: EMPTY, zeros and, where the image has it, the
// trailer.
func sealSector(sec []byte, n int, trailer bool, generation epoch, castagnoli *crc32.Table) {
	clear(sec[n:])
	if n+4 <= sectorSize {
		binary.LittleEndian.PutUint32(sec[n:], recordEmpty)
	}
	if !trailer {
		return
	}
	binary.LittleEndian.PutUint32(sec[trailerAt:], trailerMagic)
	binary.LittleEndian.PutUint64(sec[trailerAt+8:], uint64(generation))
	binary.LittleEndian.PutUint32(sec[trailerAt+4:], sectorChecksum(sec, castagnoli))
}

// sectorChecksum covers all of the sector but the checksum itself.
func sectorChecksum(sec []byte, castagnoli *crc32.Table) uint32 {
	return crc32.Update(crc32.Checksum(sec[:trailerAt+4], castagnoli), castagnoli, sec[trailerAt+8:sectorSize])
}

// openSector classifies a sector and returns the part that holds its records. generation is 0 without trailer.
// Without a table for checksums they are not compared.
func openSector(sec []byte, trailer bool, castagnoli *crc32.Table) (state sectorState, records []byte, generation epoch) {
	kind := binary.LittleEndian.Uint32(sec)
	blank := kind == recordEmpty || kind == 0
	if !trailer {
		if blank {
			return sectorBlank, nil, 0
		}
		return sectorLive, sec[:sectorSize], 0
	}
	if binary.LittleEndian.Uint32(sec[trailerAt:]) != trailerMagic ||
		castagnoli != nil && binary.LittleEndian.Uint32(sec[trailerAt+4:]) != sectorChecksum(sec, castagnoli) {
		if blank {
			return sectorBlank, nil, 0
		}
		return sectorDamaged, nil, 0
	}
	if blank {
		return sectorBlank, nil, 0
	}
	return sectorLive, sec[:trailerAt], epoch(binary.LittleEndian.Uint64(sec[trailerAt+8:]))
}

// castagnoliTable is the table of CRC-32C. crc32.MakeTable hands out one shared table.
func castagnoliTable() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }
