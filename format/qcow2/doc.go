// Package qcow2 keeps a virtual disk in a qcow2 image, versions 2 and 3: it creates, reads, writes, checks,
// repairs and describes images. An [Image] is a block.Device over a storage.File; every byte of the image goes
// through that File. Where a comment says "specification", it means the qcow2 specification.
//
// # Layout
//
// An image file is an array of clusters of 512 bytes to 2 MiB. Cluster 0 holds the header; everything else
// lies anywhere, cluster-aligned, found through two trees of two levels:
//
//	                 header (cluster 0)
//	  +----------------------+-----------------------+------------------+
//	  |                      |                       |                  |
//	refcount table       active L1 table        snapshot table      extensions
//	  |  8-byte entries      |  8-byte entries       |                  |
//	refcount blocks      L2 tables <------- L1 tables of          feature names,
//	  |  1 to 64 bits        |  8 or 16 bytes     snapshots       bitmaps, …
//	"how often is this   "where does this
//	 host cluster used"   guest cluster lie"
//	                         |
//	                     data clusters, compressed data
//
// The left tree tells for each host cluster (a cluster of the file) how many references to it there are, its
// own tables included; 0 is free. The right tree maps guest clusters (of the disk) to host clusters:
//
//	guest offset = | L1 index | L2 index | offset in the cluster |
//	                            log2(cluster size / entry size)  log2(cluster size)
//
//	L1 entry       COPIED 63 | reserved | offset of the L2 table 55-9 | reserved
//	L2 entry       COPIED 63 | compressed 62 | reserved | host offset 55-9 | reserved | reads as zeros 0
//	 compressed    0 | 1 | sectors that follow | host byte offset
//	 extended      the same, bit 0 unused; then 64 bits: 32 "reads as zeros", 32 "allocated", one a subcluster
//
// An entry without host offset means that the backing image shows through. COPIED says that the count of the
// target is exactly 1, so that it may be written in place; what a snapshot shares has to be copied first.
// Guest data may also lie in an external data file, at the guest offset.
//
// # The parts of the package
//
// Layout, pure encoding and decoding: header.go, extension.go, entry.go, geometry.go, refcount_codec.go,
// snapshot.go, bitmap.go, with every limit in limits.go. Whole-image work on a File, without an Image:
// [Create], [Check], [ReadInfo]. Everything else is the device: tables in memory, the disciplines that make
// their changes durable, and the data path.
//
// # Hostile images
//
// Every field is validated before use and no allocation follows an unchecked one. Errors about the contents
// of an image are of type [*FormatError] and say what was found where, and what was expected.
package qcow2
