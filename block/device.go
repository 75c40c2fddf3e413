// Package block is the virtual disk as everyone above the formats sees it.
//
// A [Device] is what a guest sees: bytes at offsets, a flush, zeroing, discard, and a map of what is
// allocated where. Formats implement it; jobs, servers and tools use it and know nothing of files.
//
//	nbd/server, jobs, internal/cli
//	        |  ReadAt WriteAt Flush WriteZeroes Discard Extents Resize
//	    block.Device            (backing chains: a Device over a Device)
//	        |
//	format/qcow2, format/fvd, format/raw
package block

import (
	"errors"
	"fmt"
	"io"
)

var (
	// ErrReadOnly is wrapped by every change asked of a device that was opened read-only.
	ErrReadOnly = errors.New("the device is read-only")

	// ErrOutOfRange is wrapped when a request does not lie inside [0, Size()).
	ErrOutOfRange = errors.New("the request ends past the end of the device")

	// ErrWouldBlock is returned by Device.TryReadAt when the bytes cannot be had without waiting.
	ErrWouldBlock = errors.New("the read would block")

	// ErrClosed is wrapped by every request after Close.
	ErrClosed = errors.New("the device is closed")
)

// Device is a virtual disk.
//
// Offsets and lengths are bytes; any alignment works. A request must lie inside [0, Size()): one that does
// not fails with ErrOutOfRange and changes nothing, except that ReadAt keeps the io.ReaderAt contract (the
// bytes before the end, with io.EOF). Every method is safe for concurrent use.
// A read that runs concurrently with a write of the same sector returns the old or the new sector.
//
// The interface is complete on purpose: a wrapper implements all of it, so that no capability is lost
// silently. What a device cannot do it refuses with an error that wraps errors.ErrUnsupported.
type Device interface {
	io.ReaderAt
	io.WriterAt

	// TryReadAt fills p if that needs no waiting (memory, page cache), else returns ErrWouldBlock; the
	// contents of p are then undefined. Servers use it to answer in line. It may refuse at any time.
	TryReadAt(p []byte, off int64) error

	// WriteCompressed stores p compressed, where the format can. off must be a multiple of
	// Limits().Preferred, and len(p) the same size, or shorter only at the end of the device. Data that
	// does not shrink is stored plain. errors.ErrUnsupported when the format cannot compress.
	WriteCompressed(p []byte, off int64) error

	// WriteZeroes makes the range read as zeros.
	WriteZeroes(off, length int64, flags ZeroFlags) error

	// Discard tells that the contents of the range are no longer needed. Whole clusters inside it read as
	// zeros afterwards where the format can promise that; the rest of the range may keep its bytes.
	Discard(off, length int64) error

	// Flush makes every request that completed before the call durable. After a Flush has failed the device
	// refuses further changes and flushes with the same error: nobody knows what is on the disk.
	Flush() error

	// Extents calls fn for consecutive runs that together cover [off, off+length), until fn returns false.
	// Neighbouring runs may be equal in kind; callers that want them merged merge them.
	Extents(off, length int64, fn func(Extent) bool) error

	// Size is the size of the disk in bytes.
	Size() int64

	// Resize changes the size; the new part reads as zeros.
	Resize(size int64, prealloc Preallocation) error

	// Limits describes the device to those who plan requests for it.
	Limits() Limits

	// Close flushes, leaves the image clean, and releases everything the device holds: its file and, where
	// it was given one, its backing device. Requests that come later fail with ErrClosed. An error means that what
	// was not flushed before may not be durable; everything is released all the same. A second Close returns nil.
	Close() error
}

// Limits describes a device to those who plan requests for it.
type Limits struct {
	ReadOnly  bool
	Preferred int64 // bytes: the unit that is written whole without copying anything up (cluster size); a power of two >= 512
	Compress  bool  // WriteCompressed works
	ZeroInit  bool  // the device read as zeros when it was opened
}

// ZeroFlags modify Device.WriteZeroes.
type ZeroFlags uint8

const (
	// MayUnmap lets the device give the space back instead of keeping it allocated.
	MayUnmap ZeroFlags = 1 << iota
	// FastOnly makes the call fail with errors.ErrUnsupported, changing nothing, instead of writing zeros
	// out byte by byte (NBD_CMD_FLAG_FAST_ZERO).
	FastOnly
)

// Extent is a run of a device with one kind of contents, as reported by Device.Extents.
type Extent struct {
	Offset, Length int64 // bytes of the device; Length > 0
	Depth          int   // the layer that decides the contents: 0 this device, 1 its backing device, ...
	Allocated      bool  // some layer holds an entry for it (data or explicit zeros)
	Zero           bool  // it reads as zeros
	Data           bool  // bytes are stored for it in the layer Depth
	Compressed     bool  // those bytes are compressed
	HostOffset     int64 // where the bytes lie in the file of layer Depth, uncompressed; -1 when there is no such place
}

// Preallocation says how much of a disk is laid out when it is created or grows.
type Preallocation uint8

const (
	PreallocOff      Preallocation = iota // nothing
	PreallocMetadata                      // tables are built, the data area is sparse
	PreallocFalloc                        // space is reserved (fallocate)
	PreallocFull                          // zeros are written
)

var preallocNames = [...]string{"off", "metadata", "falloc", "full"}

// String returns the name qemu-img uses: off, metadata, falloc, full.
func (p Preallocation) String() string {
	if int(p) < len(preallocNames) {
		return preallocNames[p]
	}
	return fmt.Sprintf("Preallocation(%d)", uint8(p))
}

// ParsePreallocation is the reverse of Preallocation.String.
func ParsePreallocation(s string) (Preallocation, error) {
	for i, n := range preallocNames {
		if n == s {
			return Preallocation(i), nil
		}
	}
	return 0, fmt.Errorf("preallocation %q: want off, metadata, falloc or full", s)
}

// CheckRange returns an error that wraps ErrOutOfRange unless [off, off+length) lies inside a device of the
// given size. It cannot overflow.
func CheckRange(op string, off, length, size int64) error {
	if off < 0 || length < 0 || off > size || length > size-off {
		return fmt.Errorf("%s of %d bytes at %d on a device of %d bytes: %w", op, length, off, size, ErrOutOfRange)
	}
	return nil
}
