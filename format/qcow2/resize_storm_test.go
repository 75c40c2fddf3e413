package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
)

// TestResizeStorm: guests at work on what stays and on what goes while the disk becomes smaller and larger, with snapshots
// in between.
func TestResizeStorm(t *testing.T) {
	const large, small = 3<<20 + 1536, 1<<20 + 512
	cfgs := map[string]CreateOptions{
		"plain":   {ClusterSize: 4096},
		"tiny":    {ClusterSize: 512},
		"bits1":   {ClusterSize: 1024, RefcountBits: 1},
		"ext":     {ClusterSize: 16384, ExtendedL2: true},
		"overlay": {ClusterSize: 4096, BackingFile: "b", BackingFormat: "raw", BackingSize: large},
		"extover": {ClusterSize: 16384, ExtendedL2: true, BackingFile: "b", BackingFormat: "raw", BackingSize: large},
		"v2":      {ClusterSize: 4096, Version: 2},
		"data":    {ClusterSize: 4096, DataFileName: "d"},
		"raw":     {ClusterSize: 4096, DataFileName: "d", DataFileRaw: true},
	}
	seed := uint64(envInt(t, "PLATTER_RESIZE_SEED", 1))
	rounds := int64(envInt(t, "PLATTER_RESIZES", fewer(4)))
	for name, create := range cfgs {
		for _, how := range Disciplines() {
			if create.Version == 2 && (how == Lazy || how == Journal) {
				continue
			}
			t.Run(name+"/"+how, func(t *testing.T) {
				create.Size = large
				mem := storage.NewMemory("image")
				o := Options{Discipline: how, Discard: true, JournalSize: 1, L2CacheSize: 16384}
				if create.DataFileName != "" {
					d := storage.NewMemory("d")
					create.DataFile = d
					o.DataFile = keepOpen{d}
				}
				if err := Create(mem, create); err != nil {
					t.Fatal(err)
				}
				var base *memDevice
				if create.BackingFile != "" {
					base = newBacking(1, large)
					o.Backing = base
				}
				im, err := Open(keepOpen{mem}, o)
				if err != nil {
					t.Fatal(err)
				}
				model := make([]byte, large)
				if base != nil {
					copy(model, base.bytes)
				}
				var stop atomic.Bool
				var eg errgroup.Group
				const workers = 4
				part := int64(small / workers / 512 * 512)
				for g := range int64(workers) {
					eg.Go(func() error {
						r := rand.New(rand.NewPCG(seed, uint64(g)))
						lo, hi := g*part, (g+1)*part
						for !stop.Load() {
							past := r.IntN(2) == 0
							from, to := lo, hi
							if past {
								from, to = (small+1024+16383)&^16383, large
							}
							off := from + r.Int64N(to-from)
							n := min(1+r.Int64N(30000), to-off)
							var err error
							p := make([]byte, n)
							fillRandom(r, p)
							switch r.IntN(7) {
							case 0:
								err = im.WriteZeroes(off, n, block.ZeroFlags(r.IntN(2)))
								clear(p)
							case 1:
								if !past {
									continue // what a discard leaves is not certain
								}
								err = im.Discard(off, n)
							case 2:
								cs := create.ClusterSize
								if !past {
									off = (off + cs - 1) &^ (cs - 1)
									if off+cs > hi {
										continue
									}
								} else {
									off &^= cs - 1
								}
								p = bytes.Repeat([]byte{byte(n)}, int(min(cs, large-off)))
								err = im.WriteCompressed(p, off)
								if errors.Is(err, errors.ErrUnsupported) {
									continue
								}
							case 3:
								_, err = im.ReadAt(p, off)
								if err == nil && !past && !bytes.Equal(p, model[off:off+n]) {
									return fmt.Errorf("read of %d at %d: other contents", n, off)
								}
								if past {
									continue
								}
							case 4:
								err = im.Flush()
								if err == nil {
									continue
								}
							default:
								_, err = im.WriteAt(p, off)
							}
							if past {
								if err != nil && !errors.Is(err, block.ErrOutOfRange) && !errors.Is(err, io.EOF) {
									return err
								}
								continue
							}
							if err != nil {
								return err
							}
							copy(model[off:], p)
						}
						return nil
					})
				}
				r := rand.New(rand.NewPCG(seed, 99))
				snaps := create.DataFileName == "" && create.RefcountBits != 1 && create.Version != 2
				for i := range rounds {
					time.Sleep(time.Duration(r.IntN(4)) * time.Millisecond)
					if snaps && i%3 == 0 {
						if _, err := im.CreateSnapshot(fmt.Sprint("s", i), SnapshotOptions{}); err != nil {
							t.Error(err)
						}
					}
					if err := im.Resize(small+512*r.Int64N(3), block.PreallocOff); err != nil {
						t.Error(err)
					}
					if snaps && i%3 == 2 {
						if err := im.DeleteSnapshot(fmt.Sprint("s", i-2)); err != nil {
							t.Error(err)
						}
					}
					if err := im.Resize(large, block.PreallocOff); err != nil {
						t.Error(err)
					}
				}
				stop.Store(true)
				if err := eg.Wait(); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, part*workers)
				if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, model[:len(got)]) {
					t.Fatal("kept part differs", err)
				}
				if err := errors.Join(im.Resize(small, block.PreallocOff), im.Resize(large, block.PreallocOff)); err != nil {
					t.Fatal(err)
				}
				got = make([]byte, large-small)
				if _, err := im.ReadAt(got, small); err != nil || len(bytes.Trim(got, "\x00")) > 0 {
					t.Error("not zeros", err)
				}
				if err := im.Close(); err != nil {
					t.Fatal(err)
				}
				checkClean(t, mem)
				if create.DataFileName == "" && base == nil {
					path := filepath.Join(t.TempDir(), "x")
					n, _ := mem.Size()
					p := make([]byte, n)
					mem.ReadAt(p, 0)
					os.WriteFile(path, p, 0o644)
					if out, err := qemuImg(".", "check", path); err != nil {
						t.Error(out, err)
					}
				}
			})
		}
	}
}
