package qcow2

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"

	"github.com/platter-disk/platter/internal/storm"
)

// stormConfigs are the images that storms go over.
func stormConfigs() map[string]modelConfig {
	return map[string]modelConfig{
		"plain":     {create: CreateOptions{Size: 1 << 19, ClusterSize: 4096}},
		"narrow":    {create: CreateOptions{Size: 1 << 19, ClusterSize: 4096, RefcountBits: 2}, discard: true},
		"tiny":      {create: CreateOptions{Size: 1 << 18, ClusterSize: 512, RefcountBits: 64}, discard: true},
		"backed":    {create: CreateOptions{Size: 1 << 19, ClusterSize: 4096, CompressionType: "zstd"}, backing: 3 << 18},
		"extended":  {create: CreateOptions{Size: 1 << 20, ClusterSize: 16384, ExtendedL2: true}, discard: true},
		"both":      {create: CreateOptions{Size: 1 << 20, ClusterSize: 16384, ExtendedL2: true}, backing: 1 << 19},
		"data file": {create: CreateOptions{Size: 1 << 19, ClusterSize: 4096, DataFileName: "data"}, discard: true},
		"raw data":  {create: CreateOptions{Size: 1 << 19, ClusterSize: 4096, DataFileName: "data", DataFileRaw: true}},
	}
}

// TestStormOnFullDisk: while several goroutines change a disk and its file system is full now and then, nothing that
// was acknowledged is lost, nothing stops, and what failed leaves neither damage nor leaks. PLATTER_STORMS is the
// number of storms over each kind of image and discipline, PLATTER_STORM_SEED the first of them.
func TestStormOnFullDisk(t *testing.T) {
	storms, first := envInt(t, "PLATTER_STORMS", fewer(4)), envInt(t, "PLATTER_STORM_SEED", 0)
	for name, cfg := range stormConfigs() {
		for _, cfg.how = range Disciplines() {
			t.Run(name+"/"+cfg.how, func(t *testing.T) {
				refused := 0
				for i := range storms {
					refused += runStorm(t, cfg, uint64(first+i))
				}
				if refused == 0 {
					t.Error("space was never scarce")
				}
			})
		}
	}
}

func runStorm(t *testing.T, cfg modelConfig, seed uint64) (refused int) {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 12))
	file := storm.NewDisk("image", seed)
	create := cfg.create
	grown := create.Size * 3 / 2
	first := &storm.Claim{}
	files := []*storm.Disk{file}
	o := Options{
		Discipline: cfg.how, Discard: cfg.discard, JournalSize: 1, Reserve: []int64{0, 1, 20}[r.IntN(3)],
		L2CacheSize: r.Int64N(2), RefcountCacheSize: r.Int64N(2), Writethrough: r.IntN(8) == 0,
		JournalDataChecksums: cfg.how == Journal && r.IntN(2) == 0, JournalCommitInterval: -1,
	}
	if cfg.backing > 0 {
		base := newBacking(seed, cfg.backing)
		first.Bytes = base.bytes[:min(cfg.backing, create.Size)]
		o.Backing = base
		create.BackingFile, create.BackingFormat, create.BackingSize = "base", "raw", cfg.backing
	}
	if create.DataFileName != "" {
		data := storm.NewDisk("data", seed+1)
		files = append(files, data)
		create.DataFile, o.DataFile = keepOpen{data}, keepOpen{data}
	}
	if err := Create(file, create); err != nil {
		t.Fatal(err)
	}
	im, err := Open(keepOpen{file}, o)
	if err != nil {
		t.Fatal(err)
	}
	s := &storm.Storm{
		Device: im, Cluster: create.ClusterSize, Model: storm.NewModel(grown, first, nil), Discarded: create.ClusterSize, Failed: im.failed,
		Tolerated: []error{syscall.ENOSPC, errRefcountWidth, errors.ErrUnsupported},
	}
	fatal := func(format string, args ...any) {
		t.Helper()
		t.Fatalf("seed %d, %v, reserve %d, writethrough %v, checksums %v, %v: %s",
			seed, cfg, o.Reserve, o.Writethrough, o.JournalDataChecksums, s, fmt.Sprintf(format, args...))
	}
	for _, f := range files {
		f.SetWeather(storm.Weather{Full: true})
	}
	steward := s.Resize
	if taken := (&snapshotter{}); create.DataFileName == "" && seed%2 == 0 {
		steward = func(r *rand.Rand) error { return taken.step(s, im, r) }
	}
	if err := s.Rage(seed, steward); err != nil {
		fatal("%v", err)
	}
	for _, f := range files {
		f.SetWeather(storm.Weather{})
		refused += f.Struck()
	}
	s.Tolerated = nil
	if err := im.Flush(); err != nil {
		fatal("with space again: %v", err)
	}
	calm := rand.New(rand.NewPCG(seed, 13))
	for range 60 {
		if err := s.Step(calm); err != nil {
			fatal("with space again: %v", err)
		}
	}
	if err := s.Model.Read(im, 0, im.Size()); err != nil {
		fatal("%v", err)
	}
	if err := im.Flush(); err != nil {
		fatal("%v", err)
	}
	if err := strandedClusters(im); err != nil {
		fatal("%v", err)
	}
	if err := im.Close(); err != nil {
		fatal("close: %v", err)
	}
	if im, err = Open(keepOpen{file}, Options{Backing: o.Backing, DataFile: o.DataFile, ReadOnly: true}); err != nil {
		fatal("reopen: %v", err)
	}
	if err := s.Model.Read(im, 0, im.Size()); err != nil {
		fatal("reopened: %v", err)
	}
	if res, err := Check(file, CheckOptions{}); err != nil || !res.Clean() {
		fatal("check: %+v, %v", res, err)
	}
	return refused
}

// strandedClusters returns an error if clusters are kept from use that nobody has: of an image in which nothing is
// under way.
func strandedClusters(im *Image) error {
	return im.discipline.quiesced(func() error {
		for c := range im.alloc.busy {
			if !im.alloc.inReserve(c) {
				return fmt.Errorf("cluster %d is set aside for nobody", c)
			}
		}
		if n := len(im.alloc.packer.streams); n > 0 {
			return fmt.Errorf("%d clusters wait for streams", n)
		}
		return nil
	})
}
