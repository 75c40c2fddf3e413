// Package server puts block devices on a socket with the NBD protocol.
//
//	s, err := server.New(server.Config{})
//	err = s.AddExport(server.Export{Device: disk})
//	l, err := server.Listen("unix", "/run/disk.sock")
//	go s.Serve(ctx, l)
//	…
//	err = s.RemoveExport(ctx, "") // answers what is in flight in one device, which the caller may then close
//	err = s.Shutdown(ctx)         // the same for all; closing the devices is the caller's
//
// docs/library.md of the repository has whole programs, with TLS and with disks that move over from a base image.
//
// # How a request is served
//
// A connection has one goroutine that reads. It takes as many requests from the socket as one system call
// gives, and serves in line what cannot block: a read that the device can answer from memory or the page
// cache (Device.TryReadAt), a small write while small writes are quick. The replies gather in a batch that is
// written when no complete request is left, or when the batch is full. What may block goes to the
// connection's workers, a fixed number of goroutines that are started when first needed; their replies join
// the same outbox. Once warm nothing is allocated and no goroutine is started for a request.
//
//	socket -> receive buffer -> reader --(cannot block)--> batch --> outbox -> socket
//	                               \-----(may block)-> worker ----/
//
// # Bounds
//
// [Config] bounds what a client can make the server hold: the size of a request, the requests and bytes in
// flight for a connection and for the whole server, the connections, the handshake's duration and the size
// of an option. A client that stops reading its replies, or stops in the middle of a request, holds no more
// than its connection's share, and loses its connection when others have to wait for that (StallTimeout).
// Nor can clients fill the log: of each kind of line that they can cause the first ones are written, and then a
// count (loglimit.go).
//
// negotiate.go is the handshake, validate.go the one place that judges requests, transmit.go the reader,
// worker.go and blockstatus.go the rest of the work.
package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// TLSMode says whether clients may or must encrypt.
type TLSMode uint8

// The modes. With TLSAllowed it is the client's choice, so a man in the middle can choose for it.
const (
	TLSOff TLSMode = iota
	TLSAllowed
	TLSRequired
)

// Config is what a server is told. The zero value of each field means its default.
type Config struct {
	Logger *slog.Logger // default: slog.Default()

	TLS       TLSMode
	TLSConfig *tls.Config // with at least a certificate; RequireClientCertificates makes it verify clients. Required unless TLSOff.

	// OnIdle is called each time the last connection has ended, if a client has begun to use an export since the
	// call before; one that only lists exports, or fails to connect, does not. It must not wait for Shutdown, but may
	// for RemoveExport.
	OnIdle func()

	MaxRequest           int           // bytes of one read or write; 64 KiB to 1 GiB, default 32 MiB
	MaxRequestsPerClient int           // requests in flight on a connection, default 256
	MaxBytesPerClient    int64         // bytes they hold, default 64 MiB, at least MaxRequest
	MaxRequests          int           // the same for the whole server, default 4096
	MaxBytes             int64         // default 512 MiB, at least MaxRequest
	MaxConnections       int           // at a time; further ones are closed at once; default 128
	Workers              int           // goroutines of a connection for what may block, default 32
	HandshakeTimeout     time.Duration // from accepting a connection to the transmission phase, default 30 s
	StallTimeout         time.Duration // how long a client may leave a reply untaken, or a write half sent, while another waits for MaxBytes or MaxRequests; default 1 min
	MaxOption            int           // bytes of one option's data; 8 KiB to 1 MiB, default 64 KiB
}

func (c *Config) setDefaults() error {
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.TLS > TLSRequired {
		return fmt.Errorf("nbd server: TLS mode %d, expected TLSOff, TLSAllowed or TLSRequired", c.TLS)
	}
	if c.TLS != TLSOff && c.TLSConfig == nil {
		return errors.New("nbd server: TLS is asked for, but TLSConfig is not set")
	}
	for _, f := range []struct {
		name            string
		value           *int
		std, least, top int
	}{
		{"MaxRequest", &c.MaxRequest, 32 << 20, 64 << 10, 1 << 30},
		{"MaxRequestsPerClient", &c.MaxRequestsPerClient, 256, 1, 1 << 16},
		{"MaxRequests", &c.MaxRequests, 4096, 1, 1 << 24},
		{"MaxConnections", &c.MaxConnections, 128, 1, 1 << 20},
		{"Workers", &c.Workers, 32, 1, 1 << 12},
		{"MaxOption", &c.MaxOption, 64 << 10, 8 << 10, 1 << 20},
	} {
		if *f.value == 0 {
			*f.value = f.std
		}
		if *f.value < f.least || *f.value > f.top {
			return fmt.Errorf("nbd server: %s is %d, expected %d to %d", f.name, *f.value, f.least, f.top)
		}
	}
	for _, f := range []struct {
		name  string
		value *int64
		std   int64
	}{
		{"MaxBytesPerClient", &c.MaxBytesPerClient, 64 << 20},
		{"MaxBytes", &c.MaxBytes, 512 << 20},
	} {
		if *f.value == 0 {
			*f.value = max(f.std, int64(c.MaxRequest))
		}
		if *f.value < int64(c.MaxRequest) {
			return fmt.Errorf("nbd server: %s is %d, expected at least MaxRequest, %d", f.name, *f.value, c.MaxRequest)
		}
	}
	for _, f := range []struct {
		name  string
		value *time.Duration
		std   time.Duration
	}{
		{"HandshakeTimeout", &c.HandshakeTimeout, 30 * time.Second},
		{"StallTimeout", &c.StallTimeout, time.Minute},
	} {
		if *f.value == 0 {
			*f.value = f.std
		}
		if *f.value < 0 {
			return fmt.Errorf("nbd server: %s is %v, expected more than 0", f.name, *f.value)
		}
	}
	return nil
}

// ErrShutdown is returned by Serve and AddExport after Shutdown.
var ErrShutdown = errors.New("nbd server: shut down")

// Server serves exports on any number of listeners. Its methods are safe for concurrent use.
type Server struct {
	cfg      Config
	budget   *budget // of all connections
	draining atomic.Bool

	mu        sync.Mutex
	exports   []*export
	listeners map[net.Listener]struct{}
	conns     map[*conn]struct{}
	stats     Stats // of connections that ended
	used      bool  // a connection that ended reached the transmission phase, and OnIdle was not called since
	done      sync.WaitGroup

	// What clients can cause.
	refused, failedHandshakes, brokenRules, untaken *logLimit
}

// New returns a server without exports.
func New(cfg Config) (*Server, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	return &Server{
		cfg:       cfg,
		budget:    newBudget(int64(cfg.MaxRequests), cfg.MaxBytes),
		listeners: map[net.Listener]struct{}{},
		conns:     map[*conn]struct{}{},

		refused:          newLogLimit(cfg.Logger, slog.LevelWarn, "nbd: connection refused, too many"),
		failedHandshakes: newLogLimit(cfg.Logger, slog.LevelInfo, "nbd: handshake failed"),
		brokenRules:      newLogLimit(cfg.Logger, slog.LevelWarn, "nbd: connection ended"),
		untaken:          newLogLimit(cfg.Logger, slog.LevelInfo, "nbd: client took no more replies"),
	}, nil
}

// Serve accepts connections on l until ctx ends or Shutdown is called, then closes l. Connections that were
// accepted go on until their clients leave or Shutdown. It returns nil after Shutdown, ctx's error when ctx
// ended, or the listener's error.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	s.mu.Lock()
	if s.draining.Load() {
		s.mu.Unlock()
		return errors.Join(ErrShutdown, l.Close())
	}
	s.listeners[l] = struct{}{}
	s.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer func() {
		stop()
		l.Close()
		s.mu.Lock()
		delete(s.listeners, l)
		s.mu.Unlock()
	}()

	pause := time.Duration(0)
	for {
		nc, err := l.Accept()
		switch {
		case err == nil:
			pause = 0
			s.accept(nc)
		case s.draining.Load():
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, net.ErrClosed):
			return err
		default: // out of file descriptors, say: the listener may recover
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			s.cfg.Logger.Warn("nbd: accept failed", "error", err, "retry", pause)
			select {
			case <-time.After(pause):
			case <-ctx.Done():
			}
		}
	}
}

// accept starts the goroutine of a connection, or closes it when there are too many.
func (s *Server) accept(nc net.Conn) {
	c := newConn(s, nc)
	s.mu.Lock()
	refuse := len(s.conns) >= s.cfg.MaxConnections
	if refuse || s.draining.Load() {
		s.stats.Refused++
		s.mu.Unlock()
		if refuse {
			s.refused.log(c.log, "limit", s.cfg.MaxConnections)
		}
		nc.Close()
		return
	}
	s.conns[c] = struct{}{}
	s.stats.Accepted++
	s.done.Add(1)
	s.mu.Unlock()
	go func() {
		defer s.done.Done()
		c.run()
		s.mu.Lock()
		delete(s.conns, c)
		c.counters.addTo(&s.stats)
		s.used = s.used || c.ready.Load()
		idle := s.used && len(s.conns) == 0
		if idle {
			s.used = false
		}
		s.mu.Unlock()
		if idle && s.cfg.OnIdle != nil {
			s.cfg.OnIdle()
		}
	}()
}

// cutStalled cuts the connections of clients that keep others waiting. It is called while somebody waits for
// the server's budget.
func (s *Server) cutStalled() {
	cut := map[*conn]time.Duration{}
	s.mu.Lock()
	for c := range s.conns {
		if stalled := c.stalled(); stalled >= s.cfg.StallTimeout {
			cut[c] = stalled
			c.kill()
		}
	}
	s.mu.Unlock()
	s.budget.wake()
	for c, stalled := range cut { // without the lock: a log may be slow, and may ask the server something
		s.cfg.Logger.Warn("nbd: connection cut: others wait for what it holds", "client", c.raw.RemoteAddr(), "stalled", stalled)
	}
}

// Shutdown stops accepting, lets every connection finish and answer what it has begun, answers what it has
// not begun with ESHUTDOWN, and closes it. When ctx ends first the connections are cut and ctx's error is
// returned; requests may then still be running in the devices, and RemoveExport waits for those in one of them.
// A second call waits like the first.
func (s *Server) Shutdown(ctx context.Context) error {
	defer s.summarize()
	s.mu.Lock()
	s.draining.Store(true)
	for c := range s.connsOf(nil) {
		c.drain()
	}
	for l := range s.listeners {
		l.Close()
	}
	s.mu.Unlock()
	return s.settle(ctx, nil, &s.done)
}

// connsOf are the connections that use an export, or all of them if it is nil. The caller holds mu.
func (s *Server) connsOf(x *export) iter.Seq[*conn] {
	return func(yield func(*conn) bool) {
		for c := range s.conns {
			if (x == nil || c.export == x) && !yield(c) {
				return
			}
		}
	}
}

// settle waits for the end of connections that were told to drain: those that connsOf gives for x, which users counts.
// When ctx ends first it cuts them and returns ctx's error.
func (s *Server) settle(ctx context.Context, x *export, users *sync.WaitGroup) error {
	finished := make(chan struct{})
	go func() {
		users.Wait()
		close(finished)
	}()
	select {
	case <-finished:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	for c := range s.connsOf(x) {
		c.kill()
	}
	s.mu.Unlock()
	s.budget.wake()
	return ctx.Err()
}

// summarize logs how many lines have been left out of the log.
func (s *Server) summarize() {
	for _, l := range []*logLimit{s.refused, s.failedHandshakes, s.brokenRules, s.untaken} {
		l.summarize()
	}
	for _, x := range s.list() {
		x.failures.summarize()
	}
}
