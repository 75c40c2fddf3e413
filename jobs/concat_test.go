package jobs

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/platter-disk/platter/block"
)

func TestConcat(t *testing.T) {
	a := newFake(4096, 512).add(4096, dataRun, 1)
	b := newFake(0, 512)
	c := newFake(1024, 65536).add(512, unallocatedRun, 0).add(512, dataRun, 3)
	d, err := NewConcat(a, b, c)
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Join([][]byte{a.content, c.content}, nil)
	got := make([]byte, len(want)+10)
	if n, err := d.ReadAt(got, 0); n != len(want) || err != io.EOF || !bytes.Equal(got[:n], want) {
		t.Errorf("read of everything and more: %d bytes, %v", n, err)
	}
	if n, err := d.ReadAt(got[:100], 4090); n != 100 || err != nil || !bytes.Equal(got[:100], want[4090:4190]) {
		t.Errorf("read across the seam: %d bytes, %v", n, err)
	}
	if err := d.TryReadAt(got[:100], 4090); err != nil || !bytes.Equal(got[:100], want[4090:4190]) {
		t.Errorf("try-read across the seam: %v", err)
	}
	if err := d.TryReadAt(got[:100], 5100); !errors.Is(err, block.ErrOutOfRange) {
		t.Errorf("try-read past the end: %v", err)
	}
	var runs []block.Extent
	if err := d.Extents(100, 5000, func(e block.Extent) bool { runs = append(runs, e); return true }); err != nil {
		t.Fatal(err)
	}
	if len(runs) != 3 || runs[0].Offset != 100 || runs[0].Length != 3996 || runs[1].Offset != 4096 || !runs[1].Zero || runs[2].Length != 492 {
		t.Errorf("extents: %+v", runs)
	}
	stops := 0
	if err := d.Extents(0, 5120, func(block.Extent) bool { stops++; return false }); err != nil || stops != 1 {
		t.Errorf("stopped walk: %d calls, %v", stops, err)
	}
	if d.Limits().Preferred != 65536 || !d.Limits().ReadOnly || d.Size() != 5120 {
		t.Errorf("limits %+v, size %d", d.Limits(), d.Size())
	}
	_, err = d.WriteAt(got[:1], 0)
	for _, err := range []error{err, d.WriteCompressed(nil, 0), d.WriteZeroes(0, 1, 0), d.Discard(0, 1), d.Resize(0, 0)} {
		if !errors.Is(err, block.ErrReadOnly) {
			t.Errorf("a change is answered with %v", err)
		}
	}
	if err := errors.Join(d.Flush(), d.Close()); err != nil {
		t.Error(err)
	}
	if _, err := NewConcat(); err == nil {
		t.Error("joining nothing succeeds")
	}
}
