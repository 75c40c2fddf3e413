package crashlab

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/platter-disk/platter/storage"
)

// plainDisk is a disk whose sectors a test sets at will.
type plainDisk struct {
	data []byte
	err  error // of every request
}

func (d *plainDisk) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(d.data)) {
		return 0, io.EOF
	}
	n := copy(p, d.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *plainDisk) WriteAt(p []byte, off int64) (int, error) { return copy(d.data[off:], p), d.err }

func (d *plainDisk) WriteZeroes(off, length int64, _ bool) error {
	clear(d.data[off : off+length])
	return d.err
}
func (d *plainDisk) Discard(int64, int64) error { return d.err }
func (d *plainDisk) Flush() error               { return d.err }
func (d *plainDisk) Size() int64                { return int64(len(d.data)) }
func (d *plainDisk) Check() error               { return nil }
func (d *plainDisk) Close() error               { return nil }

// newPlain returns a guest of a disk of the given number of sectors, stamped 1000.
func newPlain(t tb, sectors int, discardUnit int64) (*Guest, *plainDisk) {
	t.Helper()
	d := &plainDisk{data: make([]byte, sectors*storage.SectorSize)}
	Stamp(d.data, 0, 1000)
	l, _ := newLab(t)
	w, err := newWatch(nil, d.Size())
	must(t, err)
	initial := make([]byte, len(d.data))
	must(t, w.read(d, d.Size(), initial))
	return newGuest(l, d, w, discardUnit, initial, nil), d
}

// afterCrash returns the tags that sector 0 may have after a crash now: 1000 for the initial contents, 0 for
// zeros.
func (g *Guest) afterCrash() []int {
	o := g.oracle(g.now() - 1)
	var tags []int
	for tag := 0; tag <= 1000; tag++ {
		s := stamped(0, uint32(tag))
		if tag == 0 {
			s = &zeroSector
		}
		view := append([]byte(nil), g.initial...)
		copy(view, s[:])
		if o.rules[0].has(s[:], 0) || o.rules[0].initial && tag == 1000 {
			tags = append(tags, tag)
		}
	}
	return tags
}

func TestOracleAfterCrash(t *testing.T) {
	fail := errors.New("no")
	for _, test := range []struct {
		name string
		unit int64
		do   func(g *Guest, d *plainDisk)
		want []int
	}{
		{"nothing", 0, func(*Guest, *plainDisk) {}, []int{1000}},
		{"a write", 0, func(g *Guest, _ *plainDisk) { g.Write(0, 512) }, []int{1, 1000}},
		{"a flushed write", 0, func(g *Guest, _ *plainDisk) { g.Write(0, 512); g.Flush() }, []int{1}},
		{"a write after the flush", 0, func(g *Guest, _ *plainDisk) { g.Write(0, 512); g.Flush(); g.Write(0, 512) }, []int{1, 3}},
		{"writes since the flush", 0, func(g *Guest, _ *plainDisk) { g.Write(0, 512); g.Write(0, 512); g.Write(0, 512) }, []int{1, 2, 3, 1000}},
		{"a flush that failed", 0, func(g *Guest, d *plainDisk) { g.Write(0, 512); d.err = fail; g.Flush() }, []int{1, 1000}},
		{"a write that failed", 0, func(g *Guest, d *plainDisk) { d.err = fail; g.Write(0, 512); d.err = nil; g.Flush() }, []int{1, 1000}},
		{"a write that failed, and one later", 0, func(g *Guest, d *plainDisk) {
			d.err = fail
			g.Write(0, 512)
			d.err = nil
			g.Write(0, 512)
			g.Flush()
		}, []int{2}},
		{"zeroes", 0, func(g *Guest, _ *plainDisk) { g.WriteZeroes(0, 512, false); g.Flush() }, []int{0}},
		{"a discard that promises nothing", 0, func(g *Guest, _ *plainDisk) { g.Write(0, 512); g.Discard(0, 512); g.Flush() }, []int{0, 1}},
		{"a discard of a whole unit", 1024, func(g *Guest, _ *plainDisk) { g.Write(0, 512); g.Discard(0, 1024); g.Flush() }, []int{0}},
		{"a discard of a part of a unit", 1024, func(g *Guest, _ *plainDisk) { g.Write(0, 512); g.Discard(0, 512); g.Flush() }, []int{0, 1}},
		{"a discard to the end of the disk", 1 << 20, func(g *Guest, d *plainDisk) { g.Discard(0, d.Size()); g.Flush() }, []int{0}},
		{"a write during another", 0, func(g *Guest, _ *plainDisk) {
			g.WriteWith("outer write", 0, 512, func([]byte) error { return g.Write(0, 512) })
			g.Flush()
		}, []int{1, 2}},
		{"a write during the flush", 0, func(g *Guest, _ *plainDisk) {
			g.Write(0, 512)
			g.FlushWith("flush", func() error { return g.Write(0, 512) })
		}, []int{1, 3}},
	} {
		t.Run(test.name, func(t *testing.T) {
			g, d := newPlain(t, 4, test.unit)
			test.do(g, d)
			if got := g.afterCrash(); fmt.Sprint(got) != fmt.Sprint(test.want) {
				t.Errorf("sector 0 may hold %v: want %v", got, test.want)
			}
		})
	}
}

// TestOracleAgainstOneRegister compares the oracle with the definition, for one sector and requests that
// overlap in time: some order of the requests that respects who ended before whom began, cut anywhere after
// what the last flush covered.
func TestOracleAgainstOneRegister(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		g, _ := newPlain(t, 1, 0)
		type req struct {
			*request
			tag int
		}
		var open, writes []req
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			if k := rapid.IntRange(0, 4).Draw(t, "kind"); k < 2 && len(writes) < 6 {
				tag := g.count + 1
				r, err := g.issue("write", func(r *request, n uint32) error {
					return g.put(r, 0, 512, false, func(i int64) *sector { return stamped(i, n) })
				})
				if err != nil {
					t.Fatal(err)
				}
				open, writes = append(open, req{r, tag}), append(writes, req{r, tag})
			} else if k == 2 {
				r, err := g.issue("flush", func(r *request, _ uint32) error {
					r.flush = true
					g.flushes = append(g.flushes, r)
					return nil
				})
				if err != nil {
					t.Fatal(err)
				}
				open = append(open, req{r, 0})
			} else if len(open) > 0 {
				i := rapid.IntRange(0, len(open)-1).Draw(t, "which")
				var err error
				if rapid.IntRange(0, 3).Draw(t, "fails") == 0 {
					err = errors.New("no")
				}
				_ = g.answer(open[i].request, err)
				open = append(open[:i], open[i+1:]...)
			}
		}
		bound := 0
		for _, f := range g.flushes {
			if f.ok {
				bound = max(bound, f.issue)
			}
		}
		want := make(map[int]bool)
		used := make([]bool, len(writes))
		var order func(last int)
		order = func(last int) {
			complete := true
			for i, w := range writes {
				complete = complete && (used[i] || !w.ok || w.end >= bound)
			}
			if complete {
				want[last] = true
			}
			for i, w := range writes {
				ready := !used[i]
				for j, v := range writes {
					ready = ready && (used[j] || j == i || v.end >= w.issue || !v.ok)
				}
				if !ready {
					continue
				}
				// A write that failed and ended before this one was issued cannot come after it any more.
				dropped := []int{}
				for j, v := range writes {
					if !used[j] && j != i && v.end < w.issue {
						used[j] = true
						dropped = append(dropped, j)
					}
				}
				used[i] = true
				order(w.tag)
				used[i] = false
				for _, j := range dropped {
					used[j] = false
				}
			}
		}
		order(1000)
		got := make(map[int]bool)
		for _, tag := range g.afterCrash() {
			got[tag] = true
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("the sector may hold %v: want %v", got, want)
		}
	})
}

func TestOracleSaysWhatItFound(t *testing.T) {
	for _, test := range []struct {
		spoil func(d *plainDisk)
		want  string
	}{
		{func(*plainDisk) {}, ""},
		{func(d *plainDisk) { clear(d.data[:512]) }, "guest sector 0 holds zeros; allowed: write of 1024 bytes at 0 (request 1)"},
		{func(d *plainDisk) { Stamp(d.data[:512], 0, 1000) }, "guest sector 0 holds its initial contents"},
		{func(d *plainDisk) { Stamp(d.data[1024:1536], 1024, 7) }, "guest sector 2 holds contents stamped 7; allowed: its initial contents"},
		{func(d *plainDisk) { copy(d.data[512:1024], d.data[:512]) }, "guest sector 1 holds what belongs to sector 0: write of 1024 bytes at 0 (request 1)"},
		{func(d *plainDisk) { d.data[1000]++ }, "guest sector 1 holds a mixture of contents that begins with write"},
		{func(d *plainDisk) { copy(d.data, poisonSector[:]) }, "guest sector 0 holds poison"},
		{func(d *plainDisk) { d.data[0]++ }, "guest sector 0 holds bytes nobody wrote to it (444c6162"},
		{func(d *plainDisk) { d.data = d.data[:512] }, "the disk has 512 bytes; allowed: [2048]"},
		{func(d *plainDisk) { d.data = nil }, "the disk has 0 bytes"},
	} {
		g, d := newPlain(t, 4, 0)
		must(t, g.Write(0, 1024))
		test.spoil(d)
		err := g.Check()
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("error %v: want %q in it", err, test.want)
		}
	}
}

func TestPartialSectors(t *testing.T) {
	g, d := newPlain(t, 2, 0)
	must(t, g.Write(100, 600), g.WriteZeroes(10, 20, false), g.Check())
	d.data[99]++
	if g.Check() == nil {
		t.Error("a byte before the write changed, and nobody noticed")
	}
	d.data[99]--
	err := g.WriteWith("write", 0, 512, func([]byte) error { return g.Write(5, 5) })
	if err == nil || !strings.Contains(err.Error(), "in doubt") {
		t.Errorf("a part of a sector was written during a write of the whole: %v", err)
	}
}

// TestLastSector has a disk that ends inside a sector.
func TestLastSector(t *testing.T) {
	g, d := newPlain(t, 2, 0)
	d.data = d.data[:700]
	g.initialSize = 700
	must(t, g.Check(), g.Write(512, 188), g.Check())
	d.data[699]++
	if g.Check() == nil {
		t.Error("the last byte changed, and nobody noticed")
	}
}

func TestResize(t *testing.T) {
	g, d := newPlain(t, 4, 0)
	g.watch = mustWatch(t, 6*512)
	g.values, g.initial = make([][]value, 6), append(g.initial, make([]byte, 1024)...)
	resize := func(size int64) func() error {
		return func() error {
			d.data = append(d.data[:min(size, int64(len(d.data)))], make([]byte, max(size-int64(len(d.data)), 0))...)
			return nil
		}
	}
	must(t, g.Resize(700, resize(700)), g.Check())
	if sizes := g.oracle(g.now() - 1).sizes; fmt.Sprint(sizes) != "[2048 700]" {
		t.Errorf("sizes after a crash: %d", sizes)
	}
	must(t, g.Resize(6*512, resize(6*512)), g.Check(), g.Flush())
	if sizes := g.oracle(g.now() - 1).sizes; fmt.Sprint(sizes) != "[3072]" {
		t.Errorf("sizes after a flush: %d", sizes)
	}
	Stamp(d.data[1024:1536], 1024, 1000)
	if g.Check() == nil {
		t.Error("what was cut off came back, and nobody noticed")
	}
}

// TestResizeIsOneChange: a crash leaves what is cut off, or the smaller disk.
func TestResizeIsOneChange(t *testing.T) {
	g, _ := newPlain(t, 4, 0)
	must(t, g.Write(1024, 1024), g.Flush())
	must(t, g.Resize(1024, func() error {
		o := g.oracle(g.now() - 1)
		whole := append(append([]byte(nil), g.initial[:1024]...), g.latest(2)[:]...)
		whole = append(whole, g.latest(3)[:]...)
		gone := append(append([]byte(nil), g.initial[:1024]...), make([]byte, 1024)...)
		if err := o.Judge(gone, 2048); err == nil {
			t.Error("what was cut off is gone from the whole disk, and nobody noticed")
		}
		return errors.Join(o.Judge(gone, 1024), o.Judge(whole, 1024))
	}))
}

func mustWatch(t *testing.T, size int64) *watch {
	t.Helper()
	w, err := newWatch(nil, size)
	must(t, err)
	return w
}

func TestWatchSlots(t *testing.T) {
	w, err := newWatch([]Range{{8192, 1024}, {0, 512}, {512, 0}, {1024, 512}}, 1<<20)
	must(t, err)
	var sectors []int64
	for slot := range w.slots {
		s := w.sector(slot)
		sectors = append(sectors, s)
		if back, ok := w.slot(s); !ok || back != slot {
			t.Errorf("sector %d has slot %d: want %d", s, back, slot)
		}
	}
	if fmt.Sprint(sectors) != "[0 2 16 17]" {
		t.Errorf("sectors %d", sectors)
	}
	for _, s := range []int64{1, 3, 15, 18, 1 << 40} {
		if _, ok := w.slot(s); ok {
			t.Errorf("sector %d is watched", s)
		}
	}
	short := &plainDisk{data: make([]byte, 100)}
	if err := w.read(short, 1<<20, make([]byte, w.slots*512)); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a disk that ends early: %v", err)
	}
}

func TestMixRefusals(t *testing.T) {
	g, _ := newPlain(t, 4, 0)
	for _, m := range []Mix{
		{Requests: 1}, {Requests: 1, Write: -1, Flush: 2}, {Requests: 1, Write: 1, Align: 100},
		{Requests: 1, Write: 1, Align: 4096},
	} {
		if m.Run(g) == nil {
			t.Errorf("%+v: no error", m)
		}
	}
	must(t, Mix{Requests: 50, Write: 1, Zero: 1, Unmap: 1, Discard: 1, Flush: 1, Check: 1, MaxLength: 2048}.Run(g))
}
