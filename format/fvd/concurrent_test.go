package fvd

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/platter-disk/platter/block"
	"go.uber.org/goleak"
)

// sectorInput is an operation on one sector: a read, or a write of value.
type sectorInput struct {
	sector int64
	write  bool
	value  byte
}

// sectorModel is a register a sector.
func sectorModel(initial []byte) porcupine.Model {
	type state struct {
		known bool
		value byte
	}
	return porcupine.Model{
		Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
			by := map[int64][]porcupine.Operation{}
			for _, op := range history {
				in, ok := op.Input.(sectorInput)
				if ok {
					by[in.sector] = append(by[in.sector], op)
				}
			}
			var parts [][]porcupine.Operation
			for _, p := range by {
				parts = append(parts, p)
			}
			return parts
		},
		Init: func() any { return state{} },
		Step: func(st, input, output any) (bool, any) {
			s, okS := st.(state)
			in, okI := input.(sectorInput)
			out, okO := output.(byte)
			if !okS || !okI || !okO {
				return false, st
			}
			if in.write {
				return true, state{true, in.value}
			}
			if !s.known {
				s.value = initial[in.sector*512]
			}
			return out == s.value, st
		},
	}
}

// TestLinearizable runs clients side by side, on few sectors, with checkpoints, soft writes and flushes between, and
// asks whether every sector behaved like a register.
func TestLinearizable(t *testing.T) {
	defer goleak.VerifyNone(t)
	compact := CreateOptions{Compact: true, BlockSize: 2 << 10, ChunkSize: 8 << 10, GrowUnit: 32 << 10, JournalSize: 8 << 10}
	overlay := CreateOptions{BlockSize: 2 << 10, JournalSize: 8 << 10}
	for _, s := range []shape{
		{create: compact, base: -1},
		{create: compact, base: 40 << 10, open: Options{Journal: JournalImmediate}},
		{create: compact, base: 40 << 10, data: "file"},
		{create: overlay, base: 64 << 10, open: Options{Journal: JournalImmediate}},
		{create: overlay, base: 64 << 10},
	} {
		s.create.Size = 64 << 10
		t.Run(s.String(), func(t *testing.T) {
			for seed := range uint64(8) {
				linearizable(t, newRig(t, s), seed)
			}
		})
	}
}

func linearizable(t *testing.T, r *rig, seed uint64) {
	var mu sync.Mutex
	var history []porcupine.Operation
	start := time.Now()
	record := func(client int, in sectorInput, out byte, from, to int64) {
		mu.Lock()
		defer mu.Unlock()
		history = append(history, porcupine.Operation{ClientId: client, Input: in, Output: out, Call: from, Return: to})
	}
	now := func() int64 { return time.Since(start).Nanoseconds() }
	var wg sync.WaitGroup
	for client := range 4 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(client)))
			for i := range 60 {
				off := rng.Int64N(32) * 2048
				n := int64(512)
				value := byte(0)
				var do func() error
				write := true
				got := make([]byte, 8<<10)
				switch k := rng.IntN(10); {
				case k < 4:
					value = byte(1 + client*60 + i)
					n = 512 * (1 + rng.Int64N(4))
					do = func() error { _, err := r.im.WriteAt(bytes.Repeat([]byte{value}, int(n)), off); return err }
				case k < 6:
					off, n = off&^8191, 8192
					do = func() error { return r.im.WriteZeroes(off, n, block.MayUnmap) }
				case k < 9:
					write, n = false, 512*(1+rng.Int64N(4))
					do = func() error { _, err := r.im.ReadAt(got[:n], off); return err }
				default:
					if err := sideWork(r.im, rng, off); err != nil {
						t.Error(err)
					}
					continue
				}
				from := now()
				if err := do(); err != nil {
					t.Error(err)
				}
				to := now()
				for at := off; at < off+n; at += 512 {
					record(client, sectorInput{at / 512, write, value}, got[at-off], from, to)
				}
			}
		})
	}
	wg.Wait()
	if !porcupine.CheckOperations(sectorModel(r.want), history) {
		t.Fatalf("seed %d: the history is not linearizable", seed)
	}
	must(t, r.im.Audit())
	disk := get(t, r.im, 0, r.im.Size())
	must(t, r.im.Close())
	must(t, checkClean(r))
	must(t, r.reopen())
	must(t, diff(get(t, r.im, 0, r.im.Size()), disk))
	must(t, r.im.Close())
}

// sideWork does what changes no sector.
func sideWork(im *Image, rng *rand.Rand, off int64) error {
	switch rng.IntN(4) {
	case 0:
		return im.Flush()
	case 1:
		return im.Checkpoint()
	case 2:
		return im.Extents(0, im.Size(), func(block.Extent) bool { return true })
	}
	if off+8192 > im.BaseSize() {
		return nil
	}
	p := make([]byte, 8192)
	if err := im.ReadBase(p, off); err != nil {
		return err
	}
	_, err := im.Populate(p, off)
	return err
}

// TestCloseWhileBusy: requests in flight at Close end, later ones are refused, and nothing is left running.
func TestCloseWhileBusy(t *testing.T) {
	defer goleak.VerifyNone(t)
	f := made(t, smallCompact(8<<10))
	im := opened(t, f, Options{})
	var wg sync.WaitGroup
	for k := range 4 {
		wg.Go(func() {
			for i := range 1000 {
				_, err := im.WriteAt(filled(byte(k+1), 512), int64((i*4+k)%64)*4096)
				if errors.Is(err, block.ErrClosed) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	time.Sleep(5 * time.Millisecond)
	must(t, im.Close())
	must(t, im.Close())
	wg.Wait()
	for name, err := range map[string]error{
		"read": func() error { _, err := im.ReadAt(make([]byte, 1), 0); return err }(), "flush": im.Flush(), "zero": im.WriteZeroes(0, 512, 0),
		"try read": im.TryReadAt(make([]byte, 1), 0), "resize": im.Resize(1<<20, 0), "extents": im.Extents(0, 1, nil),
		"checkpoint": im.Checkpoint(), "detach": im.DetachBase(), "empty": im.Empty(), "audit": im.Audit(),
		"discard": im.Discard(0, 512), "read base": im.ReadBase(make([]byte, 1), 0),
		"write":    func() error { _, err := im.WriteAt(make([]byte, 1), 0); return err }(),
		"populate": func() error { _, err := im.Populate(make([]byte, 1), 0); return err }(),
	} {
		if !errors.Is(err, block.ErrClosed) || !strings.Contains(err.Error(), f.Name()) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
	im = opened(t, f, Options{ReadOnly: true})
	must(t, im.Close())
}

// TestRequestRules: ranges, read-only images, ends of the disk.
func TestRequestRules(t *testing.T) {
	f := made(t, smallCompact(8<<10))
	im := opened(t, f, Options{})
	size := im.Size()
	p := make([]byte, 1024)
	if n, err := im.ReadAt(p, size-512); n != 512 || err != io.EOF {
		t.Errorf("read across the end: %d %v", n, err)
	}
	if n, err := im.ReadAt(p, size+5); n != 0 || err != io.EOF {
		t.Errorf("read past the end: %d %v", n, err)
	}
	_, writeErr := im.WriteAt(p, size-512)
	_, before := im.ReadAt(p, -1)
	for name, err := range map[string]error{
		"write across the end": writeErr, "read before 0": before, "zeroes": im.WriteZeroes(size, 1, 0), "discard": im.Discard(-1, 1),
		"try read": im.TryReadAt(p, size-512), "extents": im.Extents(0, size+1, nil), "overflow": im.Discard(1<<62, 1<<62),
	} {
		if !errors.Is(err, block.ErrOutOfRange) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := im.WriteCompressed(p, 0); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("compressed write: %v", err)
	}
	if err := im.Resize(512, 0); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("shrink: %v", err)
	}
	must(t, im.Close())
	im = opened(t, f, Options{ReadOnly: true})
	_, writeErr = im.WriteAt(p, 0)
	for name, err := range map[string]error{"write": writeErr, "zeroes": im.WriteZeroes(0, 1, 0), "discard": im.Discard(0, 1), "resize": im.Resize(1<<20, 0)} {
		if !errors.Is(err, block.ErrReadOnly) {
			t.Errorf("%s on a read-only image: %v", name, err)
		}
	}
	must(t, im.Flush())
	must(t, im.Close())
}

// TestReadOnlyReplay: a read-only open of a crashed image shows what a writable one shows and writes nothing.
func TestReadOnlyReplay(t *testing.T) {
	f := made(t, smallCompact(64<<10))
	im := opened(t, f, Options{})
	put(t, im, 4096, filled(3, 5000))
	must(t, im.Flush())
	left := clone(f)
	want := get(t, im, 0, im.Size())
	must(t, im.Close())
	im = opened(t, watchedFile{File: left, onWrite: func(off int64, p []byte) error {
		return fmt.Errorf("write of %d bytes at %d", len(p), off)
	}}, Options{ReadOnly: true})
	must(t, diff(get(t, im, 0, im.Size()), want))
	if r := im.Replay(); r.Records == 0 {
		t.Errorf("replay: %+v", r)
	}
	must(t, im.Close())
}

// TestDirtyImage: without a journal an image that was not closed is refused until its operator takes it over, and
// stays marked until he says that it is clean.
func TestDirtyImage(t *testing.T) {
	o := smallCompact(-1)
	f := made(t, o)
	im := opened(t, f, Options{})
	put(t, im, 0, filled(1, 512))
	must(t, im.Flush())
	left := clone(f)
	must(t, im.Close())
	for _, ro := range []bool{false, true} {
		if _, err := Open(left, Options{ReadOnly: ro}); !errors.Is(err, ErrDirty) {
			t.Errorf("read-only %v: %v", ro, err)
		}
	}
	im = opened(t, left, Options{AllowDirty: true})
	put(t, im, 4096, filled(2, 512))
	must(t, im.Close())
	if _, err := Open(left, Options{}); !errors.Is(err, ErrDirty) {
		t.Errorf("after use at the operator's risk: %v", err)
	}
	if err := Amend(left, []Setting{{"copy_on_read", "on"}}); !errors.Is(err, ErrNotClean) {
		t.Errorf("amending another field: %v", err)
	}
	must(t, Amend(left, []Setting{{"clean_shutdown", "true"}}))
	im = opened(t, left, Options{})
	if got := get(t, im, 4096, 1)[0]; got != 2 {
		t.Errorf("read %#x", got)
	}
	must(t, im.Close())
}
