package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/platter-disk/platter/jobs/prefetch"
)

const (
	bootDisk   = 2 << 30   // bytes of the base image
	bootTouch  = 200 << 20 // bytes of it that a start reads, at scale 1
	cloneTouch = 50 << 20  // the same where many machines start
	cloneCount = 20        // machines
)

// farLink is the network of the measures: 5 ms and 20 MB/s.
func farLink() link { return link{Delay: "5ms", Rate: 20_000_000} }

// BootRun is how machines started in one way.
type BootRun struct {
	How     string    `json:"how"`
	Seconds []float64 `json:"seconds"` // of each round
	Base    []int64   `json:"bytes_read_from_base"`
	Ratio   float64   `json:"time_ratio"` // to the base image alone
}

// BootReport is the boot-like trace over a base image that is far away.
type BootReport struct {
	Link     link      `json:"link"`
	Requests int       `json:"requests"`
	Read     int64     `json:"bytes_read"` // by the guest, those read again included
	Touched  int64     `json:"bytes_touched"`
	Written  int64     `json:"bytes_written"`
	Runs     []BootRun `json:"runs"`
}

// bootWay is a way to start a machine.
type bootWay struct {
	how    string
	direct bool  // from the base image itself, without writing
	again  bool  // from the clone that the way before left, which else is a new one
	block  int64 // bytes of the clone's blocks; 0: the default
	// fetch: prefetching goes on meanwhile, with profile in the order that a first start was recorded in, and ahead
	// of the start by so much.
	fetch, profile bool
	ahead          time.Duration
}

// largeBlock is a block size, in bytes, that reads ahead where the default (4 KiB for these disks) does not.
const largeBlock = 64 << 10

// bootWays are what is compared; the first is the measure of the others.
func bootWays() []bootWay {
	return []bootWay{
		{how: "the base image alone", direct: true},
		{how: "first start"},
		{how: "second start", again: true},
		{how: "first start, prefetching in order", fetch: true},
		{how: "first start, prefetching by a recorded profile", fetch: true, profile: true},
		{how: "the same, begun 5 s before the start", fetch: true, profile: true, ahead: 5 * time.Second},
		{how: "first start, blocks of 64 KiB", block: largeBlock},
		{how: "the same, prefetching by a recorded profile", block: largeBlock, fetch: true, profile: true},
	}
}

// boot measures the start of a machine whose base image is far away.
func (b *FVDBench) boot(ctx context.Context) (*BootReport, error) {
	if err := require("nbdkit"); err != nil {
		return nil, err
	}
	t := newBootTrace(bootDisk, bootTouch*int64(b.Scale), 1)
	r := &BootReport{Link: farLink(), Requests: len(t.requests), Read: t.read, Touched: t.touched, Written: t.written}
	for _, w := range bootWays() {
		r.Runs = append(r.Runs, BootRun{How: w.how})
	}
	for round := range b.Rounds {
		if err := b.bootRound(ctx, t, round, r); err != nil {
			return nil, err
		}
	}
	for i := range r.Runs {
		r.Runs[i].Ratio = median(r.Runs[i].Seconds) / median(r.Runs[0].Seconds)
	}
	return r, nil
}

// bootRound starts a machine once in every way.
func (b *FVDBench) bootRound(ctx context.Context, t *bootTrace, round int, r *BootReport) (err error) {
	dir, err := os.MkdirTemp(b.Dir, "boot-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	base, err := startFarBase(ctx, dir, t.disk, r.Link)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, base.stop()) }()
	s := &starter{trace: t, base: base, name: filepath.Join(dir, "clone.fvd")}
	for i, w := range bootWays() {
		took, n, err := s.start(ctx, w)
		if err != nil {
			return fmt.Errorf("%s: %w", w.how, err)
		}
		fmt.Fprintf(b.Notes, "boot, round %d, %s: %.1f s, %s MB from the base image\n", round+1, w.how, took.Seconds(), megabytes(float64(n)))
		r.Runs[i].Seconds, r.Runs[i].Base = append(r.Runs[i].Seconds, took.Seconds()), append(r.Runs[i].Base, n)
	}
	return nil
}

// starter starts a machine again and again.
type starter struct {
	trace   *bootTrace
	base    *farBase
	name    string           // of the clone's file
	guest   *guest           // of the clone there is
	profile prefetch.Profile // of the first start of a clone without prefetching
}

// start tells how long a start took, and how many bytes of the base image were read until the disk was closed.
func (s *starter) start(ctx context.Context, w bootWay) (took time.Duration, read int64, err error) {
	if !w.again {
		s.guest = newGuest(s.trace.disk)
		if err := os.RemoveAll(s.name); err != nil {
			return 0, 0, err
		}
	}
	if w.direct {
		alone, err := s.base.dial()
		if err != nil {
			return 0, 0, err
		}
		took, err = s.guest.boot(ctx, alone, s.trace, true)
		if err := errors.Join(err, alone.Close()); err != nil {
			return 0, 0, err
		}
	} else if took, err = s.startClone(ctx, w); err != nil {
		return 0, 0, err
	}
	read, err = s.base.bytesRead()
	return took, read, err
}

func (s *starter) startClone(ctx context.Context, w bootWay) (took time.Duration, err error) {
	if !w.again {
		if err := createClone(ctx, s.name, s.base, w.block); err != nil {
			return 0, err
		}
		if _, err := s.base.bytesRead(); err != nil { // what creating it took
			return 0, err
		}
	}
	c, err := openClone(ctx, s.name)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	if w.fetch {
		var o prefetch.Options
		if w.profile {
			o.Order = s.profile
		}
		c.prefetch(o)
	}
	if err := sleep(ctx, w.ahead); err != nil {
		return 0, err
	}
	took, err = s.guest.boot(ctx, c.disk, s.trace, false)
	if s.profile == nil {
		s.profile = c.recorder.Profile()
	}
	return took, err
}
