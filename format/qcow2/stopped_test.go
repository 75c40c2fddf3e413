package qcow2

import (
	"bytes"
	"fmt"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
)

// failingSync is a file of which one barrier fails, the n-th from when it is armed.
type failingSync struct {
	storage.File
	left atomic.Int64
}

func (f *failingSync) Sync() error {
	if f.left.Add(-1) == 0 {
		return syscall.EIO
	}
	return f.File.Sync()
}

// heldBacking is a backing device whose map of the second cluster waits.
type heldBacking struct {
	*memDevice
	asked, answer chan struct{}
}

func (d heldBacking) Extents(off, n int64, fn func(block.Extent) bool) error {
	if off == 4096 {
		close(d.asked)
		<-d.answer
	}
	return d.memDevice.Extents(off, n, fn)
}

// TestStoppedImageKeepsClusters: a write whose barrier failed has its words in the tables, and may have them on the
// disk. Its cluster is not for a write that was under way at that time.
func TestStoppedImageKeepsClusters(t *testing.T) {
	for n := range int64(2) {
		how := Synchronous // the others come here as well, when memory for what a flush would free is full
		t.Run(fmt.Sprintf("barrier %d", n+1), func(t *testing.T) {
			f := &failingSync{File: storage.NewMemory("image")}
			base := heldBacking{newBacking(1, 64<<10), make(chan struct{}), make(chan struct{})}
			if err := Create(f, CreateOptions{Size: 64 << 10, ClusterSize: 4096, BackingFile: "base", BackingFormat: "raw"}); err != nil {
				t.Fatal(err)
			}
			o := Options{Discipline: how, Backing: base, JournalSize: 1, JournalCommitInterval: -1}
			im, err := Open(keepOpen{f}, o)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := im.WriteAt(bytes.Repeat([]byte{1}, 4096), 60<<10); err != nil { // the table is there
				t.Fatal(err)
			}
			second := make(chan error)
			go func() {
				_, err := im.WriteAt(bytes.Repeat([]byte{0xbb}, 4096), 4096)
				second <- err
			}()
			<-base.asked
			f.left.Store(n + 1)
			if _, err := im.WriteAt(bytes.Repeat([]byte{0xaa}, 4096), 0); err == nil {
				t.Error("a write succeeded whose barrier failed")
			}
			close(base.answer)
			if err := <-second; err == nil {
				t.Error("a write succeeded after a barrier had failed")
			}
			judge := func(im *Image, when string) {
				t.Helper()
				got := make([]byte, 4096)
				if _, err := im.ReadAt(got, 0); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, base.bytes[:4096]) && !bytes.Equal(got, bytes.Repeat([]byte{0xaa}, 4096)) {
					t.Errorf("%s: the first cluster holds %x…, neither its old bytes nor its new ones", when, got[:8])
				}
			}
			judge(im, "stopped")
			base.asked, base.answer = make(chan struct{}), make(chan struct{})
			close(base.answer)
			o.Backing = base.memDevice
			again, err := Open(keepOpen{f}, o)
			if err != nil {
				t.Fatal(err)
			}
			judge(again, "opened again")
		})
	}
}
