package qcow2

// Fields of L1 and L2 entries (specification sections 7 to 9).
const (
	entryCopied     = 1 << 63 // the target's reference count is exactly 1: it may be written in place
	entryCompressed = 1 << 62 // L2: the rest is a compressed cluster descriptor
	entryZero       = 1 << 0  // L2, version 3, not extended: the cluster reads as zeros

	entryOffsetMask = 0x00fffffffffffe00 // bits 9..55: host offset
	l1ReservedMask  = 0x7f000000000001ff
	l2ReservedMask  = 0x3f000000000001fe

	subclusters = 32 // of an extended L2 entry
)

// l1Entry is one word of an L1 table.
type l1Entry uint64

func (e l1Entry) offset() hostOff { return hostOff(e & entryOffsetMask) }
func (e l1Entry) copied() bool    { return e&entryCopied != 0 }

// l2Entry is the first (or only) word of an L2 table entry.
type l2Entry uint64

func (e l2Entry) compressed() bool { return e&entryCompressed != 0 }
func (e l2Entry) copied() bool     { return e&entryCopied != 0 }
func (e l2Entry) offset() hostOff  { return hostOff(e & entryOffsetMask) }

// mapping is a whole L2 entry: where a guest cluster's bytes are.
type mapping struct {
	entry  l2Entry
	bitmap uint64 // extended L2 only: bit i subcluster i allocated, bit 32+i subcluster i reads as zeros
}

// kind classifies what a cluster or subcluster reads as.
type kind uint8

const (
	kindUnallocated kind = iota // the backing device shows through
	kindZero                    // zeros; the backing device is not consulted
	kindNormal                  // bytes in the host cluster
	kindCompressed              // inflate
	kindInvalid                 // an extended entry whose bitmap contradicts itself
)

// hasHost reports whether the entry owns an uncompressed host cluster.
func (g *geometry) hasHost(m mapping) bool {
	if m.entry.compressed() {
		return false
	}
	return m.entry.offset() != 0 || g.dataFile && m.entry.copied()
}

// kindAt classifies subcluster sub of the mapping (sub is 0 when the geometry has no subclusters).
func (g *geometry) kindAt(m mapping, sub uint) kind {
	if m.entry.compressed() {
		return kindCompressed
	}
	if !g.extended {
		switch {
		case m.entry&entryZero != 0 && g.version >= 3:
			return kindZero
		case !g.hasHost(m):
			return kindUnallocated
		}
		return kindNormal
	}
	alloc, zero := m.bitmap>>sub&1 != 0, m.bitmap>>(32+sub)&1 != 0
	switch {
	case alloc && (zero || !g.hasHost(m)):
		return kindInvalid
	case alloc:
		return kindNormal
	case zero:
		return kindZero
	}
	return kindUnallocated
}

// subclusterMask has bit i set for every subcluster that [from, to) of a cluster touches (bytes, to > from).
func (g *geometry) subclusterMask(from, to int64) uint64 {
	first, last := uint(from>>g.unitBits), uint((to-1)>>g.unitBits)
	return (1<<(last+1) - 1) &^ (1<<first - 1)
}

// compressedRange decodes a compressed descriptor: the host byte offset of the stream and the number of
// bytes, counted in whole sectors, that it may extend over.
func (g *geometry) compressedRange(e l2Entry) (off hostOff, length int64) {
	off = hostOff(e & (1<<g.coffsetBits - 1))
	extra := int64(e & (entryCompressed - 1) >> g.coffsetBits)
	return off, (extra+1)*sectorSize - int64(off)&(sectorSize-1)
}

// compressedEntry encodes a descriptor for length bytes at off.
func (g *geometry) compressedEntry(off hostOff, length int64) l2Entry {
	extra := (int64(off)+length-1)/sectorSize - int64(off)/sectorSize
	return entryCompressed | l2Entry(extra)<<g.coffsetBits | l2Entry(off)
}

// sectorSize is the unit of compressed descriptors and of what a crash keeps or loses whole.
const sectorSize = 512
