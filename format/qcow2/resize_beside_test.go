package qcow2

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/storage"
)

// stalledReads is a file where the first read at some offsets waits.
type stalledReads struct {
	storage.File
	mu     sync.Mutex
	stalls map[int64]*stall
}

type stall struct{ reached, goOn chan struct{} }

func (f *stalledReads) at(off int64) *stall {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stalls[off] = &stall{make(chan struct{}), make(chan struct{})}
	return f.stalls[off]
}

func (f *stalledReads) ReadAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	s := f.stalls[off]
	delete(f.stalls, off)
	f.mu.Unlock()
	if s != nil {
		close(s.reached)
		<-s.goOn
	}
	return f.File.ReadAt(p, off)
}

// TestZeroingBesideGrowth: zeroing up to the end of the disk, which lies inside a cluster, leaves alone what somebody
// writes behind that when the disk has grown meanwhile.
func TestZeroingBesideGrowth(t *testing.T) {
	for _, how := range []string{"discard", "zeroes"} {
		t.Run(how, func(t *testing.T) {
			const cluster, size = 4096, 64<<20 + 512
			mem := storage.NewMemory("image")
			filledWith(t, mem, CreateOptions{Size: size, ClusterSize: cluster})
			f := &stalledReads{File: keepOpen{mem}, stalls: map[int64]*stall{}}
			im, err := Open(f, Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer im.Close()
			first, later := f.at(int64(im.l1.Load().entry(0).offset())), f.at(int64(im.l1.Load().entry(8).offset()))
			eg := errgroup.Group{}
			eg.Go(func() error { _, err := im.ReadAt(make([]byte, 512), 0); return err })
			<-first.reached
			eg.Go(func() error {
				if how == "discard" {
					return im.Discard(0, size)
				}
				return im.WriteZeroes(0, size, block.MayUnmap)
			})
			time.Sleep(50 * time.Millisecond)
			grown := make(chan error, 1)
			go func() { grown <- im.Resize(64<<20+cluster, block.PreallocOff) }()
			time.Sleep(50 * time.Millisecond)
			close(first.goOn)
			<-later.reached
			if err := <-grown; err != nil {
				t.Fatal(err)
			}
			want := bytes.Repeat([]byte{2}, 512)
			if _, err := im.WriteAt(want, size); err != nil {
				t.Fatal(err)
			}
			close(later.goOn)
			if err := eg.Wait(); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 512)
			if _, err := im.ReadAt(got, size); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("the write is gone: %x %v", got[:4], err)
			}
		})
	}
}

// TestCompressedWriteBesideShrink: a compressed write that shrinking overtakes is done or refused.
func TestCompressedWriteBesideShrink(t *testing.T) {
	mem := storage.NewMemory("image")
	if err := Create(mem, CreateOptions{Size: 8 << 20, ClusterSize: 2 << 20}); err != nil {
		t.Fatal(err)
	}
	im, err := Open(keepOpen{mem}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	p := make([]byte, 2<<20)
	fillRandom(rand.New(rand.NewPCG(1, 1)), p)
	for range 20 {
		done := make(chan any, 1)
		go func() {
			defer func() { done <- recover() }()
			if err := im.WriteCompressed(p, 6<<20); err != nil && !errors.Is(err, block.ErrOutOfRange) {
				t.Error(err)
			}
		}()
		time.Sleep(3 * time.Millisecond)
		if err := im.Resize(1<<20, block.PreallocOff); err != nil {
			t.Fatal(err)
		}
		if p := <-done; p != nil {
			t.Fatal("panic:", p)
		}
		if err := im.Resize(8<<20, block.PreallocOff); err != nil {
			t.Fatal(err)
		}
	}
}

// TestShrinkWaitsForSpace: as long as a journal finds no room to begin in, a disk keeps its size, for whoever asks and
// after a crash.
func TestShrinkWaitsForSpace(t *testing.T) {
	mem := storage.NewMemory("image")
	filledWith(t, mem, CreateOptions{Size: 4 << 20})
	in := crashlab.NewInjector(crashlab.Fault{Kind: crashlab.KindTruncate, N: 1, Err: syscall.ENOSPC})
	im, err := Open(in.Wrap(keepOpen{mem}), Options{Discipline: Journal, JournalSize: 1, JournalCommitInterval: -1})
	if err != nil {
		t.Fatal(err)
	}
	err = im.Resize(1<<20, block.PreallocOff)
	if err == nil || im.Size() != 4<<20 {
		t.Errorf("%v, %d bytes", err, im.Size())
	}
	if err := im.Resize(1<<20, block.PreallocOff); err != nil {
		t.Errorf("with space again: %v", err)
	}
	after, err := Open(keepOpen{mem}, Options{}) // as a crash leaves it
	if err != nil {
		t.Fatal(err)
	}
	if after.Size() != 1<<20 {
		t.Errorf("a crash leaves %d bytes", after.Size())
	}
}

// fixed is a file like a block device.
type fixed struct {
	storage.File
	size int64
}

func (f fixed) Truncate(n int64) error {
	if n == f.size {
		return nil
	}
	return errors.ErrUnsupported
}
func (f fixed) WriteAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > f.size {
		return 0, syscall.ENOSPC
	}
	return f.File.WriteAt(p, off)
}

// TestShrinkOnDataDevice: a data file that is a block device keeps its size, and the disk may become as large again.
func TestShrinkOnDataDevice(t *testing.T) {
	for _, raw := range []bool{false, true} {
		const old, small = 1<<20 + 64<<10, 1<<20 + 512
		mem, data := storage.NewMemory("image"), storage.NewMemory("data")
		if err := Create(mem, CreateOptions{Size: old, DataFileName: "data", DataFileRaw: raw, DataFile: data}); err != nil {
			t.Fatal(err)
		}
		if err := data.Truncate(old); err != nil {
			t.Fatal(err)
		}
		im, err := Open(keepOpen{mem}, Options{DataFile: fixed{keepOpen{data}, old}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := im.WriteAt(bytes.Repeat([]byte{1}, old), 0); err != nil {
			t.Fatal(err)
		}
		if err := im.Flush(); err != nil {
			t.Fatal(err)
		}
		if err := im.Resize(small, block.PreallocOff); err != nil {
			t.Errorf("raw %v: %v", raw, err)
		}
		if err := im.Resize(old, block.PreallocOff); err != nil {
			t.Errorf("raw %v: %v", raw, err)
		}
		want := append(bytes.Repeat([]byte{1}, small), make([]byte, old-small)...)
		got := make([]byte, old)
		if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			t.Error("other contents", err)
		}
		if err := im.Resize(old+512, block.PreallocOff); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("raw %v: %v", raw, err)
		}
		if err := im.Close(); err != nil {
			t.Error(err)
		}
		checkClean(t, mem)
	}
}

// TestShrinkToNothing: a disk whose L1 table is as large as they come becomes empty, and is used again.
func TestShrinkToNothing(t *testing.T) {
	withoutRace(t)
	for _, c := range []struct{ cluster, size int64 }{{512, 128 << 30}, {64 << 10, 512 << 40}} {
		mem := storage.NewMemory("image")
		if err := Create(mem, CreateOptions{Size: c.size, ClusterSize: c.cluster}); err != nil {
			t.Fatal(err)
		}
		im, err := Open(keepOpen{mem}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := im.WriteAt([]byte("hello"), c.size-1024); err != nil {
			t.Fatal(err)
		}
		if err := im.Resize(0, block.PreallocOff); err != nil || im.Size() != 0 {
			t.Fatalf("%d bytes, %v", im.Size(), err)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		checkClean(t, mem)
		if im, err = Open(keepOpen{mem}, Options{}); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 512)
		if err := im.Resize(512, block.PreallocOff); err != nil {
			t.Fatal(err)
		}
		if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, make([]byte, 512)) {
			t.Errorf("%x…, %v", got[:8], err)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		checkClean(t, mem)
	}
}

// TestCompressedWriteBesideGrowth: a compressed write of the last, short cluster that growth overtakes leaves alone what
// somebody writes behind it.
func TestCompressedWriteBesideGrowth(t *testing.T) {
	const size, cluster = 2<<20 + 512, 2 << 20
	for try := range 30 {
		mem := storage.NewMemory("image")
		if err := Create(mem, CreateOptions{Size: size, ClusterSize: cluster}); err != nil {
			t.Fatal(err)
		}
		im, err := Open(keepOpen{mem}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		eg := errgroup.Group{}
		eg.Go(func() error {
			err := im.WriteCompressed(bytes.Repeat([]byte{1}, 512), 2<<20)
			if errors.Is(err, block.ErrOutOfRange) {
				return nil
			}
			return err
		})
		time.Sleep(time.Duration(try%10) * 300 * time.Microsecond)
		if err := im.Resize(4<<20, block.PreallocOff); err != nil {
			t.Fatal(err)
		}
		want := bytes.Repeat([]byte{2}, 512)
		if _, err := im.WriteAt(want, size); err != nil {
			t.Fatal(err)
		}
		if err := eg.Wait(); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 512)
		if _, err := im.ReadAt(got, size); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("try %d: the write is gone: %x %v", try, got[:4], err)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
