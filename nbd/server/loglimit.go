package server

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// Of the lines of one kind, logLines are written in each logWindow.
const (
	logLines  = 5
	logWindow = 10 * time.Second
)

// logLimit writes one kind of log line that clients can cause as often as they like: the first ones, and then
// how many there were that it left out. It is safe for concurrent use.
type logLimit struct {
	logger  *slog.Logger // of the count
	level   slog.Level
	message string

	mu     sync.Mutex
	lines  int         // in this window, those that were left out included
	window *time.Timer // ends it; nil when none has begun
}

func newLogLimit(logger *slog.Logger, level slog.Level, message string) *logLimit {
	return &logLimit{logger: logger, level: level, message: message}
}

// log writes a line to logger, or counts it.
func (l *logLimit) log(logger *slog.Logger, args ...any) {
	if l.take() {
		logger.Log(context.Background(), l.level, l.message, args...)
	}
}

// take tells whether another line may be written now.
func (l *logLimit) take() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.window == nil {
		l.window = time.AfterFunc(logWindow, l.summarize)
	}
	l.lines++
	return l.lines <= logLines
}

// summarize ends the window: it writes how many lines were left out, if any were.
func (l *logLimit) summarize() {
	if more := l.end(); more > 0 {
		l.logger.Log(context.Background(), l.level, l.message+", and more that are not logged", "more", more)
	}
}

// end ends the window and returns how many lines were left out in it.
func (l *logLimit) end() (more int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.window == nil {
		return 0
	}
	l.window.Stop()
	l.window = nil
	more = max(0, l.lines-logLines)
	l.lines = 0
	return more
}
