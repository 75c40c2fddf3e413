//go:build linux

package storage_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
)

const deviceBytes = 1<<20 + 512

// loopDevice attaches a sparse file to a loop device.
func loopDevice(t *testing.T) string {
	testenv.Need(t, "losetup")
	if os.Geteuid() != 0 {
		t.Skip("needs root to attach a loop device")
	}
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, deviceBytes); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", path).Output()
	if err != nil {
		t.Skip("needs a free loop device")
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() { exec.Command("losetup", "--detach", dev).Run() })
	return dev
}

func TestBlockDevice(t *testing.T) {
	for name, o := range map[string]storage.OpenOptions{"cached": {}, "direct": {Direct: true}} {
		t.Run(name, func(t *testing.T) {
			f, err := storage.Open(loopDevice(t), o)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if size, err := f.Size(); size != deviceBytes || err != nil {
				t.Fatalf("size %d, %v", size, err)
			}
			want := pattern(deviceBytes, 9)
			if _, err := f.WriteAt(want, 0); err != nil {
				t.Fatal(err)
			}
			for _, r := range [][2]int64{{1000, 20001}, {100, 50}, {500000, 4096}, {deviceBytes - 9000, 100000}} {
				err := f.PunchHole(r[0], r[1])
				if err != nil && !errors.Is(err, errors.ErrUnsupported) {
					t.Fatal(err)
				}
				if err == nil {
					clear(want[r[0]:min(r[0]+r[1], deviceBytes)])
				}
			}
			if err := f.ZeroRange(300001, 65536); err == nil {
				clear(want[300001 : 300001+65536])
			} else if !errors.Is(err, errors.ErrUnsupported) {
				t.Fatal(err)
			}
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, deviceBytes)
			if _, err := f.ReadAt(got, 0); err != nil && err != io.EOF {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Error("contents differ")
			}
			if n, err := f.ReadAt(got[:1000], deviceBytes-500); n != 500 || err != io.EOF {
				t.Errorf("read at the end: %d, %v", n, err)
			}
			for name, call := range map[string]func() error{
				"write": func() error { _, err := f.WriteAt(got[:1024], deviceBytes-512); return err },
				"zero":  func() error { return f.ZeroRange(0, deviceBytes+1) },
				"alloc": func() error { return f.Allocate(1, deviceBytes) },
			} {
				if err := call(); !errors.Is(err, io.ErrShortWrite) {
					t.Errorf("%s past the end: %v", name, err)
				}
			}
			if err := f.Truncate(deviceBytes * 2); !errors.Is(err, errors.ErrUnsupported) {
				t.Errorf("truncate: %v", err)
			}
			if err := f.Truncate(deviceBytes); err != nil {
				t.Errorf("truncate to the same size: %v", err)
			}
			if err := f.Allocate(0, deviceBytes); err != nil {
				t.Errorf("allocate: %v", err)
			}
			runs := 0
			if err := f.DataExtents(0, deviceBytes, func(e storage.Extent) bool { runs++; return e.Data }); err != nil || runs != 1 {
				t.Errorf("%d extents, %v", runs, err)
			}
		})
	}
}
