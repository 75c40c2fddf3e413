package storage

import (
	"fmt"
	"io"
	"math"
	"unsafe"

	"github.com/platter-disk/platter/internal/bufpool"
	"golang.org/x/sys/unix"
)

// bounceSize is the size in bytes of the buffer that stands in where a request does not suit direct I/O.
const bounceSize = 1 << 20

// direct is a local file opened with O_DIRECT. The kernel transfers whole blocks only, from and to aligned
// memory; direct makes requests of any shape from those.
//
// A block that is written in part is read, changed and written back, and nobody else may write it meanwhile:
// such a write holds the blocks it touches exclusively, every other change holds its range shared.
type direct struct {
	*local
	block  int64   // alignment of offsets and lengths
	memory uintptr // alignment of buffers; at most bufpool.Align
	ranges rangeLock
}

// newDirect makes a File of l, whose descriptor was opened with O_DIRECT.
func newDirect(l *local) (File, error) {
	d := &direct{local: l, block: zeroEdge, memory: bufpool.Align}
	d.ranges.init()
	var st unix.Statx_t
	err := unix.Statx(int(l.fd), "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st)
	if err == nil && st.Mask&unix.STATX_DIOALIGN != 0 && st.Dio_offset_align != 0 {
		if st.Dio_offset_align > bounceSize || st.Dio_mem_align > bufpool.Align {
			return nil, l.wrap("open", fmt.Errorf("direct I/O wants offsets aligned to %d and memory to %d bytes: more than supported",
				st.Dio_offset_align, st.Dio_mem_align))
		}
		d.block, d.memory = int64(st.Dio_offset_align), uintptr(st.Dio_mem_align)
	}
	return d, nil
}

// suits tells whether p can be transferred at off as it is.
func (d *direct) suits(p []byte, off int64) bool {
	return off%d.block == 0 && int64(len(p))%d.block == 0 && uintptr(unsafe.Pointer(unsafe.SliceData(p)))%d.memory == 0
}

// pread reads an aligned range; fewer bytes than asked for mean the end of the file.
func (d *direct) pread(p []byte, off int64) (done int, err error) {
	err = d.withFD("read", func(fd uintptr) error {
		for done < len(p) {
			n, err := unix.Pread(int(fd), p[done:], off+int64(done))
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				return err
			}
			done += n
			// Only the end of the file cuts a block; going on from there would be unaligned.
			if n == 0 || int64(n)%d.block != 0 {
				return nil
			}
		}
		return nil
	})
	return done, err
}

func (d *direct) ReadAt(p []byte, off int64) (int, error) {
	if err := checkRange(off, int64(len(p))); err != nil {
		return 0, d.wrap("read", err)
	}
	if d.suits(p, off) {
		n, err := d.pread(p, off)
		if err == nil && n < len(p) {
			err = io.EOF
		}
		return n, err
	}
	end := off + int64(len(p))
	bounce := bufpool.Get(int(min(bounceSize, alignUp(end, d.block)-alignDown(off, d.block))))
	defer bounce.Put()
	for done := 0; done < len(p); {
		pos := off + int64(done)
		start := alignDown(pos, d.block)
		b := bounce.B[:min(int64(len(bounce.B)), alignUp(end, d.block)-start)]
		n, err := d.pread(b, start)
		if err != nil {
			return done, err
		}
		if skip := int(pos - start); n > skip {
			done += copy(p[done:], b[skip:n])
		}
		if n < len(b) && done < len(p) {
			return done, io.EOF
		}
	}
	return len(p), nil
}

// TryReadAt implements File; direct I/O always waits for the device.
func (d *direct) TryReadAt([]byte, int64) (int, error) { return 0, ErrWouldBlock }

func (d *direct) WriteAt(p []byte, off int64) (int, error) {
	if err := d.change("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	if d.device {
		return d.writeDevice(p, off, d.writeAt)
	}
	return d.writeAt(p, off)
}

func (d *direct) writeAt(p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	end := off + int64(len(p))
	if d.suits(p, off) {
		defer d.ranges.unlock(d.ranges.lock(off, end, false))
		return d.f.WriteAt(p, off)
	}
	first, last := alignDown(off, d.block), alignUp(end, d.block)
	ticket := d.ranges.lock(first, last, first != off || last != end)
	size, err := d.Size()
	if last != end && last > size && err == nil && !d.device {
		// The last block is cut by the end of the file. It is written whole and the file cut again, so nobody
		// may write anything behind it.
		d.ranges.unlock(ticket)
		defer d.ranges.unlock(d.ranges.lock(first, math.MaxInt64, true))
		return d.writeTail(p, off)
	}
	defer d.ranges.unlock(ticket)
	if err != nil {
		return 0, err
	}
	return d.writeBlocks(p, off)
}

// writeTail writes p, whose last block may pass the end of the file. The caller holds everything from the
// first block on exclusively.
func (d *direct) writeTail(p []byte, off int64) (int, error) {
	size, err := d.Size()
	if err != nil {
		return 0, err
	}
	n, err := d.writeBlocks(p, off)
	now, sizeErr := d.Size()
	if want := max(size, off+int64(n)); sizeErr == nil && now > want {
		sizeErr = d.f.Truncate(want)
	}
	if err == nil {
		err = sizeErr
	}
	return n, err
}

// writeBlocks writes p through a bounce buffer. The caller holds the blocks it touches.
func (d *direct) writeBlocks(p []byte, off int64) (int, error) {
	end := off + int64(len(p))
	bounce := bufpool.Get(int(min(bounceSize, alignUp(end, d.block)-alignDown(off, d.block))))
	defer bounce.Put()
	for done := 0; done < len(p); {
		pos := off + int64(done)
		start := alignDown(pos, d.block)
		b := bounce.B[:min(int64(len(bounce.B)), alignUp(end, d.block)-start)]
		stop := start + int64(len(b))
		if pos != start {
			if err := d.fill(b[:d.block], start); err != nil {
				return done, err
			}
		}
		if stop > end && (stop-d.block != start || pos == start) {
			if err := d.fill(b[int64(len(b))-d.block:], stop-d.block); err != nil {
				return done, err
			}
		}
		n := copy(b[pos-start:], p[done:])
		if _, err := d.f.WriteAt(b, start); err != nil {
			return done, err
		}
		done += n
	}
	return len(p), nil
}

// fill reads one block, with zeros past the end of the file.
func (d *direct) fill(b []byte, off int64) error {
	n, err := d.pread(b, off)
	clear(b[n:])
	return err
}

func (d *direct) Truncate(size int64) error {
	defer d.ranges.unlock(d.ranges.lock(0, math.MaxInt64, true))
	return d.local.Truncate(size)
}

func (d *direct) PunchHole(off, length int64) error {
	return d.hold(off, length, func() error { return d.punchHole(off, length, d.holdDevice) })
}

func (d *direct) ZeroRange(off, length int64) error {
	return d.hold(off, length, func() error { return d.zeroRange(off, length, d.holdDevice) })
}

func (d *direct) Allocate(off, length int64) error {
	return d.hold(off, length, func() error { return d.local.Allocate(off, length) })
}

// hold runs a change of a range that the kernel makes, while nobody rewrites a block of it. A block device is
// left to holdDevice, because there the edges of the range are written like any other bytes.
func (d *direct) hold(off, length int64, change func() error) error {
	if !d.device && checkRange(off, length) == nil {
		defer d.ranges.unlock(d.ranges.lock(off, off+length, false))
	}
	return change()
}

// holdDevice zeroes whole blocks with inner and writes zeros to the rest.
func (d *direct) holdDevice(op string, mode uint32, off, length int64) error {
	return d.zeroDevice(op, off, length, func(off, length int64) error {
		defer d.ranges.unlock(d.ranges.lock(off, off+length, false))
		return d.fallocate(op, mode, off, length)
	}, d.writeAt)
}
