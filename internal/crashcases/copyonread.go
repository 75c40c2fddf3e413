package crashcases

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/jobs/prefetch"
)

// copied is a disk whose reads are kept in it.
type copied interface {
	crashlab.Subject
	overlay() prefetch.Overlay
}

func (s *fvdSubject) overlay() prefetch.Overlay { return s.im }

// qcow2CopyOnRead is a workload of an overlay whose reads are kept in it, and which lets go of its backing file in the
// end. Copies are written like what a guest writes, so every discipline has to cope with them.
func qcow2CopyOnRead() qcow2Workload {
	return qcow2Workload{
		Workload: Workload{Name: "copy-on-read", Description: "copy-on-read and prefetching under guest writes, to the end: the backing file is let go"},
		create:   qcow2.CreateOptions{Size: 96 * kib, ClusterSize: 4096},
		backing:  64 * kib, discard: true, copyOnRead: true, work: copyOnReadWork,
	}
}

// guardedSubject is a qcow2 overlay whose copies and guest requests keep out of each other's way.
type guardedSubject struct {
	*prefetch.CopyOnRead
	guard *prefetch.Guarded
	check func() error
}

// keepCopies puts copy-on-read in front of an image whose backing file covers size bytes.
func (s *qcow2Subject) keepCopies(cluster, size int64) *guardedSubject {
	guard := prefetch.Guard(s.Image, prefetch.GuardedOptions{
		Unit: cluster, BaseSize: size, Detach: func() error { return s.SetBacking("", "") },
	})
	return &guardedSubject{prefetch.NewCopyOnRead(guard, prefetch.CopyOnReadOptions{}), guard, s.check}
}

func (s *guardedSubject) overlay() prefetch.Overlay { return s.guard }

func (s *guardedSubject) WriteZeroes(off, length int64, unmap bool) error {
	return s.CopyOnRead.WriteZeroes(off, length, zeroFlags(unmap))
}

// Check finds nothing but what the discipline may leave.
func (s *guardedSubject) Check() error { return s.check() }

// Close closes the image.
func (s *guardedSubject) Close() error { return closeCopies(s.CopyOnRead) }

// closeCopies closes a disk and wants no copy to be left half-way (FVD specification 5, invariant 32).
func closeCopies(c *prefetch.CopyOnRead) error {
	err := c.Close()
	if s := c.Stats(); err == nil && s.Kept+s.Dropped != s.BaseRead {
		err = fmt.Errorf("after closing, %d bytes of %d that were read from the base image are neither kept nor dropped",
			s.BaseRead-s.Kept-s.Dropped, s.BaseRead)
	}
	return err
}

// copyOnReadWork has a guest write and read while what lives in the base image is copied over, until the disk has let go
// of its base image, and goes on then.
func copyOnReadWork(seed uint64) func(*crashlab.Guest) error {
	return func(g *crashlab.Guest) error {
		s := g.Subject().(copied)
		r := newRand(seed)
		m := crashlab.Mix{Requests: 12, MaxLength: 12 * kib, Write: 8, Unmap: 1, Discard: 1, Flush: 3, Seed: r.Uint64()}
		var all errgroup.Group
		all.Go(func() error { return m.Run(g) })
		reads := newRand(r.Uint64())
		all.Go(func() error {
			for range 6 {
				p := make([]byte, (1+reads.Int64N(16))*512)
				if _, err := s.ReadAt(p, reads.Int64N((s.Size()-int64(len(p)))/512)*512); err != nil {
					return err
				}
			}
			return nil
		})
		all.Go(func() error {
			return prefetch.New(s.overlay(), prefetch.Options{
				PerPrefetch: 8 * kib, CheckpointEvery: 40 * kib, MinRead: -1, MinWrite: -1, Throttle: -1, Clock: noTime{},
			}).Run(context.Background())
		})
		if err := all.Wait(); err != nil {
			return err
		}
		m.Seed, m.Check = r.Uint64(), 1
		return m.Run(g)
	}
}

// noTime is a clock for prefetching that does not wait.
type noTime struct{}

func (noTime) Now() time.Time { return time.Time{} }

func (noTime) Sleep(ctx context.Context, _ time.Duration) error { return ctx.Err() }

// zeroFlags are the flags of a zeroing.
func zeroFlags(unmap bool) block.ZeroFlags {
	if unmap {
		return block.MayUnmap
	}
	return 0
}
