package crashlab

import (
	"fmt"
	"math/bits"

	"encoding/binary"

	"github.com/platter-disk/platter/storage"
)

// Model says what a crash may do to what was not yet durable.
type Model struct {
	// Tear is the unit in bytes that a crash keeps or loses whole: 512 or 4096.
	Tear int64
	// Poison makes a sector whose growth of the file survived, but whose bytes did not, read as Poison
	// instead of zeros: a file system that extends a file before it writes the data.
	Poison bool
	// Zap lets a unit that was being written read as Poison: a device that loses the whole physical sector
	// when the power fails in the middle of writing it. Only formats with checksums survive it.
	Zap bool
}

// maxUnitSectors is the largest Tear in sectors.
const maxUnitSectors = 8

func (m Model) validate() error {
	if m.Tear != storage.SectorSize && m.Tear != maxUnitSectors*storage.SectorSize {
		return fmt.Errorf("crashlab: model: tear is %d bytes: want %d or %d", m.Tear, storage.SectorSize, maxUnitSectors*storage.SectorSize)
	}
	return nil
}

// sectors is the number of sectors in a unit.
func (m Model) sectors() int64 { return m.Tear / storage.SectorSize }

// String returns for example "torn at 512 bytes, poison".
func (m Model) String() string {
	s := fmt.Sprintf("torn at %d bytes", m.Tear)
	if m.Poison {
		s += ", poison"
	}
	if m.Zap {
		s += ", zap"
	}
	return s
}

// unitData is the contents of one unit: as many sectors as the model's unit has, nil where never written.
type unitData [maxUnitSectors]*sector

func resolve(s, blank *sector) *sector {
	if s == nil {
		return blank
	}
	return s
}

func sameSector(a, b, blank *sector) bool {
	a, b = resolve(a, blank), resolve(b, blank)
	return a == b || *a == *b
}

func (d *unitData) same(e *unitData, blank *sector) bool {
	for i := range d {
		if !sameSector(d[i], e[i], blank) {
			return false
		}
	}
	return true
}

// clip drops what lies at or past size from a unit that starts at byte start.
func (d *unitData) clip(start, size int64) unitData {
	var out unitData
	for i := range d {
		out[i] = clipSector(d[i], start+int64(i)*storage.SectorSize, size)
	}
	return out
}

// clipSector drops the bytes at or past size from the sector that starts at byte start.
func clipSector(s *sector, start, size int64) *sector {
	switch {
	case s == nil || start >= size:
		return nil
	case start+storage.SectorSize <= size:
		return s
	}
	part := *s
	clear(part[size-start:])
	return &part
}

// The fingerprint of a file is the sum over its sectors of contribution: independent of the order in which it
// is taken, and cheap to correct when a sector changes. Never written sectors contribute nothing. Two states
// with different contents and equal fingerprints (64 bits) would count as one.

// contribution is what sector i with contents s adds to the fingerprint.
func contribution(file int, i int64, s, blank *sector) uint64 {
	if sameSector(s, nil, blank) {
		return 0
	}
	h := uint64(i)*0x9E3779B97F4A7C15 ^ uint64(file+1)
	for k := 0; k < storage.SectorSize; k += 16 {
		hi, lo := bits.Mul64(binary.LittleEndian.Uint64(s[k:])^h, binary.LittleEndian.Uint64(s[k+8:])^0xD6E8FEB86659FD93)
		h = mix(h ^ hi ^ lo)
	}
	return h
}

func (d *unitData) contribution(file int, firstSector int64, blank *sector) uint64 {
	var sum uint64
	for i, s := range d {
		if s != nil {
			sum += contribution(file, firstSector+int64(i), s, blank)
		}
	}
	return sum
}

// mix spreads the bits of x (the finaliser of MurmurHash3, public domain).
func mix(x uint64) uint64 {
	x = (x ^ x>>33) * 0xFF51AFD7ED558CCD
	x = (x ^ x>>33) * 0xC4CEB9FE1A85EC53
	return x ^ x>>33
}
