package qcow2

import (
	"errors"
	"testing"

	"github.com/platter-disk/platter/storage"
)

func FuzzBitmapDirectory(f *testing.F) {
	entry := func(name string) []byte {
		b := make([]byte, 24)
		b[6], b[11], b[16], b[17], b[19] = 2, 1, 1, 16, byte(len(name))
		b = append(b, name...)
		return append(b, make([]byte, -len(b)&7)...)
	}
	one := entry("bitmap0")
	f.Add(one, uint32(1))
	f.Add(append(one, entry("b")...), uint32(2))
	f.Fuzz(func(t *testing.T, b []byte, n uint32) {
		m := storage.NewMemory("fuzz")
		if _, err := m.WriteAt(b, 512); err != nil {
			t.Fatal(err)
		}
		h := &Header{ClusterBits: 9, Bitmaps: &BitmapsExtension{Count: n, DirectorySize: uint64(len(b)), DirectoryOffset: 512}}
		found := uint32(0)
		err := forEachBitmap(m, h, func(b Bitmap) error {
			found++
			if b.Name == "" || len(b.Name) > maxBitmapName || int64(b.TableSize)*512 > maxBitmapBytes || b.TableOffset%512 != 0 {
				t.Fatalf("%+v", b)
			}
			return nil
		})
		var invalid *FormatError
		if err == nil && found != n || err != nil && !errors.As(err, &invalid) {
			t.Fatalf("%d of %d bitmaps, %v", found, n, err)
		}
	})
}

func TestBitmapTableEntry(t *testing.T) {
	for e, want := range map[uint64]hostOff{0: 0, 1: 0, 0x10000: 0x10000} {
		if got, err := bitmapTableEntry(e, 65536); err != nil || got != want {
			t.Errorf("%#x: %#x, %v", e, got, err)
		}
	}
	for _, e := range []uint64{2, 0x10001, 0x200, 1 << 56, 1 << 63} {
		if _, err := bitmapTableEntry(e, 65536); err == nil {
			t.Errorf("%#x: no error", e)
		}
	}
}
