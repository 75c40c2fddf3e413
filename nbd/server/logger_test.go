package server_test

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/internal/nbdtest"
	"github.com/platter-disk/platter/nbd/server"
)

// askingLog is a log that asks the server something with each line.
type askingLog struct {
	slog.Handler
	ask func(line string)
}

func (h askingLog) Enabled(context.Context, slog.Level) bool { return true }
func (h askingLog) WithAttrs([]slog.Attr) slog.Handler       { return h }

func (h askingLog) Handle(_ context.Context, r slog.Record) error {
	h.ask(r.Message)
	return nil
}

// TestLogMayAskServer: whatever the server logs it logs without a lock that its methods need.
func TestLogMayAskServer(t *testing.T) {
	const unit = 1 << 20
	cut := make(chan bool, 1)
	var s *nbdtest.Served
	serving := make(chan struct{})
	logger := slog.New(askingLog{slog.DiscardHandler, func(line string) {
		<-serving
		answered := make(chan struct{})
		go func() {
			defer close(answered)
			s.Stats()
		}()
		select {
		case <-answered:
		case <-time.After(testenv.Patience):
			t.Errorf("the server does not answer while it logs %q", line)
		}
		if strings.Contains(line, "connection cut") {
			select {
			case cut <- true:
			default:
			}
		}
	}})
	cfg := server.Config{Logger: logger, MaxRequest: unit, MaxBytesPerClient: unit, MaxBytes: unit, StallTimeout: 50 * time.Millisecond}
	s = nbdtest.Serve(t, cfg, server.Export{Device: nbdtest.Disk(t, unit)})
	close(serving)
	read := nbd.Request{Command: nbd.CmdRead, Length: unit}
	one := read.Append(nil, false)
	for range 2 { // one holds all there is, the other waits for it, and neither takes a reply
		enter(t, s, nbd.StructuredReplies).write(slices.Concat(one, one))
	}
	select {
	case <-cut:
	case <-time.After(testenv.Patience):
		t.Error("nobody was cut off")
	}
}
