package raw_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/raw"
)

// TestFileCutOff: when somebody makes the file smaller while it is open, what it held is an error and not zeros.
// Only the rest of the last sector reads as zeros.
func TestFileCutOff(t *testing.T) {
	f := memory(t, 8192)
	if _, err := f.WriteAt(bytes.Repeat([]byte{7}, 8192), 0); err != nil {
		t.Fatal(err)
	}
	d := open(t, f, all)
	if err := f.Truncate(5000); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 1024)
	if _, err := d.ReadAt(p, 4096); err != nil || !bytes.Equal(p, append(bytes.Repeat([]byte{7}, 904), make([]byte, 120)...)) {
		t.Errorf("read up to the sector in which the file ends: %v, %v", err, p)
	}
	extents := func(off, length int64) error {
		return d.Extents(off, length, func(block.Extent) bool { return true })
	}
	if err := extents(0, 5120); err != nil {
		t.Errorf("map up to the sector in which the file ends: %v", err)
	}
	for name, call := range map[string]func() error{
		"read across the end": func() error { _, err := d.ReadAt(p, 4608); return err },
		"read past the end":   func() error { _, err := d.ReadAt(p, 7168); return err },
		"try":                 func() error { return d.TryReadAt(p, 4608) },
		"map across the end":  func() error { return extents(0, 8192) },
		"map past the end":    func() error { return extents(6000, 1000) },
	} {
		err := call()
		if !errors.Is(err, io.ErrUnexpectedEOF) || !strings.Contains(err.Error(), "disk.raw: the file ends at ") {
			t.Errorf("%s: error %v, want one that says where disk.raw ends", name, err)
		}
	}
}

// TestResizeInterrupted: growing with preallocation can be interrupted, and leaves the disk as it was.
func TestResizeInterrupted(t *testing.T) {
	for _, prealloc := range []block.Preallocation{block.PreallocFalloc, block.PreallocFull} {
		f := memory(t, 8192)
		asked := 0
		d := open(t, f, raw.Options{Interrupt: func() error {
			if asked++; asked < 3 {
				return nil
			}
			return context.Canceled
		}})
		if err := d.Resize(1<<30, prealloc); !errors.Is(err, context.Canceled) {
			t.Errorf("%v: error %v, want %v", prealloc, err, context.Canceled)
		}
		if size, err := f.Size(); err != nil || size != 8192 || d.Size() != 8192 || asked != 3 {
			t.Errorf("%v: a file of %d bytes, %v, and a disk of %d, asked %d times", prealloc, size, err, d.Size(), asked)
		}
		if err := d.Resize(1<<20, block.PreallocOff); err != nil || d.Size() != 1<<20 {
			t.Errorf("%v: resize afterwards: %v, size %d", prealloc, err, d.Size())
		}
	}
}

// TestForeignQcow: version 1 of what became qcow2 has its magic number and another name.
func TestForeignQcow(t *testing.T) {
	for head, want := range map[string]string{
		"QFI\xfb\x00\x00\x00\x01": "qcow", "QFI\xfb\x00\x00\x00\x02": "qcow2", "QFI\xfb\x00\x00\x00\x03": "qcow2", "QFI\xfb": "qcow2",
	} {
		if got := raw.Foreign([]byte(head)); got != want {
			t.Errorf("%q is taken for %q, want %q", head, got, want)
		}
	}
}
