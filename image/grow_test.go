package image_test

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/storage"
)

// volume is a file whose size its user cannot change.
type volume struct{ storage.File }

func (v volume) Truncate(int64) error { return errors.ErrUnsupported }

func (v volume) WriteAt(p []byte, off int64) (int, error) {
	if size, err := v.Size(); err != nil || off+int64(len(p)) > size {
		return 0, errors.Join(err, io.ErrShortWrite)
	}
	return v.File.WriteAt(p, off)
}

// TestGrowStorageNamesFile: who makes full storage larger is told which file that is.
func TestGrowStorageNamesFile(t *testing.T) {
	for name, data := range map[string]string{"in the image": "", "in a data file": "data"} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			top := filepath.Join(dir, "disk.fvd")
			create(t, "fvd", top, fvdOptions(64*mib, "", "", data, fvd.CreateOptions{Compact: true, GrowUnit: mib}))
			want := top
			if data != "" {
				want = filepath.Join(dir, data)
			}
			info, err := os.Stat(want)
			if err != nil {
				t.Fatal(err)
			}
			size := (info.Size() + 2*mib) / mib * mib
			if err := os.Truncate(want, size); err != nil {
				t.Fatal(err)
			}
			grown := 0
			im := open(t, top, image.Options{
				Wrap: func(f storage.File) storage.File {
					if f.Name() != want {
						return f
					}
					return volume{f}
				},
				GrowStorage: func(full string, need int64) error {
					grown++
					size += need
					if full != want {
						t.Errorf("asked to make %s larger, want %s", full, want)
					}
					return os.Truncate(want, size)
				},
			})
			for off := int64(0); off < 8*mib; off += mib {
				if _, err := im.WriteAt([]byte("data"), off); err != nil {
					t.Fatal(err)
				}
			}
			if grown == 0 {
				t.Error("the storage was not full")
			}
		})
	}
}
