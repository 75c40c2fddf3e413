package server_test

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/internal/nbdtest"
	"github.com/platter-disk/platter/nbd/server"
)

// TestLogIsBounded: a client cannot fill the log, neither with requests that fail nor with connections that do.
func TestLogIsBounded(t *testing.T) {
	var log bytes.Buffer
	hooks := &nbdtest.Hooks{
		Device:  nbdtest.Disk(t, 1<<20),
		OnWrite: func([]byte, int64) (int, error) { return 0, errors.New("worn out") },
		OnFlush: func() error { return errors.New("worn out") },
	}
	s := nbdtest.Serve(t, server.Config{Logger: slog.New(slog.NewTextHandler(&log, nil))},
		server.Export{Name: "bad", Device: hooks, Default: true}, server.Export{Name: "other", Device: hooks})
	for range 10 { // in line, by a worker; on new connections, too
		x := enter(t, s, nbd.StructuredReplies)
		for range 20 {
			x.do(nbd.Request{Command: nbd.CmdWrite, Length: 512}, make([]byte, 512))
			x.do(nbd.Request{Command: nbd.CmdFlush}, nil)
		}
		x.Close()
	}
	c, err := nbd.Dial(s.URI("other"), nbd.ClientOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if c.Sync() == nil {
		t.Error("a flush succeeded")
	}
	c.Close()
	const broken = 30
	for range broken {
		x := enter(t, s, nbd.StructuredReplies)
		x.write(bytes.Repeat([]byte{0xff}, 64))
		x.ended()
		x.Close()
	}
	for range broken {
		x := connect(t, s)
		x.write(bytes.Repeat([]byte{0xff}, 64))
		x.ended()
		x.Close()
	}
	s.Stop()
	for _, c := range []struct {
		line  string
		least int
		most  int
	}{
		{`msg="nbd: request failed" client=@ export=bad command=`, 5, 5},
		{`msg="nbd: request failed, and more that are not logged" export=bad more=395`, 1, 1},
		{`msg="nbd: request failed" client=@ export=other command=FLUSH`, 1, 1},
		{`msg="nbd: connection ended"`, 1, 5},
		{`msg="nbd: connection ended, and more`, 1, 1},
		{`msg="nbd: handshake failed"`, 1, 5},
		{`msg="nbd: handshake failed, and more`, 1, 1},
	} {
		if n := strings.Count(log.String(), c.line); n < c.least || n > c.most {
			t.Errorf("%d lines with %s, want %d to %d", n, c.line, c.least, c.most)
		}
	}
	if n := strings.Count(log.String(), "\n"); n > 20 {
		t.Errorf("%d lines in the log:\n%.3000s", n, &log)
	}
}
