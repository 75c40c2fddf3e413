package storm

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
)

// Storm issues requests to a device. Its methods are safe for concurrent use; its exported fields are not to be
// changed while they run.
type Storm struct {
	Device    block.Device
	Cluster   int64        // bytes: requests are about that large
	Model     *Model       // of the device
	Discards  bool         // discarded clusters read as zeros for sure
	Failed    func() error // why the device takes no further changes, which it has to; nil: it does
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

// Outcome tells whether a request succeeded, and an error unless it ended in a way that it may end.
func (s *Storm) Outcome(what string, err error) (ok bool, _ error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done == nil {
		s.done, s.failed = map[string]int{}, map[string]int{}
	}
	if failed := s.Failed(); failed != nil {
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

// Change issues one request that gives a range a value.
func (s *Storm) Change(what string, c *Claim, off, n int64, request func() error) error {
	s.Model.Begin(c, off, n)
	ok, err := s.Outcome(what, request())
	if !ok {
		n = 0
	}
	s.Model.Finish(c, off, n)
	return err
}

// Step issues one random request.
func (s *Storm) Step(r *rand.Rand) error {
	size := s.Device.Size()
	off := r.Int64N(size/storage.SectorSize) * storage.SectorSize
	if r.IntN(2) == 0 { // where others are
		off = min(off%(8*s.Cluster), size-storage.SectorSize)
	}
	if r.IntN(3) == 0 {
		off = off / s.Cluster * s.Cluster
	}
	n := min((1+r.Int64N(3*s.Cluster/storage.SectorSize))*storage.SectorSize, size-off)
	whole := off / s.Cluster * s.Cluster
	switch op := r.IntN(20); {
	case op < 6:
		c := &Claim{ID: Unnamed}
		return s.Change("write", c, off, n, func() error {
			p := make([]byte, n)
			for at := int64(0); at < n; at += storage.SectorSize {
				c.Sector(p[at:at+storage.SectorSize], (off+at)/storage.SectorSize)
			}
			_, err := s.Device.WriteAt(p, off)
			return err
		})
	case op < 12 && s.Device.Limits().Compress && whole+s.Cluster <= size: // a short one must be the last, and disks grow
		c := &Claim{ID: Unnamed}
		n = s.Cluster
		return s.Change("compressed write", c, whole, n, func() error {
			p := make([]byte, n)
			for at := int64(0); at < n; at += storage.SectorSize {
				c.Sector(p[at:at+storage.SectorSize], (whole+at)/storage.SectorSize)
			}
			return s.Device.WriteCompressed(p, whole)
		})
	case op < 14:
		flags := block.ZeroFlags(r.IntN(2))
		return s.Change("zero", &Claim{}, off, n, func() error { return s.Device.WriteZeroes(off, n, flags) })
	case op < 15:
		n = min((1+r.Int64N(3))*s.Cluster, size-whole)
		c := &Claim{}
		s.Model.Begin(c, whole, n)
		ok, err := s.Outcome("discard", s.Device.Discard(whole, n))
		if !ok || !s.Discards {
			n = 0
		}
		s.Model.Finish(c, whole, n)
		return err
	case op < 16:
		_, err := s.Outcome("flush", s.Device.Flush())
		return err
	default:
		_, err := s.Outcome("read", s.Model.Read(s.Device, off, n))
		return err
	}
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
	_, err := s.Outcome("resize", s.Device.Resize(size, how))
	return err
}
