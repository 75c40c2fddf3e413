package storm

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"syscall"

	"github.com/platter-disk/platter/storage"
)

// blockSize is the unit in bytes in which a Disk takes and gives back space.
const blockSize = 4096

// Weather is what may happen to the operations on a Disk. The zero value is fair.
type Weather struct {
	Full   bool // for a few operations in a row now and then, there is no space
	Reads  int  // one read in about that many fails with EIO; 0: none
	Writes int  // likewise of what changes the file, with all, nothing or a part of it done
	Syncs  int  // likewise; nothing becomes durable from then on, whatever later ones return
	Base   int  // likewise of reads of a Base
}

// Disk is a file on a disk that fails from time to time. What needs space while there is none ends with ENOSPC, with
// all, nothing or a part of it done that finds room; what lies in place can always be overwritten.
type Disk struct {
	storage.File

	place  sync.RWMutex       // held shared to write what Allocate reads and writes back, and zeros that give space back
	mu     sync.Mutex         // guards what follows
	blocks map[int64]struct{} // that have space
	r      *rand.Rand
	w      Weather
	full   bool // there is no space now
	left   int  // operations until that changes
	lying  bool // nothing becomes durable any more
	struck int
}

// NewDisk returns a Disk over an empty file in memory, with fair weather. seed decides what fails.
func NewDisk(name string, seed uint64) *Disk {
	return &Disk{File: storage.NewMemory(name), blocks: map[int64]struct{}{}, r: rand.New(rand.NewPCG(seed, 11))}
}

// OnFile is NewDisk over a file that exists.
func OnFile(f storage.File, seed uint64) (*Disk, error) {
	d := NewDisk(f.Name(), seed)
	d.File = f
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	return d, f.DataExtents(0, size, func(e storage.Extent) bool {
		if e.Data {
			d.take(e.Offset, e.Length)
		}
		return true
	})
}

// Struck is how many operations failed.
func (f *Disk) Struck() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.struck
}

// SetWeather says what may happen from now on.
func (f *Disk) SetWeather(w Weather) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.w = w
}

// Close implements storage.File; the Disk may be used again.
func (f *Disk) Close() error { return nil }

// take gives a range its space.
func (f *Disk) take(off, n int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for b := off / blockSize; b*blockSize < off+n; b++ {
		f.blocks[b] = struct{}{}
	}
}

// give takes the space of the whole blocks of a range away.
func (f *Disk) give(off, n int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for b := (off + blockSize - 1) / blockSize; (b+1)*blockSize <= off+n; b++ {
		delete(f.blocks, b)
	}
}

// room is how much of [off, off+n) has space, from its start. The caller holds mu.
func (f *Disk) room(off, n int64) int64 {
	at := off
	for at < off+n {
		if _, ok := f.blocks[at/blockSize]; !ok {
			break
		}
		at = (at/blockSize + 1) * blockSize
	}
	return min(at-off, n)
}

// hit draws whether something happens that happens to one in so many.
func (f *Disk) hit(one int) bool { return one > 0 && f.r.IntN(one) == 0 }

// fail is an error of the disk. The caller holds mu.
func (f *Disk) fail(err error) error {
	f.struck++
	return fmt.Errorf("%s: %w", f.Name(), err)
}

// grant is how much of a change of [off, off+n) is made, and with what error it ends; less than all ends with a sector
// of the file. space says that it is made by taking space.
func (f *Disk) grant(off, n int64, space bool) (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	cut := func(least int64) int64 {
		at := off + least + f.r.Int64N(n-least+1)
		return max(least, min(n, at/storage.SectorSize*storage.SectorSize-off))
	}
	if f.hit(f.w.Writes) {
		return cut(0), f.fail(syscall.EIO)
	}
	if !f.w.Full || !space {
		return n, nil
	}
	room := f.room(off, n)
	if room == n {
		return n, nil
	}
	if f.left == 0 {
		f.full = !f.full
		f.left = 1 + f.r.IntN(12)
	}
	f.left--
	if !f.full {
		return n, nil
	}
	if f.r.IntN(2) == 0 {
		room = cut(room)
	}
	return room, f.fail(syscall.ENOSPC)
}

// ReadAt implements storage.File.
func (f *Disk) ReadAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	struck := f.hit(f.w.Reads)
	if struck {
		defer f.mu.Unlock()
		return 0, f.fail(syscall.EIO)
	}
	f.mu.Unlock()
	return f.File.ReadAt(p, off)
}

// TryReadAt implements storage.File.
func (f *Disk) TryReadAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	absent := f.w.Reads > 0 && f.r.IntN(2) == 0
	f.mu.Unlock()
	if absent {
		return 0, storage.ErrWouldBlock
	}
	return f.File.TryReadAt(p, off)
}

// WriteAt implements storage.File.
func (f *Disk) WriteAt(p []byte, off int64) (int, error) {
	defer f.dawdle()
	f.place.RLock()
	defer f.place.RUnlock()
	n, failed := f.grant(off, int64(len(p)), true)
	f.take(off, n)
	if done, err := f.File.WriteAt(p[:n], off); err != nil {
		return done, err
	}
	return int(n), failed
}

// Sync implements storage.File.
func (f *Disk) Sync() error {
	defer f.dawdle()
	f.mu.Lock()
	if f.hit(f.w.Syncs) {
		f.lying = true
		defer f.mu.Unlock()
		return f.fail(syscall.EIO)
	}
	lying := f.lying
	f.mu.Unlock()
	if lying {
		return nil
	}
	return f.File.Sync()
}

// Truncate implements storage.File.
func (f *Disk) Truncate(size int64) error {
	f.place.Lock()
	defer f.place.Unlock()
	now, err := f.Size()
	if err != nil {
		return err
	}
	if size < now {
		f.give(size, now-size+blockSize)
	} else if _, err := f.grant(now, size-now, true); err != nil {
		return err
	}
	return f.File.Truncate(size)
}

// Allocate implements storage.File. It writes what is there, because in memory only what was written has its space.
func (f *Disk) Allocate(off, n int64) error {
	defer f.dawdle()
	f.place.Lock()
	defer f.place.Unlock()
	n, failed := f.grant(off, n, true)
	f.take(off, n)
	p := make([]byte, n)
	if err := storage.ReadFull(f.File, p, off); err != nil {
		return err
	}
	_, err := f.File.WriteAt(p, off)
	return errors.Join(failed, err)
}

// ZeroRange implements storage.File. As with unwritten extents, what is written there may find no space.
func (f *Disk) ZeroRange(off, n int64) error {
	f.place.Lock()
	defer f.place.Unlock()
	n, failed := f.grant(off, n, true)
	f.give(off, n)
	return errors.Join(f.File.ZeroRange(off, n), failed)
}

// PunchHole implements storage.File.
func (f *Disk) PunchHole(off, n int64) error {
	f.place.Lock()
	defer f.place.Unlock()
	n, failed := f.grant(off, n, false)
	f.give(off, n)
	return errors.Join(f.File.PunchHole(off, n), failed)
}

// dawdle lets others run between the end of an operation and what its caller makes of it.
func (f *Disk) dawdle() {
	f.mu.Lock()
	lazy := f.w != Weather{} && f.r.IntN(4) == 0
	f.mu.Unlock()
	if lazy {
		runtime.Gosched()
	}
}
