package jobs

import (
	"context"
	"errors"
	"testing"

	"pgregory.net/rapid"

	"github.com/platter-disk/platter/block"
)

func TestCompare(t *testing.T) {
	const mib = 1 << 20
	empty := func(n int) *fakeDevice { return newFake(n, 65536).add(int64(n), unallocatedRun, 0) }
	ones := func(n int) *fakeDevice { return newFake(n, 65536).add(int64(n), dataRun, 1) }
	poke := func(d *fakeDevice, off int) *fakeDevice { d.runs = nil; d.content[off] = 'x'; return d }
	for _, tt := range []struct {
		name   string
		a, b   *fakeDevice
		strict bool
		want   CompareResult
	}{
		{"equal data", ones(mib), ones(mib), false, CompareResult{}},
		{"both empty", empty(mib), empty(mib), false, CompareResult{}},
		{"zeros written out", empty(mib), newFake(mib, 512).add(mib, dataRun, 0), false, CompareResult{}},
		{"one byte", ones(mib), poke(ones(mib), 700001), false, CompareResult{Difference: ContentDiffers, Offset: 699904}},
		{"one byte in an empty disk", empty(mib), poke(empty(mib), 70001), false, CompareResult{Difference: ContentDiffers, Offset: 69632}},
		{"longer, zeros", empty(mib), empty(2 * mib), false, CompareResult{SizesDiffer: true}},
		{"longer, data", poke(empty(2*mib), 1500001), empty(mib), false,
			CompareResult{Difference: ContentDiffers, Offset: 1499648, SizesDiffer: true}},
		{"strict, longer", empty(mib), empty(2 * mib), true, CompareResult{Difference: SizeDiffers, SizesDiffer: true}},
		{"strict, zeros written out", newFake(mib, 512).add(mib/2, unallocatedRun, 0).add(mib/2, dataRun, 0), empty(mib), true,
			CompareResult{Difference: AllocationDiffers, Offset: mib / 2}},
		{"strict, zero clusters", newFake(mib, 512).add(mib, zeroRun, 0), empty(mib), true,
			CompareResult{Difference: AllocationDiffers}},
		{"strict, equal", ones(mib), ones(mib), true, CompareResult{}},
		{"first of many", poke(poke(empty(9*mib), 8*mib), 4*mib), empty(9 * mib), false,
			CompareResult{Difference: ContentDiffers, Offset: 4 * mib}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, flip := range []bool{false, true} {
				a, b := tt.a, tt.b
				if flip {
					a, b = b, a
				}
				got, err := Compare(t.Context(), a, b, CompareOptions{Strict: tt.strict, BufferSize: 65536})
				if err != nil {
					t.Fatal(err)
				}
				if got != tt.want {
					t.Errorf("flipped %v: got %+v, expected %+v", flip, got, tt.want)
				}
			}
		})
	}
}

func TestCompareErrors(t *testing.T) {
	boom := errors.New("boom")
	bad := func() *fakeDevice {
		d := newFake(1<<20, 512)
		d.badSectors = map[int64]bool{1000: true}
		return d
	}
	lost := newFake(1<<20, 512)
	lost.failMap = boom
	good := func() *fakeDevice { return newFake(1<<20, 512) }
	differing := bad()
	differing.content[5] = 1

	var ce *CompareError
	var re *ReadError
	var ee *ExtentsError
	_, err := Compare(t.Context(), good(), bad(), CompareOptions{BufferSize: 4096})
	if !errors.As(err, &ce) || !ce.Second || !errors.As(err, &re) || re.Offset != 1000*512/4096*4096 {
		t.Errorf("unreadable second disk: %v", err)
	}
	_, err = Compare(t.Context(), lost, good(), CompareOptions{})
	if !errors.As(err, &ce) || ce.Second || !errors.As(err, &ee) || !errors.Is(err, boom) {
		t.Errorf("first disk without a map: %v", err)
	}
	got, err := Compare(t.Context(), good(), differing, CompareOptions{BufferSize: 4096})
	if err != nil || got.Difference != ContentDiffers || got.Offset != 0 {
		t.Errorf("a difference before the unreadable sector: %+v, %v", got, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Compare(ctx, good(), good(), CompareOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestCompareModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		draw := func(name string) *fakeDevice {
			sectors := rapid.IntRange(0, 60).Draw(t, name)
			d := newFake(sectors*512, 512)
			d.runs = []block.Extent{}
			for left := sectors; left > 0; {
				n := min(left, rapid.IntRange(1, 20).Draw(t, "run"))
				e := rapid.SampledFrom([]block.Extent{dataRun, zeroRun, unallocatedRun}).Draw(t, "kind")
				fill := byte(0)
				if e.Data {
					fill = byte(rapid.IntRange(0, 1).Draw(t, "fill"))
				}
				d.add(int64(n*512), e, fill)
				left -= n
			}
			return d
		}
		a, b := draw("a"), draw("b")
		want := CompareResult{SizesDiffer: len(a.content) != len(b.content)}
		for i := range max(len(a.content), len(b.content)) {
			at := func(d *fakeDevice) byte {
				if i < len(d.content) {
					return d.content[i]
				}
				return 0
			}
			if at(a) != at(b) {
				want.Difference, want.Offset = ContentDiffers, int64(i/512*512)
				break
			}
		}
		got, err := Compare(context.Background(), a, b, CompareOptions{BufferSize: 4096, Workers: 3})
		if err != nil || got != want {
			t.Fatalf("got %+v, %v; expected %+v", got, err, want)
		}
	})
}
