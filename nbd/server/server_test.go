package server_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/internal/nbdtest"
	"github.com/platter-disk/platter/nbd/server"
)

// TestCommands goes through every command with each form of replies.
func TestCommands(t *testing.T) {
	for _, mode := range modes {
		t.Run(fmt.Sprint(mode), func(t *testing.T) {
			disk := nbdtest.Disk(t, 8<<20)
			var flushes atomic.Int64
			hooks := &nbdtest.Hooks{Device: disk, OnFlush: func() error { flushes.Add(1); return disk.Flush() }}
			s := nbdtest.Serve(t, server.Config{}, server.Export{Device: hooks})
			x := enter(t, s, mode)
			ok := func(r nbd.Request, payload []byte) answer {
				t.Helper()
				if r.Command == nbd.CmdWrite && mode == nbd.ExtendedReplies {
					r.Flags |= nbd.CmdFlagPayloadLen
				}
				a := x.do(r, payload)
				if a.errno != 0 {
					t.Fatalf("%s: %v %q", r.Command, a.errno, a.message)
				}
				return a
			}
			holds := func(off, n int, value byte) {
				t.Helper()
				if a := ok(nbd.Request{Command: nbd.CmdRead, Offset: uint64(off), Length: uint64(n)}, nil); !bytes.Equal(a.data, filled(value, n)) {
					t.Fatalf("%d bytes at %d are not all %d", n, off, value)
				}
			}
			for i, n := range []int{1, 512, 4096, 32 << 10, 40_000, 300_000, 2 << 20} { // in place, in line, by a worker
				off := uint64(1<<20 + i)
				ok(nbd.Request{Command: nbd.CmdWrite, Offset: off, Length: uint64(n)}, filled(byte(i+1), n))
				holds(int(off), n, byte(i+1))
			}
			before := flushes.Load()
			ok(nbd.Request{Command: nbd.CmdFlush}, nil)
			ok(nbd.Request{Command: nbd.CmdWrite, Flags: nbd.CmdFlagFUA, Offset: 0, Length: 4096}, filled(9, 4096))
			ok(nbd.Request{Command: nbd.CmdWriteZeroes, Flags: nbd.CmdFlagFUA, Offset: 4096, Length: 4096}, nil)
			ok(nbd.Request{Command: nbd.CmdTrim, Flags: nbd.CmdFlagFUA, Offset: 8192, Length: 4096}, nil)
			if n := flushes.Load() - before; n != 4 {
				t.Errorf("%d flushes for FLUSH and three requests with FUA, want 4", n)
			}
			ok(nbd.Request{Command: nbd.CmdRead, Flags: nbd.CmdFlagFUA, Offset: 0, Length: 512}, nil)
			ok(nbd.Request{Command: nbd.CmdWriteZeroes, Offset: 1 << 20, Length: 1 << 20}, nil)
			holds(1<<20, 1<<20, 0)
			ok(nbd.Request{Command: nbd.CmdWriteZeroes, Flags: nbd.CmdFlagNoHole, Offset: 100, Length: 50}, nil)
			holds(100, 50, 0)
			holds(0, 100, 9)
			ok(nbd.Request{Command: nbd.CmdCache, Offset: 0, Length: 1 << 20}, nil)
			ok(nbd.Request{Command: nbd.CmdTrim, Offset: 2 << 20, Length: 1 << 20}, nil)
			for _, c := range []nbd.Command{nbd.CmdRead, nbd.CmdWrite, nbd.CmdTrim, nbd.CmdWriteZeroes, nbd.CmdCache} {
				ok(nbd.Request{Command: c, Offset: 8 << 20}, nil) // of nothing, at the very end
			}
			ok(nbd.Request{Command: nbd.CmdWrite, Flags: nbd.CmdFlagFUA}, nil)
			if mode != nbd.SimpleReplies {
				a := ok(nbd.Request{Command: nbd.CmdRead, Flags: nbd.CmdFlagDF, Length: 1 << 20}, nil)
				if len(a.data) != 1<<20 {
					t.Errorf("unfragmented read gives %d bytes", len(a.data))
				}
			}
			x.request(nbd.Request{Command: nbd.CmdDisc}, nil)
			x.ended()

			s.Stop()
			st := s.Stats()
			if w := st.Commands[nbd.CmdWrite]; w.Requests != 10 || w.Errors != 0 || w.Bytes != 1+512+4096+32<<10+40_000+300_000+2<<20+4096 {
				t.Errorf("statistics of writes: %+v", w)
			}
			if st.Commands[nbd.CmdFlush].Requests != 1 || st.Inline == 0 || st.Accepted != 1 || st.Connections != 0 {
				t.Errorf("statistics: %+v", st)
			}
		})
	}
}

func TestFastZero(t *testing.T) {
	var got []block.ZeroFlags
	hooks := &nbdtest.Hooks{Device: nbdtest.Disk(t, 1<<20)}
	hooks.OnZero = func(_, _ int64, flags block.ZeroFlags) error {
		got = append(got, flags)
		if flags&block.FastOnly != 0 {
			return errors.ErrUnsupported
		}
		return nil
	}
	x := enter(t, nbdtest.Serve(t, server.Config{}, server.Export{Device: hooks}), nbd.StructuredReplies)
	for _, c := range []struct {
		flags nbd.CommandFlags
		want  block.ZeroFlags
		errno nbd.Errno
	}{
		{0, block.MayUnmap, 0}, {nbd.CmdFlagNoHole, 0, 0},
		{nbd.CmdFlagFastZero, block.MayUnmap | block.FastOnly, nbd.ENOTSUP}, {nbd.CmdFlagFastZero | nbd.CmdFlagNoHole, block.FastOnly, nbd.ENOTSUP},
	} {
		a := x.do(nbd.Request{Command: nbd.CmdWriteZeroes, Flags: c.flags, Length: 4096}, nil)
		if a.errno != c.errno || got[len(got)-1] != c.want {
			t.Errorf("flags %#x: %v, device was called with %#x, want %#x", c.flags, a.errno, got[len(got)-1], c.want)
		}
	}
}

// TestDeviceErrors: what a device returns becomes the protocol's error and a message, and the connection lives on.
func TestDeviceErrors(t *testing.T) {
	var fail error
	var log bytes.Buffer
	disk := nbdtest.Disk(t, 1<<20)
	hooks := &nbdtest.Hooks{
		Device:    disk,
		OnRead:    func([]byte, int64) (int, error) { return 0, fail },
		OnWrite:   func([]byte, int64) (int, error) { return 0, fail },
		OnFlush:   func() error { return fail },
		OnZero:    func(int64, int64, block.ZeroFlags) error { return fail },
		OnDiscard: func(int64, int64) error { return fail },
		OnExtents: func(int64, int64, func(block.Extent) bool) error { return fail },
	}
	s := nbdtest.Serve(t, server.Config{Logger: slog.New(slog.NewTextHandler(&log, nil))}, server.Export{Device: hooks})
	x := enter(t, s, nbd.StructuredReplies)
	for _, c := range []struct {
		err     error
		command nbd.Command
		want    nbd.Errno
	}{
		{errors.New("odd \xff"), nbd.CmdRead, nbd.EIO},
		{syscall.EIO, nbd.CmdWrite, nbd.EIO},
		{fmt.Errorf("write: %w", syscall.ENOSPC), nbd.CmdWrite, nbd.ENOSPC},
		{syscall.EDQUOT, nbd.CmdWriteZeroes, nbd.ENOSPC},
		{syscall.EFBIG, nbd.CmdFlush, nbd.ENOSPC},
		{os.ErrPermission, nbd.CmdWrite, nbd.EIO},
		{syscall.EROFS, nbd.CmdWrite, nbd.EPERM},
		{block.ErrReadOnly, nbd.CmdTrim, nbd.EPERM},
		{block.ErrOutOfRange, nbd.CmdRead, nbd.EINVAL},
		{block.ErrOutOfRange, nbd.CmdWrite, nbd.ENOSPC},
		{block.ErrClosed, nbd.CmdCache, nbd.ESHUTDOWN},
		{errors.ErrUnsupported, nbd.CmdTrim, 0},
		{errors.ErrUnsupported, nbd.CmdBlockStatus, 0},
		{errors.ErrUnsupported, nbd.CmdWriteZeroes, nbd.EIO},
		{nil, nbd.CmdRead, nbd.EIO}, // a device that reads too little without saying why
		{nil, nbd.CmdBlockStatus, nbd.EIO},
		{io.EOF, nbd.CmdRead, nbd.EIO},
	} {
		fail = c.err
		r := nbd.Request{Command: c.command, Length: 512}
		var payload []byte
		switch c.command {
		case nbd.CmdWrite:
			payload = make([]byte, 512)
		case nbd.CmdFlush:
			r.Length = 0
		}
		a := x.do(r, payload)
		if a.errno != c.want || c.want != 0 && a.message == "" {
			t.Errorf("%s with %v: %v %q, want %v", c.command, c.err, a.errno, a.message, c.want)
		}
	}
	if st := s.Stats(); st.Commands[nbd.CmdWrite].Errors != 5 {
		t.Errorf("%d failed writes were counted, want 5", st.Commands[nbd.CmdWrite].Errors)
	}
	s.Stop()
	if !strings.Contains(log.String(), "odd") || !strings.Contains(log.String(), "command=READ") {
		t.Errorf("the log does not tell of the errors: %s", &log)
	}
}

// TestFlushCoversAllConnections: a write that was answered on one connection is in the device when a flush
// on another one reaches it.
func TestFlushCoversAllConnections(t *testing.T) {
	var written, flushed atomic.Int64
	disk := nbdtest.Disk(t, 1<<20)
	hooks := &nbdtest.Hooks{Device: disk}
	hooks.OnWrite = func(p []byte, off int64) (int, error) { n, err := disk.WriteAt(p, off); written.Add(1); return n, err }
	hooks.OnFlush = func() error { flushed.Store(written.Load()); return disk.Flush() }
	s := nbdtest.Serve(t, server.Config{}, server.Export{Device: hooks})
	a, b := enter(t, s, nbd.StructuredReplies), enter(t, s, nbd.SimpleReplies)
	for i := range int64(100) {
		a.do(nbd.Request{Command: nbd.CmdWrite, Length: 4096}, make([]byte, 4096))
		if b.do(nbd.Request{Command: nbd.CmdFlush}, nil); flushed.Load() != i+1 {
			t.Fatalf("the flush saw %d writes, want %d", flushed.Load(), i+1)
		}
	}
}

// TestManyRequestsInFlight: hundreds of requests sent before the first reply is read, more than the bounds
// allow at once, are all answered.
func TestManyRequestsInFlight(t *testing.T) {
	disk := nbdtest.Disk(t, 16<<20)
	hooks := &nbdtest.Hooks{Device: disk}
	var n, running, most atomic.Int64
	hooks.OnTryRead = func(p []byte, off int64) error {
		if n.Add(1)%2 == 0 {
			return disk.TryReadAt(p, off)
		}
		return block.ErrWouldBlock
	}
	hooks.OnRead = func(p []byte, off int64) (int, error) {
		now := running.Add(1)
		defer running.Add(-1)
		for m := most.Load(); now > m && !most.CompareAndSwap(m, now); m = most.Load() {
		}
		time.Sleep(50 * time.Microsecond)
		return disk.ReadAt(p, off)
	}
	for i := range int64(16) {
		disk.WriteAt(filled(byte(i+1), 1<<20), i<<20)
	}
	s := nbdtest.Serve(t, server.Config{Workers: 3, MaxRequestsPerClient: 5, MaxRequests: 4, MaxRequest: 64 << 10, MaxBytesPerClient: 100 << 10, MaxBytes: 128 << 10}, server.Export{Device: hooks})
	for _, mode := range modes {
		x := enter(t, s, mode)
		const requests = 600
		lengths := map[uint64]uint64{}
		var b []byte
		for i := range uint64(requests) {
			r := nbd.Request{Command: nbd.CmdRead, Cookie: i, Offset: i % 16 << 20, Length: 1000 + i%50*1000}
			lengths[i] = r.Length
			b = r.Append(b, mode == nbd.ExtendedReplies)
		}
		go x.Write(b)
		for range requests {
			var a answer
			if mode == nbd.SimpleReplies { // the length is known only from the cookie
				var r nbd.Reply
				if err := nbd.DecodeReply(x.read(nbd.SimpleReplySize), mode, &r); err != nil {
					t.Fatal(err)
				}
				a = answer{cookie: r.Cookie, errno: r.Error, data: x.read(int(lengths[r.Cookie]))}
			} else {
				a = x.answer(0)
			}
			want, ok := lengths[a.cookie]
			if !ok || a.errno != 0 || !bytes.Equal(a.data, filled(byte(a.cookie%16+1), int(want))) {
				t.Fatalf("reply %d: %v, known %v, %d bytes, want %d", a.cookie, a.errno, ok, len(a.data), want)
			}
			delete(lengths, a.cookie)
		}
		x.Close()
	}
	if m := most.Load(); m > 3 || m < 2 {
		t.Errorf("%d reads ran at once in 3 workers", m)
	}
}

// TestStalledClient: a client that asks and does not read the replies holds a bounded amount and nobody up.
func TestStalledClient(t *testing.T) {
	s := nbdtest.Serve(t, server.Config{MaxRequest: 1 << 20, MaxBytesPerClient: 2 << 20}, server.Export{Device: nbdtest.Disk(t, 1<<20)})
	stalled := enter(t, s, nbd.SimpleReplies)
	stalled.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
	r := nbd.Request{Command: nbd.CmdRead, Length: 1 << 20}
	for range 100_000 {
		if _, err := stalled.Write(r.Append(nil, false)); err != nil {
			break
		}
	}
	if n := s.Stats().Commands[nbd.CmdRead].Requests; n > 100 {
		t.Errorf("%d reads of 1 MiB were carried out for a client that reads none", n)
	}
	enter(t, s, nbd.SimpleReplies).alive()
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("shutdown with a stalled client: %v", err)
	}
}

// TestShutdown: what was begun is finished and answered, what was not begun is refused, and the client sees
// an orderly end.
func TestShutdown(t *testing.T) {
	disk := nbdtest.Disk(t, 1<<20)
	begun, release := make(chan struct{}), make(chan struct{})
	hooks := &nbdtest.Hooks{Device: disk}
	hooks.OnFlush = func() error { close(begun); <-release; return nil }
	s := nbdtest.Serve(t, server.Config{}, server.Export{Device: hooks})
	idle, busy, early := enter(t, s, nbd.SimpleReplies), enter(t, s, nbd.StructuredReplies), connect(t, s)
	busy.request(nbd.Request{Command: nbd.CmdFlush, Cookie: 7}, nil)
	<-begun
	stopped := make(chan struct{})
	go func() { s.Stop(); close(stopped) }()
	idle.ended()
	early.ended()
	if _, err := net.Dial("unix", s.Socket); err == nil {
		t.Error("a connection was accepted during shutdown")
	}
	select {
	case <-stopped:
		t.Fatal("shutdown did not wait for the flush")
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	if a := busy.answer(0); a.cookie != 7 || a.errno != 0 {
		t.Errorf("the flush was answered with %+v", a)
	}
	busy.ended()
	<-stopped
	if err := s.Shutdown(context.Background()); err != nil {
		t.Errorf("second shutdown: %v", err)
	}
	if err := s.AddExport(server.Export{Name: "late", Device: disk}); !errors.Is(err, server.ErrShutdown) {
		t.Errorf("export after shutdown: %v", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Serve(context.Background(), l); !errors.Is(err, server.ErrShutdown) {
		t.Errorf("serve after shutdown: %v", err)
	}
}

// TestShutdownRefusesQueuedRequests: requests that were received but not begun are answered with ESHUTDOWN.
func TestShutdownRefusesQueuedRequests(t *testing.T) {
	begun, release := make(chan struct{}), make(chan struct{})
	hooks := &nbdtest.Hooks{Device: nbdtest.Disk(t, 1<<20)}
	var once sync.Once
	hooks.OnWrite = func(p []byte, off int64) (int, error) { // in line: the reader waits here
		once.Do(func() { close(begun) })
		<-release
		return len(p), nil
	}
	s := nbdtest.Serve(t, server.Config{}, server.Export{Device: hooks})
	x := enter(t, s, nbd.StructuredReplies)
	var b []byte
	for i := range uint64(3) {
		b = append((&nbd.Request{Command: nbd.CmdWrite, Cookie: i, Length: 512}).Append(b, false), make([]byte, 512)...)
	}
	x.write(b)
	<-begun
	stopped := make(chan struct{})
	go func() { s.Stop(); close(stopped) }()
	testenv.Until(t, "the listener to close, which is after draining was set", func() bool {
		c, err := net.Dial("unix", s.Socket)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	close(release)
	for i := range uint64(3) {
		want := nbd.ESHUTDOWN
		if i == 0 {
			want = 0
		}
		if a := x.answer(0); a.cookie != i || a.errno != want {
			t.Errorf("request %d: %+v, want %v", i, a, want)
		}
	}
	x.ended()
	<-stopped
}

func TestMaxConnections(t *testing.T) {
	s := nbdtest.Serve(t, server.Config{MaxConnections: 2}, server.Export{Device: nbdtest.Disk(t, 1<<20)})
	a, b := enter(t, s, nbd.SimpleReplies), enter(t, s, nbd.SimpleReplies)
	c, err := net.Dial("unix", s.Socket)
	if err != nil {
		t.Fatal(err)
	}
	(&session{Conn: c, t: t}).ended()
	c.Close()
	a.alive()
	b.request(nbd.Request{Command: nbd.CmdDisc}, nil)
	b.ended()
	testenv.Until(t, "the connection to be counted no longer", func() bool { return s.Stats().Connections == 1 })
	enter(t, s, nbd.SimpleReplies).alive()
	if st := s.Stats(); st.Refused != 1 || st.Accepted != 3 || st.Connections != 2 {
		t.Errorf("statistics: %+v", st)
	}
}

func TestServeEnds(t *testing.T) {
	s, err := server.New(server.Config{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	l, err := server.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() { ended <- s.Serve(ctx, l) }()
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("context ended: %v", err)
	}
	l, err = server.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { ended <- s.Serve(context.Background(), l) }()
	l.Close()
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Errorf("listener closed: %v", err)
	}
}

func TestConfigIsChecked(t *testing.T) {
	for name, c := range map[string]server.Config{
		"MaxRequest":           {MaxRequest: 1},
		"MaxRequest ":          {MaxRequest: 2 << 30},
		"MaxRequestsPerClient": {MaxRequestsPerClient: -1},
		"MaxBytesPerClient":    {MaxBytesPerClient: 1 << 20},
		"MaxBytes":             {MaxBytes: 1 << 20},
		"MaxConnections":       {MaxConnections: -1},
		"Workers":              {Workers: 5000},
		"MaxOption":            {MaxOption: 10},
		"HandshakeTimeout":     {HandshakeTimeout: -1},
		"TLSConfig":            {TLS: server.TLSRequired},
		"TLS mode":             {TLS: 9},
	} {
		if _, err := server.New(c); err == nil || !strings.Contains(err.Error(), strings.TrimSpace(name)) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	s, err := server.New(server.Config{})
	if err != nil {
		t.Fatal(err)
	}
	disk := nbdtest.Disk(t, 1<<20)
	if err := s.AddExport(server.Export{Name: "taken", Device: disk, Default: true}); err != nil {
		t.Fatal(err)
	}
	for say, e := range map[string]server.Export{
		"no device":            {Name: "x"},
		"is taken":             {Name: "taken", Device: disk},
		"is the default":       {Name: "", Device: disk},
		"4096 allowed":         {Name: strings.Repeat("x", 5000), Device: disk},
		"not UTF-8":            {Name: "x", Description: "\xff", Device: disk},
		"minimum block size":   {Name: "x", Device: disk, MinBlock: 3},
		"preferred block size": {Name: "x", Device: disk, PreferredBlock: 1000},
		"block sizes":          {Name: "x", Device: disk, MinBlock: -1},
	} {
		if err := s.AddExport(e); err == nil || !strings.Contains(err.Error(), say) {
			t.Errorf("%+.80v: got %v, want %q", e, err, say)
		}
	}
}

func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := server.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := server.Listen("unix", path); err == nil || !strings.Contains(err.Error(), "another process listens") {
		t.Errorf("a socket in use: %v", err)
	}
	aside := path + ".aside" // the socket stays, as after a kill
	if err := errors.Join(os.Rename(path, aside), l.Close(), os.Rename(aside, path)); err != nil {
		t.Fatal(err)
	}
	if l, err = server.Listen("unix", path); err != nil {
		t.Fatalf("a socket that was left behind: %v", err)
	}
	l.Close()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Listen("unix", path); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file: %v", err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the file is gone: %v", err)
	}
}
