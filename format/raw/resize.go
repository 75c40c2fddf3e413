package raw

import (
	"errors"
	"fmt"

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
		return fmt.Errorf("create %s: %w", f.Name(), err)
	}
	if err := f.Truncate(0); err != nil {
		if errors.Is(err, errors.ErrUnsupported) {
			return createInPlace(f, size, err)
		}
		return err
	}
	return grow(f, 0, size, prealloc)
}

// createInPlace accepts a container whose size is fixed if the disk fits.
func createInPlace(f storage.File, size int64, fixed error) error {
	have, err := f.Size()
	if err == nil && have < size {
		err = fmt.Errorf("create a disk of %d bytes in %s, which has %d: %w", size, f.Name(), have, fixed)
	}
	return err
}

func checkPreallocation(prealloc block.Preallocation) error {
	switch prealloc {
	case block.PreallocOff, block.PreallocFalloc, block.PreallocFull:
		return nil
	}
	return fmt.Errorf("Unsupported preallocation mode: %v: %w", prealloc, errors.ErrUnsupported) //lint:ignore ST1005 QEMU's wording
}

// grow extends f from old to size bytes; when that fails the file is cut back.
func grow(f storage.File, old, size int64, prealloc block.Preallocation) error {
	err := f.Truncate(size)
	if err == nil && size > old {
		switch prealloc {
		case block.PreallocFalloc:
			err = f.Allocate(old, size-old)
		case block.PreallocFull:
			err = writeZeros(f, old, size-old)
		}
	}
	if err != nil {
		return errors.Join(fmt.Errorf("grow %s from %d to %d bytes: %w", f.Name(), old, size, err), f.Truncate(old))
	}
	return nil
}

// Resize implements block.Device. The file gets the size as it is; the disk is rounded up to a sector.
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
		err = grow(d.f, length, size, prealloc)
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
