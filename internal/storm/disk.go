// Package storm lets several goroutines change a disk while its file system is full now and then, and knows what the
// disk may hold afterwards. It is for tests of the formats, and knows none of them.
//
//	Storm   requests from many goroutines, to a block.Device
//	Model   the values that each sector of it may have
//	Disk    a storage.File under the device that lacks space from time to time
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

// Disk is a file on a file system that is full from time to time: for a few operations in a row, what needs
// space ends with ENOSPC, with all, nothing or a part of it done that finds room. What lies in place can always be
// overwritten, and a barrier never fails.
type Disk struct {
	*storage.Memory

	place sync.RWMutex // held to read and write back what Allocate keeps

	mu      sync.Mutex
	r       *rand.Rand
	calm    bool // there is space from now on
	full    bool // there is none now
	left    int  // operations until that changes
	refused int
}

// NewDisk returns an empty Disk that has space until SetCalm(false). seed decides when it has none.
func NewDisk(name string, seed uint64) *Disk { return OnMemory(storage.NewMemory(name), seed) }

// OnMemory is NewDisk over a file that exists.
func OnMemory(m *storage.Memory, seed uint64) *Disk {
	return &Disk{Memory: m, calm: true, r: rand.New(rand.NewPCG(seed, 11))}
}

// Refused is how many operations found no space.
func (f *Disk) Refused() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.refused
}

// SetCalm says whether there is space from now on.
func (f *Disk) SetCalm(calm bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calm = calm
}

// grant is how much of n bytes in whole sectors, of which room need no space, an operation gets, and with what error.
func (f *Disk) grant(room, n int64) (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.calm || room >= n {
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
	f.refused++
	if f.r.IntN(2) == 0 {
		room += f.r.Int64N((n-room)/storage.SectorSize+1) * storage.SectorSize
	}
	return min(room, n), fmt.Errorf("%s: %w", f.Name(), syscall.ENOSPC)
}

// room is how much of a range lies in place, from its start, in whole sectors.
func (f *Disk) room(off, n int64) (int64, error) {
	room := int64(0)
	err := f.DataExtents(off, n, func(e storage.Extent) bool {
		if e.Data {
			room += e.Length
		}
		return e.Data
	})
	return room &^ (storage.SectorSize - 1), err
}

// WriteAt implements storage.File.
func (f *Disk) WriteAt(p []byte, off int64) (int, error) {
	defer f.dawdle()
	f.place.RLock()
	defer f.place.RUnlock()
	room, err := f.room(off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	if room+storage.SectorSize > int64(len(p)) {
		room = int64(len(p)) // of words of a table
	}
	n, full := f.grant(room, int64(len(p)))
	if done, err := f.Memory.WriteAt(p[:n], off); err != nil {
		return done, err
	}
	return int(n), full
}

// Truncate implements storage.File.
func (f *Disk) Truncate(size int64) error {
	now, err := f.Size()
	if err != nil {
		return err
	}
	if _, err := f.grant(now, size); err != nil {
		return err
	}
	return f.Memory.Truncate(size)
}

// Allocate implements storage.File. It writes what is there, because in memory only what was written has its space.
func (f *Disk) Allocate(off, n int64) error {
	defer f.dawdle()
	f.place.Lock()
	defer f.place.Unlock()
	room, err := f.room(off, n)
	if err != nil {
		return err
	}
	n, full := f.grant(room, n)
	p := make([]byte, n)
	if err := storage.ReadFull(f.Memory, p, off); err != nil {
		return err
	}
	_, err = f.Memory.WriteAt(p, off)
	return errors.Join(full, err)
}

// ZeroRange implements storage.File.
func (f *Disk) ZeroRange(off, n int64) error {
	n, full := f.grant(0, n)
	return errors.Join(f.Memory.ZeroRange(off, n), full)
}

// dawdle lets others run between the end of an operation and what its caller makes of it.
func (f *Disk) dawdle() {
	f.mu.Lock()
	lazy := !f.calm && f.r.IntN(4) == 0
	f.mu.Unlock()
	if lazy {
		runtime.Gosched()
	}
}
