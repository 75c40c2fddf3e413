package guestlog

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
)

// SectorSize is the unit in bytes that carries contents of its own.
const SectorSize = 512

// headerSize is the length in bytes of what names a sector; the rest of it follows from that.
const headerSize = 32

// MinSize is the length in bytes of the shortest file whose generation can be told from its contents.
const MinSize = headerSize

const magic = 0x676f6c7473657567 // "guestlog", little-endian

// Fill fills p with what generation gen of the file at path has at off, a multiple of SectorSize. seed is the
// workload's, so that two workloads never write the same.
//
// A sector begins with magic (u64), the generation (u64), a hash of seed and path (u64) and its number in the
// file (u64), all little-endian; pseudo-random bytes that follow from these fill it up.
func Fill(p []byte, seed uint64, path string, gen uint64, off int64) {
	k := key(seed, path)
	for i := 0; i < len(p); i += SectorSize {
		fillSector(p[i:min(i+SectorSize, len(p))], k, gen, uint64(off)/SectorSize+uint64(i)/SectorSize)
	}
}

func fillSector(p []byte, key, gen, sector uint64) {
	var buf [SectorSize]byte
	le := binary.LittleEndian
	le.PutUint64(buf[0:], magic)
	le.PutUint64(buf[8:], gen)
	le.PutUint64(buf[16:], key)
	le.PutUint64(buf[24:], sector)
	rng := rand.NewPCG(key^gen<<32, sector)
	for i := headerSize; i < SectorSize; i += 8 {
		le.PutUint64(buf[i:], rng.Uint64())
	}
	copy(p, buf[:])
}

func key(seed uint64, path string) uint64 {
	h := fnv.New64a()
	fmt.Fprintf(h, "%d %s", seed, path)
	return h.Sum64()
}

// generation is the generation that the header of a sector claims; false when p is no sector of ours, or too
// short to tell.
func generation(p []byte) (uint64, bool) {
	if len(p) < headerSize || binary.LittleEndian.Uint64(p) != magic {
		return 0, false
	}
	return binary.LittleEndian.Uint64(p[8:]), true
}
