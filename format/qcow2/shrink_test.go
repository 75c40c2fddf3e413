package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
)

// TestShrink: what stays is there, what is cut off is gone from the file too, and what comes when the disk grows again
// reads as zeros.
func TestShrink(t *testing.T) {
	withoutRace(t)
	for name, create := range compactConfigs() {
		for _, how := range Disciplines() {
			if create.Version == 2 && (how == Lazy || how == Journal) {
				continue
			}
			t.Run(name+"/"+how, func(t *testing.T) {
				file := storage.NewMemory("image")
				im := filled(t, file, create, Options{Discipline: how, Discard: true, JournalSize: 1})
				want := make([]byte, create.Size)
				if _, err := im.ReadAt(want, 0); err != nil {
					t.Fatal(err)
				}
				const size = 300<<10 + 512
				if err := im.Resize(size, block.PreallocOff); err != nil || im.Size() != size {
					t.Fatalf("%d bytes, %v", im.Size(), err)
				}
				for i, l1 := im.geo.l1Needed(size), im.l1.Load(); i < int64(len(l1.words)); i++ {
					if l1.words[i] != 0 {
						t.Errorf("L1 entry %d is %#x", i, l1.words[i])
					}
				}
				if _, err := im.WriteAt(make([]byte, 512), size); !errors.Is(err, block.ErrOutOfRange) {
					t.Errorf("a write past the end: %v", err)
				}
				if err := im.Close(); err != nil {
					t.Fatal(err)
				}
				checkClean(t, file)
				// Where clusters are tiny, refcount blocks stay at the end of the file.
				if n := fileSize(t, file); n > 1<<20 && create.ClusterSize > 512 {
					t.Errorf("the file has %d bytes", n)
				}
				var backing block.Device
				if create.BackingFile != "" {
					backing = newBacking(1, create.Size)
				}
				im, err := Open(keepOpen{file}, Options{Discipline: how, Backing: backing})
				if err != nil {
					t.Fatal(err)
				}
				if err := im.Resize(create.Size, block.PreallocOff); err != nil {
					t.Fatal(err)
				}
				clear(want[size:])
				got := make([]byte, create.Size)
				if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
					t.Errorf("the disk holds something else (%v)", err)
				}
				if err := im.Close(); err != nil {
					t.Fatal(err)
				}
				checkClean(t, file)
			})
		}
	}
}

// TestShrinkPreallocation: a disk that shrinks takes none.
func TestShrinkPreallocation(t *testing.T) {
	im := filled(t, storage.NewMemory("image"), CreateOptions{Size: 8 << 20}, Options{})
	defer im.Close()
	if err := im.Resize(1<<20, block.PreallocFull); !errors.Is(err, errors.ErrUnsupported) || im.Size() != 8<<20 {
		t.Errorf("%v, %d bytes", err, im.Size())
	}
}

// TestShrinkAndSnapshots: snapshots keep what the disk gives up, and their size.
func TestShrinkAndSnapshots(t *testing.T) {
	withoutRace(t)
	for _, how := range Disciplines() {
		t.Run(how, func(t *testing.T) {
			w := written(t, modelConfig{how: how, create: CreateOptions{Size: 1 << 20, ClusterSize: 1024, Version: 3}})
			if _, err := w.im.CreateSnapshot("whole", SnapshotOptions{}); err != nil {
				t.Fatal(err)
			}
			whole := w.want
			if err := w.im.Resize(200<<10+512, block.PreallocOff); err != nil {
				t.Fatal(err)
			}
			w.want = bytes.Clone(whole[:200<<10+512])
			w.verify(t, 0, int64(len(w.want)))
			w.reopen(t)
			if err := w.im.ApplySnapshot("whole"); err != nil {
				t.Fatal(err)
			}
			w.want = whole
			w.verify(t, 0, int64(len(w.want)))
			w.cleanAfter(t)
		})
	}
}

// TestShrinkBesideRequests: requests for what stays go on, those for what goes are refused or done, and nothing of
// those comes back.
func TestShrinkBesideRequests(t *testing.T) {
	for _, how := range Disciplines() {
		t.Run(how, func(t *testing.T) {
			const large, small = 4 << 20, 1<<20 + 512
			w := written(t, modelConfig{how: how, create: CreateOptions{Size: large, ClusterSize: 4096, Version: 3}})
			var stop atomic.Bool
			var eg errgroup.Group
			for g := range 4 {
				eg.Go(func() error {
					r := rand.New(rand.NewPCG(uint64(g), 3))
					p := bytes.Repeat([]byte{byte(10 + g)}, 3000)
					for !stop.Load() {
						off := r.Int64N((large - 3000) / 512)
						if _, err := w.im.WriteAt(p, off*512); err != nil && !errors.Is(err, block.ErrOutOfRange) {
							return err
						}
					}
					return nil
				})
			}
			for range fewer(8) {
				time.Sleep(time.Millisecond)
				if err := w.im.Resize(small, block.PreallocOff); err != nil {
					t.Error(err)
				}
				if err := w.im.Resize(large, block.PreallocOff); err != nil {
					t.Error(err)
				}
			}
			stop.Store(true)
			if err := eg.Wait(); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(w.im.Resize(small, block.PreallocOff), w.im.Resize(large, block.PreallocOff)); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, large-small)
			if _, err := w.im.ReadAt(got, small); err != nil || len(bytes.Trim(got, "\x00")) > 0 {
				t.Errorf("what was cut off came back (%v)", err)
			}
			w.cleanAfter(t)
		})
	}
}

// TestShrinkInterrupted: the disk is smaller, the image in order, and the next shrink gives up the rest.
func TestShrinkInterrupted(t *testing.T) {
	errStop := errors.New("stop")
	asked := 0
	file := storage.NewMemory("image")
	im := filled(t, file, CreateOptions{Size: 2 << 20, ClusterSize: 1024, RefcountBits: 1}, Options{Interrupt: func() error {
		if asked++; asked == 3 {
			return errStop
		}
		return nil
	}})
	if err := im.Resize(1<<20, block.PreallocOff); !errors.Is(err, errStop) || im.Size() != 1<<20 {
		t.Fatalf("%v, %d bytes", err, im.Size())
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, file)
	before := fileSize(t, file)
	im, err := Open(keepOpen{file}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(im.Resize(1<<20-512, block.PreallocOff), im.Close()); err != nil {
		t.Fatal(err)
	}
	checkClean(t, file)
	if now := fileSize(t, file); now > before-(900<<10) {
		t.Errorf("the file had %d bytes and has %d", before, now)
	}
}

// TestShrinkFaults: whatever operation on the file fails, the disk is whole or smaller, and nothing worse than leaked
// clusters is left.
func TestShrinkFaults(t *testing.T) {
	withoutRace(t)
	const large, small = 256 << 10, 50<<10 + 512
	for _, how := range Disciplines() {
		for _, f := range []crashlab.Fault{
			{Kind: crashlab.KindWrite, Err: syscall.EIO},
			{Kind: crashlab.KindWrite, Err: syscall.ENOSPC, Onward: true},
			{Kind: crashlab.KindSync, Err: syscall.EIO},
			{Kind: crashlab.KindRead, Err: syscall.EIO},
			{Kind: crashlab.KindTruncate, Err: syscall.EIO},
		} {
			t.Run(fmt.Sprintf("%s/%+v", how, f), func(t *testing.T) {
				err := crashlab.ForEachFault([]crashlab.Fault{f}, 40, func(in *crashlab.Injector) error {
					file := storage.NewMemory("image")
					o := Options{Discipline: how, Discard: true, JournalSize: 1, JournalCommitInterval: -1}
					full := filledWith(t, file, CreateOptions{Size: large, ClusterSize: 512})
					im, err := Open(in.Wrap(keepOpen{file}), o)
					if err != nil {
						return nil
					}
					resized := im.Resize(small, block.PreallocOff)
					if in.Hits() == 0 && resized != nil {
						return resized
					}
					closed := im.Close()
					if im, err = Open(keepOpen{file}, o); err != nil {
						return fmt.Errorf("reopen (resized with %v, closed with %v): %w", resized, closed, err)
					}
					if n := im.Size(); n != large && n != small || resized == nil && n != small {
						return fmt.Errorf("the disk has %d bytes (resized with %v)", n, resized)
					}
					got := make([]byte, im.Size())
					if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, full[:len(got)]) {
						return fmt.Errorf("the disk of %d bytes holds something else (%v)", len(got), err)
					}
					if err := im.Close(); err != nil {
						return err
					}
					if res, err := Check(file, CheckOptions{}); err != nil || res.Corruptions+res.CheckErrors > 0 {
						return fmt.Errorf("check: %+v, %v", res, err)
					}
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// filledWith makes an image with a disk that is written all over, and returns what it holds.
func filledWith(t *testing.T, f storage.File, create CreateOptions) []byte {
	t.Helper()
	if err := Create(f, create); err != nil {
		t.Fatal(err)
	}
	im, err := Open(keepOpen{f}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, create.Size)
	fillRandom(rand.New(rand.NewPCG(5, 5)), p)
	if _, err := im.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestShrinkAndQemu: stock qemu-img finds nothing wrong with the smaller image, and what was cut off does not come
// back when it lets the disk grow.
func TestShrinkAndQemu(t *testing.T) {
	testenv.Need(t, "qemu-img")
	dir := t.TempDir()
	for name, create := range map[string]CreateOptions{
		"plain":    {Size: 1 << 20},
		"extended": {Size: 1 << 20, ExtendedL2: true},
		"raw data": {Size: 1 << 20, DataFileName: filepath.Join(dir, "data"), DataFileRaw: true},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, name)
			open := func() *Image {
				t.Helper()
				f, err := storage.Open(path, storage.OpenOptions{Create: true})
				if err != nil {
					t.Fatal(err)
				}
				o := Options{Discard: true}
				if create.DataFileName != "" {
					if o.DataFile, err = storage.Open(create.DataFileName, storage.OpenOptions{Create: true}); err != nil {
						t.Fatal(err)
					}
					create.DataFile = o.DataFile
				}
				if n := fileSize(t, f); n == 0 {
					if err := Create(f, create); err != nil {
						t.Fatal(err)
					}
				}
				im, err := Open(f, o)
				if err != nil {
					t.Fatal(err)
				}
				return im
			}
			im := open()
			want := bytes.Repeat([]byte("data"), 1<<18)
			if _, err := im.WriteAt(want, 0); err != nil {
				t.Fatal(err)
			}
			const size = 100 << 10 // inside a cluster
			if err := errors.Join(im.Resize(size, block.PreallocOff), im.Close()); err != nil {
				t.Fatal(err)
			}
			if create.DataFile != nil {
				if st, err := os.Stat(create.DataFileName); err != nil || st.Size() != size {
					t.Errorf("the data file has %d bytes (%v)", st.Size(), err)
				}
			}
			testenv.Run(t, "qemu-img", "check", path)
			testenv.Run(t, "qemu-img", "resize", "-f", "qcow2", path, "1M")
			testenv.Run(t, "qemu-img", "check", path)
			im = open()
			defer im.Close()
			clear(want[size:])
			got := make([]byte, len(want))
			if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("the disk holds something else (%v)", err)
			}
		})
	}
}

// TestResizeAndClose: Close waits for a change of size under way, and leaves a closed image.
func TestResizeAndClose(t *testing.T) {
	for _, how := range Disciplines() {
		t.Run(how, func(t *testing.T) {
			for i := range fewer(200) {
				file := storage.NewMemory("image")
				if err := Create(file, CreateOptions{Size: 1 << 20, ClusterSize: 4096}); err != nil {
					t.Fatal(err)
				}
				im, err := Open(keepOpen{file}, Options{Discipline: how, JournalSize: 1})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := im.WriteAt(make([]byte, 8192), 4096); err != nil {
					t.Fatal(err)
				}
				var eg errgroup.Group
				eg.Go(func() error {
					for size := int64(1 << 20); ; size ^= 3 << 20 {
						if err := im.Resize(size, block.PreallocOff); errors.Is(err, block.ErrClosed) {
							return nil
						} else if err != nil {
							return err
						}
					}
				})
				time.Sleep(time.Duration(i%20) * 50 * time.Microsecond)
				if err := errors.Join(im.Close(), eg.Wait()); err != nil {
					t.Fatal(err)
				}
				if h, err := ReadHeader(file); err != nil || h.Incompatible != 0 {
					t.Fatalf("incompatible features %#x, %v", h.Incompatible, err)
				}
				checkClean(t, file)
			}
		})
	}
}

// TestShrinkOnFullDisk: on a full file system, what a shrinking disk gives up has room for what it has to move.
func TestShrinkOnFullDisk(t *testing.T) {
	for _, how := range []string{Ordered, Lazy} {
		t.Run(how, func(t *testing.T) {
			const size, small, cluster = 4 << 20, 1<<20 + 512, 4096
			file := &fullDisk{File: storage.NewMemory("image")}
			filledWith(t, file, CreateOptions{Size: size, ClusterSize: cluster})
			im, err := Open(keepOpen{file}, Options{Discipline: how})
			if err != nil {
				t.Fatal(err)
			}
			want := bytes.Repeat([]byte{5}, cluster)
			if err := im.WriteCompressed(want, 1<<20); err != nil {
				t.Fatal(err)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			file.full.Store(true)
			if im, err = Open(keepOpen{file}, Options{Discipline: how}); err != nil {
				t.Fatal(err)
			}
			if err := im.Resize(small, block.PreallocOff); err != nil {
				t.Error(err)
			}
			got := make([]byte, 512)
			if _, err := im.ReadAt(got, 1<<20); err != nil || !bytes.Equal(got, want[:512]) {
				t.Error("other contents", err)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			checkClean(t, file)
			if n := fileSize(t, file); n > 2<<20 {
				t.Errorf("the file has %d bytes", n)
			}
		})
	}
}

// TestShrinkCutsBlocks: refcount blocks that count nothing but themselves do not keep the file long.
func TestShrinkCutsBlocks(t *testing.T) {
	for name, create := range map[string]CreateOptions{
		"plain": {Size: 32 << 20, ClusterSize: 4096},
	} {
		for _, how := range Disciplines() {
			t.Run(name+"/"+how, func(t *testing.T) {
				file := storage.NewMemory("image")
				filledWith(t, file, create)
				im, err := Open(keepOpen{file}, Options{Discipline: how, Discard: true, JournalSize: 1})
				if err != nil {
					t.Fatal(err)
				}
				if err := im.Resize(256<<10, block.PreallocOff); err != nil {
					t.Fatal(err)
				}
				if err := im.Close(); err != nil {
					t.Fatal(err)
				}
				checkClean(t, file)
				if n := fileSize(t, file); n > 512<<10 {
					t.Errorf("the file has %d bytes", n)
				}
				if im, err = Open(keepOpen{file}, Options{Discipline: how}); err != nil {
					t.Fatal(err)
				}
				if err := im.Resize(create.Size, block.PreallocOff); err != nil {
					t.Fatal(err)
				}
				if _, err := im.WriteAt(make([]byte, create.Size), 0); err != nil {
					t.Fatal(err)
				}
				if err := im.Close(); err != nil {
					t.Fatal(err)
				}
				checkClean(t, file)
			})
		}
	}
}
