package fvd

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/raw"
	"github.com/platter-disk/platter/storage"
)

// TestEmpty writes what an image holds to its base and empties it: every shape reads as before, in this session and
// the next, and holds nothing of what the base covers.
func TestEmpty(t *testing.T) {
	const size, base = 200 << 10, 150<<10 + 512 // the base ends inside a block and inside a chunk
	for _, o := range []CreateOptions{
		{Compact: true},
		{Compact: true, JournalBuffer: -1},
		{Compact: true, JournalSize: -1},
		{Compact: true, PlainJournal: true},
		{},
		{Compact: true, DataFile: "data"},
		{DataFile: "data", JournalSize: -1},
	} {
		o.Size, o.BlockSize, o.BaseImage = size, 4096, "base"
		if o.JournalSize == 0 {
			o.JournalSize = 64 << 10
		}
		if o.Compact {
			o.ChunkSize, o.GrowUnit = 16<<10, 16<<10
		}
		name := fmt.Sprintf("compact=%v journal=%d buffer=%d plain=%v data=%q", o.Compact, o.JournalSize, o.JournalBuffer, o.PlainJournal, o.DataFile)
		t.Run(name, func(t *testing.T) {
			below := storage.NewMemory("base")
			if _, err := below.WriteAt(bytes.Repeat([]byte("base"), base/4), 0); err != nil {
				t.Fatal(err)
			}
			openBase := func() block.Device {
				dev, err := raw.Open(unclosed{below}, raw.Options{})
				if err != nil {
					t.Fatal(err)
				}
				return dev
			}
			f := storage.NewMemory("image")
			var open Options
			o.Base = openBase()
			if o.DataFile != "" {
				data := storage.NewMemory("data")
				o.Data, open.Data = data, unclosed{data}
			}
			if err := Create(f, o); err != nil {
				t.Fatal(err)
			}
			reopen := func() *Image {
				open.Base = openBase()
				im, err := Open(unclosed{f}, open)
				if err != nil {
					t.Fatal(err)
				}
				return im
			}
			im := reopen()
			for i, off := range []int64{100, 20 << 10, 70 << 10, 140 << 10, 149 << 10, 180 << 10} {
				if _, err := im.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, 5000), off); err != nil {
					t.Fatal(err)
				}
			}
			if err := im.WriteZeroes(32<<10, 16<<10, block.MayUnmap); err != nil {
				t.Fatal(err)
			}
			want := make([]byte, size)
			check := func(when string) {
				t.Helper()
				got := make([]byte, size)
				if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
					t.Fatalf("%s the disk reads differently: %v", when, err)
				}
			}
			if _, err := im.ReadAt(want, 0); err != nil {
				t.Fatal(err)
			}
			if _, err := im.base.WriteAt(want[:base], 0); err != nil {
				t.Fatal(err)
			}
			if err := im.Empty(); err != nil {
				t.Fatal(err)
			}
			check("emptied,")
			if start, n := im.NextInBase(0); start != 0 || n < base {
				t.Errorf("only %d bytes from %d on live in the base image", n, start)
			}
			err := im.Extents(0, base, func(e block.Extent) bool {
				if e.Depth == 0 {
					t.Errorf("the image still decides %+v", e)
				}
				return true
			})
			if err != nil {
				t.Error(err)
			}
			// The image is as good as new: a part of a block is written, the rest copied up.
			if _, err := im.WriteAt([]byte("again"), 150<<10); err != nil {
				t.Fatal(err)
			}
			copy(want[150<<10:], "again")
			check("written again,")
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			res, err := Check(f, CheckOptions{Data: open.Data})
			if err != nil || len(res.Findings) > 0 || res.LocalBlocks != 1 {
				t.Errorf("check: %+v, %v", res, err)
			}
			im = reopen()
			check("opened again,")
			if err := im.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// unclosed is a file that stays open when an image closes it.
type unclosed struct{ storage.File }

func (unclosed) Close() error { return nil }

func TestEmptyRefuses(t *testing.T) {
	f := storage.NewMemory("image")
	if err := Create(f, CreateOptions{Size: 1 << 20, Compact: true, JournalSize: 64 << 10}); err != nil {
		t.Fatal(err)
	}
	im, err := Open(unclosed{f}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := im.Empty(); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("without a base image: %v, want %v", err, errors.ErrUnsupported)
	}
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	if err := im.Empty(); !errors.Is(err, block.ErrClosed) {
		t.Errorf("closed: %v, want %v", err, block.ErrClosed)
	}
	if im, err = Open(unclosed{f}, Options{ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	if err := im.Empty(); !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("read-only: %v, want %v", err, block.ErrReadOnly)
	}
	if err := im.Close(); err != nil {
		t.Error(err)
	}
}

// TestForgetBaseLength: a base image that has grown is accepted by an image that was told.
func TestForgetBaseLength(t *testing.T) {
	below := storage.NewMemory("base")
	if err := below.Truncate(64 << 10); err != nil {
		t.Fatal(err)
	}
	open := func() block.Device {
		dev, err := raw.Open(unclosed{below}, raw.Options{})
		if err != nil {
			t.Fatal(err)
		}
		return dev
	}
	f := storage.NewMemory("image")
	o := CreateOptions{Size: 128 << 10, BaseImage: "base", Base: open(), Compact: true, JournalSize: 64 << 10}
	if err := Create(f, o); err != nil {
		t.Fatal(err)
	}
	im, err := Open(unclosed{f}, Options{Base: open()})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(im.Close(), below.Truncate(128<<10)); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(unclosed{f}, Options{Base: open()}); err == nil {
		t.Fatal("a base of another length was accepted unasked")
	}
	if err := below.Truncate(64 << 10); err != nil {
		t.Fatal(err)
	}
	if im, err = Open(unclosed{f}, Options{Base: open()}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(im.ForgetBaseLength(), im.Close(), below.Truncate(128<<10)); err != nil {
		t.Fatal(err)
	}
	if im, err = Open(unclosed{f}, Options{Base: open()}); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Error(err)
	}
}
