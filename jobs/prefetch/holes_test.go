package prefetch

import (
	"testing"

	"github.com/platter-disk/platter/block"
)

// mapped is the map of a base image and nothing else: zeros, but for the last of every so many sectors.
type mapped struct {
	Overlay
	size, every int64 // bytes
}

func (m mapped) BaseSize() int64 { return m.size }

func (m mapped) Extents(off, n int64, fn func(block.Extent) bool) error {
	for end := off + n; off < end; {
		data := off/m.every*m.every + m.every - 512
		e := block.Extent{Offset: off, Length: min(end, data) - off, Depth: 1, Zero: true}
		if off >= data {
			e.Length, e.Zero, e.Data, e.Allocated = min(end, data+512)-off, false, true, true
		}
		if !fn(e) {
			return nil
		}
		off += e.Length
	}
	return nil
}

// TestHolesInWholeUnits: no unit of the disk is cut in two, wherever a window or what is remembered of it ends. Parts of
// a unit are not kept: they would be read again in a later pass.
func TestHolesInWholeUnits(t *testing.T) {
	for _, c := range []struct {
		name              string
		unit, size, every int64
	}{
		{"window", 7680, 3*holesWindow + 512, holesWindow / 2},
		{"largest unit", 64<<20 - 512, 3*holesWindow + 512, holesWindow / 2},
		{"runs", 64 << 10, holesWindow - 512, 160<<10 + 512},
		{"many runs", 7680, holesWindow, 16 << 10},
	} {
		t.Run(c.name, func(t *testing.T) {
			known := holes{over: mapped{size: c.size, every: c.every}, unit: c.unit}
			for off := int64(0); off < c.size; {
				_, n := known.sameKind(off, c.size-off)
				if off += n; n <= 0 || off%c.unit != 0 && off != c.size {
					t.Fatalf("%d bytes up to %d are alike: want whole units of %d", n, off, c.unit)
				}
			}
		})
	}
}
