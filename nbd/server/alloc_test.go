package server_test

import (
	"io"
	"runtime"
	"slices"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/internal/nbdtest"
	"github.com/platter-disk/platter/nbd/server"
)

// hot is a device that answers everything at once and allocates nothing itself.
func hot(t testing.TB, wait bool) block.Device {
	disk := nbdtest.Disk(t, 64<<20)
	h := &nbdtest.Hooks{Device: disk}
	h.OnWrite = func(p []byte, off int64) (int, error) { return len(p), nil }
	h.OnFlush = func() error { return nil }
	if wait {
		h.OnTryRead = func([]byte, int64) error { return block.ErrWouldBlock }
	} else {
		h.OnTryRead = func([]byte, int64) error { return nil }
	}
	return h
}

// TestNoAllocations: once warm a request costs no allocation and starts no goroutine, in line or by a
// worker, with each form of replies.
func TestNoAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes pools forget")
	}
	const depth, workers = 32, 4
	for _, c := range []struct {
		name    string
		wait    bool
		request nbd.Request
	}{
		{"read in line", false, nbd.Request{Command: nbd.CmdRead, Length: 4096}},
		{"read by a worker", true, nbd.Request{Command: nbd.CmdRead, Length: 4096}},
		{"large read by a worker", true, nbd.Request{Command: nbd.CmdRead, Length: 512 << 10}},
		{"write in line", false, nbd.Request{Command: nbd.CmdWrite, Length: 4096}},
		{"large write in line", false, nbd.Request{Command: nbd.CmdWrite, Length: 64 << 10}},
		{"write by a worker", false, nbd.Request{Command: nbd.CmdWrite, Flags: nbd.CmdFlagFUA, Length: 4096}},
		{"flush", false, nbd.Request{Command: nbd.CmdFlush}},
	} {
		for _, mode := range modes {
			s := nbdtest.Serve(t, server.Config{Workers: workers}, server.Export{Device: hot(t, c.wait)})
			x := enter(t, s, mode)
			r := c.request
			var payload []byte
			if r.Command == nbd.CmdWrite {
				payload = make([]byte, r.Length)
				if mode == nbd.ExtendedReplies {
					r.Flags |= nbd.CmdFlagPayloadLen
				}
			}
			one := append(r.Append(nil, mode == nbd.ExtendedReplies), payload...)
			all := slices.Repeat(one, depth)
			reply := len(nbd.AppendDone(nil, mode, &r))
			if r.Command == nbd.CmdRead {
				reply = nbd.ReadReplySize(mode) + int(r.Length)
			}
			answers := make([]byte, reply*depth)
			next := make(chan struct{})
			go func() {
				for range next {
					x.Conn.Write(all)
				}
			}()
			round := func() {
				next <- struct{}{}
				if _, err := io.ReadFull(x.Conn, answers); err != nil {
					t.Fatal(err)
				}
			}
			rounds := min(200, 32<<20/len(answers)+10)
			for range rounds / 4 {
				round()
			}
			goroutines := runtime.NumGoroutine()
			allocations := testing.AllocsPerRun(rounds, round)
			// A collection may empty the pools once: a few allocations in thousands of requests.
			if a := allocations / depth; a > 0.05 {
				t.Errorf("%s, mode %d: %.2f allocations a request", c.name, mode, a)
			}
			// Workers start when first needed, which for a write is when one in line was slow.
			if n := runtime.NumGoroutine(); n > goroutines+workers {
				t.Errorf("%s, mode %d: %d goroutines were started", c.name, mode, n-goroutines)
			}
			close(next)
			x.Close()
		}
	}
}

// BenchmarkServe is the server's share and the socket's; ReportAllocs counts the client too, which allocates
// nothing.
func BenchmarkServe(b *testing.B) {
	const depth = 32
	for _, c := range []struct {
		name string
		wait bool
	}{{"inline", false}, {"worker", true}} {
		b.Run(c.name, func(b *testing.B) {
			x := enter(b, nbdtest.Serve(b, server.Config{}, server.Export{Device: hot(b, c.wait)}), nbd.StructuredReplies)
			r := nbd.Request{Command: nbd.CmdRead, Length: 4096}
			all := slices.Repeat(r.Append(nil, false), depth)
			answers := make([]byte, (nbd.ReadReplySize(x.mode)+4096)*depth)
			b.ReportAllocs()
			for b.Loop() {
				x.Conn.Write(all)
				if _, err := io.ReadFull(x.Conn, answers); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/depth, "ns/request")
		})
	}
}
