package prefetch

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/internal/storm"
	"github.com/platter-disk/platter/storage"
)

// moving is a disk that moves over while a guest uses it.
type moving struct {
	*CopyOnRead
	stop func()
	done chan struct{}
}

// newMoving begins to prefetch; nothing of over is done after Close.
func newMoving(over Overlay, r *rand.Rand) *moving {
	ctx, stop := context.WithCancel(context.Background())
	m := &moving{NewCopyOnRead(over, CopyOnReadOptions{MaxOutstanding: 1 << r.IntN(20)}), stop, make(chan struct{})}
	o := Options{
		Slots: 1 + r.IntN(3), PerPrefetch: 1 << (12 + r.IntN(6)), Throttle: -1, Retry: time.Millisecond, CheckpointEvery: 1 << (14 + r.IntN(6)),
		Announce: m.Announce,
	}
	if r.IntN(2) == 0 {
		o.Guest, o.SharePercent = m.Guest(), 100
	}
	p := New(m, o)
	go func() {
		defer close(m.done)
		p.Run(ctx) // a disk that is full now and then ends it, and the guest goes on
	}()
	return m
}

func (m *moving) Close() error {
	m.stop()
	<-m.done
	return m.CopyOnRead.Close()
}

// holedBase is a base image that knows its holes.
type holedBase struct{ *memoryDevice }

func (d holedBase) Extents(off, n int64, fn func(block.Extent) bool) error {
	return d.DataExtents(off, n, func(e storage.Extent) bool {
		return fn(block.Extent{Offset: e.Offset, Length: e.Length, Allocated: e.Data, Data: e.Data, Zero: !e.Data, HostOffset: e.Offset})
	})
}

// stormOverlay is a kind of disk with a base image.
type stormOverlay struct {
	cluster, discarded int64
	create             func(f storage.File, size int64, base block.Device) error
	open               func(f storage.File, base block.Device) (Overlay, error)
	check              func(f storage.File, crashed bool) error
}

func fvdStorms(o fvd.CreateOptions) stormOverlay {
	return stormOverlay{
		cluster: 64 << 10, discarded: o.BlockSize,
		create: func(f storage.File, size int64, base block.Device) error {
			o := o
			o.Size, o.BaseImage, o.Base = size, "base", base
			return fvd.Create(f, o)
		},
		open: func(f storage.File, base block.Device) (Overlay, error) {
			h, err := fvd.ReadHeader(f)
			if err != nil {
				return nil, err
			}
			var open fvd.Options
			if h.BaseImage != "" && !h.FullyPrefetched {
				open.Base = base
			}
			return fvd.Open(f, open)
		},
		check: func(f storage.File, _ bool) error {
			res, err := fvd.Check(f, fvd.CheckOptions{})
			if err == nil && len(res.Findings) > 0 {
				err = fmt.Errorf("the checker found %+v", res.Findings)
			}
			return err
		},
	}
}

func qcow2Storms(o qcow2.CreateOptions, discipline string) stormOverlay {
	return stormOverlay{
		cluster: o.ClusterSize, discarded: o.ClusterSize,
		create: func(f storage.File, size int64, base block.Device) error {
			o := o
			o.Size, o.BackingFile, o.BackingFormat, o.BackingSize = size, "base", "raw", base.Size()
			return qcow2.Create(f, o)
		},
		open: func(f storage.File, base block.Device) (Overlay, error) {
			info, err := qcow2.ReadInfo(f)
			if err != nil {
				return nil, err
			}
			open := qcow2.Options{Discipline: discipline, JournalSize: 1, JournalCommitInterval: -1, L2CacheSize: 1, Reserve: 10}
			if info.BackingFile != "" {
				open.Backing = base
			}
			im, err := qcow2.Open(f, open)
			if err != nil {
				return nil, err
			}
			g := GuardedOptions{Whole: !o.ExtendedL2, Detach: func() error { return im.SetBacking("", "") }}
			if info.BackingFile != "" {
				g.BaseSize = base.Size()
			}
			return Guard(im, g), nil
		},
		check: func(f storage.File, crashed bool) error {
			res, err := qcow2.Check(f, qcow2.CheckOptions{})
			leaky := crashed && (discipline == qcow2.Ordered || discipline == qcow2.Synchronous)
			if err == nil && (res.Corruptions+res.CheckErrors > 0 || res.Leaks > 0 && !leaky) {
				err = fmt.Errorf("the checker found %+v", res)
			}
			return err
		},
	}
}

// TestStorms: while a disk moves over, with copy-on-read and prefetching, several goroutines change it, it is full now
// and then, and the base image cannot be read now and then: what was acknowledged is there, nothing else is, with or
// without the base image, and of what was flushed a power cut at any moment takes nothing. PLATTER_TRIALS is the number
// of trials of each kind, PLATTER_TRIAL_SEED the first of them; the weather changes from one to the next.
func TestStorms(t *testing.T) {
	overlays := map[string]stormOverlay{
		"fvd":           fvdStorms(fvd.CreateOptions{BlockSize: 4096, JournalSize: 64 << 10}),
		"fvd, compact":  fvdStorms(fvd.CreateOptions{BlockSize: 4096, Compact: true, ChunkSize: 16 << 10, JournalSize: 20480}),
		"fvd, buffered": fvdStorms(fvd.CreateOptions{BlockSize: 15872, Compact: true, ChunkSize: 31744, JournalSize: 20480, JournalBuffer: 4096}),
	}
	for _, discipline := range qcow2.Disciplines() {
		overlays["qcow2, "+discipline] = qcow2Storms(qcow2.CreateOptions{ClusterSize: 4096}, discipline)
		overlays["subclusters, "+discipline] = qcow2Storms(qcow2.CreateOptions{ClusterSize: 16384, ExtendedL2: true}, discipline)
	}
	number := func(name string, n int) int {
		if s := os.Getenv(name); s != "" {
			var err error
			n, err = strconv.Atoi(s)
			must(t, err)
		}
		return n
	}
	trials, first := number("PLATTER_TRIALS", 1), number("PLATTER_TRIAL_SEED", 0)
	weathers := []storm.Weather{{}, {Full: true}, {Base: 10}}
	for shift, name := range slices.Sorted(maps.Keys(overlays)) {
		t.Run(name, func(t *testing.T) {
			for i := range trials {
				runTrial(t, overlays[name], weathers[(first+i+shift)%len(weathers)], uint64(first+i))
			}
		})
	}
}

func runTrial(t *testing.T, k stormOverlay, w storm.Weather, seed uint64) {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 31))
	const size = 1 << 19
	length := []int64{size, size / 2, size + 65536, size/2 + 1536}[r.IntN(4)]
	below := storage.NewMemory("base")
	under := make([]byte, length)
	for at := 0; at < len(under); at += 8192 {
		if r.IntN(4) > 0 {
			for i := at; i < min(at+8192, len(under)); i++ {
				under[i] = byte(r.Uint32()) | 1
			}
			_, err := below.WriteAt(under[at:min(at+8192, len(under))], int64(at))
			must(t, err)
		}
	}
	must(t, below.Truncate(length))
	base := storm.NewBase(holedBase{&memoryDevice{Memory: below}}, seed)
	trial := &storm.Trial{
		Seed: seed, Files: []string{"image"}, Most: size * 3 / 2, First: &storm.Claim{Bytes: under[:min(size, length)]}, Weather: w,
		Create: func(files []storage.File) error { return k.create(files[0], size, base) },
		Open: func(files []storage.File) (*storm.Life, error) {
			over, err := k.open(files[0], base)
			if err != nil {
				return nil, err
			}
			return &storm.Life{
				Device: newMoving(over, r), Cluster: k.cluster, Discarded: k.discarded, Base: base, Failed: func() error { return nil },
				Steward: func(s *storm.Storm, r *rand.Rand) error {
					if r.IntN(2) == 0 {
						return s.Resize(r)
					}
					_, err := s.Do("checkpoint", over.Checkpoint)
					return err
				},
			}, nil
		},
		Check: func(files []storage.File, crashed bool) error { return k.check(files[0], crashed) },
	}
	if _, err := trial.Run(); err != nil {
		t.Fatalf("seed %d, a base image of %d bytes: %v", seed, length, err)
	}
}
