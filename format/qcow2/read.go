package qcow2

import (
	"errors"
	"fmt"
	"io"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
)

// ReadAt reads from the virtual disk.
func (im *Image) ReadAt(p []byte, off int64) (int, error) {
	want := len(p)
	if size := im.size.Load(); off >= 0 && off <= size && int64(len(p)) > size-off {
		p = p[:size-off]
	}
	if err := im.checkRequest("read", off, int64(len(p))); err != nil {
		return 0, err
	}
	if len(p) > 0 {
		hold, err := im.hold(off, off+int64(len(p)), false)
		if err != nil {
			return 0, err
		}
		err = im.readHeld(p, guestOff(off))
		im.locks.unlock(hold)
		if err != nil {
			return 0, err
		}
	}
	if len(p) < want {
		return len(p), io.EOF
	}
	return len(p), nil
}

// readHeld reads a range that the caller holds.
func (im *Image) readHeld(p []byte, off guestOff) error {
	for len(p) > 0 {
		s, err := im.span(off, int64(len(p)), false)
		if err != nil {
			return err
		}
		if !s.inPlace() {
			if part, n := im.partials.find(off, s.n, im.geo.clusterSize); part != nil {
				if err := im.readPartial(part, p[:n], off); err != nil {
					return err
				}
				p, off = p[n:], off+guestOff(n)
				continue
			} else {
				s.n = n
			}
		}
		if err := im.readSpan(p[:s.n], off, &s); err != nil {
			return err
		}
		p, off = p[s.n:], off+guestOff(s.n)
	}
	return nil
}

// readSource reads what the tables say about a range, whatever was written on top of it and is not linked yet.
func (im *Image) readSource(p []byte, off guestOff) error {
	for len(p) > 0 {
		s, err := im.span(off, int64(len(p)), false)
		if err != nil {
			return err
		}
		if err := im.readSpan(p[:s.n], off, &s); err != nil {
			return err
		}
		p, off = p[s.n:], off+guestOff(s.n)
	}
	return nil
}

// readSpan reads a run of one kind.
func (im *Image) readSpan(p []byte, off guestOff, s *span) error {
	switch s.kind {
	case kindNormal:
		if err := storage.ReadFull(im.data, p, int64(s.host)); err != nil {
			return fmt.Errorf("%s: read at guest offset %d: %w", im.file.Name(), off, err)
		}
		return nil
	case kindCompressed:
		return im.readCompressed(p, off, s.entry)
	case kindUnallocated:
		return im.readBacking(p, off)
	}
	clear(p)
	return nil
}

// backed returns how many of n bytes at off the backing device has.
func (im *Image) backed(off guestOff, n int64) int64 {
	backing := im.backing.get()
	if backing == nil {
		return 0
	}
	return max(min(n, backing.Size()-int64(off)), 0)
}

func (im *Image) readBacking(p []byte, off guestOff) error {
	n := im.backed(off, int64(len(p)))
	clear(p[n:])
	if n == 0 {
		return nil
	}
	if _, err := im.backing.get().ReadAt(p[:n], int64(off)); err != nil && err != io.EOF {
		return fmt.Errorf("%s: backing file: %w", im.file.Name(), err)
	}
	return nil
}

// TryReadAt reads from the virtual disk if that needs no waiting.
func (im *Image) TryReadAt(p []byte, off int64) error {
	if err := im.checkRequest("read", off, int64(len(p))); err != nil {
		return err
	}
	if len(p) == 0 {
		return nil
	}
	hold, ok := im.locks.tryLockShared(off, off+int64(len(p)))
	if !ok {
		return block.ErrWouldBlock
	}
	err := im.errIfClosed()
	if err == nil {
		err = im.tryReadHeld(p, guestOff(off))
	}
	im.locks.unlock(hold)
	if errors.Is(err, storage.ErrWouldBlock) {
		return block.ErrWouldBlock
	}
	return err
}

func (im *Image) tryReadHeld(p []byte, off guestOff) error {
	for len(p) > 0 {
		s, err := im.span(off, int64(len(p)), true)
		if err != nil {
			return err
		}
		if !s.inPlace() && !im.partials.empty() {
			return block.ErrWouldBlock
		}
		switch s.kind {
		case kindNormal:
			err = storage.TryReadFull(im.data, p[:s.n], int64(s.host))
		case kindZero:
			clear(p[:s.n])
		case kindUnallocated:
			n := im.backed(off, s.n)
			clear(p[n:s.n])
			if n > 0 {
				err = im.backing.get().TryReadAt(p[:n], int64(off))
			}
		default:
			err = block.ErrWouldBlock
		}
		if err != nil {
			return err
		}
		p, off = p[s.n:], off+guestOff(s.n)
	}
	return nil
}
