package qcow2

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/testenv"
)

// TestConcurrent has workers write, read, zero and discard interleaved stripes that share clusters and L2
// tables, while flushes run and the table cache is too small. Every worker must see exactly its own bytes.
func TestConcurrent(t *testing.T) {
	for _, cfg := range []modelConfig{
		{create: CreateOptions{Size: 8 << 20, ClusterSize: 65536}},
		{create: CreateOptions{Size: 1 << 20, ClusterSize: 512, RefcountBits: 64}, cache: 1},
		{create: CreateOptions{Size: 4 << 20, ClusterSize: 16384, ExtendedL2: true}, backing: 3 << 20, cache: 1},
		{create: CreateOptions{Size: 4 << 20, ClusterSize: 4096, RefcountBits: 1}, backing: 5 << 20, cache: 1, discard: true},
		{create: CreateOptions{Size: 2 << 20, ClusterSize: 4096, DataFileName: "data"}},
	} {
		if cfg.backing > 0 {
			cfg.create.BackingFile, cfg.create.BackingFormat = "base", "raw"
		}
		cfg.create.Version = 3
		if cfg.create.RefcountBits == 0 {
			cfg.create.RefcountBits = 16
		}
		for _, cfg.how = range Disciplines() {
			t.Run(cfg.String(), func(t *testing.T) { runConcurrent(t, cfg) })
		}
	}
}

func runConcurrent(t *testing.T, cfg modelConfig) {
	testenv.Need(t, "qemu-img")
	w := newWorld(t, t, cfg, 7)
	const workers, stripe = 6, 1536
	var wg sync.WaitGroup
	fail := make(chan error, workers+1)
	for id := range workers {
		wg.Go(func() {
			if err := stripeWorker(w, id, workers, stripe); err != nil {
				fail <- fmt.Errorf("worker %d: %w", id, err)
			}
		})
	}
	stop := make(chan struct{})
	flushed := make(chan struct{})
	go func() {
		defer close(flushed)
		for {
			select {
			case <-stop:
				return
			default:
				if err := w.im.Flush(); err != nil {
					fail <- err
					return
				}
			}
		}
	}()
	wg.Wait()
	close(stop)
	<-flushed
	select {
	case err := <-fail:
		t.Fatal(err)
	default:
	}
	w.verify(t, 0, int64(len(w.want)))
	w.reopen(t)
	w.verify(t, 0, int64(len(w.want)))
	if err := w.im.Close(); err != nil {
		t.Fatal(err)
	}
	w.judge(t, t)
}

// stripeWorker works on every workers-th stripe of the disk, which nobody else touches.
func stripeWorker(w *world, id, workers int, stripe int64) error {
	r := rand.New(rand.NewPCG(uint64(id), 3))
	size := int64(len(w.want))
	got := make([]byte, stripe)
	for range 400 {
		k := r.Int64N(size / stripe / int64(workers))
		off := (k*int64(workers) + int64(id)) * stripe
		n := min(stripe, size-off)
		want := w.want[off : off+n]
		switch r.IntN(8) {
		case 0, 1, 2, 3:
			at, m := r.Int64N(n), int64(0)
			m = 1 + r.Int64N(n-at)
			fillRandom(r, want[at:at+m])
			if _, err := w.im.WriteAt(want[at:at+m], off+at); err != nil {
				return err
			}
		case 4:
			if err := w.im.WriteZeroes(off, n, block.ZeroFlags(r.IntN(2))); err != nil {
				return err
			}
			clear(want)
		case 5:
			if w.cfg.create.ClusterSize > 512 {
				break // a larger cluster is shared with the neighbours' stripes
			}
			if err := w.im.Discard(off, n); err != nil {
				return err
			}
			clear(want)
		}
		if _, err := w.im.ReadAt(got[:n], off); err != nil {
			return err
		}
		if !bytes.Equal(got[:n], want) {
			return fmt.Errorf("stripe at %d differs", off)
		}
	}
	return nil
}
