package fvd

import (
	"errors"
	"fmt"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/bufpool"
	"github.com/platter-disk/platter/storage"
)

// ioUnit bounds the buffers of copies, zeroing and metadata transfers, in bytes.
const ioUnit = 1 << 20

// store is the storage that holds the guest's data: the image file itself, a raw data file, or a virtual disk of
// another format. Every method is safe for concurrent use.
type store interface {
	// read fills p; bytes past the end are zeros.
	read(p []byte, off dataOffset) error
	// tryRead is read, or block.ErrWouldBlock if it would have to wait.
	tryRead(p []byte, off dataOffset) error
	write(p []byte, off dataOffset) error
	sync() error
	size() (int64, error)
	// resize sets the length; new bytes read as zeros. It fails on storage of a fixed size.
	resize(size int64) error
	// punch makes the range read as zeros and gives its space back, zeroRange keeps the space. Both wrap
	// errors.ErrUnsupported, having changed nothing, where the storage cannot.
	punch(off dataOffset, n int64) error
	zeroRange(off dataOffset, n int64) error
	// allocate reserves space; errors.ErrUnsupported where the storage cannot.
	allocate(off dataOffset, n int64) error
	// extents reports runs of stored bytes and of holes, which read as zeros, until fn returns false.
	extents(off dataOffset, n int64, fn func(off dataOffset, n int64, data bool) bool) error
	close() error
}

// fileStore keeps the data in a storage.File.
type fileStore struct {
	f storage.File
}

func (s fileStore) read(p []byte, off dataOffset) error { return storage.ReadFull(s.f, p, int64(off)) }

func (s fileStore) tryRead(p []byte, off dataOffset) error {
	err := storage.TryReadFull(s.f, p, int64(off))
	if err == storage.ErrWouldBlock {
		return block.ErrWouldBlock
	}
	return err
}

func (s fileStore) write(p []byte, off dataOffset) error {
	_, err := s.f.WriteAt(p, int64(off))
	return err
}

func (s fileStore) sync() error                            { return s.f.Sync() }
func (s fileStore) size() (int64, error)                   { return s.f.Size() }
func (s fileStore) resize(size int64) error                { return s.f.Truncate(size) }
func (s fileStore) punch(off dataOffset, n int64) error    { return s.f.PunchHole(int64(off), n) }
func (s fileStore) allocate(off dataOffset, n int64) error { return s.f.Allocate(int64(off), n) }
func (s fileStore) close() error                           { return s.f.Close() }

func (s fileStore) zeroRange(off dataOffset, n int64) error { return s.f.ZeroRange(int64(off), n) }

func (s fileStore) extents(off dataOffset, n int64, fn func(dataOffset, int64, bool) bool) error {
	end := off + dataOffset(n)
	more := true
	err := s.f.DataExtents(int64(off), n, func(e storage.Extent) bool {
		off = dataOffset(e.Offset + e.Length)
		more = fn(dataOffset(e.Offset), e.Length, e.Data)
		return more
	})
	if err == nil && more && off < end { // past the end of the file
		fn(off, int64(end-off), false)
	}
	return err
}

// deviceStore keeps the data in a virtual disk, for data files of other formats.
type deviceStore struct {
	d block.Device
}

// inside is how many of n bytes at off lie on the device.
func (s deviceStore) inside(off dataOffset, n int) int {
	return int(min(int64(n), max(0, s.d.Size()-int64(off))))
}

func (s deviceStore) read(p []byte, off dataOffset) error {
	n := s.inside(off, len(p))
	clear(p[n:])
	if n == 0 {
		return nil
	}
	_, err := s.d.ReadAt(p[:n], int64(off))
	return err
}

func (s deviceStore) tryRead(p []byte, off dataOffset) error {
	n := s.inside(off, len(p))
	clear(p[n:])
	if n == 0 {
		return nil
	}
	return s.d.TryReadAt(p[:n], int64(off))
}

func (s deviceStore) write(p []byte, off dataOffset) error {
	_, err := s.d.WriteAt(p, int64(off))
	return err
}

func (s deviceStore) sync() error          { return s.d.Flush() }
func (s deviceStore) size() (int64, error) { return s.d.Size(), nil }
func (s deviceStore) close() error         { return s.d.Close() }

func (s deviceStore) resize(size int64) error { return s.d.Resize(size, block.PreallocOff) }

func (s deviceStore) punch(off dataOffset, n int64) error {
	return s.d.WriteZeroes(int64(off), n, block.MayUnmap|block.FastOnly)
}

func (s deviceStore) zeroRange(off dataOffset, n int64) error {
	return s.d.WriteZeroes(int64(off), n, block.FastOnly)
}

func (s deviceStore) allocate(dataOffset, int64) error {
	return fmt.Errorf("reserving space on a data disk: %w", errors.ErrUnsupported)
}

func (s deviceStore) extents(off dataOffset, n int64, fn func(dataOffset, int64, bool) bool) error {
	end := off + dataOffset(n)
	more := true
	if in := s.inside(off, int(n)); in > 0 {
		err := s.d.Extents(int64(off), int64(in), func(e block.Extent) bool {
			off = dataOffset(e.Offset + e.Length)
			more = fn(dataOffset(e.Offset), e.Length, !e.Zero)
			return more
		})
		if err != nil {
			return err
		}
	}
	if more && off < end {
		fn(off, int64(end-off), false)
	}
	return nil
}

// countedStore counts what changes a store, for the barrier that makes it durable.
type countedStore struct {
	store
	barrier *barrier
}

func (s countedStore) write(p []byte, off dataOffset) error {
	defer s.barrier.changed()
	return s.store.write(p, off)
}

func (s countedStore) resize(size int64) error {
	defer s.barrier.changed()
	return s.store.resize(size)
}

func (s countedStore) punch(off dataOffset, n int64) error {
	defer s.barrier.changed()
	return s.store.punch(off, n)
}

func (s countedStore) zeroRange(off dataOffset, n int64) error {
	defer s.barrier.changed()
	return s.store.zeroRange(off, n)
}

func (s countedStore) allocate(off dataOffset, n int64) error {
	defer s.barrier.changed()
	return s.store.allocate(off, n)
}

// zeroStore makes [off, off+n) read as zeros: without writing if the storage can, giving space back when unmap
// is set, else by writing zeros out, which fast forbids.
func zeroStore(s store, off dataOffset, n int64, unmap, fast bool) error {
	if n == 0 {
		return nil
	}
	ways := [2]func(dataOffset, int64) error{s.zeroRange, s.punch}
	if unmap {
		ways[0], ways[1] = ways[1], ways[0]
	} else if !fast {
		ways[1] = nil // keeping the space matters more than speed
	}
	var err error
	for _, zero := range ways {
		if zero == nil {
			continue
		}
		if err = zero(off, n); !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	if fast {
		return err
	}
	return writeZeroBytes(s, off, n)
}

// writeZeroBytes writes zeros out.
func writeZeroBytes(s store, off dataOffset, n int64) error {
	buf := bufpool.Get(int(min(n, ioUnit)))
	defer buf.Put()
	clear(buf.B)
	for n > 0 {
		part := min(n, int64(len(buf.B)))
		if err := s.write(buf.B[:part], off); err != nil {
			return err
		}
		off, n = off+dataOffset(part), n-part
	}
	return nil
}
