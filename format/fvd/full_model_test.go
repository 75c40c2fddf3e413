package fvd

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"github.com/platter-disk/platter/internal/storm"
)

// stormShape is a random way to build and open an image.
func stormShape(r *rand.Rand) shape {
	pick := func(v ...int64) int64 { return v[r.IntN(len(v))] }
	var s shape
	c := &s.create
	c.Size = (100 + r.Int64N(1500)) * 512
	c.Compact = r.IntN(4) > 0
	c.BlockSize = pick(512, 1024, 4096, 7680, 65536)
	c.ChunkSize = c.BlockSize * pick(1, 2, 3, 5, 7, 12)
	c.GrowUnit = max(pick(1, 300<<10), roundUp(c.ChunkSize, lcm(c.BlockSize, pageSize)))
	c.JournalSize = pick(-1, 8192, 20480, 1<<20)
	c.JournalBuffer = pick(-1, 100, 0)
	c.JournalBufferDelay = time.Hour
	c.PlainJournal = r.IntN(2) == 0
	s.base = pick(-1, c.Size, c.Size/2, c.Size+12345)
	s.data = []string{"", "", "file", "device"}[r.IntN(4)]
	if s.base >= 0 && r.IntN(2) == 0 {
		c.DetectSparseHole = 10000
	}
	s.open.Writethrough = r.IntN(8) == 0
	return s
}

// TestStormOnFullDisk: while several goroutines change a disk and the file systems of its files are full now and then,
// nothing that was acknowledged is lost, nothing stops, and what failed leaves neither damage nor leaks, after a kill
// at the end included. PLATTER_STORMS is the number of storms, PLATTER_STORM_SEED the first of them.
func TestStormOnFullDisk(t *testing.T) {
	storms, first := 60, envNumber(t, "PLATTER_STORM_SEED", 0)
	if raceEnabled {
		storms /= 4
	}
	refused := 0
	for i := range envNumber(t, "PLATTER_STORMS", storms) {
		refused += runStorm(t, uint64(first+i))
	}
	if refused == 0 {
		t.Error("space was never scarce")
	}
}

func runStorm(t *testing.T, seed uint64) (refused int) {
	t.Helper()
	shape := stormShape(rand.New(rand.NewPCG(seed, 12)))
	rig := newRig(t, shape)
	must(t, rig.im.Close())
	meta, err := storm.OnFile(rig.meta, seed)
	must(t, err)
	data, err := storm.OnFile(rig.data, seed+1)
	must(t, err)
	o := rig.options()
	switch {
	case o.Data != nil:
		o.Data = data
	case o.DataDevice != nil:
		o.DataDevice = clustered{&ram{f: rig.data}, data}
	}
	rig.im, err = Open(meta, o)
	must(t, err)
	size := shape.create.Size
	s := &storm.Storm{
		Device: rig.im, Cluster: shape.create.ChunkSize, Failed: rig.im.m.failed,
		Model:     storm.NewModel(roundUp(size*3/2, sectorSize), &storm.Claim{Bytes: rig.want}, nil),
		Tolerated: []error{syscall.ENOSPC, errors.ErrUnsupported},
	}
	fatal := func(doing string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("seed %d, %v, %v: %s: %v", seed, shape, s, doing, err)
		}
	}
	meta.SetWeather(storm.Weather{Full: true})
	data.SetWeather(storm.Weather{Full: true})
	fatal("storm", s.Rage(seed, func(r *rand.Rand) error { return stewardImage(s, rig.im, r) }))
	meta.SetWeather(storm.Weather{})
	data.SetWeather(storm.Weather{})
	s.Tolerated = []error{errors.ErrUnsupported} // a discard of what is not whole clusters of a data device
	fatal("flush with space again", rig.im.Flush())
	calm := rand.New(rand.NewPCG(seed, 13))
	for range 60 {
		fatal("with space again", s.Step(calm))
	}
	fatal("read", s.Model.Read(rig.im, 0, rig.im.Size()))
	if shape.create.JournalSize >= 0 && seed%2 == 0 {
		fatal("flush", rig.im.Flush())
		rig.freeze()
		fatal("open after a kill", rig.reopen())
		fatal("read after a kill", s.Model.Read(rig.im, 0, rig.im.Size()))
	}
	fatal("audit", rig.im.Audit())
	fatal("close", rig.im.Close())
	fatal("check", stormFindings(rig))
	fatal("open again", rig.reopen())
	fatal("read again", s.Model.Read(rig.im, 0, rig.im.Size()))
	fatal("close again", rig.im.Close())
	return meta.Struck() + data.Struck()
}

// stormFindings is checkClean, but that a data device that gives back whole clusters only may keep the space of chunks.
func stormFindings(r *rig) error {
	o := r.options()
	res, err := Check(r.meta, CheckOptions{Data: o.Data, DataDevice: o.DataDevice})
	if err != nil {
		return err
	}
	for _, f := range res.Findings {
		if f.Kind != FindingLeak || r.shape.data != "device" {
			return fmt.Errorf("the checker found %+v", res.Findings)
		}
	}
	return nil
}

// stewardImage grows the disk, makes a checkpoint, or keeps copies of the base image.
func stewardImage(s *storm.Storm, im *Image, r *rand.Rand) error {
	switch r.IntN(4) {
	case 0:
		return s.Resize(r)
	case 1:
		_, err := s.Do("checkpoint", im.Checkpoint)
		return err
	}
	for range 3 {
		base := im.BaseSize()
		if base == 0 {
			return nil
		}
		off, n := im.NextInBase(r.Int64N(base))
		if n == 0 {
			return nil
		}
		p := make([]byte, min(n, 40000))
		if ok, err := s.Do("read base", func() error { return im.ReadBase(p, off) }); !ok {
			return err
		}
		_, err := s.Do("populate", func() error {
			_, err := im.Populate(p, off)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}
