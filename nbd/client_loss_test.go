package nbd_test

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
	"time"

	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/internal/nbdtest"
	"github.com/platter-disk/platter/nbd/server"
)

// TestClientWriterIsNotRepeated: a write whose connection was lost is not sent again over another one. The
// server may still be about to carry out the first, and would then undo whatever was written after the second.
func TestClientWriterIsNotRepeated(t *testing.T) {
	var writes, flushes atomic.Int64
	f := fake{size: 1 << 20, flags: nbd.CanMultiConn | nbd.SendFlush, serve: func(c net.Conn, _ nbd.ReplyMode, r *nbd.Request, _ []byte) error {
		switch r.Command {
		case nbd.CmdWrite:
			if writes.Add(1) == 1 {
				return net.ErrClosed
			}
		case nbd.CmdFlush:
			flushes.Add(1)
		}
		_, err := c.Write(nbd.AppendSimpleReply(nil, r.Cookie, 0))
		return err
	}}
	c := dial(t, f.start(t), nbd.ClientOptions{Connections: 3})
	if c.Connections() != 3 {
		t.Fatalf("%d connections", c.Connections())
	}
	if _, err := c.WriteAt(make([]byte, 512), 0); !errors.Is(err, nbd.ErrConnectionLost) {
		t.Errorf("write: %v", err)
	}
	for range 6 { // whichever connection it would take
		if err := c.Sync(); !errors.Is(err, nbd.ErrConnectionLost) {
			t.Errorf("sync after a write was lost: %v", err)
		}
	}
	if w, f := writes.Load(), flushes.Load(); w != 1 || f != 0 {
		t.Errorf("the server saw %d writes and %d flushes, want 1 and 0", w, f)
	}
}

// TestClientIdleConnectionLost: a connection that is lost while it has nothing to do ends a writer, too: what
// was written over it may be gone, and a flush over another one must not pass for one of everything.
func TestClientIdleConnectionLost(t *testing.T) {
	var mu sync.Mutex
	var used []net.Conn // in the order of their first request
	gone := make(chan net.Conn, 2)
	f := fake{gone: func(c net.Conn) { gone <- c }, size: 1 << 20, flags: nbd.CanMultiConn | nbd.SendFlush, serve: func(c net.Conn, _ nbd.ReplyMode, r *nbd.Request, _ []byte) error {
		mu.Lock()
		if !slices.Contains(used, c) {
			used = append(used, c)
		}
		mu.Unlock()
		_, err := c.Write(nbd.AppendSimpleReply(nil, r.Cookie, 0))
		return err
	}}
	c := dial(t, f.start(t), nbd.ClientOptions{Connections: 2})
	for range 2 {
		if _, err := c.WriteAt(make([]byte, 512), 0); err != nil {
			t.Fatal(err)
		}
	}
	mu.Lock()
	if len(used) != 2 {
		t.Fatalf("%d connections were used", len(used))
	}
	lost := used[1] // the next request would take the other one
	mu.Unlock()
	if err := lost.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	select {
	case c := <-gone: // the client has noticed, and closed its side
		if c != lost {
			t.Fatal("the other connection has ended")
		}
	case <-time.After(testenv.Patience):
		t.Fatal("the client does not notice")
	}
	for range 3 {
		if err := c.Sync(); !errors.Is(err, nbd.ErrConnectionLost) {
			t.Errorf("sync: %v", err)
		}
	}
}

// TestClientConnectionsMustAgree: a second connection on which the server describes another export is not used.
func TestClientConnectionsMustAgree(t *testing.T) {
	const size, flags = 1 << 20, nbd.CanMultiConn | nbd.SendFlush
	for name, say := range map[string][]byte{
		"size":  nbd.AppendInfoExport(nil, size/2, nbd.HasFlags|flags),
		"flags": nbd.AppendInfoExport(nil, size, nbd.HasFlags|nbd.SendFlush), // a flush covers this connection alone
	} {
		var connections atomic.Int64
		f := fake{size: size, flags: flags, serve: func(c net.Conn, _ nbd.ReplyMode, r *nbd.Request, _ []byte) error {
			_, err := c.Write(nbd.AppendSimpleReply(nil, r.Cookie, 0))
			return err
		}}
		f.option = func(c net.Conn, h nbd.OptionHeader) bool {
			if h.Code != nbd.OptGo || connections.Add(1) == 1 {
				return false
			}
			c.Write(nbd.AppendOptionReply(nil, h.Code, nbd.RepInfo, say))
			c.Write(nbd.AppendOptionReply(nil, h.Code, nbd.RepAck, nil))
			return true
		}
		c := dial(t, f.start(t), nbd.ClientOptions{Connections: 2})
		if c.Connections() != 1 {
			t.Errorf("%s: %d connections are used, want 1", name, c.Connections())
		}
		if _, err := c.WriteAt(make([]byte, 512), 1<<20-512); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestClientTimeoutWhileSending: the time for an answer runs while a server takes nothing of what is sent, too.
func TestClientTimeoutWhileSending(t *testing.T) {
	release := make(chan struct{})
	f := fake{size: 1 << 30}
	f.option = func(c net.Conn, h nbd.OptionHeader) bool {
		if h.Code != nbd.OptGo {
			return false
		}
		c.Write(nbd.AppendOptionReply(nil, h.Code, nbd.RepInfo, nbd.AppendInfoExport(nil, f.size, nbd.HasFlags)))
		c.Write(nbd.AppendOptionReply(nil, h.Code, nbd.RepAck, nil))
		<-release
		return true
	}
	uri := f.start(t)
	t.Cleanup(func() { close(release) }) // before the server ends
	c := dial(t, uri, nbd.ClientOptions{RequestTimeout: 100 * time.Millisecond})
	result := make(chan error, 1)
	go func() { _, err := c.WriteAt(make([]byte, 8<<20), 0); result <- err }()
	select {
	case err := <-result:
		if !errors.Is(err, nbd.ErrConnectionLost) || !strings.Contains(err.Error(), "did not answer in time") {
			t.Errorf("got %v", err)
		}
	case <-time.After(testenv.Patience):
		t.Error("the write waits for a server that reads nothing")
	}
}

// TestConnectionLostThroughImage: who uses a disk in an export can tell that the connection was lost, too, and so can
// its later requests, as the image refuses changes from then on with that error.
func TestConnectionLostThroughImage(t *testing.T) {
	ctx := context.Background()
	for _, format := range []string{"raw", "qcow2"} {
		s := nbdtest.Serve(t, server.Config{}, server.Export{Device: nbdtest.Disk(t, 4<<20)})
		if format == "qcow2" {
			var o image.CreateOptions
			o.Size = 2 << 20
			if err := image.Create(ctx, format, s.URI(""), o); err != nil {
				t.Fatal(err)
			}
		}
		disk, err := image.Open(ctx, s.URI(""), image.Options{Format: format})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := disk.WriteAt(make([]byte, 4096), 0); err != nil {
			t.Error(err)
		}
		if err := s.RemoveExport(ctx, ""); err != nil {
			t.Error(err)
		}
		_, read := disk.ReadAt(make([]byte, 4096), 0)
		_, write := disk.WriteAt(make([]byte, 4096), 0)
		for what, err := range map[string]error{"read": read, "write": write, "flush": disk.Flush(), "second flush": disk.Flush(), "close": disk.Close()} {
			if !errors.Is(err, nbd.ErrConnectionLost) {
				t.Errorf("%s, %s: %v", format, what, err)
			}
		}
	}
}

// TestClientClosedWhileReconnecting: who closes a client that is trying to connect again is told that it was closed,
// not that the connection was lost.
func TestClientClosedWhileReconnecting(t *testing.T) {
	lost := make(chan struct{})
	logger := slog.New(tell{slog.DiscardHandler, lost})
	s := nbdtest.Serve(t, server.Config{}, server.Export{Device: nbdtest.Disk(t, 1<<20)})
	c, err := nbd.Dial(s.URI(""), nbd.ClientOptions{ReadOnly: true, ReconnectDelay: testenv.Patience, Logger: logger})
	if err != nil {
		t.Fatal(err)
	}
	s.Stop()
	result := make(chan error, 1)
	go func() { _, err := c.ReadAt(make([]byte, 1), 0); result <- err }()
	select {
	case <-lost:
	case err := <-result:
		t.Fatalf("the client does not connect again: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := <-result; !errors.Is(err, nbd.ErrClosed) || errors.Is(err, nbd.ErrConnectionLost) {
		t.Errorf("got %v", err)
	}
}

// tell closes a channel when something is logged, once.
type tell struct {
	slog.Handler
	logged chan struct{}
}

func (tell) Enabled(context.Context, slog.Level) bool { return true }

func (h tell) Handle(context.Context, slog.Record) error { close(h.logged); return nil }
