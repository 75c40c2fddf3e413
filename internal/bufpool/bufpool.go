// Package bufpool hands out page-aligned byte buffers and takes them back, so that the data path allocates
// nothing once warm and O_DIRECT files can use the buffers as they are.
package bufpool

import (
	"math/bits"
	"sync"
	"unsafe"
)

// Align is the alignment in bytes of every buffer's first byte.
const Align = 4096

const (
	minShift = 12 // 4 KiB
	maxShift = 26 // 64 MiB; larger buffers are allocated and dropped
)

var classes [maxShift - minShift + 1]sync.Pool

// Buffer is a pooled buffer. B may be resliced by its holder up to its capacity.
type Buffer struct {
	B     []byte
	whole []byte
	class int // index in classes, -1 when not pooled
}

// Get returns a buffer with len(B) == n. Its contents are undefined.
func Get(n int) *Buffer {
	class := 0
	if n > 1<<minShift {
		class = bits.Len(uint(n-1)) - minShift
	}
	if class >= len(classes) {
		return &Buffer{B: aligned(n), class: -1}
	}
	b, _ := classes[class].Get().(*Buffer)
	if b == nil {
		whole := aligned(1 << (minShift + class))
		b = &Buffer{whole: whole, class: class}
	}
	b.B = b.whole[:n]
	return b
}

// Put gives the buffer back; neither it nor any slice of it may be used afterwards.
func (b *Buffer) Put() {
	if b.class >= 0 {
		b.B = nil
		classes[b.class].Put(b)
	}
}

func aligned(n int) []byte {
	raw := make([]byte, n+Align)
	skip := (Align - int(uintptr(unsafe.Pointer(unsafe.SliceData(raw)))%Align)) % Align
	return raw[skip : skip+n : skip+n]
}
