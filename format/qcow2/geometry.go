package qcow2

// The address spaces of an image, each with a type of its own so that the compiler refuses a mix-up.
type (
	guestOff    int64 // byte of the virtual disk
	hostOff     int64 // byte of the image file (or of the external data file, for guest data)
	hostCluster int64 // hostOff >> clusterBits
)

// geometry is what the header fixes for the life of an image: sizes and shifts. Immutable.
type geometry struct {
	version     uint32
	clusterBits uint
	clusterSize int64
	extended    bool // 16-byte L2 entries with 32 subclusters
	dataFile    bool // guest data lives in an external data file at host offset == guest offset

	entryWords int64 // 64-bit words of an L2 entry: 1, or 2 when extended
	l2Bits     uint  // log2 of the entries of an L2 table
	unitBits   uint  // log2 of the smallest allocatable piece: cluster, or subcluster when extended

	refOrder    uint32 // width of a count is 1<<refOrder bits
	refPerBlock int64  // counts a refcount block holds

	coffsetBits uint // compressed descriptor: bits 0..coffsetBits-1 hold the host byte offset (specification section 9)
}

func newGeometry(h *Header) geometry {
	g := geometry{
		version:     h.Version,
		clusterBits: uint(h.ClusterBits),
		clusterSize: 1 << h.ClusterBits,
		extended:    h.ExtendedL2(),
		dataFile:    h.HasDataFile(),
		entryWords:  1,
		l2Bits:      uint(h.ClusterBits) - 3,
		unitBits:    uint(h.ClusterBits),
		refOrder:    h.RefcountOrder,
		coffsetBits: 70 - uint(h.ClusterBits),
	}
	if g.extended {
		g.entryWords = 2
		g.l2Bits--
		g.unitBits -= 5
	}
	g.refPerBlock = g.clusterSize * 8 >> h.RefcountOrder
	return g
}

// unitSize is the smallest piece in bytes that can be allocated: a cluster, or a subcluster.
func (g *geometry) unitSize() int64 { return 1 << g.unitBits }

// entrySize is the size in bytes of an L2 entry.
func (g *geometry) entrySize() int64 { return g.entryWords * 8 }

func (g *geometry) l2Entries() int64 { return 1 << g.l2Bits }

// l1Index is the L1 entry that maps a guest offset.
func (g *geometry) l1Index(off guestOff) int64 { return int64(off) >> (g.clusterBits + g.l2Bits) }

// l2Index is the entry inside its L2 table that maps a guest offset.
func (g *geometry) l2Index(off guestOff) int64 {
	return int64(off) >> g.clusterBits & (g.l2Entries() - 1)
}

// l1Needed is the number of L1 entries a disk of size bytes needs.
func (g *geometry) l1Needed(size int64) int64 {
	span := g.clusterBits + g.l2Bits
	return int64((uint64(size) + 1<<span - 1) >> span)
}

func (g *geometry) clusterStart(off guestOff) guestOff { return off &^ guestOff(g.clusterSize-1) }

func (g *geometry) inCluster(off int64) int64 { return off & (g.clusterSize - 1) }

func (g *geometry) clusterOf(off hostOff) hostCluster { return hostCluster(off >> g.clusterBits) }

func (g *geometry) offsetOf(c hostCluster) hostOff { return hostOff(c) << g.clusterBits }

// clustersFor is the number of clusters n bytes need.
func (g *geometry) clustersFor(n int64) int64 {
	return int64((uint64(n) + uint64(g.clusterSize) - 1) >> g.clusterBits)
}

// refcountClusters returns the size in clusters of the refcount table, and the number of refcount blocks, of an image
// that has content other clusters: they count all clusters, one block after the other.
func (g *geometry) refcountClusters(content int64) (table, blocks int64) {
	// The refcount structures count themselves, so their size is the fixed point of its own function; it
	// grows by less than it is fed, hence the loop ends.
	for table, blocks = 1, 1; ; {
		total := content + table + blocks
		b := (total + g.refPerBlock - 1) / g.refPerBlock
		t := g.clustersFor(b * 8)
		if b == blocks && t == table {
			return table, blocks
		}
		blocks, table = b, t
	}
}
