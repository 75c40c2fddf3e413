package nbd

import (
	"context"
	"sync/atomic"
	"time"
)

// watchKey is under what a context has the function of Watch.
type watchKey struct{}

// Watch returns a context whose clients become known: DialContext, given it or one that descends from it, calls fn
// with each client that it is about to return. It is for a program that has others open its disks, and must be able
// to end the connections below them when a server answers no more (Silent, Close): a disk cannot be closed before
// what it waits for has failed. fn may be called from any goroutine.
func Watch(ctx context.Context, fn func(*Client)) context.Context {
	return context.WithValue(ctx, watchKey{}, fn)
}

// watched tells about a client that is open.
func watched(ctx context.Context, c *Client) {
	if fn, ok := ctx.Value(watchKey{}).(func(*Client)); ok {
		fn(c)
	}
}

// Silent is for how long requests have been waiting for the server without a byte from it; 0 while none waits. The
// time that a lost connection takes to be made again counts.
func (c *Client) Silent() time.Duration { return c.silence.now() }

// ReadOnly tells whether the client was told to refuse changes: its server owes it nothing that would be lost with the
// connection.
func (c *Client) ReadOnly() bool { return c.opt.ReadOnly }

// silence measures how long a server lets requests wait. Safe for concurrent use; reading it waits for nobody, as
// who is silent may be waited for with any lock held.
type silence struct {
	began   time.Time    // before the first request
	waiting atomic.Int64 // requests
	heard   atomic.Int64 // nanoseconds from began on until a byte came, a request ended, or one began while none waited
}

func (s *silence) begin() {
	if s.waiting.Load() == 0 {
		s.hear()
	}
	s.waiting.Add(1)
}

func (s *silence) end() {
	s.hear() // first: who comes next must not count from before
	s.waiting.Add(-1)
}

func (s *silence) hear() { s.heard.Store(int64(time.Since(s.began))) }

func (s *silence) now() time.Duration {
	if s.waiting.Load() == 0 {
		return 0
	}
	return max(0, time.Since(s.began)-time.Duration(s.heard.Load()))
}
