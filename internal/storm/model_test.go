package storm

import (
	"bytes"
	"errors"
	"syscall"
	"testing"

	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/storage"
)

// made is what claims leave of a disk when one is made after the other.
func made(size int64, parts ...func(disk []byte)) []byte {
	disk := make([]byte, size)
	for _, p := range parts {
		p(disk)
	}
	return disk
}

func part(c *Claim, off, n int64) func([]byte) {
	return func(disk []byte) { c.fill(disk[off:off+n], off) }
}

// TestModel: a model allows what may be there, to the byte, and nothing else.
func TestModel(t *testing.T) {
	const size = 2048
	m := NewModel(size, &Claim{}, nil)
	write := func(off, n int64, ok bool) *Claim {
		c := &Claim{ID: Unnamed}
		m.Begin(c, off, n)
		if !ok {
			n = 0
		}
		m.Finish(c, off, n)
		return c
	}
	a := write(100, 700, true)
	flushed := m.Now()
	m.Flushed(flushed)
	afterFlush := m.Now()
	b := write(304, 8, true)
	failed := write(1000, 1000, false)
	during := &Claim{ID: Unnamed}
	m.Begin(during, 0, 600)

	for _, tc := range []struct {
		name       string
		disk       []byte
		now, crash bool // it is allowed
	}{
		{"what was written last", made(size, part(a, 100, 700), part(b, 304, 8)), true, true},
		{"what failed was made", made(size, part(a, 100, 700), part(b, 304, 8), part(failed, 1000, 1000)), true, true},
		{"it was made in a sector", made(size, part(a, 100, 700), part(b, 304, 8), part(failed, 1024, 512)), true, true},
		{"it was made in a part of a sector", made(size, part(a, 100, 700), part(b, 304, 8), part(failed, 1024, 500)), false, false},
		{"what runs was made", made(size, part(a, 100, 700), part(b, 304, 8), part(during, 0, 600)), true, true},
		{"what was not flushed is lost", made(size, part(a, 100, 700)), false, true},
		{"what was flushed is lost", made(size, part(b, 304, 8)), false, false},
		{"a byte too many", made(size, part(a, 100, 701), part(b, 304, 8)), false, false},
		{"at another place", made(size, part(a, 100, 700), part(b, 305, 8)), false, false},
	} {
		if err := m.Compare(tc.disk, 0, m.Now()); (err == nil) != tc.now {
			t.Errorf("%s: in use: %v", tc.name, err)
		}
		if err := m.Crashed(tc.disk, m.Now()); (err == nil) != tc.crash {
			t.Errorf("%s: after a crash: %v", tc.name, err)
		}
	}
	if err := m.Crashed(made(size), flushed); err != nil {
		t.Errorf("a crash before the flush ended: %v", err)
	}
	if err := m.Crashed(made(size), afterFlush); err == nil {
		t.Error("a crash after the flush takes what was flushed")
	}
}

// TestDisk: what fails ends at a sector, what lies in place needs no space, and after a failed barrier nothing becomes
// durable.
func TestDisk(t *testing.T) {
	lab, err := crashlab.NewLab(crashlab.FileSpec{Name: "image"})
	if err != nil {
		t.Fatal(err)
	}
	d, err := OnFile(lab.Files()[0], 1)
	if err != nil {
		t.Fatal(err)
	}
	old := bytes.Repeat([]byte{1}, 8192)
	if _, err := d.WriteAt(old, 0); err != nil {
		t.Fatal(err)
	}
	d.SetWeather(Weather{Full: true})
	refused := false
	for range 100 {
		if _, err := d.WriteAt(old, 0); err != nil {
			t.Fatalf("in place: %v", err)
		}
		n, err := d.WriteAt(old[:5000], 4096+100)
		refused = refused || errors.Is(err, syscall.ENOSPC)
		if err != nil && (n < 4096-100 || (4096+100+n)%storage.SectorSize != 0) {
			t.Fatalf("%d bytes, %v", n, err)
		}
		if err := d.PunchHole(8192, 8192); err != nil {
			t.Fatal(err)
		}
	}
	if !refused || d.Struck() == 0 {
		t.Error("space was never scarce")
	}
	d.SetWeather(Weather{Syncs: 1})
	if err := d.Sync(); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	d.SetWeather(Weather{})
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	states, err := lab.RandomCrashes(crashlab.Model{Tear: storage.SectorSize}, 50, 1)
	if err != nil {
		t.Fatal(err)
	}
	lost := false
	for state := range states {
		size, err := state.Files()[0].Size()
		lost = lost || err == nil && size == 0 && state.Event() > 20
	}
	if !lost {
		t.Error("a barrier after one that failed made something durable")
	}
}
