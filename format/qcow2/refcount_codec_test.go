package qcow2

import (
	"testing"

	"pgregory.net/rapid"
)

func TestRefcountCodec(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		order := rapid.Uint32Range(0, maxRefcountOrder).Draw(t, "order")
		block := make([]byte, 512)
		n := len(block) * 8 >> order
		want := make([]uint64, n)
		for range rapid.IntRange(1, 200).Draw(t, "sets") {
			i := rapid.IntRange(0, n-1).Draw(t, "index")
			v := rapid.Uint64Range(0, maxRefcount(order)).Draw(t, "count")
			setRefcount(block, order, i, v)
			want[i] = v
		}
		for i, w := range want {
			if got := getRefcount(block, order, i); got != w {
				t.Fatalf("order %d: count %d is %d, want %d", order, i, got, w)
			}
		}
	})
}

// The bit and byte order is the format's: entry 0 in the low-order bits, big-endian from 16 bits up.
func TestRefcountCodecLayout(t *testing.T) {
	for _, tc := range []struct {
		order    uint32
		i        int
		v        uint64
		at       int
		want     byte
		wantLast byte // the byte where the entry ends
		last     int
	}{
		{0, 9, 1, 1, 0x02, 0x02, 1},
		{1, 5, 3, 1, 0x0c, 0x0c, 1},
		{2, 1, 0xa, 0, 0xa0, 0xa0, 0},
		{3, 2, 0x7f, 2, 0x7f, 0x7f, 2},
		{4, 1, 0x1234, 2, 0x12, 0x34, 3},
		{5, 1, 0x12345678, 4, 0x12, 0x78, 7},
		{6, 1, 0x1234567890abcdef, 8, 0x12, 0xef, 15},
	} {
		block := make([]byte, 512)
		setRefcount(block, tc.order, tc.i, tc.v)
		if block[tc.at] != tc.want || block[tc.last] != tc.wantLast {
			t.Errorf("order %d: % x", tc.order, block[:16])
		}
	}
	for order, want := range []uint64{1, 3, 15, 255, 65535, 1<<32 - 1, 1<<64 - 1} {
		if got := maxRefcount(uint32(order)); got != want {
			t.Errorf("maxRefcount(%d) = %d, want %d", order, got, want)
		}
	}
}
