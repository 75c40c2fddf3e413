package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"
)

// ClonesRun is how many machines started from one base image.
type ClonesRun struct {
	Block  int64   `json:"block_size"`           // bytes
	Needed int64   `json:"bytes_of_blocks"`      // that they touch
	First  int64   `json:"bytes_read_from_base"` // by the first start of all machines
	Ratio  float64 `json:"ratio"`                // to what they touch
	Second int64   `json:"bytes_read_again"`     // by the second start of all machines
}

// ClonesReport is many machines that start from one base image at the same time.
type ClonesReport struct {
	Clones  int         `json:"clones"`
	Touched int64       `json:"bytes_touched"` // by all of them together
	Runs    []ClonesRun `json:"runs"`
}

// clones measures what machines read from a base image that they share. Each has a trace of its own. How long it
// takes is not the question, so the base image is near.
func (b *FVDBench) clones(ctx context.Context) (*ClonesReport, error) {
	if err := require("nbdkit"); err != nil {
		return nil, err
	}
	r := &ClonesReport{Clones: cloneCount}
	traces := make([]*bootTrace, r.Clones)
	for i := range traces {
		traces[i] = newBootTrace(bootDisk, cloneTouch*int64(b.Scale), uint64(i))
		r.Touched += traces[i].touched
	}
	for _, block := range []int64{64 << 10, 16 << 10, 4 << 10} {
		run, err := b.clonesRun(ctx, traces, block)
		if err != nil {
			return nil, err
		}
		for _, t := range traces {
			run.Needed += t.needs(block)
		}
		run.Ratio = float64(run.First) / float64(r.Touched)
		fmt.Fprintf(b.Notes, "clones, blocks of %d: %.1f MB read from the base image, %.1f MB touched\n", block, float64(run.First)/1e6, float64(r.Touched)/1e6)
		r.Runs = append(r.Runs, run)
	}
	return r, nil
}

func (b *FVDBench) clonesRun(ctx context.Context, traces []*bootTrace, block int64) (run ClonesRun, err error) {
	run.Block = block
	dir, err := os.MkdirTemp(b.Dir, "clones-")
	if err != nil {
		return run, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	base, err := startFarBase(ctx, dir, bootDisk, link{})
	if err != nil {
		return run, err
	}
	defer func() { err = errors.Join(err, base.stop()) }()
	name := func(i int) string { return filepath.Join(dir, fmt.Sprintf("%d.fvd", i)) }
	guests := make([]*guest, len(traces))
	for i := range traces {
		guests[i] = newGuest(bootDisk)
		if err := createClone(ctx, name(i), base, block); err != nil {
			return run, err
		}
	}
	if _, err := base.bytesRead(); err != nil { // what creating them took
		return run, err
	}
	start := func() (int64, error) {
		all, ctx := errgroup.WithContext(ctx)
		for i, t := range traces {
			all.Go(func() error {
				c, err := openClone(ctx, name(i))
				if err != nil {
					return err
				}
				_, err = guests[i].boot(ctx, c.disk, t, false)
				return errors.Join(err, c.close())
			})
		}
		if err := all.Wait(); err != nil {
			return 0, err
		}
		return base.bytesRead()
	}
	if run.First, err = start(); err != nil {
		return run, err
	}
	run.Second, err = start()
	return run, err
}
