package storage

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/platter-disk/platter/internal/bufpool"
	"golang.org/x/sys/unix"
)

// blockDevices: this system's block devices can be opened.
const blockDevices = true

// localSystem is what linux keeps for a local file.
type localSystem struct {
	noTry atomic.Bool // the file system does not know RWF_NOWAIT
}

// noCoWFlag is FS_NOCOW_FL of linux/fs.h.
const noCoWFlag = 0x00800000

// zeroEdge is the alignment in bytes in which a block device zeroes without the page cache: the largest
// logical block size in use.
const zeroEdge = 4096

func openDescriptor(path string, flags int, perm fs.FileMode, direct bool) (*os.File, error) {
	if direct {
		flags |= unix.O_DIRECT
	}
	f, err := os.OpenFile(path, flags, perm)
	if direct && errors.Is(err, unix.EINVAL) {
		if flags&os.O_EXCL != 0 {
			os.Remove(path) // the kernel makes the file before it looks whether it can do direct I/O
		}
		err = &fs.PathError{Op: "open", Path: path, Err: fmt.Errorf("the file system does not support direct I/O: %w", errors.ErrUnsupported)}
	}
	return f, err
}

// syncDirectoryOf makes the directory entry of a new file durable.
func syncDirectoryOf(path string) error {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	// Some file systems cannot sync a directory and say so; there is nothing more to be done on those.
	if err := dir.Sync(); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return nil
}

// setNoCoW is a hint: a file system without the attribute refuses, and the file works all the same.
func setNoCoW(fd uintptr) {
	flags, err := unix.IoctlGetUint32(int(fd), unix.FS_IOC_GETFLAGS)
	if err != nil {
		return
	}
	unix.IoctlSetPointerInt(int(fd), unix.FS_IOC_SETFLAGS, int(flags|noCoWFlag))
}

func (l *local) TryReadAt(p []byte, off int64) (int, error) {
	if l.sys.noTry.Load() {
		return 0, ErrWouldBlock
	}
	// preadv2 takes offset -1 for the file position.
	if err := checkRange(off, int64(len(p))); err != nil {
		return 0, l.wrap("read", err)
	}
	done := 0
	err := l.withFD("read", func(fd uintptr) error {
		for done < len(p) {
			n, err := unix.Preadv2(int(fd), [][]byte{p[done:]}, off+int64(done), unix.RWF_NOWAIT)
			switch {
			case err == unix.EINTR:
			case err == unix.EAGAIN:
				return ErrWouldBlock
			case err == unix.EOPNOTSUPP || err == unix.ENOSYS:
				l.sys.noTry.Store(true)
				return ErrWouldBlock
			case err != nil:
				return err
			case n == 0:
				return io.EOF
			default:
				done += n
			}
		}
		return nil
	})
	return done, err
}

func (l *local) Sync() error {
	if l.readOnly {
		return nil
	}
	return l.withFD("fdatasync", func(fd uintptr) error { return retry(func() error { return unix.Fdatasync(int(fd)) }) })
}

func retry(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

func fallocate(fd uintptr, mode uint32, off, length int64) error {
	err := retry(func() error { return unix.Fallocate(int(fd), mode, off, length) })
	if err == unix.ENODEV || err == unix.ENOSYS {
		err = unix.EOPNOTSUPP
	}
	return err
}

func (l *local) fallocate(op string, mode uint32, off, length int64) error {
	return l.withFD(op, func(fd uintptr) error { return fallocate(fd, mode, off, length) })
}

func (l *local) PunchHole(off, length int64) error { return l.punchHole(off, length, l.zeroBuffered) }

// punchHole leaves a block device to zero.
func (l *local) punchHole(off, length int64, zero deviceZeroer) error {
	const op, mode = "punch hole in", unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	if err := l.change(op, off, length); err != nil || length == 0 {
		return err
	}
	if !l.device {
		err := l.fallocate(op, mode, off, length)
		if !errors.Is(err, unix.EFBIG) {
			return err
		}
		// The range ends past what the file system can address; what lies past the end does not count.
	}
	size, err := l.Size()
	if err != nil || off >= size {
		return err
	}
	if !l.device {
		return l.fallocate(op, mode, off, min(length, size-off))
	}
	return zero(op, mode, off, min(length, size-off))
}

func (l *local) ZeroRange(off, length int64) error { return l.zeroRange(off, length, l.zeroBuffered) }

// zeroRange leaves a block device to zero.
func (l *local) zeroRange(off, length int64, zero deviceZeroer) error {
	const op = "zero range of"
	if err := l.change(op, off, length); err != nil || length == 0 {
		return err
	}
	if l.device {
		if err := l.insideDevice(op, off, length); err != nil {
			return err
		}
		return zero(op, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, length)
	}
	return l.withFD(op, func(fd uintptr) error {
		err := fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, off, length)
		if err != unix.EOPNOTSUPP {
			return err
		}
		// tmpfs and others: a hole with its space reserved is the same. Reserving comes first because it may
		// be what is not supported, and then nothing may have changed.
		if err := fallocate(fd, 0, off, length); err != nil {
			return err
		}
		if err := fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, length); err != nil {
			return err
		}
		return fallocate(fd, 0, off, length)
	})
}

func (l *local) Allocate(off, length int64) error {
	if err := l.change("allocate in", off, length); err != nil || length == 0 {
		return err
	}
	if l.device {
		return l.insideDevice("allocate in", off, length) // a device has all its space
	}
	return l.fallocate("allocate in", 0, off, length)
}

func (l *local) insideDevice(op string, off, length int64) error {
	size, err := l.Size()
	if err == nil && length > size-off {
		err = l.wrap(op, fmt.Errorf("%d bytes at %d of a device of %d bytes: %w", length, off, size, io.ErrShortWrite))
	}
	return err
}

// deviceZeroer zeroes a range of a block device.
type deviceZeroer func(op string, mode uint32, off, length int64) error

// zeroBuffered is the deviceZeroer of a device behind the page cache.
func (l *local) zeroBuffered(op string, mode uint32, off, length int64) error {
	return l.zeroDevice(op, off, length, func(off, length int64) error { return l.fallocate(op, mode, off, length) }, l.f.WriteAt)
}

// zeroDevice zeroes the whole blocks of the range with inner, which takes nothing else, and writes zeros to
// its edges.
func (l *local) zeroDevice(op string, off, length int64, inner func(off, length int64) error, write func([]byte, int64) (int, error)) error {
	end := off + length
	first, last := alignUp(off, zeroEdge), alignDown(end, zeroEdge)
	if first >= last {
		return l.wrap(op, fmt.Errorf("%d bytes at %d hold no whole block of the device: %w", length, off, errors.ErrUnsupported))
	}
	if err := inner(first, last-first); err != nil {
		return err
	}
	zeros := bufpool.Get(zeroEdge)
	defer zeros.Put()
	clear(zeros.B)
	for _, edge := range [2][2]int64{{off, first}, {last, end}} {
		if _, err := write(zeros.B[:edge[1]-edge[0]], edge[0]); err != nil {
			return err
		}
	}
	return nil
}

func alignDown(n, align int64) int64 { return n / align * align }

func alignUp(n, align int64) int64 { return (n + align - 1) / align * align }
