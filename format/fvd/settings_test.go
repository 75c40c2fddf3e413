package fvd

import (
	"fmt"
	"strings"
	"testing"

	"github.com/platter-disk/platter/storage"
)

// TestBaseLengthIsKeptUp: D-34 goes on after the base image was exchanged or its length changed.
func TestBaseLengthIsKeptUp(t *testing.T) {
	f, base := damaged(t, func(*storage.Memory, *Header) {})
	refused := func(length int64) {
		t.Helper()
		_, err := Open(f, Options{Base: newBase(length)})
		if err == nil || !strings.Contains(err.Error(), "it was changed") {
			t.Errorf("a base image of %d bytes: %v", length, err)
		}
	}
	im := opened(t, f, Options{Base: borrowedDevice{base}})
	must(t, im.ForgetBaseLength()) // the way of a commit that lengthens the base image
	longer := newBase(120 << 10)
	for _, length := range []int64{100<<10 - 512, -1, 1 << 62} {
		if err := im.RecordBaseLength(length); err == nil || !strings.Contains(err.Error(), "base_length") {
			t.Errorf("recording %d bytes: %v", length, err)
		}
	}
	must(t, im.RecordBaseLength(longer.Size()))
	must(t, im.Close())
	refused(100 << 10)
	im = opened(t, f, Options{Base: longer})
	must(t, im.Close())

	// The way of a rebase: the name and the length of another base image in one change.
	must(t, Amend(f, []Setting{{"base_img", "other"}, {"base_length", "110000"}}))
	refused(120 << 10)
	im = opened(t, f, Options{Base: newBase(110000)})
	must(t, im.Close())
	must(t, Amend(f, []Setting{{"base_img", "unseen"}}))
	for _, length := range []int64{100 << 10, 130 << 10} {
		im := opened(t, f, Options{Base: newBase(length)})
		must(t, im.Close())
	}
	if err := Amend(f, []Setting{{"base_length", "4096"}}); err == nil || !strings.Contains(err.Error(), "base_img_size 102400") {
		t.Errorf("a length that does not cover the base image: %v", err)
	}
}

// TestSettingsBeyondUse: values that nobody would use as they are, and references of an image to itself, are refused.
func TestSettingsBeyondUse(t *testing.T) {
	base := newBase(100 << 10)
	o := smallCompact(64 << 10)
	o.Base, o.BaseImage, o.DataFile, o.Data = base, "base", "data", storage.NewMemory("data")
	f := storage.NewMemory("/images/clone.fvd")
	must(t, Create(f, o))
	for _, c := range []struct{ name, value, want string }{
		{"max_num_outstanding_prefetch_writes", "1024", ""},
		{"max_num_outstanding_prefetch_writes", "1025", "num_prefetch_slots (byte 3244) is 1025, want at most 1024"},
		{"bytes_per_prefetch", "67108864", ""},
		{"bytes_per_prefetch", "67112960", "bytes_per_prefetch (byte 3248) is 67112960, want at most 67108864"},
		{"journal_buf_size", "65536", ""},
		{"journal_buf_size", "65537", "journal_buf_size (byte 3320) is 65537, want at most 65536"},
		{"data_file", "other.raw", ""},
		{"data_file", "clone.fvd", "another file than the image itself"},
		{"data_file", "../images/./clone.fvd", "another file than the image itself"},
		{"base_img", "/images/clone.fvd", "another file than the image itself"},
	} {
		err := Amend(f, []Setting{{c.name, c.value}})
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s=%s: %v, want %q", c.name, c.value, err, c.want)
		}
	}
	// An image that has more is used and amended all the same.
	h, err := ReadHeader(f)
	must(t, err)
	h.PrefetchSlots, h.JournalBuffer = 5000, 1<<40
	putHeader(t, f, h)
	must(t, Amend(f, []Setting{{"copy_on_read", "on"}}))
	for _, c := range []struct {
		o    CreateOptions
		want string
	}{
		{CreateOptions{Size: 1 << 20, Compact: true, GrowUnit: 512}, "option storage_grow_unit is 512, want at least the chunk_size of 1048576"},
		{CreateOptions{Size: 1 << 20, Compact: true, ChunkSize: 1000, GrowUnit: 1000}, "option storage_grow_unit is 1000, want at least the chunk_size of 4096"},
		{CreateOptions{Size: 1 << 20, Compact: true, JournalBuffer: 65537}, "option journal_buf_size is 65537"},
	} {
		if err := Create(storage.NewMemory("image"), c.o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.o, err, c.want)
		}
	}
	h, err = ReadHeader(made(t, CreateOptions{Size: 1 << 20, Compact: true, ChunkSize: 1000, JournalSize: 5000}))
	must(t, err)
	if h.ChunkSize != 4096 || h.JournalSize != 8192 || h.GrowUnit != DefaultGrowUnit {
		t.Errorf("rounded: chunk_size %d, journal_size %d, storage_grow_unit %d", h.ChunkSize, h.JournalSize, h.GrowUnit)
	}
}

// TestUnknownVersion: an image of a version that is not known is recognised, and says so before anything else.
func TestUnknownVersion(t *testing.T) {
	for _, version := range []byte{0, 2, 77} {
		b, err := validHeader().encode()
		must(t, err)
		b[4] = version
		b[3216] = 9 // whatever this means in that version
		if !Probe(b[:512]) {
			t.Errorf("version %d is not recognised", version)
		}
		want := fmt.Sprintf("field version (byte 4) is %d, want 1", version)
		if _, err := decodeHeader(b); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("version %d: %v, want %q", version, err, want)
		}
	}
}
