package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/platter-disk/platter/storage"
)

// fullDisk is a file on a file system that can become full: what needs space then ends with ENOSPC, and with a part
// of it written; what lies in place already can be overwritten.
type fullDisk struct {
	storage.File
	full    atomic.Bool
	refused atomic.Int64
}

// room is how much of a range lies in place, from its start.
func (f *fullDisk) room(off, length int64) (int64, error) {
	room := int64(0)
	err := f.DataExtents(off, length, func(e storage.Extent) bool {
		if e.Data {
			room += e.Length
		}
		return e.Data
	})
	return room, err
}

func (f *fullDisk) WriteAt(p []byte, off int64) (int, error) {
	if f.full.Load() {
		room, err := f.room(off, int64(len(p)))
		if err != nil {
			return 0, err
		}
		if room < int64(len(p)) {
			f.refused.Add(1)
			n, err := f.File.WriteAt(p[:room], off)
			return n, errors.Join(syscall.ENOSPC, err)
		}
	}
	return f.File.WriteAt(p, off)
}

func (f *fullDisk) Allocate(off, length int64) error {
	if f.full.Load() {
		if room, err := f.room(off, length); err != nil || room < length {
			f.refused.Add(1)
			return errors.Join(syscall.ENOSPC, err)
		}
	}
	// In memory only what was written has its space.
	p := make([]byte, length)
	if err := storage.ReadFull(f.File, p, off); err != nil {
		return err
	}
	_, err := f.File.WriteAt(p, off)
	return err
}

// TestDiskFull: while the file system is full, writes fail that need space, and nothing else breaks; once there is
// space the guest goes on, on the same open image.
func TestDiskFull(t *testing.T) {
	withoutRace(t)
	geometries := map[string]CreateOptions{
		"plain":    {Size: 4 << 20, ClusterSize: 4096},
		"tiny":     {Size: 1 << 20, ClusterSize: 512, RefcountBits: 64},
		"extended": {Size: 4 << 20, ClusterSize: 16384, ExtendedL2: true},
	}
	for _, how := range Disciplines() {
		for name, create := range geometries {
			for _, backed := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/%v", how, name, backed), func(t *testing.T) {
					for seed := range uint64(4) {
						fillDisk(t, how, create, backed, seed)
					}
				})
			}
		}
	}
}

func fillDisk(t *testing.T, how string, create CreateOptions, backed bool, seed uint64) {
	t.Helper()
	file := &fullDisk{File: storage.NewMemory("image")}
	o := Options{Discipline: how, Discard: true, JournalSize: 1}
	want := make([]byte, create.Size)
	if backed {
		base := newBacking(1, create.Size/2)
		copy(want, base.bytes)
		o.Backing = base
		create.BackingFile, create.BackingFormat, create.BackingSize = "base", "raw", create.Size/2
	}
	if err := Create(file, create); err != nil {
		t.Fatal(err)
	}
	im, err := Open(keepOpen{file}, o)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(seed, 1))
	type extent struct{ off, n int64 }
	var again []extent
	for round := range 60 {
		switch round {
		case 3 * int(seed):
			file.full.Store(true)
		case 40:
			file.full.Store(false)
			for _, e := range again { // the guest repeats what failed
				if _, err := im.WriteAt(want[e.off:e.off+e.n], e.off); err != nil {
					t.Fatalf("%s, seed %d: with space again: %v", how, seed, err)
				}
			}
		}
		n := int64(512 * (1 + r.IntN(40)))
		off := r.Int64N((create.Size-n)/512) * 512
		p := want[off : off+n]
		for i := range p {
			p[i] = byte(r.Uint32() | 1)
		}
		if _, err := im.WriteAt(p, off); err != nil {
			if !file.full.Load() || !errors.Is(err, syscall.ENOSPC) {
				t.Fatalf("%s, seed %d, round %d: write: %v", how, seed, round, err)
			}
			again = append(again, extent{off, n})
		}
		if r.IntN(3) > 0 {
			continue
		}
		if err := im.Flush(); err != nil && (!file.full.Load() || !errors.Is(err, syscall.ENOSPC)) {
			t.Fatalf("%s, seed %d, round %d: flush: %v", how, seed, round, err)
		}
		if err := im.failed(); err != nil {
			t.Fatalf("%s, seed %d, round %d: the image stopped: %v", how, seed, round, err)
		}
	}
	if file.refused.Load() == 0 {
		t.Fatalf("%s, seed %d: the disk was never full", how, seed)
	}
	got := make([]byte, len(want))
	if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%s, seed %d: the disk holds something else (%v)", how, seed, err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if im, err = Open(keepOpen{file}, Options{Backing: o.Backing, ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%s, seed %d: reopened, the disk holds something else (%v)", how, seed, err)
	}
	if res, err := Check(file, CheckOptions{}); err != nil || !res.Clean() {
		t.Fatalf("%s, seed %d: check: %+v, %v", how, seed, res, err)
	}
}

// TestJournalWaitsForSpace: as long as there is no space for the journal, flushes fail, and the file does not grow
// by one journal each.
func TestJournalWaitsForSpace(t *testing.T) {
	file := &fullDisk{File: storage.NewMemory("image")}
	if err := Create(file, CreateOptions{Size: 4 << 20, ClusterSize: 4096}); err != nil {
		t.Fatal(err)
	}
	im, err := Open(keepOpen{file}, Options{Discipline: Journal, JournalSize: 1, JournalCommitInterval: -1})
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{7}, 5000)
	if _, err := im.WriteAt(want, 512); err != nil {
		t.Fatal(err)
	}
	file.full.Store(true)
	var first int64
	for i := range 10 {
		if err := im.Flush(); !errors.Is(err, syscall.ENOSPC) || im.failed() != nil {
			t.Fatalf("flush on a full disk: %v", err)
		}
		if i == 0 {
			first = fileSize(t, file)
		}
	}
	if size := fileSize(t, file); size > first {
		t.Errorf("the file grew from %d to %d bytes", first, size)
	}
	file.full.Store(false)
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if im, err = Open(keepOpen{file}, Options{ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := im.ReadAt(got, 512); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the disk holds something else: %v", err)
	}
	checkClean(t, file)
}

// TestReadsNeedNoSpace: reads go on while changed tables fill the cache and there is no space to write them to.
func TestReadsNeedNoSpace(t *testing.T) {
	for _, how := range Disciplines() {
		t.Run(how, func(t *testing.T) {
			const cluster, size = 512, 4 << 20 // an L2 table maps 32 KiB
			file := &fullDisk{File: storage.NewMemory("image")}
			if err := Create(file, CreateOptions{Size: size, ClusterSize: cluster}); err != nil {
				t.Fatal(err)
			}
			o := Options{Discipline: how, Discard: true, JournalSize: 1, JournalCommitInterval: -1, L2CacheSize: 1}
			im, err := Open(keepOpen{file}, Options{}) // leaves no room where a journal was
			if err != nil {
				t.Fatal(err)
			}
			want := bytes.Repeat([]byte("data"), size/4)
			if _, err := im.WriteAt(want, 0); err != nil {
				t.Fatal(err)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			if im, err = Open(keepOpen{file}, o); err != nil {
				t.Fatal(err)
			}
			file.full.Store(true)
			for at := int64(0); at < size; at += 64 * cluster { // a discard changes a table and needs no space
				if err := im.Discard(at, cluster); err == nil {
					clear(want[at : at+cluster])
				} else if !errors.Is(err, syscall.ENOSPC) {
					t.Fatal(err)
				}
			}
			got := make([]byte, size)
			if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("the disk holds something else (%v)", err)
			}
			file.full.Store(false)
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			checkClean(t, file)
		})
	}
}
