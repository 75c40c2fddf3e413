// Package fvd reads and writes FVD, the Fast Virtual Disk format that was proposed for QEMU in 2011: a block
// device kept in a storage file.
//
// FVD keeps apart what other formats entangle. A bitmap says whether a block still lives in the base image; a
// lookup table, if the image has one, says where in the storage a chunk lies; one journal makes changes of both
// durable in a single small write. Each of them can be absent. docs/fvd.md describes the format for readers of
// the 2011 proposal and lists what this implementation changes and why.
//
// # Layout of an image
//
// All integers are little-endian; offsets and sizes in the header are bytes.
//
//	byte 0          8192           bitmap_offset   journal_offset   table_offset   data_offset
//	+---------------+--------------+---------------+----------------+--------------+-----------------------+
//	| header        | (free)       | bitmap        | journal        | table        | data                  |
//	| 7412 bytes,   |              | 1 bit a block | 512-byte       | u32 a chunk  | raw (no table), or    |
//	| zero padded   |              | of the base   | sectors        |              | chunks 0, 1, 2 ...    |
//	+---------------+--------------+---------------+----------------+--------------+-----------------------+
//	                 bitmap, journal and table begin at multiples of 4 KiB; readers go by the offsets in the
//	                 header, not by this order. With data_file set the data lies in a file of its own, from 0.
//
// Header, the fields that change while an image is in use (all inside sector 6, bytes 3072 to 3583, so that one
// atomic sector write changes them):
//
//	3208  u64  stable_journal_epoch      records with this epoch or a smaller one are in the tables already
//	3216  u32  clean_shutdown            1: table and bitmap alone are the truth, the journal need not be read
//	3240  u32  base_img_fully_prefetched 1: the base image is not needed any more
//
// Fields in several sectors are changed (amend.go) through a copy of sectors 0 to 6 in 7 to 13, which is the header as
// long as the checksum in sector 14 seals it: headercopy.go.
//
// Bitmap: bit i (byte i/8, bit i mod 8, least significant first) describes guest bytes
// [i*block_size, (i+1)*block_size) below base_img_size. 0: the base image holds them. 1: this image does.
// Bits go from 0 to 1, and back only all at once, when the image was committed to its base (empty.go).
//
// Table: entry i describes guest bytes [i*chunk_size, (i+1)*chunk_size).
//
//	31 30                              0
//	+-+--------------------------------+   id: the chunk lies at data_offset + id*chunk_size, 0 <= id < 0x7FFFFFFF
//	|D|  id                            |   D:  mapping not yet durable; in memory and in journal records only
//	+-+--------------------------------+   0xFFFFFFFF: never written, reads as zeros
//
// Journal sector: records back to back without padding, then EMPTY (0xA5A5A5A5), zeros, and in images with the
// journal trailer feature 16 bytes that make a torn or outdated sector recognisable:
//
//	TABLE   u32 0xB4E6F7AC | u64 epoch | u32 n | u32 first chunk | n * u32 entry
//	BITMAP  u32 0xEF2AB8ED | u32 sectors | u64 first guest sector
//	EMPTY   u32 0xA5A5A5A5
//	...
//	496     u32 trailer magic | u32 CRC-32C of bytes 0-499 and 504-511 | u64 generation
//
// # How the package is built
//
//	layout     header.go validate.go bits.go table.go record.go sector.go geometry.go     pure
//	metadata   metadata.go allocator.go journal.go checkpoint.go recovery.go,
//	           discipline.go and one file a discipline: immediate.go buffered.go nojournal.go
//	device     image.go open.go create.go read.go write.go zero.go populate.go extents.go resize.go empty.go
//	tools      check.go repair.go info.go amend.go headercopy.go
//
// Start with image.go, then write.go for the order in which a write makes its way to the disk.
package fvd
