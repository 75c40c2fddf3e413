package jobs

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/platter-disk/platter/block"
)

func TestConvertSkipsWhatIsZero(t *testing.T) {
	const mib = 1 << 20
	src := newFake(8*mib, 65536)
	src.add(mib, dataRun, 1).add(2*mib, unallocatedRun, 0).add(3*mib, block.Extent{Zero: true, Depth: 1}, 0).add(mib, zeroRun, 0).add(mib, dataRun, 0)
	for _, tt := range []struct {
		name           string
		o              ConvertOptions
		limits         block.Limits
		written, zeroe int64
		compressed     int64
	}{
		{"fresh target", ConvertOptions{TargetIsZero: true}, block.Limits{}, mib, 0, 0},
		{"target knows it is zero", ConvertOptions{}, block.Limits{ZeroInit: true}, mib, 0, 0},
		{"old target", ConvertOptions{}, block.Limits{}, mib, 7 * mib, 0},
		{"fresh overlay", ConvertOptions{TargetBackingSize: 4 * mib}, block.Limits{}, mib, 3 * mib, 0},
		{"full allocation", ConvertOptions{NoSparse: true, TargetIsZero: true}, block.Limits{}, 8 * mib, 0, 0},
		{"compressed", ConvertOptions{Compressed: true, TargetIsZero: true}, block.Limits{}, 0, 0, mib},
		{"over a backing file", ConvertOptions{SkipDepth: 1}, block.Limits{}, mib, 4 * mib, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dst := newFake(8*mib, 65536)
			if !tt.o.TargetIsZero && !tt.limits.ZeroInit && tt.o.TargetBackingSize == 0 && tt.o.SkipDepth == 0 {
				copy(dst.content, bytes.Repeat([]byte{9}, len(dst.content)))
			}
			dst.limits.ZeroInit = tt.limits.ZeroInit
			if err := Convert(t.Context(), src, dst, tt.o); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(src.content, dst.content) {
				t.Error("the copy differs from the source")
			}
			if dst.writes != tt.written || dst.zeroed != tt.zeroe || dst.compressed != tt.compressed {
				t.Errorf("wrote %d, zeroed %d, compressed %d bytes; expected %d, %d, %d",
					dst.writes, dst.zeroed, dst.compressed, tt.written, tt.zeroe, tt.compressed)
			}
			if dst.flushes != 1 {
				t.Errorf("%d flushes, expected 1", dst.flushes)
			}
		})
	}
}

// TestConvertHugeEmpty: an empty disk of 1 TiB takes no reads and no writes.
func TestConvertHugeEmpty(t *testing.T) {
	src, dst := &hugeEmpty{}, &hugeEmpty{}
	var last int64
	err := Convert(t.Context(), src, dst, ConvertOptions{TargetIsZero: true, Progress: func(done, total int64) { last = done }})
	if err != nil {
		t.Fatal(err)
	}
	if last != 0 {
		t.Errorf("progress counts %d bytes of data, expected none", last)
	}
}

type hugeEmpty struct{ fakeDevice }

func (h *hugeEmpty) Size() int64 { return 1 << 40 }
func (h *hugeEmpty) ReadAt([]byte, int64) (int, error) {
	return 0, errors.New("nothing of an empty disk should be read")
}
func (h *hugeEmpty) WriteAt([]byte, int64) (int, error) {
	return 0, errors.New("nothing of an empty disk should be written")
}
func (h *hugeEmpty) Extents(off, length int64, fn func(block.Extent) bool) error {
	const step = 512 << 20 // what one L2 table of 64 KiB clusters covers
	for end := off + length; off < end; off += step {
		if !fn(block.Extent{Offset: off, Length: min(step, end-off), Zero: true, HostOffset: -1}) {
			break
		}
	}
	return nil
}

func TestConvertErrors(t *testing.T) {
	boom := errors.New("boom")
	for _, tt := range []struct {
		name  string
		setup func(src, dst *fakeDevice)
		o     ConvertOptions
		check func(err error) bool
	}{
		{"read", func(src, _ *fakeDevice) { src.badSectors = map[int64]bool{7: true} }, ConvertOptions{},
			func(err error) bool { var e *ReadError; return errors.As(err, &e) && e.Offset == 0 }},
		{"write", func(_, dst *fakeDevice) { dst.failWrite = boom }, ConvertOptions{},
			func(err error) bool { var e *WriteError; return errors.As(err, &e) && errors.Is(err, boom) }},
		{"map", func(src, _ *fakeDevice) { src.failMap = boom }, ConvertOptions{},
			func(err error) bool { var e *ExtentsError; return errors.As(err, &e) && errors.Is(err, boom) }},
		{"map that goes nowhere", func(src, _ *fakeDevice) { src.runs = []block.Extent{} }, ConvertOptions{},
			func(err error) bool { var e *ExtentsError; return errors.As(err, &e) }},
		{"small target", func(_, dst *fakeDevice) { dst.content = dst.content[:4096] }, ConvertOptions{},
			func(err error) bool { return err != nil }},
		{"no compression", func(_, dst *fakeDevice) { dst.limits.Compress = false }, ConvertOptions{Compressed: true},
			func(err error) bool { return err != nil }},
		{"too many workers", func(_, _ *fakeDevice) {}, ConvertOptions{Workers: MaxWorkers + 1},
			func(err error) bool { return err != nil }},
		{"odd buffer", func(_, _ *fakeDevice) {}, ConvertOptions{BufferSize: 5000},
			func(err error) bool { return err != nil }},
		{"odd sparse size", func(_, _ *fakeDevice) {}, ConvertOptions{SparseSize: 1000},
			func(err error) bool { return err != nil }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			src, dst := newFake(1<<20, 65536), newFake(1<<20, 65536)
			src.content[0] = 1
			tt.setup(src, dst)
			if err := Convert(t.Context(), src, dst, tt.o); !tt.check(err) {
				t.Errorf("unexpected result: %v", err)
			}
		})
	}
}

func TestConvertCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	src, dst := newFake(16<<20, 65536), newFake(16<<20, 65536)
	for i := range src.content {
		src.content[i] = 1
	}
	err := Convert(ctx, src, dst, ConvertOptions{RateLimit: 1 << 20, Progress: func(done, _ int64) {
		if done > 0 {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v, expected %v", err, context.Canceled)
	}
	if dst.writes == int64(len(src.content)) {
		t.Error("everything was written although the copy was cancelled")
	}
}

func TestConvertSalvage(t *testing.T) {
	src, dst := newFake(1<<20, 65536), newFake(1<<20, 65536)
	for i := range src.content {
		src.content[i] = 1
	}
	src.badSectors = map[int64]bool{3: true, 100: true, 2047: true}
	var mu sync.Mutex
	var lost []int64
	err := Convert(t.Context(), src, dst, ConvertOptions{Salvage: func(off, length int64, err error) {
		mu.Lock()
		defer mu.Unlock()
		if length != sectorSize || err == nil {
			t.Errorf("salvaged %d bytes at %d: %v", length, off, err)
		}
		lost = append(lost, off/sectorSize)
	}})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(lost)
	if !slices.Equal(lost, []int64{3, 100, 2047}) {
		t.Errorf("lost sectors %v, expected 3, 100 and 2047", lost)
	}
	want := bytes.Clone(src.content)
	for _, s := range lost {
		clear(want[s*sectorSize:][:sectorSize])
	}
	if !bytes.Equal(dst.content, want) {
		t.Error("the rest of the disk was not copied")
	}
}

// TestConvertInOrder: out of OutOfOrder mode, no write goes behind one that is already done.
func TestConvertInOrder(t *testing.T) {
	src, dst := newFake(4<<20, 4096), newFake(4<<20, 4096)
	for i := range src.content {
		src.content[i] = byte(i>>12) | 1
	}
	if err := Convert(t.Context(), src, dst, ConvertOptions{BufferSize: 16384}); err != nil {
		t.Fatal(err)
	}
	if !slices.IsSorted(dst.writeOffs) {
		t.Error("writes are not in the order of the disk")
	}
	if len(dst.writeOffs) != len(src.content)/16384 {
		t.Errorf("%d writes, expected one for each of the %d windows", len(dst.writeOffs), len(src.content)/16384)
	}
}

// TestConvertModel copies random disks with random options and compares with what the bytes say.
func TestConvertModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const unit = 512
		cluster := int64(512) << rapid.IntRange(0, 6).Draw(t, "cluster")
		sectors := rapid.IntRange(1, 200).Draw(t, "sectors")
		src := newFake(sectors*unit, cluster)
		for left := sectors; left > 0; {
			n := min(left, rapid.IntRange(1, 40).Draw(t, "run"))
			kinds := []block.Extent{dataRun, zeroRun, unallocatedRun, backingRun}
			e := rapid.SampledFrom(kinds).Draw(t, "kind")
			fill := byte(0)
			if e.Data {
				fill = byte(rapid.IntRange(0, 2).Draw(t, "fill"))
			}
			src.add(int64(n*unit), e, fill)
			left -= n
		}
		extra := rapid.IntRange(0, 20).Draw(t, "extra") * unit
		dst := newFake(sectors*unit+extra, int64(512)<<rapid.IntRange(0, 6).Draw(t, "target cluster"))
		o := ConvertOptions{
			Workers:    rapid.IntRange(1, 4).Draw(t, "workers"),
			BufferSize: 4096 << rapid.IntRange(0, 3).Draw(t, "buffer"),
			SparseSize: int64(unit * rapid.IntRange(1, 9).Draw(t, "sparse")),
			NoSparse:   rapid.Bool().Draw(t, "nosparse"),
			Compressed: rapid.Bool().Draw(t, "compressed"),
			OutOfOrder: rapid.Bool().Draw(t, "outoforder"),
		}
		old := rapid.Bool().Draw(t, "old")
		if rapid.Bool().Draw(t, "overlay") { // of a backing file that ends somewhere
			o.TargetBackingSize = int64(unit * rapid.IntRange(1, sectors).Draw(t, "backing size"))
			copy(dst.content[:o.TargetBackingSize], bytes.Repeat([]byte{9}, sectors*unit))
		}
		switch {
		case o.TargetBackingSize > 0:
		case rapid.Bool().Draw(t, "skip"):
			// The target's backing file has what the lower layers of the source have, and junk elsewhere.
			o.SkipDepth = 1
			for _, r := range src.runs {
				if r.Depth >= 1 {
					copy(dst.content[r.Offset:][:r.Length], src.content[r.Offset:])
				} else {
					copy(dst.content[r.Offset:][:r.Length], bytes.Repeat([]byte{7}, int(r.Length)))
				}
			}
		case old:
			copy(dst.content, bytes.Repeat([]byte{9}, len(dst.content)))
		default:
			o.TargetIsZero = true
		}
		tail := bytes.Clone(dst.content[len(src.content):])
		if err := Convert(context.Background(), src, dst, o); err != nil {
			t.Fatal(err)
		}
		if at := firstDifference(src.content, dst.content[:len(src.content)]); at >= 0 {
			t.Fatalf("the copy differs at byte %d", at)
		}
		if !bytes.Equal(tail, dst.content[len(src.content):]) {
			t.Fatal("the copy changed bytes beyond the end of the source")
		}
	})
}

func TestRateLimit(t *testing.T) {
	r := newRateLimit(1 << 20)
	start := time.Now()
	for range 3 {
		if err := r.wait(t.Context(), 64<<10); err != nil {
			t.Fatal(err)
		}
	}
	// The third goes when the time of the first two is over.
	if d := time.Since(start); d < 100*time.Millisecond {
		t.Errorf("128 KiB at 1 MiB a second took only %v", d)
	}
	if newRateLimit(0).wait(t.Context(), 1<<40) != nil {
		t.Error("no limit limits")
	}
}
