package server

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/platter-disk/platter/internal/bufpool"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/internal/outbox"
)

// lingerTime is how long a connection that the server ends waits for the client to read its last replies
// and hang up. Closing with unread input would make the kernel throw those replies away.
const lingerTime = time.Second

// conn is a connection. Everything without a comment belongs to its reader goroutine.
type conn struct {
	srv *Server
	log *slog.Logger
	nc  net.Conn // over TLS after STARTTLS
	raw net.Conn // the socket; interrupt and kill use it from other goroutines

	terms              // settled by the handshake
	export *export     // once it is chosen; written with the server's mu, which others read it with
	meta   metaRequest // what its contexts were selected for
	fixed  bool        // the client speaks fixed newstyle
	zeroes bool        // the client wants padding after EXPORT_NAME
	secure bool        // TLS is on
	option []byte

	out   *outbox.Queue
	batch *bufpool.Buffer // replies that were not handed to out yet

	budget    *budget
	ready     atomic.Bool  // out and budget are there for other goroutines to look at
	waiting   atomic.Bool  // for the server's budget
	cut       *time.Timer  // while it waits: cuts the connections of those who stall
	receiving atomic.Int64 // when a large payload began to arrive, Unix nanoseconds; 0 when none does
	ending    atomic.Bool  // drain was called
	killed    atomic.Bool
	work      chan *request // closed when the reader ends
	idle      atomic.Int32  // workers that wait for work, less what was queued for them
	started   int           // workers
	workers   sync.WaitGroup

	slowWrites int // writes still to be handed off because one in line was slow
	slowRun    int // how many the next slow one hands off

	counters counters // atomics
}

func newConn(s *Server, nc net.Conn) *conn {
	log := s.cfg.Logger
	if a := nc.RemoteAddr(); a != nil && a.String() != "" {
		log = log.With("client", a.String())
	}
	return &conn{srv: s, log: log, nc: nc, raw: nc}
}

// run is the whole life of a connection.
func (c *conn) run() {
	defer c.raw.Close()
	if c.serveClient() {
		c.linger()
	}
}

// serveClient serves the client from the greeting to the last reply, and tells whether to linger. When it returns the
// connection does not use its export any more, and the client can know.
func (c *conn) serveClient() (linger bool) {
	defer func() {
		if c.export != nil {
			c.export.users.Done()
		}
	}()
	c.setDeadline(time.Now().Add(c.srv.cfg.HandshakeTimeout))
	ok, err := c.negotiate()
	if err != nil {
		c.srv.failedHandshakes.log(c.log, "error", err)
	}
	if err != nil || !ok {
		return false
	}
	c.setDeadline(time.Time{})
	c.log = c.log.With("export", c.export.Name)
	c.log.Debug("nbd: client connected", "replies", modeNames[c.mode], "tls", c.secure, "contexts", len(c.contexts))

	c.out = outbox.New(c.nc)
	c.cut = time.AfterFunc(c.srv.cfg.StallTimeout, func() {
		if c.waiting.Load() {
			c.srv.cutStalled()
			c.cut.Reset(c.srv.cfg.StallTimeout)
		}
	})
	c.cut.Stop()
	c.budget = newBudget(int64(c.srv.cfg.MaxRequestsPerClient), c.srv.cfg.MaxBytesPerClient)
	c.ready.Store(true)
	c.work = make(chan *request, c.srv.cfg.MaxRequestsPerClient)
	err = c.transmit()
	close(c.work)
	c.workers.Wait()
	if c.batch != nil {
		c.batch.Put()
	}
	sent := c.out.Flush()
	switch {
	case err == nil:
		c.log.Debug("nbd: client disconnected")
	case c.ending.Load():
		c.log.Debug("nbd: connection shut down")
	case sent != nil:
		c.srv.untaken.log(c.log, "error", sent)
	case errors.Is(err, io.EOF):
		c.log.Debug("nbd: client hung up")
	default:
		c.srv.brokenRules.log(c.log, "error", err)
	}
	return c.hangUp() && err != nil && sent == nil
}

// hangUp says goodbye. It returns false when nothing more can come from the client.
func (c *conn) hangUp() bool {
	c.raw.SetDeadline(time.Now().Add(lingerTime))
	half, ok := c.nc.(interface{ CloseWrite() error }) // over TLS it sends close_notify
	if !ok {
		c.raw.Close()
		return false
	}
	return half.CloseWrite() == nil
}

// linger gives a client that does not expect the end time to read what was sent.
func (c *conn) linger() {
	buf := bufpool.Get(32 << 10)
	defer buf.Put()
	for {
		if _, err := c.raw.Read(buf.B); err != nil {
			return
		}
	}
}

// setDeadline sets the deadline of reads and writes, unless drain has set that of reads already.
func (c *conn) setDeadline(t time.Time) {
	c.raw.SetDeadline(t)
	if c.ending.Load() { // its interruption may have come just before the line above
		c.interrupt()
	}
}

// stalled is how long the client has not taken what is written to it, or not sent the rest of a payload, while
// it holds part of the budgets. Any goroutine may ask.
func (c *conn) stalled() time.Duration {
	if !c.ready.Load() || !c.budget.taken(int64(c.srv.cfg.MaxRequestsPerClient)) {
		return 0
	}
	d := c.out.Stalled()
	if since := c.receiving.Load(); since != 0 {
		d = max(d, time.Since(time.Unix(0, since)))
	}
	return d
}

// drain makes the reader begin nothing any more, and end. Once is enough: later it would only take from a client the
// time to read its last replies.
func (c *conn) drain() {
	if !c.ending.Swap(true) {
		c.interrupt()
	}
}

// interrupt makes the reader stop waiting for requests.
func (c *conn) interrupt() { c.raw.SetReadDeadline(time.Unix(1, 0)) }

// kill cuts the connection.
func (c *conn) kill() {
	c.killed.Store(true)
	c.raw.Close()
}

// modeNames are for the log.
var modeNames = [...]string{nbd.SimpleReplies: "simple", nbd.StructuredReplies: "structured", nbd.ExtendedReplies: "extended"}
