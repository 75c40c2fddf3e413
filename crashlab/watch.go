package crashlab

import (
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/platter-disk/platter/storage"
)

// Range is a part of a guest disk, in bytes.
type Range struct{ Offset, Length int64 }

// maxWatched bounds the watched bytes: every judged state reads them all.
const maxWatched = 256 << 20

// watch is the list of guest sectors whose contents are judged. Each has a slot, numbered from 0 in the order
// of the sectors. Immutable.
type watch struct {
	ranges []Range // sorted, whole sectors, not touching each other
	first  []int   // slot of each range's first sector
	slots  int
}

// newWatch validates the ranges; none means the whole disk.
func newWatch(ranges []Range, size int64) (*watch, error) {
	if len(ranges) == 0 {
		const mask = storage.SectorSize - 1
		ranges = []Range{{0, (size + mask) &^ mask}}
	}
	sorted := slices.Clone(ranges)
	slices.SortFunc(sorted, func(a, b Range) int { return int(min(max(a.Offset-b.Offset, -1), 1)) })
	w := &watch{}
	var end, total int64
	for i, r := range sorted {
		if r.Offset < 0 || r.Length < 0 || r.Offset%storage.SectorSize != 0 || r.Length%storage.SectorSize != 0 ||
			r.Offset > maxFileSize || r.Length > maxFileSize-r.Offset || i > 0 && r.Offset < end {
			return nil, fmt.Errorf("crashlab: watched range of %d bytes at %d: want whole sectors that no other range contains", r.Length, r.Offset)
		}
		end = r.Offset + r.Length
		if total += r.Length; total > maxWatched {
			return nil, fmt.Errorf("crashlab: more than %d bytes of the guest disk are watched: name the ranges that matter", maxWatched)
		}
		w.ranges = append(w.ranges, r)
		w.first = append(w.first, w.slots)
		w.slots += int(r.Length / storage.SectorSize)
	}
	return w, nil
}

// slot returns the slot of a sector.
func (w *watch) slot(sector int64) (int, bool) {
	i, exact := slices.BinarySearchFunc(w.ranges, sector*storage.SectorSize, func(r Range, off int64) int {
		return int(min(max(r.Offset-off, -1), 1))
	})
	if !exact {
		i--
	}
	if i < 0 || sector*storage.SectorSize >= w.ranges[i].Offset+w.ranges[i].Length {
		return 0, false
	}
	return w.first[i] + int(sector-w.ranges[i].Offset/storage.SectorSize), true
}

// sector is the reverse of slot.
func (w *watch) sector(slot int) int64 {
	i, exact := slices.BinarySearch(w.first, slot)
	if !exact {
		i--
	}
	for w.ranges[i].Length == 0 {
		i++
	}
	return w.ranges[i].Offset/storage.SectorSize + int64(slot-w.first[i])
}

// read fills view, which has a sector for each slot, from a disk; what lies past its end is zeros.
func (w *watch) read(disk io.ReaderAt, size int64, view []byte) error {
	for i, r := range w.ranges {
		p := view[w.first[i]*storage.SectorSize:][:r.Length]
		n := min(max(size-r.Offset, 0), r.Length)
		clear(p[n:])
		if n == 0 {
			continue
		}
		got, err := disk.ReadAt(p[:n], r.Offset)
		if int64(got) < n {
			if err == nil || errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("read of %d bytes at %d on a disk of %d: %w", n, r.Offset, size, err)
		}
	}
	return nil
}
