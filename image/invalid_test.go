package image_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/image/gate"
	"github.com/platter-disk/platter/storage"
)

// patch overwrites bytes of a file.
func patch(t *testing.T, path string, off int64, p ...byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}

// TestIsInvalid: errors about what an image holds are told from those about its file and from those of the gate.
func TestIsInvalid(t *testing.T) {
	dir := t.TempDir()
	create := func(name, format string, o image.CreateOptions) string {
		t.Helper()
		path := filepath.Join(dir, name)
		o.Size = 64 << 20
		if err := image.Create(t.Context(), format, path, o); err != nil {
			t.Fatal(err)
		}
		return path
	}
	written := func(path string) string {
		t.Helper()
		disk, err := image.Open(t.Context(), path, image.Options{})
		if err != nil {
			t.Fatal(err)
		}
		_, werr := disk.WriteAt([]byte{1}, 0)
		if err := disk.Close(); werr != nil || err != nil {
			t.Fatal(werr, err)
		}
		return path
	}

	file := func(name string, contents []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, contents, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	header := create("header.qcow2", "qcow2", image.CreateOptions{})
	patch(t, header, 20, 0, 0, 0, 63) // cluster_bits
	feature := create("feature.qcow2", "qcow2", image.CreateOptions{})
	patch(t, feature, 76, 0x40) // an incompatible feature bit that nobody knows
	compact := image.CreateOptions{FVD: fvd.CreateOptions{Compact: true}}
	table := written(create("table.fvd", "fvd", compact))
	f, err := storage.Open(table, storage.OpenOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	h, err := fvd.ReadHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	patch(t, table, int64(h.TableOffset), 0, 0, 0xff, 0) // the first chunk lies far past the end
	newer := create("newer.fvd", "fvd", compact)
	patch(t, newer, 3344+3, 0x10) // a feature bit of the half that may be read
	over := func(backing, format string) (o image.CreateOptions) {
		o.BackingFile, o.BackingFormat, o.BackingUnseen = backing, format, true
		return o
	}
	cycle := create("cycle.qcow2", "qcow2", over("other.qcow2", "qcow2"))
	create("other.qcow2", "qcow2", over("cycle.qcow2", "qcow2"))
	refused := create("refused.qcow2", "qcow2", over("/elsewhere", "raw"))
	good := create("good.qcow2", "qcow2", image.CreateOptions{})
	locked := create("locked.qcow2", "qcow2", image.CreateOptions{})
	holder, err := storage.Open(locked, storage.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	ended, cancel := context.WithCancel(t.Context())
	cancel()

	for _, test := range []struct {
		name, format, path string
		ctx                context.Context
		invalid            bool
	}{
		{"no header of qcow2", "qcow2", file("text", []byte("hello")), nil, true},
		{"no header of FVD", "fvd", file("short", []byte("FVD\x00")), nil, true},
		{"a header field of qcow2", "", header, nil, true},
		{"an unknown feature of qcow2", "", feature, nil, true},
		{"a table entry of FVD", "", table, nil, true},
		{"an unknown feature of FVD", "", newer, nil, true},
		{"another format", "", file("vmdk", []byte("KDMV\x01\x00\x00\x00"+strings.Repeat("\x00", 504))), nil, true},
		{"a chain without end", "", cycle, nil, true},
		{"a refused reference", "", refused, nil, false},
		{"no file", "", filepath.Join(dir, "none"), nil, false},
		{"a directory", "", dir, nil, false},
		{"a lock", "", locked, nil, false},
		{"a server that is not there", "", "nbd+unix:///?socket=" + filepath.Join(dir, "none"), nil, false},
		{"the end of the context", "", good, ended, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx := test.ctx
			if ctx == nil {
				ctx = t.Context()
			}
			disk, err := image.Open(ctx, test.path, image.Options{Format: test.format, Gate: gate.SameDirectory{}})
			if err == nil {
				disk.Close()
				t.Fatal("opened")
			}
			if got := image.IsInvalid(err); got != test.invalid {
				t.Errorf("%v: invalid is %t", err, got)
			}
		})
	}

	// A table may show its damage only when it is used.
	damaged := written(create("damaged.qcow2", "qcow2", image.CreateOptions{}))
	disk, err := image.Open(t.Context(), damaged, image.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	l1 := disk.Qcow2().Header().L1Offset
	disk.Close()
	patch(t, damaged, int64(l1)+6, 2) // the L2 table begins in the middle of a cluster
	if disk, err = image.Open(t.Context(), damaged, image.Options{ReadOnly: true}); err == nil {
		defer disk.Close()
		_, err = disk.ReadAt([]byte{0}, 0)
	}
	if err == nil || !image.IsInvalid(err) {
		t.Errorf("reading through a damaged table: %v", err)
	}
}
