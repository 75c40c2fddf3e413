// Package storage is the floor every image format stands on: bytes with a durability barrier.
//
// A format reads and writes nothing except through a [File]. That one rule is what lets a test put a
// recording, crashing or failing File under any format and explore what a power cut leaves behind.
//
//	format/qcow2, format/fvd, format/raw
//	        |  ReadAt WriteAt Sync Size Truncate PunchHole ZeroRange Allocate DataExtents
//	    storage.File
//	        |
//	local files and block devices (Open), memory (NewMemory), an NBD export (package nbd), crashlab
//
// # The durability contract
//
// WriteAt, Truncate, PunchHole, ZeroRange and Allocate take effect at once for every later ReadAt, and
// become durable when a Sync that was called after they returned returns nil. Until then a crash may keep
// or lose each written 512-byte sector on its own, in any order. A Sync that fails tells nothing about what
// is durable; the caller must treat the file as unknown from then on.
package storage

import (
	"errors"
	"io"
)

// SectorSize is the unit in bytes that a crash keeps or loses whole.
const SectorSize = 512

var (
	// ErrWouldBlock is returned by File.TryReadAt when the bytes cannot be had without waiting.
	ErrWouldBlock = errors.New("storage: the read would block")

	// ErrLocked is wrapped by the errors of Open when another process holds a conflicting image lock.
	ErrLocked = errors.New("image is in use by another process")
)

// File is a byte container with a durability barrier: a local file, a block device, an NBD export, memory.
//
// All offsets and lengths are bytes and must not be negative; any alignment works (an implementation over
// O_DIRECT aligns for itself). Every method is safe for concurrent use. Overlapping concurrent writes leave
// either writer's bytes. The interface is complete on purpose: a wrapper implements all of it, so that no
// capability is lost silently. What an implementation cannot do it refuses with an error that wraps
// errors.ErrUnsupported, and the caller falls back.
type File interface {
	// ReadAt is io.ReaderAt: it fills p, or returns fewer bytes with io.EOF at the end of the file.
	io.ReaderAt

	// WriteAt is io.WriterAt; it extends the file when it ends past the current size, unless the
	// container has a fixed size (a block device), which is an error that wraps io.ErrShortWrite.
	io.WriterAt

	// TryReadAt is ReadAt if it can be answered without waiting for a device (from memory or the page
	// cache), and ErrWouldBlock otherwise. It may refuse at any time; contents of p are then undefined.
	TryReadAt(p []byte, off int64) (int, error)

	// Sync makes everything that was written before the call durable, sizes included (fdatasync).
	Sync() error

	// Size is the current length in bytes.
	Size() (int64, error)

	// Truncate sets the length; new bytes read as zeros.
	Truncate(size int64) error

	// PunchHole makes the range read as zeros and gives its space back. The size never changes; what lies
	// past the end is ignored. errors.ErrUnsupported when the space cannot be given back: nothing changed.
	PunchHole(off, length int64) error

	// ZeroRange makes the range read as zeros without writing them out, keeping or reserving its space, and
	// extends the file when it ends past the current size. errors.ErrUnsupported: nothing changed.
	ZeroRange(off, length int64) error

	// Allocate reserves space for the range, keeps the bytes already there and extends the file when it ends
	// past the current size. errors.ErrUnsupported: nothing changed.
	Allocate(off, length int64) error

	// DataExtents calls fn for consecutive runs that together cover [off, off+length) clipped to the size,
	// until fn returns false. A run that is not Data is a hole and reads as zeros. A container that cannot
	// tell reports everything as Data.
	DataExtents(off, length int64, fn func(Extent) bool) error

	// Name identifies the file in error messages: a path or a URI.
	Name() string

	// Close releases the file and its locks. It does not Sync.
	Close() error
}

// Extent is a run of bytes in a File, as reported by File.DataExtents.
type Extent struct {
	Offset, Length int64 // bytes; Length > 0
	Data           bool  // false: a hole, reads as zeros
}

// ReadFull fills p from off; bytes past the end of the file read as zeros. Formats use it where their
// specification lets a file end inside its last cluster.
func ReadFull(f File, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	return zeroTail(p, n, err)
}

// TryReadFull is ReadFull through File.TryReadAt: ErrWouldBlock when it would have to wait.
func TryReadFull(f File, p []byte, off int64) error {
	n, err := f.TryReadAt(p, off)
	return zeroTail(p, n, err)
}

func zeroTail(p []byte, n int, err error) error {
	if err == io.EOF {
		clear(p[n:])
		return nil
	}
	return err
}
