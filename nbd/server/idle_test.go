package server_test

import (
	"testing"
	"time"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/internal/nbdtest"
	"github.com/platter-disk/platter/nbd/server"
)

// TestOnIdle: the server says that it is idle when the last client that used an export has left, each time, and not
// because of clients that only ask.
func TestOnIdle(t *testing.T) {
	idle := make(chan struct{}, 100)
	s := nbdtest.Serve(t, server.Config{OnIdle: func() { idle <- struct{}{} }}, server.Export{Device: nbdtest.Disk(t, 1<<20)})
	gone := func() {
		t.Helper()
		testenv.Until(t, "the connections to end", func() bool { return s.Stats().Connections == 0 })
	}
	said := func() {
		t.Helper()
		select {
		case <-idle:
		case <-time.After(testenv.Patience):
			t.Fatal("the server does not say that it is idle")
		}
	}
	silent := func(when string) {
		t.Helper()
		time.Sleep(20 * time.Millisecond)
		if len(idle) > 0 {
			t.Fatalf("the server says that it is idle %s", when)
		}
	}
	ask := func() {
		t.Helper()
		if _, err := nbd.List(s.URI(""), nbd.ClientOptions{}); err != nil {
			t.Fatal(err)
		}
		gone()
	}
	ask()
	silent("after a list of exports")
	for range 2 {
		a, b := enter(t, s, nbd.StructuredReplies), enter(t, s, nbd.SimpleReplies)
		a.request(nbd.Request{Command: nbd.CmdDisc}, nil)
		a.ended()
		silent("while another client is there")
		b.Close() // without a goodbye
		said()
		gone()
		ask()
		silent("again")
	}
}
