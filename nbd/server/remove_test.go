package server_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/internal/nbdtest"
	"github.com/platter-disk/platter/nbd/server"
)

// listed are the names of the exports that a client in the handshake sees, each followed by a blank.
func (x *session) listed() string {
	x.t.Helper()
	var all strings.Builder
	for _, r := range x.ack(nbd.OptList, nil) {
		s, err := nbd.DecodeServerReply(r.data)
		if err != nil {
			x.t.Fatal(err)
		}
		all.WriteString(s.Name + " ")
	}
	return all.String()
}

// removal is a call of RemoveExport that is under way.
func removal(ctx context.Context, s *server.Server, name string) chan error {
	result := make(chan error, 1)
	go func() { result <- s.RemoveExport(ctx, name) }()
	return result
}

// TestRemoveExport: its connections finish what they have begun and end, nobody else gets the export, and the other
// connections and exports notice nothing.
func TestRemoveExport(t *testing.T) {
	begun, release := make(chan struct{}), make(chan struct{})
	hooks := &nbdtest.Hooks{Device: nbdtest.Disk(t, 1<<20)}
	hooks.OnFlush = func() error { close(begun); <-release; return nil }
	s := nbdtest.Serve(t, server.Config{},
		server.Export{Name: "a", Device: hooks, Default: true},
		server.Export{Name: "b", Device: nbdtest.Disk(t, 2<<20)})
	ctx := context.Background()
	if err := s.RemoveExport(ctx, ""); !errors.Is(err, server.ErrUnknownExport) { // a is not its name
		t.Fatalf("the default by the empty name: %v", err)
	}

	idle, busy := enter(t, s, nbd.SimpleReplies), enter(t, s, nbd.StructuredReplies)
	early, other := begunStructured(t, s), begunStructured(t, s)
	if got := early.listed(); got != "a b " {
		t.Fatalf("exports %q", got)
	}
	early.ack(nbd.OptSetMetaContext, nbd.MetaContextRequest{Name: "a", Queries: []string{nbd.ContextAllocation}}.Append(nil))
	other.ack(nbd.OptGo, nbd.InfoRequest{Name: "b"}.Append(nil))
	busy.request(nbd.Request{Command: nbd.CmdFlush, Cookie: 7}, nil)
	<-begun
	removed := removal(ctx, s.Server, "a")
	idle.ended()
	other.alive()
	if got := early.listed(); got != "b " {
		t.Errorf("exports while one is removed: %q", got)
	}
	for _, name := range []string{"a", ""} {
		info := nbd.InfoRequest{Name: name}.Append(nil)
		early.refused(nbd.OptInfo, info, nbd.RepErrUnknown)
		early.refused(nbd.OptGo, info, nbd.RepErrUnknown)
		early.refused(nbd.OptSetMetaContext, nbd.MetaContextRequest{Name: name}.Append(nil), nbd.RepErrUnknown)
	}
	byName := connect(t, s)
	byName.write(nbd.AppendClientFlags(nil, nbd.ClientFixedNewstyle|nbd.ClientNoZeroes))
	byName.write(nbd.AppendOption(nil, nbd.OptExportName, []byte("a")))
	byName.ended()
	again := removal(ctx, s.Server, "a")
	for name, say := range map[string]string{"a": "is taken", "": "is the default"} {
		if err := s.AddExport(server.Export{Name: name, Device: nbdtest.Disk(t, 1<<20)}); err == nil || !strings.Contains(err.Error(), say) {
			t.Errorf("an export %q while one is removed: %v, want %q", name, err, say)
		}
	}
	select {
	case err := <-removed:
		t.Fatalf("removing did not wait for the flush: %v", err)
	case err := <-again:
		t.Fatalf("removing once more did not wait for the flush: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	if a := busy.answer(0); a.cookie != 7 || a.errno != 0 {
		t.Errorf("the flush was answered with %+v", a)
	}
	busy.ended()
	if err := errors.Join(<-removed, <-again); err != nil {
		t.Errorf("removing: %v", err)
	}
	if err := s.RemoveExport(ctx, "a"); !errors.Is(err, server.ErrUnknownExport) || !strings.Contains(err.Error(), `"a"`) {
		t.Errorf("an export that was removed: %v", err)
	}

	if err := s.AddExport(server.Export{Name: "a", Device: nbdtest.Disk(t, 1<<20), Default: true}); err != nil {
		t.Fatalf("another export in its place: %v", err)
	}
	early.ack(nbd.OptGo, nbd.InfoRequest{Name: "a"}.Append(nil))
	early.alive()
	other.alive()
	if err := s.RemoveExport(ctx, "b"); err != nil {
		t.Errorf("removing the other: %v", err)
	}
	other.ended()
	early.alive()
}

// begunStructured is a client in the handshake that has agreed on structured replies.
func begunStructured(t *testing.T, s *nbdtest.Served) *session {
	t.Helper()
	x := begun(t, s)
	x.mode = nbd.StructuredReplies
	x.ack(nbd.OptStructuredReply, nil)
	return x
}

// TestRemoveRefusesQueuedRequests: requests that were received but not begun are answered with ESHUTDOWN.
func TestRemoveRefusesQueuedRequests(t *testing.T) {
	begun, release := make(chan struct{}), make(chan struct{})
	hooks := &nbdtest.Hooks{Device: nbdtest.Disk(t, 1<<20)}
	var writes atomic.Int64
	hooks.OnWrite = func(p []byte, off int64) (int, error) { // in line: the reader waits here
		if writes.Add(1) == 1 {
			close(begun)
		}
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
	removed := removal(context.Background(), s.Server, "")
	late := begunStructured(t, s)
	testenv.Until(t, "the export to be gone", func() bool { return late.listed() == "" })
	close(release)
	for i := range uint64(3) {
		a := x.answer(0)
		switch {
		case a.cookie != i, i == 0 && a.errno != 0:
			t.Errorf("request %d: %+v", i, a)
		case i > 0 && (a.errno != nbd.ESHUTDOWN || a.message != "the export was removed"):
			t.Errorf("request %d: %+v, want ESHUTDOWN", i, a)
		}
	}
	x.ended()
	if err := <-removed; err != nil {
		t.Error(err)
	}
	if n := writes.Load(); n != 1 {
		t.Errorf("%d writes reached the device, want 1", n)
	}
}

// TestRemoveMeetsGo: a client that is being given the export when it is removed counts as its user, and is told so.
func TestRemoveMeetsGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPipes()
		s := p.serve(t, server.Config{}, server.Export{Device: nbdtest.Disk(t, 1<<20)})
		x := p.connect(t)
		x.write(nbd.AppendClientFlags(nil, nbd.ClientFixedNewstyle|nbd.ClientNoZeroes))
		x.write(nbd.AppendOption(nil, nbd.OptGo, nbd.InfoRequest{}.Append(nil)))
		synctest.Wait() // the server has chosen, and waits for the client to take the reply
		removed := removal(context.Background(), s, "")
		synctest.Wait()
		select {
		case err := <-removed:
			t.Fatalf("a client that has the export was not waited for: %v", err)
		default:
		}
		var last nbd.ReplyCode
		for last != nbd.RepAck {
			h, err := nbd.DecodeOptionReply(x.read(nbd.OptionReplySize))
			if err != nil || h.Code.IsError() {
				t.Fatalf("%+v, %v", h, err)
			}
			x.read(int(h.Length))
			last = h.Code
		}
		x.ended()
		if err := <-removed; err != nil {
			t.Error(err)
		}
	})
}

// halfPipe is a connection that can be closed for writing, so that the server waits for its client to hang up.
type halfPipe struct{ net.Conn }

// CloseWrite tells the client nothing.
func (halfPipe) CloseWrite() error { return nil }

// TestRemoveDoesNotLinger: a client that has all its replies and does not hang up is not waited for.
func TestRemoveDoesNotLinger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPipes()
		s := p.serve(t, server.Config{}, server.Export{Device: nbdtest.Disk(t, 1<<20)})
		ours, theirs := net.Pipe()
		p.conns <- halfPipe{theirs}
		greet(t, ours).enter(nbd.SimpleReplies).alive()
		start := time.Now()
		if err := s.RemoveExport(context.Background(), ""); err != nil || time.Since(start) != 0 {
			t.Errorf("removing took %v: %v", time.Since(start), err)
		}
		if n := s.Stats().Connections; n != 1 {
			t.Errorf("%d connections", n)
		}
		start = time.Now()
		if err := s.Shutdown(context.Background()); err != nil || time.Since(start) != time.Second {
			t.Errorf("shutdown took %v: %v", time.Since(start), err)
		}
	})
}

// TestRemoveCuts: when time is up a client that does not take its replies is cut off, and a device that is still at a
// request is waited for all the same.
func TestRemoveCuts(t *testing.T) {
	const patience, slow = 5 * time.Second, time.Minute
	for name, want := range map[string]time.Duration{"client": patience, "device": slow} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var running atomic.Int64
				disk := nbdtest.Disk(t, 1<<20)
				hooks := &nbdtest.Hooks{Device: disk, OnRead: func(p []byte, off int64) (int, error) {
					running.Add(1)
					defer running.Add(-1)
					if name == "device" {
						time.Sleep(slow)
					}
					return disk.ReadAt(p, off)
				}}
				p := newPipes()
				s := p.serve(t, server.Config{}, server.Export{Device: hooks})
				if err := s.AddExport(server.Export{Name: "other", Device: disk}); err != nil {
					t.Fatal(err)
				}
				x, other := p.connect(t).enter(nbd.StructuredReplies), p.connect(t)
				other.write(nbd.AppendClientFlags(nil, nbd.ClientFixedNewstyle))
				other.ack(nbd.OptGo, nbd.InfoRequest{Name: "other"}.Append(nil))
				x.request(nbd.Request{Command: nbd.CmdRead, Length: 1 << 20}, nil)
				synctest.Wait()
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				defer cancel()
				start := time.Now()
				err := s.RemoveExport(ctx, "")
				if took := time.Since(start); !errors.Is(err, context.DeadlineExceeded) || took != want {
					t.Errorf("removing took %v, want %v: %v", took, want, err)
				}
				if n := running.Load(); n != 0 {
					t.Errorf("%d requests are running in the device", n)
				}
				if _, err := x.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
					t.Errorf("the client was not cut off: %v", err)
				}
				other.SetDeadline(time.Now().Add(testenv.Patience))
				other.alive()
			})
		})
	}
}

// TestRemoveAfterShutdown: where Shutdown has run out of time, RemoveExport waits until the device may be closed.
func TestRemoveAfterShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var flushed atomic.Bool
		hooks := &nbdtest.Hooks{Device: nbdtest.Disk(t, 1<<20), OnFlush: func() error {
			time.Sleep(time.Minute)
			flushed.Store(true)
			return nil
		}}
		p := newPipes()
		s := p.serve(t, server.Config{}, server.Export{Device: hooks})
		x := p.connect(t).enter(nbd.SimpleReplies)
		x.request(nbd.Request{Command: nbd.CmdFlush}, nil)
		synctest.Wait()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) || flushed.Load() {
			t.Fatalf("shutdown: %v; flushed: %v", err, flushed.Load())
		}
		if err := s.RemoveExport(context.Background(), ""); err != nil || !flushed.Load() {
			t.Errorf("removing: %v; flushed: %v", err, flushed.Load())
		}
	})
}

// TestContextsOutliveExport: a client that selected metadata contexts for an export, and gets another one that has come
// under the same name meanwhile, has them; it cannot know of the change.
func TestContextsOutliveExport(t *testing.T) {
	for _, c := range []struct{ first, second, name string }{{"a", "a", "a"}, {"a", "a", ""}, {"a", "b", ""}} {
		s := nbdtest.Serve(t, server.Config{}, server.Export{Name: c.first, Default: true, Device: nbdtest.Disk(t, 1<<20)})
		x := begunStructured(t, s)
		x.ack(nbd.OptSetMetaContext, nbd.MetaContextRequest{Name: c.name, Queries: []string{nbd.ContextAllocation}}.Append(nil))
		if err := s.RemoveExport(context.Background(), c.first); err != nil {
			t.Fatal(err)
		}
		if err := s.AddExport(server.Export{Name: c.second, Default: true, Device: nbdtest.Disk(t, 1<<20)}); err != nil {
			t.Fatal(err)
		}
		x.ack(nbd.OptGo, nbd.InfoRequest{Name: c.name}.Append(nil))
		if a := x.do(nbd.Request{Command: nbd.CmdBlockStatus, Length: 4096}, nil); a.errno != 0 || len(a.status) != 1 {
			t.Errorf("%+v: block status %+v", c, a)
		}
	}
}

// TestRemoveOnIdle: the function that is told of the last client's end may remove its export.
func TestRemoveOnIdle(t *testing.T) {
	var s *nbdtest.Served
	removed := make(chan error, 1)
	s = nbdtest.Serve(t, server.Config{OnIdle: func() { removed <- s.RemoveExport(context.Background(), "") }},
		server.Export{Device: nbdtest.Disk(t, 1<<20)})
	enter(t, s, nbd.SimpleReplies).Close()
	select {
	case err := <-removed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(testenv.Patience):
		t.Fatal("OnIdle hangs")
	}
}

// detached is a disk that must not be used once it was given back.
type detached struct {
	nbdtest.Hooks
	back, misused atomic.Bool
}

func newDetached(t testing.TB) *detached {
	d := &detached{Hooks: nbdtest.Hooks{Device: nbdtest.Disk(t, 1<<20)}}
	look := func() {
		if d.back.Load() {
			d.misused.Store(true)
		}
	}
	inner := d.Device
	d.OnTryRead = func(p []byte, off int64) error {
		look()
		defer look()
		if off%(128<<10) == 0 {
			return block.ErrWouldBlock
		}
		return inner.TryReadAt(p, off)
	}
	d.OnRead = func(p []byte, off int64) (int, error) {
		look()
		defer look()
		time.Sleep(100 * time.Microsecond)
		return inner.ReadAt(p, off)
	}
	d.OnWrite = func(p []byte, off int64) (int, error) { look(); defer look(); return inner.WriteAt(p, off) }
	d.OnFlush = func() error { look(); defer look(); return inner.Flush() }
	return d
}

// TestRemoveUnderLoad: disks come and go under one name while clients that use several connections connect, read, write
// and flush; no disk is used after it was given back, and in the end the server shuts down while one is being removed.
func TestRemoveUnderLoad(t *testing.T) {
	rounds := 30
	if testing.Short() {
		rounds = 10
	}
	s := nbdtest.Serve(t, server.Config{})
	stop := make(chan struct{})
	var clients sync.WaitGroup
	var served atomic.Int64
	for range 4 {
		clients.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				c, err := nbd.Dial(s.URI("disk"), nbd.ClientOptions{Connections: 3, Logger: slog.New(slog.DiscardHandler)})
				if err != nil { // there is no disk just now
					time.Sleep(time.Millisecond)
					continue
				}
				err = use(c, &served)
				var remote *nbd.RemoteError
				if !errors.Is(err, nbd.ErrConnectionLost) && !(errors.As(err, &remote) && remote.Errno == nbd.ESHUTDOWN) {
					t.Errorf("a client ended with %v", err)
				}
				c.Close()
			}
		})
	}
	var last *detached
	for i := range rounds {
		last = newDetached(t)
		if err := s.AddExport(server.Export{Name: "disk", Device: last}); err != nil {
			t.Fatal(err)
		}
		before := served.Load()
		testenv.Until(t, "clients to use the disk", func() bool { return served.Load() > before+20 })
		if i == rounds-1 {
			break
		}
		ctx, cancel := context.WithTimeout(context.Background(), testenv.Patience)
		if i%3 == 1 { // it is cut at once
			cancel()
		}
		err := s.RemoveExport(ctx, "disk")
		last.back.Store(true)
		if err != nil && (i%3 != 1 || !errors.Is(err, context.Canceled)) {
			t.Errorf("round %d: %v", i, err)
		}
		cancel()
		if last.misused.Load() {
			t.Fatalf("round %d: a disk was used after it was removed", i)
		}
	}
	removed := removal(context.Background(), s.Server, "disk")
	close(stop)
	s.Stop()
	if err := <-removed; err != nil {
		t.Error(err)
	}
	last.back.Store(true)
	clients.Wait()
	if last.misused.Load() {
		t.Error("the last disk was used after it was removed")
	}
}

// use reads, writes and flushes through eight requests at a time, until it fails.
func use(c *nbd.Client, served *atomic.Int64) error {
	errs := make(chan error, 8)
	for i := range int64(cap(errs)) {
		go func() {
			p := make([]byte, 4096)
			for off := i << 16; ; off = (off + 4096) % (1 << 20) {
				_, err := c.ReadAt(p, off)
				if err == nil {
					_, err = c.WriteAt(p, off)
				}
				if err == nil {
					err = c.Sync()
				}
				if err != nil {
					errs <- err
					return
				}
				served.Add(1)
			}
		}()
	}
	err := <-errs
	for range cap(errs) - 1 {
		<-errs
	}
	return err
}

// TestRemoveMeetsNewConnection: connections that have not chosen an export go on, whatever is removed.
func TestRemoveMeetsNewConnection(t *testing.T) {
	s := nbdtest.Serve(t, server.Config{}, server.Export{Name: "a", Device: nbdtest.Disk(t, 1<<20)})
	c, err := net.Dial("unix", s.Socket)
	if err != nil {
		t.Fatal(err)
	}
	testenv.Until(t, "the connection", func() bool { return s.Stats().Connections == 1 })
	if err := s.RemoveExport(context.Background(), "a"); err != nil {
		t.Fatal(err)
	}
	if err := s.AddExport(server.Export{Device: nbdtest.Disk(t, 1<<20)}); err != nil {
		t.Fatal(err)
	}
	greet(t, c).enter(nbd.StructuredReplies).alive()
}
