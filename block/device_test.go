package block

import (
	"errors"
	"math"
	"testing"
)

func TestCheckRange(t *testing.T) {
	const size = 4096
	for _, c := range []struct {
		off, length int64
		ok          bool
	}{
		{0, 0, true}, {0, size, true}, {size, 0, true}, {size - 1, 1, true},
		{size, 1, false}, {1, size, false}, {-1, 1, false}, {0, -1, false},
		{math.MaxInt64, math.MaxInt64, false}, {1, math.MaxInt64, false}, {math.MinInt64, 1, false},
	} {
		err := CheckRange("read", c.off, c.length, size)
		if (err == nil) != c.ok || err != nil && !errors.Is(err, ErrOutOfRange) {
			t.Errorf("[%d, +%d) of %d bytes: %v, want ok=%v", c.off, c.length, size, err, c.ok)
		}
	}
}

func TestPreallocationNames(t *testing.T) {
	for p := PreallocOff; p <= PreallocFull; p++ {
		if back, err := ParsePreallocation(p.String()); err != nil || back != p {
			t.Errorf("%v is read back as %v, %v", p, back, err)
		}
	}
	if _, err := ParsePreallocation("some"); err == nil {
		t.Error("an unknown name was accepted")
	}
	if got := Preallocation(9).String(); got != "Preallocation(9)" {
		t.Errorf("a value without a name prints as %q", got)
	}
}
