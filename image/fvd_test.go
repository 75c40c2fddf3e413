package image_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/image/gate"
	"github.com/platter-disk/platter/storage"
)

// fvdOptions are options of an FVD image.
func fvdOptions(size int64, backing, format, data string, o fvd.CreateOptions) image.CreateOptions {
	return image.CreateOptions{
		CreateOptions: qcow2.CreateOptions{Size: size, BackingFile: backing, BackingFormat: format, DataFileName: data},
		FVD:           o,
	}
}

// Every shape of an image opens by its name alone, from any working directory.
func TestFVD(t *testing.T) {
	const size = 1 << 20
	for name, o := range map[string]image.CreateOptions{
		"plain":              fvdOptions(size, "", "", "", fvd.CreateOptions{}),
		"compact":            fvdOptions(size, "", "", "", fvd.CreateOptions{Compact: true}),
		"no journal":         fvdOptions(size, "", "", "", fvd.CreateOptions{Compact: true, JournalSize: -1}),
		"over qcow2":         fvdOptions(-1, "base.qcow2", "qcow2", "", fvd.CreateOptions{Compact: true}),
		"over raw, probed":   fvdOptions(-1, "base.raw", "", "", fvd.CreateOptions{}),
		"over fvd":           fvdOptions(-1, "base.fvd", "fvd", "", fvd.CreateOptions{Compact: true}),
		"data file":          fvdOptions(size, "", "", "data", fvd.CreateOptions{Compact: true}),
		"qcow2 data file":    fvdOptions(size, "", "", "data", fvd.CreateOptions{Compact: true, DataFormat: "qcow2"}),
		"qcow2, not compact": fvdOptions(-1, "base.qcow2", "qcow2", "data", fvd.CreateOptions{DataFormat: "qcow2"}),
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			create(t, "qcow2", filepath.Join(dir, "base.qcow2"), sized(size))
			create(t, "raw", filepath.Join(dir, "base.raw"), sized(size))
			create(t, "fvd", filepath.Join(dir, "base.fvd"), sized(size))
			for _, base := range []string{"base.qcow2", "base.raw", "base.fvd"} {
				write(t, filepath.Join(dir, base), base[5:], 'b', 0, size/2)
			}
			disk := filepath.Join(dir, "disk")
			create(t, "fvd", disk, o)
			write(t, disk, "", 'x', 100, 70_000)

			im := open(t, disk, image.Options{ReadOnly: true})
			if im.Format() != "fvd" || im.FVD() == nil || im.Qcow2() != nil {
				t.Errorf("format %s", im.Format())
			}
			want := make([]byte, size)
			if o.BackingFile != "" {
				copy(want, bytes.Repeat([]byte{'b'}, size/2))
				layer := im.Chain()[0]
				if layer.BackingFormat == "" || layer.FullBacking != filepath.Join(dir, o.BackingFile) {
					t.Errorf("layer %+v", layer)
				}
				if im.LayerDevice(1).Size() != size {
					t.Error("the device of the base image is not that of its layer")
				}
			}
			copy(want[100:], bytes.Repeat([]byte{'x'}, 70_000))
			if !bytes.Equal(contents(t, im), want) {
				t.Error("other contents")
			}
			if o.DataFileName != "" && im.Chain()[0].DataFile != filepath.Join(dir, "data") {
				t.Errorf("data file %q", im.Chain()[0].DataFile)
			}
		})
	}
}

// A disk that has moved over whole opens without its base image.
func TestFVDWithoutBaseImage(t *testing.T) {
	dir := t.TempDir()
	base, disk := filepath.Join(dir, "base"), filepath.Join(dir, "disk")
	create(t, "raw", base, sized(1<<20))
	write(t, base, "raw", 'b', 4096, 4096)
	create(t, "fvd", disk, fvdOptions(-1, "base", "raw", "", fvd.CreateOptions{Compact: true}))
	im := open(t, disk, image.Options{})
	v := im.FVD()
	p := make([]byte, 1<<20)
	if err := v.ReadBase(p, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Populate(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := v.DetachBase(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(im.Close(), os.Remove(base)); err != nil {
		t.Fatal(err)
	}
	im = open(t, disk, image.Options{})
	if !bytes.Equal(contents(t, im), p) || len(im.Chain()) != 1 {
		t.Errorf("other contents without the base image; layers %+v", im.Chain())
	}
}

// The sizes of caches are for the layers of qcow2, wherever they are.
func TestCacheSizesBelowFVD(t *testing.T) {
	dir := t.TempDir()
	create(t, "qcow2", filepath.Join(dir, "base"), sized(1<<20))
	create(t, "fvd", filepath.Join(dir, "over"), fvdOptions(-1, "base", "qcow2", "", fvd.CreateOptions{}))
	create(t, "fvd", filepath.Join(dir, "data"), fvdOptions(1<<20, "", "", "data.qcow2", fvd.CreateOptions{DataFormat: "qcow2"}))
	for _, name := range []string{"base", "over", "data"} {
		im := open(t, filepath.Join(dir, name), image.Options{L2CacheSize: 64 << 10})
		if err := im.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestFVDErrors(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	create(t, "raw", at("base"), sized(1<<20))
	create(t, "fvd", at("over"), fvdOptions(-1, "base", "raw", "", fvd.CreateOptions{}))
	create(t, "fvd", at("data"), fvdOptions(1<<20, "", "", "data.raw", fvd.CreateOptions{Compact: true}))

	err := openError(t, at("over"), image.Options{Gate: gate.Deny{}})
	if !errors.Is(err, gate.ErrRefused) {
		t.Errorf("base image through a closed gate: %v", err)
	}
	err = openError(t, at("data"), image.Options{Gate: gate.Deny{}})
	if !errors.Is(err, gate.ErrRefused) {
		t.Errorf("data file through a closed gate: %v", err)
	}
	wantError(t, "qcow2's discipline", openError(t, at("over"), image.Options{Discipline: "lazy"}), "immediate or buffered")
	wantError(t, "cache sizes", openError(t, "driver=fvd,l2-cache-size=1M,file.filename="+at("over"), image.Options{}), "l2-cache-size")
	wantError(t, "cache sizes after probing", openError(t, "driver=fvd,file.filename="+at("over"), image.Options{Format: "qcow2"}), "fvd")
	wantError(t, "L2 cache", openError(t, at("over"), image.Options{L2CacheSize: 1 << 20}), "format 'fvd' does not support the option 'l2-cache-size'")
	wantError(t, "refcount cache", openError(t, at("base"), image.Options{Format: "raw", RefcountCacheSize: 1 << 20}), "format 'raw' does not support the option 'refcount-cache-size'")
	if err := os.Truncate(at("base"), 512); err != nil {
		t.Fatal(err)
	}
	wantError(t, "base image that shrank", openError(t, at("over"), image.Options{}), "it was changed")

	for name, o := range map[string]image.CreateOptions{
		"must be there":    {CreateOptions: qcow2.CreateOptions{Size: 1 << 20, BackingFile: "base", BackingFormat: "raw"}, BackingUnseen: true},
		"same filename":    fvdOptions(-1, "new", "raw", "", fvd.CreateOptions{}),
		"data_file_fmt":    fvdOptions(1<<20, "", "", "x", fvd.CreateOptions{DataFormat: "vmdk"}),
		"block_size":       fvdOptions(-1, "base", "raw", "", fvd.CreateOptions{BlockSize: 513}),
		"needs a size":     fvdOptions(-1, "", "", "", fvd.CreateOptions{}),
		"does not support": fvdOptions(1<<20, "", "", "nbd://localhost/x", fvd.CreateOptions{}),
	} {
		wantError(t, name, image.Create(t.Context(), "fvd", at("new"), o), name)
		if _, err := os.Stat(at("new")); err == nil {
			t.Errorf("%s: a file was left", name)
		}
	}
	// The base image is not overwritten by a data file of its name.
	before, err := os.Stat(at("base"))
	if err != nil {
		t.Fatal(err)
	}
	if err := image.Create(t.Context(), "fvd", at("new"), fvdOptions(-1, "base", "raw", "base", fvd.CreateOptions{})); err == nil {
		t.Error("the base image was made the data file")
	}
	if after, err := os.Stat(at("base")); err != nil || after.Size() != before.Size() {
		t.Errorf("the base image changed: %v", err)
	}
}

// A data file of no stated format is raw unless it looks like something else, which only its owner can settle.
func TestFVDDataFileOfNoFormat(t *testing.T) {
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	create(t, "fvd", disk, fvdOptions(1<<20, "", "", "data", fvd.CreateOptions{}))
	f := openFile(t, disk)
	if err := errors.Join(fvd.Amend(f, []fvd.Setting{{Name: "data_file_fmt", Value: ""}}), f.Close()); err != nil {
		t.Fatal(err)
	}
	write(t, disk, "", 'x', 0, 512)
	im := open(t, disk, image.Options{})
	if _, err := im.WriteAt([]byte("QFI\xfb\x00\x00\x00\x03"), 0); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	wantError(t, "a guest's qcow2 header", openError(t, disk, image.Options{}), "data_file_fmt")
}

// A backing file is written only when the caller asks for it, and then with a writer's lock.
func TestWritableBacking(t *testing.T) {
	dir := t.TempDir()
	base, mid, top := filepath.Join(dir, "base"), filepath.Join(dir, "mid"), filepath.Join(dir, "top")
	create(t, "raw", base, sized(1<<20))
	overlay(t, mid, "base", "raw", -1)
	overlay(t, top, "mid", "qcow2", -1)
	im := open(t, top, image.Options{WritableBacking: 1})
	if _, err := im.LayerDevice(1).WriteAt([]byte("x"), 0); err != nil {
		t.Error(err)
	}
	if _, err := im.LayerDevice(2).WriteAt([]byte("x"), 0); err == nil {
		t.Error("the layer below was written too")
	}
	if im.Chain()[1].ReadOnly || !im.Chain()[2].ReadOnly {
		t.Errorf("layers %+v", im.Chain())
	}
	wantError(t, "a reader of the layer that is written", openError(t, mid, image.Options{ReadOnly: true}), "lock")
}

// MaxMetadata bounds what any FVD image of a chain takes, and no other format.
func TestMaxMetadata(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	create(t, "fvd", at("base.fvd"), fvdOptions(64*mib, "", "", "", fvd.CreateOptions{Compact: true})) // 64 entries of 4 bytes
	create(t, "fvd", at("over.fvd"), fvdOptions(-1, "base.fvd", "fvd", "", fvd.CreateOptions{}))
	overlay(t, at("over.qcow2"), "base.fvd", "fvd", -1)
	create(t, "fvd", at("data.fvd"), fvdOptions(512, "", "", "data.qcow2", fvd.CreateOptions{DataFormat: "qcow2"}))
	create(t, "qcow2", at("disk.qcow2"), sized(64*mib))
	for name, refused := range map[string]bool{"base.fvd": true, "over.fvd": true, "over.qcow2": true, "data.fvd": false, "disk.qcow2": false} {
		for _, limit := range []int64{0, 255, 1 << 20} {
			im, err := image.Open(t.Context(), at(name), image.Options{MaxMetadata: limit, ReadOnly: true})
			if err == nil {
				err = im.Close()
			}
			if want := refused && limit == 255; errors.Is(err, fvd.ErrMaxMetadata) != want || !want && err != nil {
				t.Errorf("%s with %d bytes: %v", name, limit, err)
			}
		}
	}
}

func openFile(t *testing.T, path string) storage.File {
	t.Helper()
	f, err := storage.Open(path, storage.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return f
}
