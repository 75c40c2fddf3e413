package storage_test

import (
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"testing"

	"github.com/platter-disk/platter/storage"
	"golang.org/x/sys/unix"
)

// TestFarEnd: requests at the largest offsets there are end in an error or in the end of the file, in every
// kind of file, aligned or not.
func TestFarEnd(t *testing.T) {
	for name, o := range map[string]storage.OpenOptions{"cached": {Create: true}, "direct": {Create: true, Direct: true}} {
		t.Run(name, func(t *testing.T) {
			f, err := storage.Open(filepath.Join(t.TempDir(), "f"), o)
			if err != nil {
				t.Skip("needs a file system with direct I/O: ", err)
			}
			defer f.Close()
			if _, err := f.WriteAt(make([]byte, 1000), 0); err != nil {
				t.Fatal(err)
			}
			for _, off := range []int64{math.MaxInt64 - 100, math.MaxInt64 - 4095, math.MaxInt64 - 8191} {
				n := int(math.MaxInt64 - off)
				if n, err := f.ReadAt(make([]byte, n), off); n != 0 || err == nil {
					t.Errorf("read at %d: %d, %v", off, n, err)
				}
				if _, err := f.WriteAt(make([]byte, n), off); err == nil {
					t.Errorf("write at %d: no error", off)
				}
				for what, err := range map[string]error{
					"punch":   f.PunchHole(off, int64(n)),
					"extents": f.DataExtents(off, int64(n), func(storage.Extent) bool { return true }),
				} {
					if err != nil {
						t.Errorf("%s of %d bytes at %d: %v", what, n, off, err)
					}
				}
				if f.ZeroRange(off, int64(n)) == nil || f.Allocate(off, int64(n)) == nil {
					t.Errorf("the file could be extended to %d bytes", int64(math.MaxInt64))
				}
			}
			if err := f.PunchHole(500, math.MaxInt64-500); err != nil {
				t.Errorf("punching a hole to the end and beyond: %v", err)
			}
			if size, err := f.Size(); size != 1000 || err != nil {
				t.Errorf("size %d, %v", size, err)
			}
			p := make([]byte, 1000)
			if n, err := f.ReadAt(p, 0); n != 1000 || err != nil && err != io.EOF {
				t.Errorf("read: %d, %v", n, err)
			}
		})
	}
}

// TestNoDirectIOLeavesNoFile: where direct I/O cannot be had, creating a file fails and leaves none.
func TestNoDirectIOLeavesNoFile(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "ramfs", 0, ""); err != nil {
		t.Skip("needs to mount a ramfs, which knows no direct I/O: ", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, 0) })
	for _, exclusive := range []bool{false, true} {
		f, err := storage.Open(filepath.Join(dir, "f"), storage.OpenOptions{Create: true, Exclusive: exclusive, Direct: true})
		if err == nil {
			f.Close()
			t.Skip("needs a file system without direct I/O")
		}
		if left, _ := os.ReadDir(dir); len(left) > 0 || !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("exclusive %v: %v, left %v", exclusive, err, left)
		}
	}
}
