package fvd

import (
	"encoding/binary"
	"errors"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// validHeader is a compact image with a base image; every region is where Create would put it.
func validHeader() *Header {
	o := CreateOptions{Size: 64 << 20, Compact: true, BaseImage: "base.img", Base: newRAM(40<<20 + 512), JournalSize: 1 << 20}
	h, err := o.header()
	if err != nil {
		panic(err)
	}
	return h
}

func TestHeaderOffsets(t *testing.T) {
	h := validHeader()
	h.StableEpoch, h.FullyPrefetched, h.CopyOnRead, h.AddStorageCmd = 7, true, true, "cmd"
	b, err := h.encode()
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	for _, c := range []struct {
		name string
		off  int
		got  uint64
		want uint64
	}{
		{"magic", 0, uint64(le.Uint32(b)), 0x00445646},
		{"version", 4, uint64(le.Uint32(b[4:])), 1},
		{"virtual_disk_size", 8, le.Uint64(b[8:]), 64 << 20},
		{"base_img_size", 2104, le.Uint64(b[2104:]), 40<<20 + 512},
		{"block_size", 2128, le.Uint64(b[2128:]), 4096},
		{"chunk_size", 2152, le.Uint64(b[2152:]), 1 << 20},
		{"journal_size", 3200, le.Uint64(b[3200:]), 1 << 20},
		{"stable_journal_epoch", 3208, le.Uint64(b[3208:]), 7},
		{"clean_shutdown", 3216, uint64(le.Uint32(b[3216:])), 1},
		{"copy_on_read", 3220, uint64(le.Uint32(b[3220:])), 1},
		{"base_img_fully_prefetched", 3240, uint64(le.Uint32(b[3240:])), 1},
		{"need_zero_init", 3312, uint64(le.Uint32(b[3312:])), 0},
		{"journal_buf_size", 3320, le.Uint64(b[3320:]), 64 << 10},
		{"journal_clean_buf_period", 3328, le.Uint64(b[3328:]), 5000},
	} {
		if c.got != c.want {
			t.Errorf("%s at byte %d is %#x, want %#x", c.name, c.off, c.got, c.want)
		}
	}
	if string(b[:4]) != "FVD\x00" || string(b[1064:1073]) != "base.img\x00" || string(b[2168:2172]) != "cmd\x00" {
		t.Errorf("text fields are wrong: %q %q %q", b[:4], b[1064:1073], b[2168:2172])
	}
}

// TestHeaderFieldsDoNotOverlap guards the table of fields against slips.
func TestHeaderFieldsDoNotOverlap(t *testing.T) {
	var used [headerEnd]string
	for _, f := range new(Header).fields() {
		for i := f.off; i < f.off+f.size; i++ {
			if used[i] != "" {
				t.Fatalf("byte %d belongs to %s and %s", i, used[i], f.name)
			}
			used[i] = f.name
		}
	}
	for _, f := range []string{"stable_journal_epoch", "clean_shutdown", "base_img_fully_prefetched", "features"} {
		found := false
		for i := mutableSector; i < mutableSector+sectorSize; i++ {
			found = found || used[i] == f
		}
		if !found {
			t.Errorf("%s does not lie in header sector 6", f)
		}
	}
}

func TestHeaderRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h := &Header{}
		text := rapid.StringMatching(`[a-z/]{0,15}`)
		for _, f := range h.fields() {
			switch p := f.ptr.(type) {
			case *uint32:
				*p = rapid.Uint32().Draw(t, f.name)
			case *uint64:
				*p = rapid.Uint64().Draw(t, f.name)
			case *int64:
				*p = rapid.Int64().Draw(t, f.name)
			case *bool:
				*p = rapid.Bool().Draw(t, f.name)
			case *string:
				*p = text.Draw(t, f.name)
			}
		}
		h.Version = headerVersion
		b, err := h.encode()
		if err != nil {
			t.Fatal(err)
		}
		got, err := decodeHeader(b)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, h) {
			t.Fatalf("got %+v, want %+v", got, h)
		}
	})
}

func TestHeaderMagic(t *testing.T) {
	b, err := validHeader().encode()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		magic string
		want  string // part of the error; "": accepted
	}{
		{"FVD\x00", ""},
		{"\x00DVF", ""},
		{"\xa9\xf5\x43\x51", "January 2011"},
		{"QFI\xfb", "field magic"},
	} {
		copy(b, c.magic)
		_, err := decodeHeader(b)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("magic %q: %v, want %q", c.magic, err, c.want)
		}
		if known := c.want == "" || c.want == "January 2011"; Probe(b) != known {
			t.Errorf("magic %q: Probe says %v", c.magic, !known)
		}
	}
	if _, err := decodeHeader(b[:headerEnd-1]); err == nil {
		t.Error("a header that ends early was accepted")
	}
}

// TestValidate breaks one field at a time and wants the error to name it.
func TestValidate(t *testing.T) {
	const fileSize = 1 << 40
	if err := validHeader().validate(fileSize); err != nil {
		t.Fatalf("the header to start from: %v", err)
	}
	for _, c := range []struct {
		field string
		spoil func(h *Header)
	}{
		{"features", func(h *Header) { h.Features |= 1 << 63 }},
		{"virtual_disk_size", func(h *Header) { h.VirtualSize = 1000 }},
		{"virtual_disk_size", func(h *Header) { h.VirtualSize = 1 << 63 }},
		{"data_offset", func(h *Header) { h.DataFile = "data" }},
		{"data_offset", func(h *Header) { h.DataOffset = 512 }},
		{"data_offset", func(h *Header) { h.DataOffset++ }},
		{"base_img_size", func(h *Header) { h.BaseSize = h.VirtualSize + 512 }},
		{"base_img_size", func(h *Header) { h.BaseSize++ }},
		{"base_img_size", func(h *Header) { h.BaseImage = "" }},
		{"block_size", func(h *Header) { h.BlockSize = 0 }},
		{"block_size", func(h *Header) { h.BlockSize = 700 }},
		{"block_size", func(h *Header) { h.BlockSize = 1 << 40 }},
		{"bitmap_offset", func(h *Header) { h.BitmapOffset += 512 }},
		{"bitmap_offset", func(h *Header) { h.BitmapOffset = 0 }},
		{"bitmap_offset", func(h *Header) { h.BitmapOffset = 1 << 41 }},
		{"bitmap_size", func(h *Header) { h.BitmapSize = 0 }},
		{"chunk_size", func(h *Header) { h.ChunkSize = 0 }},
		{"chunk_size", func(h *Header) { h.ChunkSize = 100 }},
		{"chunk_size", func(h *Header) { h.ChunkSize = h.BlockSize + 512 }},
		{"chunk_size", func(h *Header) { h.VirtualSize, h.ChunkSize = 1<<50, h.BlockSize }},
		{"table_offset", func(h *Header) { h.TableOffset = 5000 }},
		{"table_offset", func(h *Header) { h.TableOffset = h.JournalOffset }},
		{"table_offset", func(h *Header) { h.TableOffset = h.DataOffset + 1<<20 }},
		{"table_size", func(h *Header) { h.TableSize = 0 }},
		{"storage_grow_unit", func(h *Header) { h.GrowUnit = h.ChunkSize - 1 }},
		{"journal_offset", func(h *Header) { h.JournalOffset = 8192 + 512 }},
		{"journal_offset", func(h *Header) { h.JournalOffset = h.BitmapOffset }},
		{"journal_size", func(h *Header) { h.JournalSize = 100 }},
		{"journal_size", func(h *Header) { h.JournalSize, h.VirtualSize = 512, 1<<30 }},
		{"journal_size", func(h *Header) { h.BaseImage, h.BaseSize, h.TableOffset = "", 0, 0 }},
		{"stable_journal_epoch", func(h *Header) { h.StableEpoch = 1 << 63 }},
		{"num_prefetch_slots", func(h *Header) { h.PrefetchSlots = 0 }},
		{"bytes_per_prefetch", func(h *Header) { h.BytesPerPrefetch = 100 }},
		{"prefetch_perf_calc_alpha", func(h *Header) { h.PrefetchAlpha = 101 }},
	} {
		h := validHeader()
		c.spoil(h)
		err := h.validate(fileSize)
		var fe *FieldError
		if !errors.As(err, &fe) || fe.Field != c.field {
			t.Errorf("%s: error is %v", c.field, err)
		}
	}
}

func TestHeaderBooleans(t *testing.T) {
	b, err := validHeader().encode()
	if err != nil {
		t.Fatal(err)
	}
	b[3216] = 2
	if _, err := decodeHeader(b); err == nil || !strings.Contains(err.Error(), "clean_shutdown (byte 3216) is 2, want 0 or 1") {
		t.Errorf("error is %v", err)
	}
	b[3216] = 0
	for i := 1064; i < 2088; i++ {
		b[i] = 'x'
	}
	if _, err := decodeHeader(b); err == nil || !strings.Contains(err.Error(), "base_img (byte 1064)") {
		t.Errorf("error is %v", err)
	}
}

func TestUnknownFeatureIsReadOnly(t *testing.T) {
	h := validHeader()
	h.Features |= 1 << 20
	if err := h.validate(1 << 40); err != nil {
		t.Errorf("reading is refused: %v", err)
	}
	if err := h.writable(); !errors.Is(err, ErrFeatures) {
		t.Errorf("writing: %v", err)
	}
}

func FuzzHeader(f *testing.F) {
	seed, err := validHeader().encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed, int64(1<<30))
	f.Add(seed[:headerEnd], int64(0))
	f.Fuzz(func(t *testing.T, b []byte, fileSize int64) {
		h, err := decodeHeader(b)
		if err != nil || fileSize < 0 || h.validate(fileSize) != nil {
			return
		}
		// What validate accepts has a geometry without overflow, and encodes to what decodes alike.
		g := h.geometry()
		if g.size < 0 || g.blocks() < 0 || g.chunks() < 0 || g.chunks() > maxChunks || g.compact() && g.chunkData(maxChunks-1) < g.dataStart {
			t.Fatalf("geometry overflows: %+v", g)
		}
		for _, r := range h.regions() {
			if int64(r.off+r.size) > fileSize || r.off < headerEnd {
				t.Fatalf("region %+v outside the file of %d bytes", r, fileSize)
			}
		}
		again, err := h.encode()
		if err != nil {
			t.Fatal(err)
		}
		h2, err := decodeHeader(again)
		if err != nil || !reflect.DeepEqual(h, h2) {
			t.Fatalf("decoding again gave %+v, %v", h2, err)
		}
	})
}
