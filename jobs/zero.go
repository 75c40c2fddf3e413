package jobs

import (
	"bytes"
	"encoding/binary"
)

// zeroPage is what buffers are compared with. It is only ever read.
var zeroPage [4096]byte

// isZero tells whether p holds nothing but zeros. Most data shows itself in the first word; the rest is
// compared a page at a time with the vectorised comparison of the standard library.
func isZero(p []byte) bool {
	if len(p) >= 8 && binary.NativeEndian.Uint64(p) != 0 {
		return false
	}
	for len(p) > len(zeroPage) {
		if !bytes.Equal(p[:len(zeroPage)], zeroPage[:]) {
			return false
		}
		p = p[len(zeroPage):]
	}
	return bytes.Equal(p, zeroPage[:len(p)])
}

// firstNonZero returns the offset of the first byte of p that is not zero, or -1.
func firstNonZero(p []byte) int {
	for off := 0; off < len(p); off += len(zeroPage) {
		page := p[off:min(off+len(zeroPage), len(p))]
		if isZero(page) {
			continue
		}
		for i, b := range page {
			if b != 0 {
				return off + i
			}
		}
	}
	return -1
}

// firstDifference returns the offset of the first byte in which a and b, of equal length, differ, or -1.
func firstDifference(a, b []byte) int {
	for off := 0; off < len(a); off += len(zeroPage) {
		end := min(off+len(zeroPage), len(a))
		if bytes.Equal(a[off:end], b[off:end]) {
			continue
		}
		for i := off; i < end; i++ {
			if a[i] != b[i] {
				return i
			}
		}
	}
	return -1
}
