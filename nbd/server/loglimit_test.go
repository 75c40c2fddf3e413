package server

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestLogLimit: the first lines of a window are written, the others are counted, and the count comes although
// nothing else happens.
func TestLogLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		logger := slog.New(slog.NewTextHandler(&out, nil))
		l := newLogLimit(logger, slog.LevelWarn, "it failed")
		for _, round := range []struct {
			lines, written int
			count          string
		}{
			{3, 3, ""}, {logLines, logLines, ""}, {logLines + 1, logLines, "more=1\n"}, {5000, logLines, "more=4995\n"}, {1, 1, ""},
		} {
			out.Reset()
			for range round.lines {
				l.log(logger.With("client", "guest"), "error", errors.New("no luck"))
			}
			time.Sleep(logWindow)
			synctest.Wait()
			if n := strings.Count(out.String(), `level=WARN msg="it failed" client=guest error="no luck"`); n != round.written {
				t.Errorf("of %d lines %d were written, want %d", round.lines, n, round.written)
			}
			if !strings.HasSuffix(out.String(), round.count) || strings.Contains(out.String(), "more=") != (round.count != "") {
				t.Errorf("%d lines end with %q, want %q", round.lines, out.String(), round.count)
			}
		}
		out.Reset()
		for range logLines + 2 {
			l.log(logger)
		}
		l.summarize()
		if !strings.HasSuffix(out.String(), "more=2\n") {
			t.Errorf("at the end: %q", out.String())
		}
		l.summarize()
		time.Sleep(2 * logWindow)
		if strings.Count(out.String(), "more=") != 1 {
			t.Errorf("the count was written again: %q", out.String())
		}
	})
}
