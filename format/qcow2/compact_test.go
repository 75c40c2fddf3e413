package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"syscall"
	"testing"

	"github.com/platter-disk/platter/storage"
)

// compactConfigs are images whose tables lie in different ways.
func compactConfigs() map[string]CreateOptions {
	return map[string]CreateOptions{
		"plain":     {Size: 8 << 20, ClusterSize: 4096},
		"version 2": {Size: 8 << 20, ClusterSize: 4096, Version: 2},
		"extended":  {Size: 8 << 20, ClusterSize: 16384, ExtendedL2: true},
		"tables":    {Size: 2 << 20, ClusterSize: 512, RefcountBits: 64}, // many blocks, and a table that grows
		"large L1":  {Size: 64 << 20, ClusterSize: 512, RefcountBits: 1},
		"overlay":   {Size: 8 << 20, ClusterSize: 4096, BackingFile: "base", BackingFormat: "raw"},
	}
}

// filled makes an image of which 2 MiB are written.
func filled(t *testing.T, f storage.File, create CreateOptions, o Options) *Image {
	t.Helper()
	create.BackingSize = create.Size
	if err := Create(f, create); err != nil {
		t.Fatal(err)
	}
	if create.BackingFile != "" {
		o.Backing = newBacking(1, create.Size)
	}
	im, err := Open(keepOpen{f}, o)
	if err != nil {
		t.Fatal(err)
	}
	fillUpTo(t, im, 2<<20)
	return im
}

func fillUpTo(t *testing.T, im *Image, n int) {
	t.Helper()
	if _, err := im.WriteAt(bytes.Repeat([]byte{7}, n), 0); err != nil {
		t.Fatal(err)
	}
}

func fileSize(t *testing.T, f storage.File) int64 {
	t.Helper()
	n, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func checkClean(t *testing.T, f storage.File) {
	t.Helper()
	if res, err := Check(f, CheckOptions{}); err != nil || !res.Clean() {
		t.Fatalf("check: %+v, %v", res, err)
	}
}

// TestEmptyMakesSmall: the file of an emptied image is about as large as that of a new one, however often it is
// filled and emptied, within a session and over several.
func TestEmptyMakesSmall(t *testing.T) {
	withoutRace(t)
	for name, create := range compactConfigs() {
		for _, how := range Disciplines() {
			if create.Version == 2 && (how == Lazy || how == Journal) {
				continue
			}
			t.Run(name+"/"+how, func(t *testing.T) {
				f := storage.NewMemory("image")
				o := Options{Discipline: how, JournalSize: 1}
				im := filled(t, f, create, o)
				fresh := storage.NewMemory("fresh")
				if err := Create(fresh, create); err != nil {
					t.Fatal(err)
				}
				// The tables move to a place beside those that they replace.
				bound := 2*fileSize(t, fresh) + 2*create.ClusterSize
				for round := range 4 {
					if err := im.Empty(); err != nil {
						t.Fatal(err)
					}
					if round%2 == 0 {
						fillUpTo(t, im, 1<<20)
						if err := im.Empty(); err != nil {
							t.Fatal(err)
						}
					}
					want := make([]byte, 2<<20)
					if create.BackingFile != "" {
						copy(want, newBacking(1, create.Size).bytes)
					}
					got := make([]byte, len(want))
					if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
						t.Fatalf("round %d: the emptied image shows something else (%v)", round, err)
					}
					if err := im.Close(); err != nil {
						t.Fatal(err)
					}
					checkClean(t, f)
					if n := fileSize(t, f); n > bound {
						t.Errorf("round %d: the file has %d bytes, want at most %d", round, n, bound)
					}
					if create.BackingFile != "" {
						o.Backing = newBacking(1, create.Size)
					}
					var err error
					if im, err = Open(keepOpen{f}, o); err != nil {
						t.Fatal(err)
					}
					fillUpTo(t, im, 2<<20)
				}
				if err := im.Close(); err != nil {
					t.Fatal(err)
				}
				checkClean(t, f)
			})
		}
	}
}

// TestEmptyKeepsWhatIsCounted: nothing is cut off or moved over that somebody else may need.
func TestEmptyKeepsWhatIsCounted(t *testing.T) {
	create := CreateOptions{Size: 8 << 20, ClusterSize: 4096}
	t.Run("snapshot", func(t *testing.T) {
		f := storage.NewMemory("image")
		im := filled(t, f, create, Options{})
		if _, err := im.CreateSnapshot("s", SnapshotOptions{}); err != nil {
			t.Fatal(err)
		}
		before := fileSize(t, f)
		if err := errors.Join(im.Empty(), im.Close()); err != nil {
			t.Fatal(err)
		}
		checkClean(t, f)
		if n := fileSize(t, f); n < before {
			t.Errorf("the file was cut from %d to %d bytes", before, n)
		}
	})
	t.Run("leak", func(t *testing.T) {
		f := storage.NewMemory("image")
		im := filled(t, f, create, Options{})
		l2 := im.l1.Load().entry(0).offset()
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		var entry [8]byte
		last := int64(l2) + (2<<20/4096-1)*8
		if _, err := f.ReadAt(entry[:], last); err != nil {
			t.Fatal(err)
		}
		lost := int64(l2Entry(binary.BigEndian.Uint64(entry[:])).offset())
		if _, err := f.WriteAt(make([]byte, 8), last); err != nil {
			t.Fatal(err)
		}
		im, err := Open(keepOpen{f}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(im.Empty(), im.Close()); err != nil {
			t.Fatal(err)
		}
		if n := fileSize(t, f); n < lost+4096 {
			t.Errorf("the file was cut to %d bytes, and a cluster at %d is counted", n, lost)
		}
		p := make([]byte, 4096)
		if _, err := f.ReadAt(p, lost); err != nil || !bytes.Equal(p, bytes.Repeat([]byte{7}, 4096)) {
			t.Errorf("a counted cluster changed (%v)", err)
		}
		if res, err := Check(f, CheckOptions{}); err != nil || res.Corruptions > 0 || res.Leaks != 1 {
			t.Errorf("check: %+v, %v", res, err)
		}
	})
}

// TestEmptyFixedSize: a block device keeps its size.
func TestEmptyFixedSize(t *testing.T) {
	f := storage.NewMemory("image")
	if err := filled(t, f, CreateOptions{Size: 8 << 20, ClusterSize: 4096}, Options{}).Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(4 << 20); err != nil {
		t.Fatal(err)
	}
	im, err := Open(keepOpen{fixedSize{f}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(im.Empty(), im.Close()); err != nil {
		t.Error(err)
	}
	checkClean(t, f)
}

// shortWrites fails writes of more than a number of bytes half-way, while it is told to.
type shortWrites struct {
	storage.File
	most int
}

func (f *shortWrites) WriteAt(p []byte, off int64) (int, error) {
	if f.most > 0 && len(p) > f.most {
		n, err := f.File.WriteAt(p[:len(p)/2], off)
		return n, errors.Join(syscall.ENOSPC, err)
	}
	return f.File.WriteAt(p, off)
}

// TestEmptyWithoutSpace: the image is empty and stays usable if there is no space for its tables at a new place; what
// was set aside there does not pass for zeros any more.
func TestEmptyWithoutSpace(t *testing.T) {
	for _, how := range Disciplines() {
		t.Run(how, func(t *testing.T) {
			f := storage.NewMemory("image")
			const size = 8 << 20
			if err := filled(t, f, CreateOptions{Size: size, ClusterSize: 4096}, Options{}).Close(); err != nil {
				t.Fatal(err)
			}
			failing := &shortWrites{File: keepOpen{f}}
			im, err := Open(failing, Options{Discipline: how, JournalSize: 1, Discard: true})
			if err != nil {
				t.Fatal(err)
			}
			fillUpTo(t, im, 4096) // a journal has begun then
			if err := im.Flush(); err != nil {
				t.Fatal(err)
			}
			failing.most = 8192
			if err := im.Empty(); !errors.Is(err, syscall.ENOSPC) {
				t.Fatalf("%v, want %v", err, syscall.ENOSPC)
			}
			failing.most = 0
			want := make([]byte, size)
			for off := 0; off < size; off += 8192 { // a sector in each second cluster: the rest reads as zeros
				for i := range 512 {
					want[off+i] = 9
				}
				if _, err := im.WriteAt(want[off:off+512], int64(off)); err != nil {
					t.Fatal(err)
				}
			}
			got := make([]byte, size)
			if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("the disk holds something else (%v)", err)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			checkClean(t, f)
		})
	}
}
