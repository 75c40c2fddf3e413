package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"syscall"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/bufpool"
	"github.com/platter-disk/platter/storage"
)

// CreateOptions are the options of a new image, those of qemu-img create -f qcow2 (encryption excepted). The
// zero value of each is qemu-img's default.
type CreateOptions struct {
	Size          int64  // bytes of the virtual disk, rounded up to 512; 0 with a backing file: BackingSize
	Version       uint32 // 2 or 3; 0 is 3
	ClusterSize   int64  // bytes, a power of two from 512 to 2 MiB; 0 is 65536
	RefcountBits  int    // 1, 2, 4 … 64; 0 is 16, the only width of version 2
	ExtendedL2    bool   // 32 subclusters a cluster; clusters of at least 16 KiB
	Preallocation block.Preallocation

	CompressionType string // "zlib" or "zstd", what compressed clusters will be; "" is zlib

	BackingFile   string // reference stored in the image; "" for none
	BackingFormat string // mandatory with BackingFile
	BackingSize   int64  // bytes of the backing disk

	DataFileName string       // reference stored in the image; "" with a DataFile: none is stored
	DataFile     storage.File // emptied and sized; nil with a DataFileName: left alone. Create does not close it
	DataFileRaw  bool         // the data file is a valid raw image at all times; implies PreallocMetadata

	LazyRefcounts bool // recorded in the image
}

// createChunk is the size in bytes of the buffer that tables and zeros are streamed through.
const createChunk = 1 << 20

const problemTooLarge = "The image size is too large for file format 'qcow2' (try using a larger cluster size)"

// Create makes f a new, empty image. Whatever f held is lost. The header is written last, after everything
// else is durable, so that a crash leaves either no image or a whole one.
//
// Memory is bounded whatever the size. Errors of the options use the words of qemu-img; after an error f
// holds no image. f must not be in use.
func Create(f storage.File, o CreateOptions) error {
	h, prealloc, err := o.header()
	if err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	c := &creation{f: f, h: h, g: newGeometry(h), prealloc: prealloc}
	c.layout()
	if !c.addressable() {
		return fmt.Errorf("%s: %s", f.Name(), problemTooLarge)
	}
	head, err := h.Encode()
	if err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	if err := c.write(head, o.DataFile); err != nil {
		return fmt.Errorf("%s: create: %w", f.Name(), err)
	}
	return nil
}

// header validates the options and makes the header that they ask for, without the places of the tables.
func (o *CreateOptions) header() (*Header, block.Preallocation, error) {
	h := &Header{
		Version:       o.Version,
		RefcountOrder: 4,
		BackingFile:   o.BackingFile,
		BackingFormat: o.BackingFormat,
		DataFile:      o.DataFileName,
	}
	if h.Version == 0 {
		h.Version = 3
	}
	clusterSize := o.ClusterSize
	if clusterSize == 0 {
		clusterSize = 65536
	}
	refcountBits := o.RefcountBits
	if refcountBits == 0 {
		refcountBits = 16
	}
	hasData := o.DataFileName != "" || o.DataFile != nil
	prealloc := o.Preallocation
	if o.DataFileRaw && prealloc == block.PreallocOff {
		prealloc = block.PreallocMetadata
	}
	size := o.Size
	if size == 0 && o.BackingFile != "" {
		size = o.BackingSize
	}
	const needV3 = " with compatibility level 1.1 and above (use version=v3 or greater)"
	var problem string
	switch v2 := h.Version == 2; {
	case h.Version != 2 && h.Version != 3:
		problem = fmt.Sprintf("Parameter 'version' does not accept value '%d'", h.Version)
	case clusterSize&(clusterSize-1) != 0 || clusterSize < 1<<minClusterBits || clusterSize > 1<<maxClusterBits:
		problem = "Cluster size must be a power of two between 512 and 2048k"
	case refcountBits < 1 || refcountBits > 64 || refcountBits&(refcountBits-1) != 0:
		problem = "Refcount width must be a power of two and may not exceed 64 bits"
	case o.CompressionType != "" && o.CompressionType != "zlib" && o.CompressionType != "zstd":
		problem = fmt.Sprintf("Parameter 'compression-type' does not accept value '%s'", o.CompressionType)
	case prealloc > block.PreallocFull:
		problem = fmt.Sprintf("Parameter 'preallocation' does not accept value '%s'", prealloc)
	case v2 && o.ExtendedL2:
		problem = "Extended L2 entries are only supported" + needV3
	case o.ExtendedL2 && clusterSize < 1<<minClusterBitsExtendedL2:
		problem = fmt.Sprintf("Extended L2 entries are only supported with cluster sizes of at least %d bytes", 1<<minClusterBitsExtendedL2)
	case v2 && o.LazyRefcounts:
		problem = "Lazy refcounts only supported" + needV3
	case v2 && refcountBits != 16:
		problem = "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)"
	case v2 && hasData:
		problem = "External data files are only supported" + needV3
	case v2 && o.CompressionType == "zstd":
		problem = "Non-zlib compression type is only supported" + needV3
	case o.DataFileRaw && !hasData:
		problem = "data-file-raw requires data-file"
	case o.DataFileRaw && o.BackingFile != "":
		problem = "Backing file and data-file-raw cannot be used at the same time"
	case o.BackingFile != "" && prealloc != block.PreallocOff && !o.ExtendedL2:
		problem = "Backing file and preallocation can only be used at the same time if extended_l2 is on"
	case o.BackingFile != "" && o.BackingFormat == "":
		problem = "Backing file specified without backing format"
	case o.BackingFile == "" && o.BackingFormat != "":
		problem = "Backing format cannot be used without backing file"
	case len(o.BackingFormat) > maxBackingFormat:
		problem = fmt.Sprintf("Parameter 'backing-fmt' does not accept value '%s'", o.BackingFormat)
	case hasData && o.DataFile == nil && prealloc >= block.PreallocFalloc:
		problem = fmt.Sprintf("preallocation=%s needs the data file", prealloc)
	case size < 0 || size > maxDiskSize(clusterSize, o.ExtendedL2):
		problem = problemTooLarge
	}
	if problem != "" {
		return nil, 0, errors.New(problem)
	}
	h.ClusterBits = uint32(bits.TrailingZeros64(uint64(clusterSize)))
	h.RefcountOrder = uint32(bits.TrailingZeros64(uint64(refcountBits)))
	h.Size = uint64(size+storage.SectorSize-1) &^ (storage.SectorSize - 1)
	if o.CompressionType == "zstd" {
		h.CompressionType = CompressionZstd
		h.Incompatible |= IncompatCompression
	}
	if o.ExtendedL2 {
		h.Incompatible |= IncompatExtendedL2
	}
	if hasData {
		h.Incompatible |= IncompatDataFile
	}
	if o.DataFileRaw {
		h.Autoclear |= AutoclearRawData
	}
	if o.LazyRefcounts {
		h.Compatible |= CompatLazyRefcounts
	}
	return h, prealloc, nil
}

// maxDiskSize is the size of the largest disk, in bytes, that an L1 table of maxL1Bytes can map.
func maxDiskSize(clusterSize int64, extended bool) int64 {
	entry := int64(8)
	if extended {
		entry = 16
	}
	return maxL1Bytes / 8 * (clusterSize / entry) * clusterSize
}

// creation is an image that is being laid out:
//
//	| header | refcount table | refcount blocks | L1 table | L2 tables | data |
//
// each part a run of whole clusters. Without preallocation it ends with the L1 table.
type creation struct {
	f        storage.File
	h        *Header
	g        geometry
	prealloc block.Preallocation

	refBlocks, l1, l2, data hostCluster // first cluster of each part; the refcount table starts at 1
	blocks, tables          int64       // refcount blocks, L2 tables
	mapped                  int64       // guest clusters with a mapping
	end                     hostCluster // first cluster past the image
	fresh                   bool        // what was not written reads as zeros
}

// layout finds the place of everything and puts it in the header.
func (c *creation) layout() {
	size := int64(c.h.Size)
	l1Entries := c.g.l1Needed(size)
	var dataClusters int64
	if c.prealloc != block.PreallocOff {
		c.tables = l1Entries
		c.mapped = c.g.clustersFor(size)
		if !c.g.dataFile {
			dataClusters = c.mapped
		}
	}
	l1Clusters := c.g.clustersFor(l1Entries * 8)
	tableClusters, blocks := c.g.refcountClusters(1 + l1Clusters + c.tables + dataClusters)
	c.blocks = blocks
	c.refBlocks = hostCluster(1 + tableClusters)
	c.l1 = c.refBlocks + hostCluster(c.blocks)
	c.l2 = c.l1 + hostCluster(l1Clusters)
	c.data = c.l2 + hostCluster(c.tables)
	c.end = c.data + hostCluster(dataClusters)

	c.h.RefcountTableOffset = uint64(c.g.offsetOf(1))
	c.h.RefcountTableClusters = uint32(min(tableClusters, 1<<32-1))
	c.h.L1Size = uint32(l1Entries)
	if l1Entries > 0 {
		c.h.L1Offset = uint64(c.g.offsetOf(c.l1))
	}
}

// addressable reports whether the format has room for the layout: in its refcount table and in its offsets.
func (c *creation) addressable() bool {
	return int64(c.h.RefcountTableClusters)*c.g.clusterSize <= maxRefcountTableBytes && c.end <= entryOffsetMask>>c.g.clusterBits
}

func (c *creation) write(head []byte, dataFile storage.File) error {
	if err := c.wipe(); err != nil {
		return err
	}
	if dataFile != nil {
		if err := c.prepareDataFile(dataFile); err != nil {
			return fmt.Errorf("data file %s: %w", dataFile.Name(), err)
		}
	}
	buf := bufpool.Get(max(createChunk, int(c.g.clusterSize)))
	defer buf.Put()
	steps := []func([]byte) error{c.writeRefcountTable, c.writeRefcountBlocks, c.writeL1, c.writeL2, c.writeData}
	for _, step := range steps {
		if err := step(buf.B); err != nil {
			return err
		}
	}
	if err := c.f.Sync(); err != nil {
		return err
	}
	if _, err := c.f.WriteAt(head, 0); err != nil {
		return err
	}
	return c.f.Sync()
}

// wipe empties the file; what has a fixed size (a block device) keeps its bytes. The header of an image that
// it may hold goes first, durably: a crash must not leave the old header with the new tables. Before anything is
// lost it turns out whether there is room.
func (c *creation) wipe() error {
	old, err := c.f.Size()
	if err != nil {
		return err
	}
	size := int64(c.g.offsetOf(c.end))
	if 0 < old && old < size {
		if err := c.f.Truncate(size); errors.Is(err, errors.ErrUnsupported) {
			return fmt.Errorf("the image needs %d bytes, and there are %d: %w", size, old, syscall.ENOSPC)
		} else if err != nil {
			return err
		}
	}
	if old > 0 {
		var sector [storage.SectorSize]byte
		if _, err := c.f.WriteAt(sector[:min(old, storage.SectorSize)], 0); err != nil {
			return err
		}
		if err := c.f.Sync(); err != nil {
			return err
		}
		if old, err = truncateToZero(c.f); err != nil {
			return err
		}
	}
	c.fresh = old == 0
	if old < size {
		return c.f.Truncate(size)
	}
	return nil
}

// truncateToZero empties a file and returns the size it then has, which is not 0 where it is fixed.
func truncateToZero(f storage.File) (int64, error) {
	if err := f.Truncate(0); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return 0, err
	}
	return f.Size()
}

// prepareDataFile empties the external data file and gives it the size of the disk.
func (c *creation) prepareDataFile(d storage.File) error {
	old, err := d.Size()
	if err != nil {
		return err
	}
	if old > 0 {
		if old, err = truncateToZero(d); err != nil {
			return err
		}
	}
	size := int64(c.h.Size)
	if old < size {
		if err := d.Truncate(size); err != nil {
			return err
		}
	}
	if err := preallocate(d, 0, size, c.prealloc, old == 0); err != nil {
		return err
	}
	return d.Sync()
}

// preallocate gives [off, off+length) the space that prealloc asks for. Afterwards the range reads as zeros,
// which with fresh it does already.
func preallocate(f storage.File, off, length int64, prealloc block.Preallocation, fresh bool) error {
	if length == 0 {
		return nil
	}
	if prealloc == block.PreallocFalloc {
		if err := f.Allocate(off, length); err != nil {
			return fmt.Errorf("reserve %d bytes: %w", length, err)
		}
	}
	switch {
	case prealloc == block.PreallocFull:
		return writeZeros(f, off, length)
	case fresh:
		return nil
	}
	return zeroRange(f, off, length)
}

// zeroRange makes the range read as zeros, by the cheapest means the file has.
func zeroRange(f storage.File, off, length int64) error {
	err := f.ZeroRange(off, length)
	if errors.Is(err, errors.ErrUnsupported) {
		return writeZeros(f, off, length)
	}
	return err
}

// writeZeros writes zeros out.
func writeZeros(f storage.File, off, length int64) error {
	buf := bufpool.Get(int(min(length, createChunk)))
	defer buf.Put()
	clear(buf.B)
	for length > 0 {
		n := min(length, int64(len(buf.B)))
		if _, err := f.WriteAt(buf.B[:n], off); err != nil {
			return err
		}
		off += n
		length -= n
	}
	return nil
}

// writeWords streams a table of n big-endian words, made by word, to the cluster at start, and pads the last
// cluster with zeros.
func (c *creation) writeWords(buf []byte, start hostCluster, n int64, word func(i int64) uint64) error {
	size := c.g.clustersFor(n*8) << c.g.clusterBits
	for done := int64(0); done < size; {
		chunk := buf[:min(size-done, int64(len(buf)))]
		for i := 0; i < len(chunk); i += 8 {
			v := uint64(0)
			if k := (done + int64(i)) / 8; k < n {
				v = word(k)
			}
			binary.BigEndian.PutUint64(chunk[i:], v)
		}
		if _, err := c.f.WriteAt(chunk, int64(c.g.offsetOf(start))+done); err != nil {
			return err
		}
		done += int64(len(chunk))
	}
	return nil
}

func (c *creation) writeRefcountTable(buf []byte) error {
	return c.writeWords(buf, 1, c.blocks, func(i int64) uint64 {
		return uint64(c.g.offsetOf(c.refBlocks + hostCluster(i)))
	})
}

// writeRefcountBlocks counts every cluster up to the end once.
func (c *creation) writeRefcountBlocks(buf []byte) error {
	per := c.g.refPerBlock
	whole := int64(c.end) / per // blocks that are full of ones
	perWrite := int64(len(buf)) >> c.g.clusterBits
	fill := min(per*perWrite, int64(c.end))
	clear(buf)
	for i := range fill {
		setRefcount(buf, c.h.RefcountOrder, int(i), 1)
	}
	for i := int64(0); i < c.blocks; {
		n := min(perWrite, whole-i)
		if n <= 0 { // the last block, partly filled
			n = 1
			clear(buf[:c.g.clusterSize])
			for k := range int64(c.end) - i*per {
				setRefcount(buf, c.h.RefcountOrder, int(k), 1)
			}
		}
		if _, err := c.f.WriteAt(buf[:n<<c.g.clusterBits], int64(c.g.offsetOf(c.refBlocks+hostCluster(i)))); err != nil {
			return err
		}
		i += n
	}
	return nil
}

func (c *creation) writeL1(buf []byte) error {
	if c.tables == 0 {
		if c.fresh || c.h.L1Size == 0 {
			return nil
		}
		return zeroRange(c.f, int64(c.h.L1Offset), c.g.clustersFor(int64(c.h.L1Size)*8)<<c.g.clusterBits)
	}
	return c.writeWords(buf, c.l1, c.tables, func(i int64) uint64 {
		return entryCopied | uint64(c.g.offsetOf(c.l2+hostCluster(i)))
	})
}

// writeL2 maps every guest cluster. With extended L2 entries no subcluster is marked allocated, so that they
// keep reading as they did before; the host cluster is merely reserved.
func (c *creation) writeL2(buf []byte) error {
	words := c.g.entryWords
	return c.writeWords(buf, c.l2, c.tables<<(c.g.l2Bits)*words, func(i int64) uint64 {
		guest := i / words
		if i%words != 0 || guest >= c.mapped {
			return 0
		}
		if c.g.dataFile {
			return entryCopied | uint64(guest)<<c.g.clusterBits
		}
		return entryCopied | uint64(c.g.offsetOf(c.data+hostCluster(guest)))
	})
}

func (c *creation) writeData([]byte) error {
	if c.end == c.data {
		return nil
	}
	return preallocate(c.f, int64(c.g.offsetOf(c.data)), int64(c.g.offsetOf(c.end)-c.g.offsetOf(c.data)), c.prealloc, c.fresh)
}
