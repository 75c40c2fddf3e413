package bufpool

import (
	"testing"
	"unsafe"
)

func TestBuffersAreAlignedAndLargeEnough(t *testing.T) {
	for _, n := range []int{0, 1, 4095, 4096, 4097, 65536, 65537, 1 << maxShift, 1<<maxShift + 1} {
		b := Get(n)
		if len(b.B) != n {
			t.Errorf("Get(%d) has %d bytes", n, len(b.B))
		}
		if n > 0 && uintptr(unsafe.Pointer(&b.B[0]))%Align != 0 {
			t.Errorf("Get(%d) is not aligned to %d", n, Align)
		}
		for i := range b.B {
			b.B[i] = byte(i)
		}
		b.Put()
	}
}

func TestWarmPoolAllocatesNothing(t *testing.T) {
	if n := testing.AllocsPerRun(100, func() { Get(4096).Put() }); n > 0.5 {
		t.Errorf("%v allocations for a buffer, want none once warm", n)
	}
}
