package fvd

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
	"pgregory.net/rapid"
)

// shape is one way an image can be built and opened.
type shape struct {
	create CreateOptions
	base   int64  // bytes; -1: none
	data   string // "", "file", "device"
	open   Options
}

func (s shape) String() string {
	c := s.create
	return fmt.Sprintf("size %d compact %v block %d chunk %d base %d data %q journal %d buffer %d plain %v mode %d writethrough %v",
		c.Size, c.Compact, c.BlockSize, c.ChunkSize, s.base, s.data, c.JournalSize, c.JournalBuffer, c.PlainJournal, s.open.Journal, s.open.Writethrough)
}

func drawShape(t *rapid.T) shape {
	var s shape
	c := &s.create
	c.Size = int64(rapid.IntRange(1, 2000).Draw(t, "sectors")) * 512
	c.Compact = rapid.Bool().Draw(t, "compact")
	c.BlockSize = rapid.SampledFrom([]int64{512, 1024, 7680, 15872, 65024, 65536}).Draw(t, "block")
	c.ChunkSize = c.BlockSize * rapid.SampledFrom([]int64{1, 2, 3, 5, 7, 12}).Draw(t, "chunk/block")
	c.GrowUnit = max(rapid.SampledFrom([]int64{1, 300 << 10}).Draw(t, "grow unit"), roundUp(c.ChunkSize, lcm(c.BlockSize, pageSize)))
	c.JournalSize = rapid.SampledFrom([]int64{-1, 512, 8192, 20480, 1 << 20}).Draw(t, "journal")
	c.JournalBuffer = rapid.SampledFrom([]int64{-1, 100, 0}).Draw(t, "journal buffer")
	c.JournalBufferDelay = time.Hour
	c.PlainJournal = rapid.Bool().Draw(t, "plain journal")
	s.base = -1
	switch rapid.IntRange(0, 3).Draw(t, "base") {
	case 1:
		s.base = c.Size
	case 2:
		s.base = int64(rapid.IntRange(0, int(c.Size)).Draw(t, "base size"))
	case 3:
		s.base = c.Size + 12345
	}
	s.data = rapid.SampledFrom([]string{"", "", "file", "device"}).Draw(t, "data")
	if s.base >= 0 && rapid.Bool().Draw(t, "detect holes") {
		c.DetectSparseHole = 10000
	}
	s.open.Writethrough = rapid.IntRange(0, 3).Draw(t, "writethrough") == 0
	s.open.Journal = rapid.SampledFrom([]JournalMode{JournalAuto, JournalImmediate, JournalBuffered}).Draw(t, "mode")
	return s
}

// rig is an image with its files, and a plain copy of what its disk must hold.
type rig struct {
	shape
	meta, data *storage.Memory
	baseDev    *ram
	im         *Image
	want       []byte
}

func newRig(t interface {
	Fatalf(string, ...any)
	Helper()
}, s shape) *rig {
	t.Helper()
	r := &rig{shape: s, meta: storage.NewMemory("image"), data: storage.NewMemory("data")}
	c := &r.create
	r.want = make([]byte, c.Size)
	if s.base >= 0 {
		r.baseDev = newBase(s.base)
		if s.base > 100_000 { // a hole for detect_sparse_hole to find
			if err := r.baseDev.f.PunchHole(20_000, 50_000); err != nil {
				t.Fatalf("%v", err)
			}
		}
		_, err := r.baseDev.ReadAt(r.want[:min(s.base, c.Size)], 0)
		if err != nil && err != io.EOF {
			t.Fatalf("%v", err)
		}
		c.BaseImage, c.Base = "base", r.baseDev
	}
	switch s.data {
	case "file":
		c.DataFile, c.Data = "data", r.data
	case "device":
		c.DataFile, c.DataDevice = "data", &ram{f: r.data}
	}
	if err := Create(r.meta, *c); err != nil {
		t.Fatalf("create: %v", err)
	}
	if err := r.reopen(); err != nil {
		t.Fatalf("open: %v", err)
	}
	return r
}

// options are those to open the image again.
func (r *rig) options() Options {
	o := r.open
	if r.baseDev != nil {
		o.Base = r.baseDev
	}
	switch r.shape.data {
	case "file":
		o.Data = r.data
	case "device":
		o.DataDevice = &ram{f: r.data}
	}
	return o
}

func (r *rig) reopen() error {
	f, err := newRuled(r.meta)
	if err == nil {
		r.im, err = Open(f, r.options())
	}
	return err
}

// freeze replaces the files by copies, as a killed process leaves them; what still runs on the old ones is lost.
func (r *rig) freeze() {
	old := r.im
	r.meta, r.data = clone(r.meta), clone(r.data)
	old.m.fail("being killed", errors.New("test"))
}

func clone(f *storage.Memory) *storage.Memory {
	c := storage.NewMemory(f.Name())
	size, err := f.Size()
	if err == nil {
		err = c.Truncate(size)
	}
	if err == nil {
		err = f.DataExtents(0, size, func(e storage.Extent) bool {
			if !e.Data {
				return true
			}
			p := make([]byte, e.Length)
			if _, err = f.ReadAt(p, e.Offset); err == nil || err == io.EOF {
				_, err = c.WriteAt(p, e.Offset)
			}
			return err == nil
		})
	}
	if err != nil {
		panic(err)
	}
	return c
}

// compare reads the whole disk.
func (r *rig) compare() error {
	got := make([]byte, len(r.want))
	if n, err := r.im.ReadAt(got, 0); err != nil || n != len(got) {
		return fmt.Errorf("read: %d bytes, %v", n, err)
	}
	return diff(got, r.want)
}

func diff(got, want []byte) error {
	if bytes.Equal(got, want) {
		return nil
	}
	i := 0
	for got[i] == want[i] {
		i++
	}
	return fmt.Errorf("byte %d (sector %d) is %#x, want %#x", i, i/512, got[i], want[i])
}

// TestModel runs random requests on random shapes against a byte array.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawShape(t)
		t.Logf("%v", s)
		r := newRig(t, s)
		tag := byte(0)
		span := func() (off, n int64) {
			size := r.im.Size()
			off = int64(rapid.IntRange(0, int(size)).Draw(t, "off"))
			n = int64(rapid.IntRange(0, int(min(size-off, 200_000))).Draw(t, "n"))
			if rapid.Bool().Draw(t, "aligned") {
				unit := rapid.SampledFrom([]int64{512, s.create.BlockSize, s.create.ChunkSize}).Draw(t, "unit")
				off, n = off/unit*unit, min((n+unit-1)/unit*unit, size-off/unit*unit)
			}
			return off, n
		}
		ok := func(what string, err error) {
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"write": func(t *rapid.T) {
				off, n := span()
				tag++
				p := bytes.Repeat([]byte{tag | 1}, int(n))
				if _, err := r.im.WriteAt(p, off); err != nil {
					t.Fatal(err)
				}
				copy(r.want[off:], p)
			},
			"zeroes": func(t *rapid.T) {
				off, n := span()
				flags := block.ZeroFlags(rapid.IntRange(0, 3).Draw(t, "flags"))
				err := r.im.WriteZeroes(off, n, flags)
				if flags&block.FastOnly != 0 && errors.Is(err, errors.ErrUnsupported) {
					return
				}
				ok("zeroes", err)
				clear(r.want[off : off+n])
			},
			"discard": func(t *rapid.T) {
				off, n := span()
				ok("discard", r.im.Discard(off, n))
				got := make([]byte, n)
				if n > 0 {
					_, err := r.im.ReadAt(got, off)
					ok("read", err)
				}
				for i, b := range got {
					if b != 0 && b != r.want[off+int64(i)] {
						t.Fatalf("byte %d is %#x after a discard, was %#x", off+int64(i), b, r.want[off+int64(i)])
					}
				}
				copy(r.want[off:], got)
			},
			"read": func(t *rapid.T) {
				off, n := span()
				got := make([]byte, n)
				m, err := r.im.ReadAt(got, off)
				if err != nil || int64(m) != n {
					t.Fatalf("read: %d %v", m, err)
				}
				ok("read", diff(got, r.want[off:off+n]))
				clear(got)
				ok("try read", r.im.TryReadAt(got, off))
				ok("try read", diff(got, r.want[off:off+n]))
			},
			"flush":      func(t *rapid.T) { ok("flush", r.im.Flush()) },
			"checkpoint": func(t *rapid.T) { ok("checkpoint", r.im.Checkpoint()) },
			"populate": func(t *rapid.T) {
				if r.im.BaseSize() == 0 {
					return
				}
				off := int64(rapid.IntRange(0, int(r.im.BaseSize())-1).Draw(t, "off"))
				p := make([]byte, min(int64(rapid.IntRange(0, 200_000).Draw(t, "n")), r.im.BaseSize()-off))
				ok("read base", r.im.ReadBase(p, off))
				_, err := r.im.Populate(p, off)
				ok("populate", err)
			},
			"detach": func(t *rapid.T) {
				for range rapid.IntRange(0, 8).Draw(t, "steps") {
					off, n := r.im.NextInBase(0)
					if n == 0 {
						break
					}
					p := make([]byte, n)
					ok("read base", r.im.ReadBase(p, off))
					_, err := r.im.Populate(p, off)
					ok("populate", err)
				}
				if err := r.im.DetachBase(); err != nil && !errors.Is(err, ErrStillNeeded) {
					t.Fatal(err)
				}
			},
			"resize": func(t *rapid.T) {
				size := r.im.Size() + 512*int64(rapid.IntRange(0, 300).Draw(t, "more"))
				if size > 2_000_000 {
					return
				}
				how := block.Preallocation(rapid.IntRange(0, 3).Draw(t, "preallocation"))
				if err := r.im.Resize(size, how); err != nil {
					if h := r.im.Header(); errors.Is(err, errors.ErrUnsupported) && how == block.PreallocFalloc && r.shape.data == "device" ||
						h.JournalSize > 0 && int64(h.JournalSize) < minJournalSize(size/s.create.BlockSize+1, true) {
						r.want = append(r.want, make([]byte, r.im.Size()-int64(len(r.want)))...)
						return
					}
					t.Fatal(err)
				}
				r.want = append(r.want, make([]byte, size-int64(len(r.want)))...)
			},
			"reopen": func(t *rapid.T) {
				ok("close", r.im.Close())
				h, err := ReadHeader(r.meta)
				ok("header", err)
				if !h.CleanShutdown {
					t.Fatal("the image is not clean after Close")
				}
				ok("check", checkClean(r))
				ok("open", r.reopen())
			},
			"kill": func(t *rapid.T) {
				if r.create.JournalSize < 0 {
					t.Skip("no journal")
				}
				ok("flush", r.im.Flush())
				r.freeze()
				ok("open", r.reopen())
			},
			"": func(t *rapid.T) {
				if err := r.compare(); err != nil {
					t.Fatal(err)
				}
				ok("extents", r.compareExtents())
				ok("audit", r.im.Audit())
			},
		})
		ok("close", r.im.Close())
	})
}

// compareExtents wants the runs to cover the disk and the zero ones to be zero.
func (r *rig) compareExtents() error {
	at := int64(0)
	err := error(nil)
	e := r.im.Extents(0, r.im.Size(), func(e block.Extent) bool {
		switch {
		case e.Offset != at || e.Length <= 0:
			err = fmt.Errorf("extent %+v at %d", e, at)
		case e.Zero && bytes.Count(r.want[e.Offset:e.Offset+e.Length], []byte{0}) != int(e.Length):
			err = fmt.Errorf("extent %+v is not zero", e)
		case e.Depth == 0 && e.Data && r.shape.data == "":
			got := make([]byte, e.Length)
			if readErr := storage.ReadFull(r.meta, got, e.HostOffset); readErr != nil {
				err = readErr
			} else if d := diff(got, r.want[e.Offset:e.Offset+e.Length]); d != nil {
				err = fmt.Errorf("extent %+v: %w", e, d)
			}
		}
		at = e.Offset + e.Length
		return err == nil
	})
	if err == nil && at != r.im.Size() {
		err = fmt.Errorf("extents end at %d", at)
	}
	return errors.Join(e, err)
}

// checkClean wants the checker to find nothing at all in an image that was closed.
func checkClean(r *rig) error {
	o := r.options()
	res, err := Check(r.meta, CheckOptions{Data: o.Data, DataDevice: o.DataDevice})
	if err == nil && len(res.Findings) > 0 {
		err = fmt.Errorf("the checker found %+v", res.Findings)
	}
	return err
}
