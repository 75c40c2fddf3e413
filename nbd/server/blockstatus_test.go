package server_test

import (
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/internal/nbdtest"
	"github.com/platter-disk/platter/nbd/server"
)

const (
	allocationID = 1
	depthID      = 2
)

// layout is a device whose extents are given.
func layout(t testing.TB, size int64, extents ...block.Extent) *nbdtest.Hooks {
	return &nbdtest.Hooks{Device: nbdtest.Disk(t, size), OnExtents: func(off, length int64, fn func(block.Extent) bool) error {
		at := int64(0)
		for _, e := range extents {
			from, to := max(at, off), min(at+e.Length, off+length)
			at += e.Length
			if from < to {
				e.Offset, e.Length = from, to-from
				if !fn(e) {
					break
				}
			}
		}
		return nil
	}}
}

// pairs makes descriptors of lengths and values in turn.
func pairs(v ...uint64) []nbd.BlockStatus {
	var runs []nbd.BlockStatus
	for ; len(v) > 0; v = v[2:] {
		runs = append(runs, nbd.BlockStatus{Length: v[0], Flags: v[1]})
	}
	return runs
}

func TestBlockStatus(t *testing.T) {
	data := block.Extent{Allocated: true, Data: true}
	zero := block.Extent{Allocated: true, Zero: true}
	zeroData := block.Extent{Allocated: true, Zero: true, Data: true}
	absent := block.Extent{Zero: true, Depth: 1}
	backing := block.Extent{Allocated: true, Data: true, Depth: 1}
	unknown := block.Extent{} // neither data nor known to be zero
	sized := func(e block.Extent, n int64) block.Extent { e.Length = n; return e }
	disk := layout(t, 1<<20, sized(data, 65536), sized(data, 4096), sized(zero, 61440), sized(zeroData, 65536), sized(absent, 131072), sized(backing, 65536), sized(unknown, 655360))
	s := nbdtest.Serve(t, server.Config{}, server.Export{Device: disk})
	for _, mode := range modes[1:] {
		x := enter(t, s, mode)
		status := func(flags nbd.CommandFlags, off, length uint64) (allocation, depth []nbd.BlockStatus) {
			t.Helper()
			a := x.do(nbd.Request{Command: nbd.CmdBlockStatus, Flags: flags, Offset: off, Length: length}, nil)
			if a.errno != 0 || len(a.status) != 2 {
				t.Fatalf("%+v", a)
			}
			return a.status[allocationID], a.status[depthID]
		}
		allocation, depth := status(0, 0, 1<<20)
		if want := pairs(69632, 0, 61440, 3, 65536, 2, 131072, 3, 720896, 0); !slices.Equal(allocation, want) {
			t.Errorf("allocation %v, want %v", allocation, want)
		}
		if want := pairs(196608, 1, 131072, 0, 65536, 2, 655360, 0); !slices.Equal(depth, want) {
			t.Errorf("depth %v, want %v", depth, want)
		}
		allocation, depth = status(nbd.CmdFlagReqOne, 1000, 1<<20-1000)
		if !slices.Equal(allocation, pairs(68632, 0)) || !slices.Equal(depth, pairs(195608, 1)) {
			t.Errorf("one extent: %v, %v", allocation, depth)
		}
		allocation, _ = status(0, 69631, 2)
		if !slices.Equal(allocation, pairs(1, 0, 1, 3)) {
			t.Errorf("two bytes: %v", allocation)
		}
	}
}

// TestBlockStatusPayload: with extended headers a client may ask for some contexts only.
func TestBlockStatusPayload(t *testing.T) {
	s := nbdtest.Serve(t, server.Config{}, server.Export{Device: nbdtest.Disk(t, 1<<20)})
	x := enter(t, s, nbd.ExtendedReplies)
	ask := func(length uint64, ids ...uint32) answer {
		payload := nbd.BlockStatusPayload{Length: length, Contexts: ids}.Append(nil)
		return x.do(nbd.Request{Command: nbd.CmdBlockStatus, Flags: nbd.CmdFlagPayloadLen, Offset: 4096, Length: uint64(len(payload))}, payload)
	}
	for range 3 {
		for _, ids := range [][]uint32{{allocationID}, {depthID}, {depthID, allocationID}} {
			a := ask(8192, ids...)
			if a.errno != 0 || len(a.status) != len(ids) {
				t.Fatalf("contexts %v: %+v", ids, a)
			}
			for _, id := range ids {
				if len(a.status[id]) != 1 || a.status[id][0].Length != 8192 {
					t.Errorf("context %d: %v", id, a.status[id])
				}
			}
		}
	}
	for name, a := range map[string]answer{
		"no context": ask(8192), "unknown context": ask(8192, 9), "a context twice": ask(8192, depthID, depthID),
		"no length": ask(0, depthID), "past the end": ask(1<<20, depthID), "a length that wraps": ask(math.MaxUint64, depthID),
	} {
		if a.errno != nbd.EINVAL || a.message == "" {
			t.Errorf("%s: %+v", name, a)
		}
	}
	x.alive()
}

// TestBlockStatusIsBounded: a disk in thousands of pieces is reported in bounded replies that make progress.
func TestBlockStatusIsBounded(t *testing.T) {
	disk := &nbdtest.Hooks{Device: nbdtest.Disk(t, 1<<30)}
	reported := 0
	disk.OnExtents = func(off, length int64, fn func(block.Extent) bool) error {
		for at := off; at < off+length; at += 512 {
			reported++
			if !fn(block.Extent{Offset: at, Length: min(512, off+length-at), Allocated: at/512%2 == 0, Data: at/512%2 == 0, Zero: at/512%2 == 1}) {
				return nil
			}
		}
		return nil
	}
	s := nbdtest.Serve(t, server.Config{}, server.Export{Device: disk})
	for _, mode := range modes[1:] {
		x := enter(t, s, mode)
		reported = 0
		a := x.do(nbd.Request{Command: nbd.CmdBlockStatus, Length: 1 << 30}, nil)
		for id, runs := range a.status {
			if len(runs) != 4096 {
				t.Errorf("context %d: %d descriptors", id, len(runs))
			}
		}
		if reported > 5000 {
			t.Errorf("the device was asked for %d extents of which 4096 are reported", reported)
		}
	}
}

// TestBlockStatusKeepsToBlocks: descriptors are multiples of the minimum block size, cover the request, and
// claim zeros only where there are zeros.
func TestBlockStatusKeepsToBlocks(t *testing.T) {
	const size, minimum = 1 << 20, 4096
	extents := make([]block.Extent, 0, 100)
	disk := &nbdtest.Hooks{Device: nbdtest.Disk(t, size)}
	disk.OnExtents = func(off, length int64, fn func(block.Extent) bool) error {
		return layout(t, size, extents...).OnExtents(off, length, fn)
	}
	x := enter(t, nbdtest.Serve(t, server.Config{}, server.Export{Device: disk, MinBlock: minimum}), nbd.StructuredReplies)
	rapid.Check(t, func(t *rapid.T) {
		extents = extents[:0]
		zero := make([]bool, size/512)
		for at := int64(0); at < size; {
			n := min(512*rapid.Int64Range(1, 100).Draw(t, "sectors"), size-at)
			e := block.Extent{Length: n, Allocated: true, Data: true, Depth: rapid.IntRange(0, 2).Draw(t, "depth")}
			if rapid.Bool().Draw(t, "zero") {
				e.Zero, e.Data = true, false
			}
			for i := at / 512; i < (at+n)/512; i++ {
				zero[i] = e.Zero
			}
			extents = append(extents, e)
			at += n
		}
		off := minimum * rapid.Uint64Range(0, size/minimum-1).Draw(t, "offset")
		length := minimum * rapid.Uint64Range(1, (size-off)/minimum).Draw(t, "length")
		a := x.do(nbd.Request{Command: nbd.CmdBlockStatus, Offset: off, Length: length}, nil)
		for id, runs := range a.status {
			at := off
			for i, r := range runs {
				if r.Length%minimum != 0 || i > 0 && runs[i-1].Flags == r.Flags {
					t.Fatalf("context %d: descriptor %+v after %v", id, r, runs[:i])
				}
				if id == allocationID && r.Flags&nbd.StateZero != 0 && slices.Contains(zero[at/512:(at+r.Length)/512], false) {
					t.Fatalf("%+v at %d is not all zero", r, at)
				}
				at += r.Length
			}
			if at != off+length {
				t.Fatalf("context %d covers %d to %d, want to %d", id, off, at, off+length)
			}
		}
	})
}
