package nbd_test

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/nbd"
)

// TestClientSilent: a server that lets requests wait is silent from when it last sent a byte, one that nobody asks
// anything is not, and Close ends what waits.
func TestClientSilent(t *testing.T) {
	const pieces, piece, pause = 4, 1024, 50 * time.Millisecond
	hang, next := make(chan struct{}), make(chan struct{})
	defer close(hang)
	f := fake{size: 1 << 20, serve: func(c net.Conn, mode nbd.ReplyMode, r *nbd.Request, _ []byte) error {
		if r.Offset > 0 {
			<-hang
			return nil
		}
		b := nbd.AppendReadReply(nil, mode, r)
		b = append(b, make([]byte, r.Length)...)
		for ; len(b) > 0; b = b[min(len(b), piece):] { // slow, not silent
			select {
			case <-next:
			case <-hang:
				return nil
			}
			if _, err := c.Write(b[:min(len(b), piece)]); err != nil {
				return err
			}
		}
		return nil
	}}
	c := dial(t, f.start(t), nbd.ClientOptions{ReadOnly: true})
	time.Sleep(pause)
	if d := c.Silent(); d != 0 {
		t.Errorf("nobody has asked anything: silent for %v", d)
	}

	read := make(chan error, 1)
	go func() {
		_, err := c.ReadAt(make([]byte, pieces*piece), 0)
		read <- err
	}()
	for range pieces {
		testenv.Until(t, "the silence", func() bool { return c.Silent() >= pause })
		sent := time.Now()
		next <- struct{}{}
		testenv.Until(t, "a piece to end the silence", func() bool { return c.Silent() < time.Since(sent) })
	}
	next <- struct{}{} // the rest, which the head of the answer has displaced
	if err := <-read; err != nil {
		t.Fatal(err)
	}
	if d := c.Silent(); d != 0 {
		t.Errorf("everything is answered: silent for %v", d)
	}

	go func() {
		_, err := c.ReadAt(make([]byte, piece), 4096)
		read <- err
	}()
	testenv.Until(t, "the silence", func() bool { return c.Silent() >= 2*pause })
	c.Close()
	if err := <-read; !errors.Is(err, nbd.ErrClosed) {
		t.Errorf("what waited when the client was closed: %v", err)
	}
	if d := c.Silent(); d != 0 {
		t.Errorf("after Close: silent for %v", d)
	}
}

// TestClientSilentReconnecting: who connects again waits for the server as well, and Close ends that.
func TestClientSilentReconnecting(t *testing.T) {
	var lost atomic.Bool
	hang := make(chan struct{})
	defer close(hang)
	f := fake{
		size: 1 << 20,
		serve: func(net.Conn, nbd.ReplyMode, *nbd.Request, []byte) error {
			lost.Store(true)
			return net.ErrClosed
		},
		option: func(net.Conn, nbd.OptionHeader) bool {
			if lost.Load() {
				<-hang
			}
			return false
		},
	}
	c := dial(t, f.start(t), nbd.ClientOptions{ReadOnly: true})
	read := make(chan error, 1)
	go func() {
		_, err := c.ReadAt(make([]byte, 512), 0)
		read <- err
	}()
	testenv.Until(t, "the silence", func() bool { return lost.Load() && c.Silent() >= 100*time.Millisecond })
	c.Close()
	if err := <-read; err == nil {
		t.Error("a read without a server")
	}
}

// TestWatch: who watches a context is told of each client that is dialled with it, once it is open.
func TestWatch(t *testing.T) {
	f := fake{size: 1 << 20}
	uri := f.start(t)
	var seen []*nbd.Client
	ctx := nbd.Watch(t.Context(), func(c *nbd.Client) { seen = append(seen, c) })
	below, cancel := context.WithCancel(ctx)
	defer cancel()
	c, err := nbd.DialContext(below, uri, nbd.ClientOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if len(seen) != 1 || seen[0] != c || !c.ReadOnly() {
		t.Errorf("told of %v, want %p alone, read-only", seen, c)
	}
	if _, err := nbd.DialContext(below, uri+"-gone", nbd.ClientOptions{}); err == nil || len(seen) != 1 {
		t.Errorf("%v; told of %d clients, one of which is not open", err, len(seen))
	}
}
