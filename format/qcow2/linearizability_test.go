package qcow2

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"go.uber.org/goleak"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
)

// sectorCall is what one request did to one sector.
type sectorCall struct {
	sector int
	write  bool
	value  uint64 // of a write
}

// sectorRegister is the specification of a sector: a register that is written and read.
func sectorRegister(initial func(sector int) uint64) porcupine.Model {
	type state struct {
		value uint64
		known bool
	}
	return porcupine.Model{
		Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
			bySector := map[int][]porcupine.Operation{}
			for _, op := range history {
				s := op.Input.(sectorCall).sector
				bySector[s] = append(bySector[s], op)
			}
			var parts [][]porcupine.Operation
			for _, ops := range bySector {
				parts = append(parts, ops)
			}
			return parts
		},
		Init: func() any { return state{} },
		Step: func(s, in, out any) (bool, any) {
			now, call := s.(state), in.(sectorCall)
			if !now.known {
				now = state{initial(call.sector), true}
			}
			if call.write {
				return true, state{call.value, true}
			}
			return out.(uint64) == now.value, now
		},
		Equal: func(a, b any) bool { return a.(state) == b.(state) },
		DescribeOperation: func(in, out any) string {
			if call := in.(sectorCall); call.write {
				return fmt.Sprintf("sector %d := %d", call.sector, call.value)
			}
			return fmt.Sprintf("sector %d is %v", in.(sectorCall).sector, out)
		},
	}
}

// TestLinearizable has clients race for the same few clusters, with tables and counts pushed out of tiny
// caches all the time: every sector behaves like a register that each request reads or writes at one instant
// between its call and its return. Closing leaves no goroutine behind.
func TestLinearizable(t *testing.T) {
	defer goleak.VerifyNone(t)
	rounds := envInt(t, "PLATTER_LINEARIZABLE", 1)
	for _, cfg := range []modelConfig{
		{create: CreateOptions{Size: 512 << 10, ClusterSize: 4096}, discard: true},
		{create: CreateOptions{Size: 256 << 10, ClusterSize: 512, RefcountBits: 64}, cache: 1},
		{create: CreateOptions{Size: 1 << 20, ClusterSize: 16384, ExtendedL2: true}, backing: 1 << 20, cache: 1},
		{create: CreateOptions{Size: 512 << 10, ClusterSize: 4096, RefcountBits: 8}, backing: 512 << 10, cache: 1, discard: true},
	} {
		if cfg.backing > 0 {
			cfg.create.BackingFile, cfg.create.BackingFormat = "base", "raw"
		}
		cfg.create.Version = 3
		if cfg.create.RefcountBits == 0 {
			cfg.create.RefcountBits = 16
		}
		for _, cfg.how = range Disciplines() {
			t.Run(cfg.String(), func(t *testing.T) {
				for seed := range rounds {
					checkLinearizable(t, cfg, uint64(seed))
				}
			})
		}
	}
}

func checkLinearizable(t *testing.T, cfg modelConfig, seed uint64) {
	t.Helper()
	w := newWorld(t, t, cfg, seed)
	const clients, requests = 5, 60
	var clock atomic.Int64
	var mu sync.Mutex
	var history []porcupine.Operation
	var wg sync.WaitGroup
	for id := range clients {
		wg.Go(func() {
			c := &client{id: id, w: w, r: rand.New(rand.NewPCG(seed, uint64(id))), clock: &clock}
			for range requests {
				if err := c.request(); err != nil {
					t.Errorf("client %d: %v", id, err)
					return
				}
			}
			mu.Lock()
			history = append(history, c.history...)
			mu.Unlock()
		})
	}
	wg.Wait()
	if err := w.im.Close(); err != nil {
		t.Fatal(err)
	}
	initial := func(sector int) uint64 {
		if w.backing == nil || (sector+1)*sectorSize > len(w.backing.bytes) {
			return 0
		}
		return fingerprint(w.backing.bytes[sector*sectorSize:][:sectorSize])
	}
	if result := porcupine.CheckOperationsTimeout(sectorRegister(initial), history, testenv.Patience); result != porcupine.Ok {
		t.Errorf("seed %d: the history of %d operations is %s", seed, len(history), result)
	}
	if res, err := Check(w.file, CheckOptions{}); err != nil || !res.Clean() {
		t.Errorf("seed %d: check: %+v, %v", seed, res, err)
	}
}

// fingerprint tells sectors apart; that of a sector of zeros, or of one number repeated, is that number.
func fingerprint(p []byte) uint64 {
	first := binary.BigEndian.Uint64(p)
	if bytes.Equal(p[8:], p[:len(p)-8]) {
		return first
	}
	sum := uint64(0)
	for i := 0; i < len(p); i += 8 {
		sum = sum*0x9e3779b97f4a7c15 + binary.BigEndian.Uint64(p[i:])
	}
	return sum | 1<<63
}

// client issues requests and records what each did to every sector.
type client struct {
	id      int
	w       *world
	r       *rand.Rand
	clock   *atomic.Int64 // counts starts and ends of requests: systems' clocks may be too coarse to order them
	count   uint64
	history []porcupine.Operation
}

func (c *client) request() error {
	im, cs := c.w.im, int(c.w.cfg.create.ClusterSize)
	// Few clusters, in two places that different table slices map where clusters are small.
	sectors := int(im.Size() / sectorSize)
	first := c.r.IntN(2) * (sectors / 2)
	first += c.r.IntN(max(3*cs/sectorSize, 6))
	n := min(1+c.r.IntN(6), sectors-first)
	off, length := int64(first)*sectorSize, int64(n)*sectorSize
	p := make([]byte, length)
	call := c.clock.Add(1)
	var err error
	write, value := true, uint64(0)
	switch op := c.r.IntN(12); op {
	case 0, 1, 2, 3:
		c.count++
		value = uint64(c.id+1)<<32 | c.count
		for i := 0; i < len(p); i += sectorSize {
			sectorTag(value).fill(p[i:][:sectorSize])
		}
		_, err = im.WriteAt(p, off)
	case 4, 5:
		err = im.WriteZeroes(off, length, block.ZeroFlags(op-4))
	case 6:
		per := cs / sectorSize
		first = first / per * per
		n, off, length = per, int64(first)*sectorSize, int64(cs)
		err = im.Discard(off, length)
	case 7:
		return im.Flush()
	case 8:
		write = false
		if err := im.TryReadAt(p, off); err != nil {
			return nil
		}
	default:
		write = false
		_, err = im.ReadAt(p, off)
	}
	back := c.clock.Add(1)
	for i := range n {
		op := porcupine.Operation{
			ClientId: c.id, Call: call, Return: back,
			Input: sectorCall{sector: first + i, write: write, value: value},
		}
		if !write {
			op.Output = fingerprint(p[i*sectorSize:][:sectorSize])
		}
		c.history = append(c.history, op)
	}
	return err
}

// TestReadOnlyThrash has readers of a read-only image fight for a table cache with room for few of its slices.
func TestReadOnlyThrash(t *testing.T) {
	f := storage.NewMemory("image")
	if err := Create(f, CreateOptions{Size: 4 << 20, Version: 3, ClusterSize: 512, RefcountBits: 16}); err != nil {
		t.Fatal(err)
	}
	im, err := Open(keepOpen{f}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < im.Size(); off += 32 << 10 {
		if _, err := im.WriteAt([]byte{1}, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if im, err = Open(keepOpen{f}, Options{ReadOnly: true, L2CacheSize: 1}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for id := range 12 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(id), 8))
			p := make([]byte, 1)
			for range 4000 {
				off := r.Int64N(im.Size()>>15) << 15
				if _, err := im.ReadAt(p, off); err != nil || p[0] != 1 {
					t.Errorf("byte %d is %d, %v", off, p[0], err)
					return
				}
			}
		})
	}
	wg.Wait()
	if err := im.Close(); err != nil {
		t.Error(err)
	}
}

// TestRangeLockEqualRanges has holders come and go for the same ranges: one that is let in while it still
// sleeps must not lose its place to another that leaves.
func TestRangeLockEqualRanges(t *testing.T) {
	l := newRangeLock()
	err := within(time.Minute, func() error {
		var wg sync.WaitGroup
		for id := range 8 {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(id), 9))
				for range 5000 {
					from := int64(r.IntN(3))
					l.unlock(l.lock(from, from+2, r.IntN(4) == 0))
				}
			})
		}
		wg.Wait()
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
