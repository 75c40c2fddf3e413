package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"regexp"
	"slices"
	"testing"

	"github.com/platter-disk/platter/internal/storm"
	"github.com/platter-disk/platter/storage"
)

// snapshotter takes, compares, applies and deletes snapshots, and knows what they hold.
type snapshotter struct {
	ops []*snapshotOp
}

// snapshotOp is a request to make a snapshot or to delete one.
type snapshotOp struct {
	name         string
	create       bool
	began, ended uint64       // times of the model; ended is 0 if it failed
	holds        *storm.Claim // nil: not known
}

// newSnapshotter knows the snapshots of an image that was just opened.
func newSnapshotter(im *Image) (*snapshotter, error) {
	list, err := im.Snapshots()
	k := &snapshotter{}
	for _, e := range list {
		got, readErr := readSnapshot(im, e.Name)
		err = errors.Join(err, readErr)
		k.ops = append(k.ops, &snapshotOp{name: e.Name, create: true, began: 1, ended: 1, holds: &storm.Claim{Bytes: got}})
	}
	return k, err
}

// last is the operation on a snapshot that succeeded last, up to a time, and whether another one began since.
func (k *snapshotter) last(name string, at uint64) (last *snapshotOp, unsure bool) {
	for _, op := range k.ops {
		switch {
		case op.name != name || op.began > at:
		case op.ended == 0 || op.ended > at:
			unsure = true
		default:
			last, unsure = op, false
		}
	}
	return last, unsure
}

// change makes or deletes a snapshot.
func (k *snapshotter) change(s *storm.Storm, what, name string, create bool, request func() error) error {
	op := &snapshotOp{name: name, create: create, began: s.Model.Now()}
	k.ops = append(k.ops, op)
	ok, err := s.Ask(what, request)
	if ok {
		op.ended = s.Model.Now()
	}
	return err
}

// step does one thing with a snapshot.
func (k *snapshotter) step(s *storm.Storm, im *Image, r *rand.Rand) error {
	name := fmt.Sprintf("s%d", r.IntN(3)) // no ID
	var list []Snapshot
	if ok, err := s.Do("list", func() (err error) { list, err = im.Snapshots(); return err }); !ok {
		return err
	}
	there := slices.ContainsFunc(list, func(e Snapshot) bool { return e.Name == name })
	made, _ := k.last(name, s.Model.Now())
	sure := made != nil && made.create
	switch op := r.IntN(3); {
	case !there:
		return k.change(s, "snapshot", name, true, func() error {
			_, err := im.CreateSnapshot(name, SnapshotOptions{})
			return err
		})
	case op == 0:
		return k.change(s, "delete snapshot", name, false, func() error { return im.DeleteSnapshot(name) })
	case op == 1 && sure && made.holds != nil:
		c := &storm.Claim{ID: s.Model.Now(), Bytes: made.holds.Bytes}
		return s.Change("apply snapshot", c, 0, im.Size(), func() error { return im.ApplySnapshot(name) })
	}
	var got []byte
	ok, err := s.Do("read snapshot", func() (err error) { got, err = readSnapshot(im, name); return err })
	if !ok || !sure {
		return err
	}
	if made.holds == nil {
		made.holds = &storm.Claim{Bytes: got}
	}
	if !bytes.Equal(got, made.holds.Bytes) {
		return fmt.Errorf("snapshot %s changed", name)
	}
	return nil
}

// judge compares the snapshots of an image that crashed at a time.
func (k *snapshotter) judge(im *Image, at uint64) error {
	list, err := im.Snapshots()
	if err != nil {
		return err
	}
	for _, name := range []string{"s0", "s1", "s2"} {
		there := slices.ContainsFunc(list, func(e Snapshot) bool { return e.Name == name })
		last, unsure := k.last(name, at)
		if unsure {
			continue
		}
		if there != (last != nil && last.create) {
			return fmt.Errorf("snapshot %s: there is one: %v, after %+v", name, there, last)
		}
		if there && last.holds != nil {
			got, err := readSnapshot(im, name)
			if err != nil {
				return err
			}
			if !bytes.Equal(got, last.holds.Bytes) {
				return fmt.Errorf("snapshot %s changed", name)
			}
		}
	}
	return nil
}

func readSnapshot(im *Image, name string) ([]byte, error) {
	d, err := im.SnapshotDevice(name)
	if err != nil {
		return nil, err
	}
	got, err := storm.ReadAll(d)
	return got, errors.Join(err, d.Close())
}

// weathers are what storms bring.
func weathers() []storm.Weather {
	return []storm.Weather{
		{},
		{Full: true},
		{Full: true, Reads: 40, Base: 40},
		{Base: 20},
		{Full: true, Writes: 800},
		{Syncs: 40},
	}
}

// TestStorms: whatever several goroutines do with a disk at once, at any byte, and whatever fails meanwhile: what was
// acknowledged is there, nothing else is, and of what was flushed a power cut at any moment takes nothing. PLATTER_TRIALS
// is the number of trials of each kind of image and discipline, PLATTER_TRIAL_SEED the first of them; the weather
// changes from one to the next.
func TestStorms(t *testing.T) {
	trials, first := envInt(t, "PLATTER_TRIALS", 1), envInt(t, "PLATTER_TRIAL_SEED", 0)
	configs := stormConfigs()
	configs["old"] = modelConfig{create: CreateOptions{Size: 1 << 19, ClusterSize: 4096, Version: 2}, discard: true}
	configs["old backed"] = modelConfig{create: CreateOptions{Size: 1 << 19, ClusterSize: 1024, Version: 2}, backing: 1 << 19}
	kinds := 0
	for _, name := range slices.Sorted(maps.Keys(configs)) {
		for _, how := range Disciplines() {
			cfg := configs[name]
			cfg.how = how
			if cfg.create.Version == 2 && how != Ordered && how != Synchronous {
				continue
			}
			kinds++
			shift := kinds
			if raceEnabled && kinds%3 != 0 {
				continue
			}
			t.Run(name+"/"+how, func(t *testing.T) {
				for i := range trials {
					w := weathers()[(first+i+shift)%len(weathers())]
					if err := runTrial(cfg, w, uint64(first+i), ""); err != nil {
						t.Fatal(err)
					}
				}
			})
		}
	}
}

// trialOptions draws how an image is opened.
func trialOptions(cfg modelConfig, r *rand.Rand) Options {
	return Options{
		Discipline: cfg.how, Discard: cfg.discard, JournalSize: 1, Reserve: []int64{0, 1, 20}[r.IntN(3)],
		L2CacheSize: r.Int64N(2), RefcountCacheSize: r.Int64N(2), Writethrough: r.IntN(8) == 0,
		JournalDataChecksums: cfg.how == Journal && r.IntN(2) == 0, JournalCommitInterval: -1,
	}
}

func runTrial(cfg modelConfig, w storm.Weather, seed uint64, mutant Mutant) error {
	r := rand.New(rand.NewPCG(seed, 22))
	create, o := cfg.create, trialOptions(cfg, r)
	o.Mutant = mutant
	first := &storm.Claim{}
	under := &storm.Claim{}
	var base *storm.Base
	if cfg.backing > 0 {
		d := newBacking(seed, cfg.backing)
		under.Bytes = d.bytes
		first.Bytes = d.bytes[:min(cfg.backing, create.Size)]
		base = storm.NewBase(d, seed)
		create.BackingFile, create.BackingFormat, create.BackingSize = "base", "raw", cfg.backing
	}
	names := []string{"image"}
	if create.DataFileName != "" {
		names = append(names, "data")
	}
	withSnapshots := create.DataFileName == "" && seed%2 == 0
	trial := &storm.Trial{
		Seed: seed, Files: names, Most: create.Size * 3 / 2, First: first, Weather: w, Tolerated: []error{errRefcountWidth},
		Create: func(files []storage.File) error {
			if len(files) > 1 {
				create.DataFile = files[1]
			}
			return Create(files[0], create)
		},
		Open: func(files []storage.File) (*storm.Life, error) {
			o := o
			if base != nil {
				o.Backing = base
			}
			if len(files) > 1 {
				o.DataFile = files[1]
			}
			im, err := Open(files[0], o)
			if err != nil {
				return nil, err
			}
			taken, err := newSnapshotter(im)
			if err != nil {
				return nil, errors.Join(err, im.Close())
			}
			life := &storm.Life{
				Device: im, Cluster: create.ClusterSize, Discarded: create.ClusterSize, Writethrough: o.Writethrough, Base: base, Failed: im.failed,
				Rest: func(s *storm.Storm) error {
					if create.DataFileRaw {
						if err := s.Model.Read(files[1], 0, im.Size()); err != nil {
							return fmt.Errorf("the raw data file: %w", err)
						}
					}
					return strandedClusters(im)
				},
			}
			if create.Version == 2 && base != nil {
				life.Discarded = 0
			}
			life.Steward = func(s *storm.Storm, r *rand.Rand) error {
				switch op := r.IntN(8); {
				case op == 0:
					return s.Change("empty", &storm.Claim{Bytes: under.Bytes}, 0, im.Size(), im.Empty)
				case withSnapshots && op < 7:
					return taken.step(s, im, r)
				case op < 5 && !withSnapshots:
					return s.Resize(r)
				}
				off := r.Int64N(im.Size())
				n := 1 + r.Int64N(min(im.Size()-off, 3*create.ClusterSize))
				return s.Change("hold zeroes", &storm.Claim{}, off, n, func() error { return im.HoldZeroes(off, n) })
			}
			if withSnapshots {
				life.Judge = func(again *storm.Life, at uint64) error { return taken.judge(again.Device.(*Image), at) }
			}
			return life, nil
		},
		Check: func(files []storage.File, crashed bool) error {
			leaky := crashed && (cfg.how == Ordered || cfg.how == Synchronous)
			return stormFindings(files[0], leaky, w.Reads > 0)
		},
		Between: func(files []storage.File, r *rand.Rand) error {
			lazy := r.IntN(2) == 0
			a := Amendment{LazyRefcounts: &lazy}
			if create.Version == 2 {
				a.Version = 3
			}
			if r.IntN(2) == 0 {
				return nil
			}
			return Amend(files[0], a)
		},
	}
	if _, err := trial.Run(); err != nil {
		return fmt.Errorf("seed %d, %v, reserve %d, writethrough %v, checksums %v: %w", seed, cfg, o.Reserve, o.Writethrough, o.JournalDataChecksums, err)
	}
	return nil
}

// TestStormsFindMutants: storms notice wrong orders. These are found in every few trials, others more rarely.
func TestStormsFindMutants(t *testing.T) {
	withoutRace(t)
	for _, m := range []struct {
		mutant Mutant
		how    string
	}{
		{MutantHistorical, Ordered}, {MutantLowerEarly, Ordered}, {MutantPunchEarly, Lazy}, {MutantReuseEarly, Synchronous},
		{MutantReuseEarly, Ordered}, {MutantReuseEarly, Lazy}, {MutantNoWAL, Journal},
	} {
		t.Run(string(m.mutant)+"/"+m.how, func(t *testing.T) {
			for seed := range uint64(30) {
				for _, name := range []string{"backed", "narrow"} {
					cfg := stormConfigs()[name]
					cfg.how = m.how
					if runTrial(cfg, storm.Weather{}, seed, m.mutant) != nil {
						return
					}
				}
			}
			t.Error("was not found")
		})
	}
}

// stormFindings checks an image. interrupted: long changes may have been, under a discipline that allows for leaks, and
// for COPIED bits that do not agree with counts that are too high; giving the leaks back has to cure it. leaky: what
// could not be read may have kept clusters from being freed.
func stormFindings(f storage.File, interrupted, leaky bool) error {
	copiedAway := regexp.MustCompile("^Repairing OFLAG_COPIED .*entry=[89a-f][0-9a-f]{15} ") // bit 63 was set
	var found []string
	o := CheckOptions{Report: func(f Finding) {
		if len(found) < 5 && (f.Kind != FindingLeak || !leaky) {
			found = append(found, f.Message)
		}
	}}
	res, err := Check(f, o)
	if err == nil && interrupted && !res.Clean() {
		var shared error
		_, err = Check(f, CheckOptions{Repair: RepairLeaks, Report: func(f Finding) {
			// What the first examination finds is not about references; what is repaired afterwards is.
			if copiedAway.MatchString(f.Message) {
				shared = fmt.Errorf("an entry may be written in place that has another user: %s", f.Message)
			}
		}})
		if err = errors.Join(err, shared); err == nil {
			found = nil
			res, err = Check(f, o)
		}
	}
	if err == nil && (res.Corruptions+res.CheckErrors > 0 || res.Leaks > 0 && !leaky) {
		err = fmt.Errorf("the checker found %d corruptions, %d leaks, %q", res.Corruptions, res.Leaks, found)
	}
	return err
}
