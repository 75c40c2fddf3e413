package server_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/internal/nbdtest"
	"github.com/platter-disk/platter/nbd/server"
)

// pipes is a listener whose connections have no buffer: what the peer does not read is not written.
type pipes struct {
	conns chan net.Conn
	once  sync.Once
	ended chan struct{}
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), ended: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.ended:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { p.once.Do(func() { close(p.ended) }); return nil }
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipes", Net: "unix"} }

// connect connects to whoever serves p and goes through the greeting.
func (p *pipes) connect(t testing.TB) *session {
	t.Helper()
	ours, theirs := net.Pipe()
	p.conns <- theirs
	return greet(t, ours)
}

// serve runs a server on p until the test ends.
func (p *pipes) serve(t *testing.T, cfg server.Config, x server.Export) *server.Server {
	t.Helper()
	cfg.Logger = slog.New(slog.DiscardHandler)
	s, err := server.New(cfg)
	if err == nil {
		err = s.AddExport(x)
	}
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(context.Background(), p) }()
	t.Cleanup(func() {
		s.Shutdown(context.Background())
		<-ended
	})
	return s
}

// slowStart is a connection on which the server sets the deadline of the handshake only once its Shutdown has
// asked it to stop reading.
type slowStart struct {
	net.Conn
	drained chan struct{}
	once    sync.Once
}

func (c *slowStart) SetDeadline(t time.Time) error {
	select {
	case <-c.drained:
	case <-time.After(5 * time.Second):
	}
	return c.Conn.SetDeadline(t)
}

func (c *slowStart) SetReadDeadline(t time.Time) error {
	err := c.Conn.SetReadDeadline(t)
	c.once.Do(func() { close(c.drained) })
	return err
}

// TestShutdownMeetsNewConnection: a connection that is accepted just before Shutdown does not hold it up for
// the time of a handshake.
func TestShutdownMeetsNewConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPipes()
		s := p.serve(t, server.Config{}, server.Export{Device: nbdtest.Disk(t, 1<<20)})
		ours, theirs := net.Pipe()
		defer ours.Close()
		p.conns <- &slowStart{Conn: theirs, drained: make(chan struct{})}
		go func() { // says nothing
			b := make([]byte, nbd.GreetingSize)
			ours.Read(b)
		}()
		synctest.Wait()
		if n := s.Stats().Connections; n != 1 {
			t.Fatalf("%d connections", n)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("shutdown with a connection that is new: %v", err)
		}
	})
}

// TestStalledClientKeepsToItsShare: replies that a client does not take count as bytes in flight until they
// are sent.
func TestStalledClientKeepsToItsShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const unit, share = 1 << 20, 3
		var reads atomic.Int64
		hooks := &nbdtest.Hooks{Device: nbdtest.Disk(t, unit), OnRead: func(p []byte, _ int64) (int, error) {
			reads.Add(1)
			return len(p), nil
		}}
		p := newPipes()
		p.serve(t, server.Config{MaxRequest: unit, MaxBytesPerClient: share * unit}, server.Export{Device: hooks})
		x := p.connect(t).enter(nbd.StructuredReplies)
		asked := make(chan struct{})
		go func() {
			defer close(asked)
			r := nbd.Request{Command: nbd.CmdRead, Length: unit}
			for range 4 * share {
				if _, err := x.Write(r.Append(nil, false)); err != nil {
					return
				}
			}
		}()
		synctest.Wait()
		if n := reads.Load(); n != share {
			t.Errorf("%d MiB are held for a client that reads nothing, %d MiB are allowed", n, share)
		}
		x.Close()
		<-asked
	})
}

// TestLongErrorIsText: an error that is cut to what the protocol allows is still UTF-8.
func TestLongErrorIsText(t *testing.T) {
	for _, start := range []string{"", "x", "xx"} {
		hooks := &nbdtest.Hooks{Device: nbdtest.Disk(t, 1<<20), OnFlush: func() error {
			return errors.New(start + strings.Repeat("€", nbd.MaxString))
		}}
		s := nbdtest.Serve(t, server.Config{}, server.Export{Device: hooks})
		x := enter(t, s, nbd.StructuredReplies)
		x.request(nbd.Request{Command: nbd.CmdFlush}, nil)
		var r nbd.Reply
		if err := nbd.DecodeReply(x.read(nbd.StructuredReplySize), x.mode, &r); err != nil || r.Type != nbd.ReplyError {
			t.Fatalf("%+v, %v", r, err)
		}
		text := x.read(int(r.Length))[6:]
		if len(text) < nbd.MaxString-utf8.UTFMax || len(text) > nbd.MaxString || !utf8.Valid(text) {
			t.Errorf("an error of %d bytes, UTF-8 %v", len(text), utf8.Valid(text))
		}
	}
}

// TestStalledClientsAreCutOff: when clients that read nothing, or stop in the middle of a write, hold all that
// the server may hold, they lose their connections and others go on. A slow disk is nobody's fault.
func TestStalledClientsAreCutOff(t *testing.T) {
	const unit = 1 << 20
	cfg := server.Config{MaxRequest: unit, MaxBytesPerClient: unit, MaxBytes: unit}
	read := nbd.Request{Command: nbd.CmdRead, Length: unit}
	one := read.Append(nil, false)
	write := nbd.Request{Command: nbd.CmdWrite, Length: unit}
	for name, c := range map[string]struct {
		first []byte
		slow  bool
	}{
		"reads nothing":      {first: slices.Concat(one, one)},
		"half a write":       {first: append(write.Append(nil, false), make([]byte, unit/2)...)},
		"waits for its disk": {first: one, slow: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				disk := nbdtest.Disk(t, unit)
				release := make(chan struct{})
				var once sync.Once
				hooks := &nbdtest.Hooks{Device: disk, OnRead: func(p []byte, off int64) (int, error) {
					if c.slow {
						once.Do(func() { <-release })
					}
					return disk.ReadAt(p, off)
				}}
				p := newPipes()
				s := p.serve(t, cfg, server.Export{Device: hooks})
				bad := p.connect(t).enter(nbd.StructuredReplies)
				bad.write(c.first)
				synctest.Wait() // until the budget is taken
				if c.slow {
					time.AfterFunc(3*time.Minute, func() { close(release) }) // the default of StallTimeout is 1 min
				}
				good := p.connect(t).enter(nbd.StructuredReplies)
				good.SetDeadline(time.Now().Add(10 * time.Minute))
				good.request(read, nil)
				if c.slow {
					bad.SetDeadline(time.Now().Add(10 * time.Minute))
					if a := bad.answer(0); a.errno != 0 || len(a.data) != unit {
						t.Errorf("%v, %d bytes", a.errno, len(a.data))
					}
				}
				if a := good.answer(0); a.errno != 0 || len(a.data) != unit {
					t.Fatalf("%v, %d bytes", a.errno, len(a.data))
				}
				if c.slow {
					bad.alive()
					return
				}
				synctest.Wait()
				if n := s.Stats().Connections; n != 1 {
					t.Errorf("%d connections; the stalled client is still connected", n)
				}
			})
		})
	}
}
