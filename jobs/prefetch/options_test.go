package prefetch

import "testing"

// An image's header may ask for any number of buffers of any size; memory stays bounded.
func TestBuffersAreBounded(t *testing.T) {
	for _, c := range []struct {
		slots     int
		size      int64
		unit      int64
		wantSlots int
		wantSize  int64
	}{
		{0, 0, 65536, DefaultSlots, DefaultPerPrefetch},
		{7, 100_000, 65536, 7, 131072},
		{1024, 1 << 40, 512, 4, 64 << 20},
		{1024, 1, 64 << 20, 4, 64 << 20},
		{5, 1, 200 << 20, 1, 200 << 20},
		{1, 1, 1 << 30, 1, 1 << 30},
	} {
		o := Options{Slots: c.slots, PerPrefetch: c.size}.withDefaults(c.unit)
		if o.Slots != c.wantSlots || o.PerPrefetch != c.wantSize {
			t.Errorf("%d slots of %d bytes in units of %d: %d of %d, want %d of %d",
				c.slots, c.size, c.unit, o.Slots, o.PerPrefetch, c.wantSlots, c.wantSize)
		}
	}
}
