// Package storm lets several goroutines change a disk while the disks of its files fail now and then, and knows what
// it may hold afterwards, and after a power cut at any moment. It is for tests of the formats, and knows none of them.
//
//	Trial   lives of an image: storms, power cuts, what comes after them
//	Storm   requests from many goroutines, to a block.Device
//	Model   the values that each byte of it may have
//	Disk    a storage.File under the device that fails from time to time
//	Base    a device under the device that does
package storm

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
)

// longest is the largest request in bytes.
const longest = 256 << 10

// Storm issues requests to a device. Its methods are safe for concurrent use; its exported fields are not to be
// changed while they run.
type Storm struct {
	Device    block.Device
	Cluster   int64        // bytes: requests are about that large
	Discarded int64        // bytes: whole units of that size read as zeros for sure when discarded; 0: none
	Model     *Model       // of the device
	Unaligned bool         // requests may begin and end at any byte
	Failed    func() error // why the device takes no further changes; nil: it does
	MayFail   bool         // it may come to that
	Tolerated []error      // that requests may fail with

	mu           sync.Mutex
	done, failed map[string]int // requests by kind
}

// String tells how many requests of each kind succeeded and failed.
func (s *Storm) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return fmt.Sprintf("done %v, failed %v", s.done, s.failed)
}

// Do makes a request that changes nothing, or nothing of the disk. It tells whether that succeeded, and an error unless
// it ended in a way that it may end.
func (s *Storm) Do(what string, request func() error) (ok bool, _ error) {
	err := request()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done == nil {
		s.done, s.failed = map[string]int{}, map[string]int{}
	}
	if failed := s.Failed(); failed != nil && !s.MayFail {
		return false, fmt.Errorf("%s: the image stopped: %w", what, failed)
	}
	if err == nil {
		s.done[what]++
		return true, nil
	}
	s.failed[what]++
	for _, e := range s.Tolerated {
		if errors.Is(err, e) {
			return false, nil
		}
	}
	return false, fmt.Errorf("%s: %w", what, err)
}

// Ask is Do for a request that a device refuses that takes no further changes.
func (s *Storm) Ask(what string, request func() error) (ok bool, _ error) {
	stopped := s.Failed()
	ok, err := s.Do(what, request)
	if ok && stopped != nil {
		return false, fmt.Errorf("%s succeeded, though the image had stopped: %w", what, stopped)
	}
	return ok, err
}

// Change makes a request that gives a range a value.
func (s *Storm) Change(what string, c *Claim, off, n int64, request func() error) error {
	return s.change(what, c, off, n, off, n, request)
}

// change is Change for one that gives [sure, sure+surely) the value for sure.
func (s *Storm) change(what string, c *Claim, off, n, sure, surely int64, request func() error) error {
	s.Model.Begin(c, off, n)
	ok, err := s.Ask(what, request)
	if !ok {
		surely = 0
	}
	s.Model.Finish(c, sure, surely)
	return err
}

// span draws a range of the device.
func (s *Storm) span(r *rand.Rand) (off, n int64) {
	size := s.Device.Size()
	off = r.Int64N(size/storage.SectorSize) * storage.SectorSize
	if r.IntN(2) == 0 { // where others are
		off = min(off%(8*s.Cluster), size-storage.SectorSize)
	}
	if r.IntN(3) == 0 {
		off = off / s.Cluster * s.Cluster
	}
	n = (1 + r.Int64N(3*s.Cluster/storage.SectorSize)) * storage.SectorSize
	if s.Unaligned && r.IntN(2) == 0 {
		off += r.Int64N(storage.SectorSize)
		n = 1 + r.Int64N([...]int64{16, storage.SectorSize, 2 * storage.SectorSize, 3 * s.Cluster}[r.IntN(4)])
	}
	return off, min(n, longest, size-off)
}

// Step issues one random request.
func (s *Storm) Step(r *rand.Rand) error {
	off, n := s.span(r)
	whole := off / s.Cluster * s.Cluster
	switch op := r.IntN(24); {
	case op < 7:
		c := &Claim{ID: Unnamed}
		return s.Change("write", c, off, n, func() error {
			p := make([]byte, n)
			c.fill(p, off)
			_, err := s.Device.WriteAt(p, off)
			return err
		})
	case op < 12 && s.Device.Limits().Compress && whole+s.Cluster <= s.Device.Size(): // a short one must be the last, and disks grow
		c := &Claim{ID: Unnamed}
		return s.Change("compressed write", c, whole, s.Cluster, func() error {
			p := make([]byte, s.Cluster)
			c.fill(p, whole)
			return s.Device.WriteCompressed(p, whole)
		})
	case op < 15:
		flags := block.ZeroFlags(r.IntN(2))
		return s.Change("zero", &Claim{}, off, n, func() error { return s.Device.WriteZeroes(off, n, flags) })
	case op < 17:
		sure, surely := off, int64(0)
		if u := s.Discarded; u > 0 {
			sure = (off + u - 1) / u * u
			surely = max(0, (off+n)/u*u-sure)
		}
		return s.change("discard", &Claim{}, off, n, sure, surely, func() error { return s.Device.Discard(off, n) })
	case op < 18:
		return s.Flush()
	case op < 19:
		_, err := s.Do("map", func() error { return s.extents(off, n) })
		return err
	case op < 21:
		_, err := s.Do("quick read", func() error { return s.Model.Read(quick{s.Device}, off, n) })
		return err
	default:
		_, err := s.Do("read", func() error { return s.Model.Read(s.Device, off, n) })
		return err
	}
}

// Flush flushes the device.
func (s *Storm) Flush() error {
	began := s.Model.Now()
	ok, err := s.Ask("flush", s.Device.Flush)
	if ok {
		s.Model.Flushed(began)
	}
	return err
}

// quick reads without waiting where that can be.
type quick struct{ block.Device }

func (q quick) ReadAt(p []byte, off int64) (int, error) {
	if err := q.TryReadAt(p, off); err != block.ErrWouldBlock {
		return len(p), err
	}
	return q.Device.ReadAt(p, off)
}

// extents wants the map of a range to cover it, and what it calls zero to be zero.
func (s *Storm) extents(off, n int64) error {
	began := s.Model.Now()
	at := off
	var zero []block.Extent
	err := s.Device.Extents(off, n, func(e block.Extent) bool {
		if e.Offset != at || e.Length <= 0 {
			at = -1
			return false
		}
		at += e.Length
		if e.Zero {
			zero = append(zero, e)
		}
		return true
	})
	if err != nil {
		return err
	}
	if at != off+n {
		return fmt.Errorf("the runs of %d bytes at %d do not follow each other", n, off)
	}
	for _, e := range zero {
		if err := s.Model.Compare(make([]byte, e.Length), e.Offset, began); err != nil {
			return fmt.Errorf("called zero: %w", err)
		}
	}
	return nil
}

// Rage issues random requests from several goroutines at once, and has steward do something else now and then.
func (s *Storm) Rage(seed uint64, steward func(*rand.Rand) error) error {
	const workers, requests = 5, 120
	var wg sync.WaitGroup
	errs := make([]error, workers+1)
	for id := range workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, 100+uint64(id)))
			for n := 0; n < requests && errs[id] == nil; n++ {
				errs[id] = s.Step(r)
			}
		})
	}
	wg.Go(func() {
		r := rand.New(rand.NewPCG(seed, 99))
		for n := 0; n < 20 && errs[workers] == nil; n++ {
			time.Sleep(time.Duration(r.IntN(400)) * time.Microsecond)
			errs[workers] = steward(r)
		}
	})
	wg.Wait()
	return errors.Join(errs...)
}

// ReadAll reads all that a device holds.
func ReadAll(d block.Device) ([]byte, error) {
	got := make([]byte, d.Size())
	_, err := d.ReadAt(got, 0)
	if err == io.EOF {
		err = nil
	}
	return got, err
}

// Resize grows the device by up to ten clusters, as far as the model goes.
func (s *Storm) Resize(r *rand.Rand) error {
	most := int64(len(s.Model.sectors)) * storage.SectorSize
	old := s.Device.Size()
	size := min(old+r.Int64N(10*s.Cluster/storage.SectorSize)*storage.SectorSize, most)
	if size <= old {
		return nil
	}
	how := block.PreallocOff
	if r.IntN(2) == 0 {
		how = block.Preallocation(r.IntN(4))
	}
	ok, err := s.Ask("resize", func() error { return s.Device.Resize(size, how) })
	if ok {
		s.Model.Grown(size)
	}
	return err
}
