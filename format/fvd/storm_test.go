package fvd

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/storm"
	"github.com/platter-disk/platter/storage"
)

// stormDevice is a data device over any file.
type stormDevice struct{ clustered }

func (d stormDevice) Size() int64 {
	n, err := d.file.Size()
	if err != nil {
		return 0 // the power is off
	}
	return n
}

func (d stormDevice) Extents(off, n int64, fn func(block.Extent) bool) error {
	return d.file.DataExtents(off, n, func(e storage.Extent) bool {
		return fn(block.Extent{Offset: e.Offset, Length: e.Length, Allocated: e.Data, Data: e.Data, Zero: !e.Data, HostOffset: e.Offset})
	})
}

func (d stormDevice) Resize(size int64, _ block.Preallocation) error {
	if size < d.Size() {
		return errors.ErrUnsupported
	}
	return d.file.Truncate(size)
}

func (d stormDevice) Close() error { return nil }

// weathers are what storms bring.
func weathers() map[string]storm.Weather {
	return map[string]storm.Weather{
		"fair":   {},
		"full":   {Full: true},
		"reads":  {Full: true, Reads: 40, Base: 40},
		"base":   {Base: 20},
		"writes": {Full: true, Writes: 500},
		"syncs":  {Syncs: 25},
	}
}

// envNumber is a number from the environment.
func envNumber(t *testing.T, name string, n int) int {
	t.Helper()
	if s := os.Getenv(name); s != "" {
		var err error
		n, err = strconv.Atoi(s)
		must(t, err)
	}
	return n
}

// TestStorms: whatever several goroutines do with a disk at once, at any byte, and whatever fails meanwhile: what was
// acknowledged is there, nothing else is, and of what was flushed a power cut at any moment takes nothing. PLATTER_TRIALS
// is the number of trials of each weather, PLATTER_TRIAL_SEED the first of them.
func TestStorms(t *testing.T) {
	trials, first := 3, envNumber(t, "PLATTER_TRIAL_SEED", 0)
	if raceEnabled {
		trials /= 3
	}
	trials = envNumber(t, "PLATTER_TRIALS", trials)
	for name, w := range weathers() {
		t.Run(name, func(t *testing.T) {
			struck := 0
			for i := range trials {
				struck += runTrial(t, w, uint64(first+i))
			}
			if fair := w == (storm.Weather{Base: w.Base}); fair != (struck == 0) {
				t.Errorf("%d operations failed", struck)
			}
		})
	}
}

// trialShape is a stormShape with a mode of the journal.
func trialShape(r *rand.Rand) shape {
	s := stormShape(r)
	s.open.Journal = []JournalMode{JournalAuto, JournalImmediate, JournalBuffered}[r.IntN(3)]
	return s
}

func runTrial(t *testing.T, w storm.Weather, seed uint64) int {
	t.Helper()
	s := trialShape(rand.New(rand.NewPCG(seed, 22)))
	c := s.create
	trial := &storm.Trial{
		Seed: seed, Files: []string{"image", "data"}, Most: roundUp(c.Size*3/2, sectorSize), First: &storm.Claim{}, Weather: w, Fragile: c.JournalSize < 0,
	}
	var base *storm.Base
	var under []byte
	if s.base >= 0 {
		d := newBase(s.base)
		if s.base > 100_000 { // a hole for detect_sparse_hole to find
			must(t, d.f.PunchHole(20_000, 50_000))
		}
		all, err := storm.ReadAll(d)
		must(t, err)
		all = append(all, make([]byte, roundUp(s.base, sectorSize)-s.base)...) // the last sector counts as the base image's
		under = all[:min(int64(len(all)), c.Size)]
		trial.First.Bytes = under
		base = storm.NewBase(d, seed)
		c.BaseImage, c.Base = "base", base
	}
	trial.Create = func(files []storage.File) error {
		switch s.data {
		case "file":
			c.DataFile, c.Data = "data", files[1]
		case "device":
			c.DataFile, c.DataDevice = "data", stormDevice{clustered{file: files[1]}}
		}
		return Create(files[0], c)
	}
	options := func(files []storage.File) (Options, error) {
		o := s.open
		h, err := ReadHeader(files[0])
		if err == nil && h.BaseImage != "" && !h.FullyPrefetched {
			o.Base = base
		}
		switch s.data {
		case "file":
			o.Data = files[1]
		case "device":
			o.DataDevice = stormDevice{clustered{file: files[1]}}
		}
		return o, err
	}
	trial.Open = func(files []storage.File) (*storm.Life, error) {
		o, err := options(files)
		if err != nil {
			return nil, err
		}
		im, err := Open(files[0], o)
		if err != nil {
			return nil, err
		}
		life := &storm.Life{
			Device: im, Cluster: c.ChunkSize, Writethrough: o.Writethrough, Base: base, Failed: im.m.failed,
			Steward: func(s *storm.Storm, r *rand.Rand) error { return stewardTrial(s, im, under, r) },
			Rest:    func(*storm.Storm) error { return im.Audit() },
		}
		if s.data != "device" {
			life.Discarded = c.BlockSize
		}
		return life, nil
	}
	trial.Check = func(files []storage.File, crashed bool) error {
		o, err := options(files)
		if err != nil {
			return err
		}
		res, err := Check(files[0], CheckOptions{Data: o.Data, DataDevice: o.DataDevice})
		if err != nil {
			return err
		}
		for _, f := range res.Findings {
			if f.Kind != FindingLeak || s.data != "device" { // it gives back whole clusters only
				return fmt.Errorf("the checker found %+v", res.Findings)
			}
		}
		return nil
	}
	trial.Between = func(files []storage.File, r *rand.Rand) error {
		err := Amend(files[0], []Setting{{"journal_buf_size", strconv.Itoa(r.IntN(2) * 4096)}})
		if errors.Is(err, ErrNotClean) {
			return nil
		}
		return err
	}
	struck, err := trial.Run()
	if err != nil {
		t.Fatalf("seed %d, %v: %v", seed, s, err)
	}
	return struck
}

// stewardTrial is stewardImage, and empties the image or has it let go of its base image, which holds under.
func stewardTrial(s *storm.Storm, im *Image, under []byte, r *rand.Rand) error {
	switch op := r.IntN(12); {
	case op == 0 && im.BaseSize() > 0:
		return s.Change("empty", &storm.Claim{Bytes: under}, 0, int64(len(under)), im.Empty)
	case op == 1:
		_, err := s.Do("detach", func() error {
			if err := im.DetachBase(); !errors.Is(err, ErrStillNeeded) {
				return err
			}
			return nil
		})
		return err
	}
	return stewardImage(s, im, r)
}
