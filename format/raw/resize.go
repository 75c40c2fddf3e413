package raw

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
)

// Create makes f, whatever it held, a raw disk of size bytes, rounded up to a multiple of 512, that reads as
// zeros. A block device keeps its size, which must suffice, and its contents. f is neither synced nor closed.
func Create(f storage.File, size int64, prealloc block.Preallocation) error {
	size, err := diskSize(size)
	if err != nil {
		return fmt.Errorf("create %s: %w", f.Name(), err)
	}
	if err := checkPreallocation(prealloc); err != nil {
		return err
	}
	if err := f.Truncate(0); err != nil {
		if errors.Is(err, errors.ErrUnsupported) {
			return createInPlace(f, size)
		}
		return err
	}
	return grow(f, 0, size, prealloc, nil)
}

// createInPlace accepts a container whose size is fixed if the disk fits.
func createInPlace(f storage.File, size int64) error {
	have, err := f.Size()
	if err == nil && have < size {
		err = fmt.Errorf("%s: the disk needs %d bytes, and there are %d: %w", f.Name(), size, have, syscall.ENOSPC)
	}
	return err
}

func checkPreallocation(prealloc block.Preallocation) error {
	switch prealloc {
	case block.PreallocOff, block.PreallocFalloc, block.PreallocFull:
		return nil
	}
	return preallocationError(prealloc)
}

// preallocationError says in QEMU's words that raw has no such preallocation. It wraps errors.ErrUnsupported.
type preallocationError block.Preallocation

func (e preallocationError) Error() string {
	return "Unsupported preallocation mode: " + block.Preallocation(e).String()
}

func (preallocationError) Unwrap() error { return errors.ErrUnsupported }

// growStep is the most in bytes that is allocated or written between two looks at the interrupt.
const growStep = 64 << 20

// grow extends f from old to size bytes; when that fails, or interrupt says so, the file is cut back.
func grow(f storage.File, old, size int64, prealloc block.Preallocation, interrupt func() error) error {
	err := f.Truncate(size)
	if prealloc != block.PreallocOff {
		lay := f.Allocate
		if prealloc == block.PreallocFull {
			lay = func(off, length int64) error { return writeZeros(f, off, length) }
		}
		for off := old; err == nil && off < size; off += growStep {
			if interrupt != nil {
				err = interrupt()
			}
			if err == nil {
				err = lay(off, min(growStep, size-off))
			}
		}
	}
	if err != nil {
		return errors.Join(fmt.Errorf("grow %s from %d to %d bytes: %w", f.Name(), old, size, err), f.Truncate(old))
	}
	return nil
}

// Resize implements block.Device. The file gets the size as it is; the disk is rounded up to a sector. While it
// preallocates it can be interrupted (Options.Interrupt); the disk then keeps its size.
func (d *Device) Resize(size int64, prealloc block.Preallocation) error {
	d.changes.Lock()
	defer d.changes.Unlock()
	if err := d.usable("resize"); err != nil {
		return err
	}
	disk, err := diskSize(size)
	if err != nil {
		return fmt.Errorf("resize %s: %w", d.f.Name(), err)
	}
	if err := checkPreallocation(prealloc); err != nil {
		return err
	}
	length, err := d.f.Size()
	if err != nil {
		return err
	}
	if size < length {
		if prealloc != block.PreallocOff {
			return errors.New("Preallocation can only be used for growing images") //lint:ignore ST1005 QEMU's wording
		}
		// The disk first: a reader must not take the end of the file for the end of its data.
		before := d.size.Swap(min(disk, d.size.Load()))
		if err = d.f.Truncate(size); err != nil {
			d.size.Store(before)
		}
	} else {
		err = grow(d.f, length, size, prealloc, d.o.Interrupt)
	}
	if err != nil {
		return err
	}
	d.size.Store(disk)
	if d.o.Writethrough {
		return d.flusher.flush()
	}
	return nil
}
