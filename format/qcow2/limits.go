package qcow2

import "math"

// Limits on what an image may claim. An image is hostile input: a field is compared with its limit before
// anything is read, allocated or computed from it. Unless a comment says otherwise the specification leaves
// the value open and the limit is the one QEMU enforces, so that both programs accept the same images.
const (
	minClusterBits           = 9  // qcow2 specification: at least 512 bytes
	maxClusterBits           = 21 // 2 MiB
	minClusterBitsExtendedL2 = 14 // qcow2 specification: 32 subclusters of at least 512 bytes

	maxRefcountOrder = 6 // qcow2 specification: counts are at most 64 bits wide

	headerLengthV2  = 72  // bytes; qcow2 specification
	headerLengthV3  = 104 // bytes; qcow2 specification: the smallest header_length of version 3
	headerLengthOut = 112 // bytes; what is written: the known fields of version 3 and their padding

	maxBackingName   = 1023 // bytes
	maxBackingFormat = 15   // bytes

	maxL1Bytes            = 32 << 20 // active and snapshot L1 tables, 4194304 entries
	maxRefcountTableBytes = 8 << 20

	maxSnapshots          = 65536
	maxSnapshotTableBytes = 64 << 20
	maxSnapshotExtra      = 1024 // bytes of extra data in one snapshot table entry

	maxBitmaps               = 65535
	maxBitmapDirectoryBytes  = 65535 << 10
	maxBitmapName            = 1023 // bytes
	minBitmapGranularityBits = 9
	maxBitmapGranularityBits = 31
	maxBitmapTableEntries    = 0x8000000
	maxBitmapBytes           = 512 << 20

	maxHostOffset = 1 << 56 // bytes; qcow2 specification: 47 bits of cluster-aligned host offset in an entry

	maxL1Index       = math.MaxInt32 // index of the L1 entry that maps the disk's last byte
	maxCheckClusters = math.MaxInt32 // host clusters of an image that can be checked
)
