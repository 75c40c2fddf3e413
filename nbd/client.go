package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/platter-disk/platter/internal/bufpool"
	"github.com/platter-disk/platter/storage"
)

// ErrReadOnly is wrapped by the error of Dial when an export that only can be read is opened for writing.
var ErrReadOnly = errors.New("the server offers the export read-only")

// ErrConnectionLost is wrapped by the error of a request that has no answer because its connection ended: see Client.
var ErrConnectionLost = errors.New("the connection was lost")

// ErrClosed is wrapped by every request after Close.
var ErrClosed = errors.New("the connection to the NBD server was closed")

// ClientOptions say how to use an export. The zero value of each field means its default.
type ClientOptions struct {
	// ReadOnly refuses changes, and lets the client connect again when a connection is lost: the reads that
	// were under way are sent once more. For writing, a lost connection is final, because nobody knows
	// which of the writes that were not flushed took place.
	ReadOnly bool

	// TLS encrypts the connection, whatever the scheme of the URI. An nbds URI without it uses the system's
	// certificate authorities. The URI's tls parameters are applied to a copy.
	TLS *tls.Config

	// Connections to use, where the server allows several (CanMultiConn); default 1, at most 64.
	Connections int

	ConnectTimeout time.Duration // for connecting and the handshake, default 30 s
	RequestTimeout time.Duration // for the answer to a request, after which the connection counts as lost; default none
	ReconnectDelay time.Duration // how long reads wait for a lost connection to come back, default 30 s; negative: not at all

	Logger *slog.Logger // default slog.Default()
}

func (o *ClientOptions) setDefaults() error {
	if o.Connections == 0 {
		o.Connections = 1
	}
	if o.ConnectTimeout == 0 {
		o.ConnectTimeout = 30 * time.Second
	}
	if o.ReconnectDelay == 0 {
		o.ReconnectDelay = 30 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.Connections < 1 || o.Connections > 64 {
		return fmt.Errorf("NBD client: Connections is %d, expected 1 to 64", o.Connections)
	}
	if o.ConnectTimeout < 0 || o.RequestTimeout < 0 {
		return fmt.Errorf("NBD client: ConnectTimeout is %v and RequestTimeout %v, expected more than 0", o.ConnectTimeout, o.RequestTimeout)
	}
	return nil
}

// Client is an export of an NBD server as a storage.File of fixed size. Any number of requests may be under
// way at once; they share the connections.
//
// It answers no read in line (TryReadAt), reserves no space (Allocate), and DataExtents reports what the
// server says reads as zeros as holes. PunchHole and ZeroRange are WRITE_ZEROES without and with NO_HOLE.
//
// Errors tell three things apart. A *RemoteError is the server's answer to a request. ErrConnectionLost says that there
// was none, and never will be: the server hung up, did not answer within RequestTimeout, or broke the protocol, which
// the rest of the error tells. It is what every request of a client that may write gets from then on: dial again, and
// repeat all changes since the last Sync. One that only reads gets it when ReconnectDelay is over, and later requests
// try again. A server that comes back with an export that is not the same, of another size say, is an error of its own:
// whoever dials again must know. ErrClosed says that Close was called. Errors of Dial are none of these.
type Client struct {
	uri    URI
	name   string
	opt    ClientOptions
	export ExportInfo
	size   int64
	block  int64        // minimum block size
	limit  int64        // longest payload
	always CommandFlags // of every change: FUA where the server has no flush

	silence silence

	next  atomic.Uint32   // which connection is next
	edges sync.RWMutex    // held exclusively by changes of parts of minimum blocks, shared by others
	ctx   context.Context // ends with Close
	end   context.CancelFunc

	mu        sync.Mutex // connections; a connection attempt holds it
	links     []*link
	lostSince time.Time // when the first of the present failures was noticed; zero when all is well
	lastTry   time.Time // to connect again
	err       error     // sticky
}

// maxTries is how often a request is sent when its connections get lost: it may be the request that ends them.
const maxTries = 5

var _ storage.File = (*Client)(nil)

// Dial connects to the export that a URI names.
func Dial(uri string, o ClientOptions) (*Client, error) {
	return DialContext(context.Background(), uri, o)
}

// DialContext is Dial that gives up when ctx ends. Once it has returned, ctx does not matter any more.
func DialContext(ctx context.Context, uri string, o ClientOptions) (*Client, error) {
	u, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	if err := o.setDefaults(); err != nil {
		return nil, err
	}
	c := &Client{uri: u, name: uri, opt: o, silence: silence{began: time.Now()}}
	c.ctx, c.end = context.WithCancel(context.Background())
	stop := context.AfterFunc(ctx, c.end)
	err = c.open()
	if !stop() {
		err = ctx.Err()
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("%s: %w", uri, err)
	}
	watched(ctx, c)
	return c, nil
}

// open makes the connections.
func (c *Client) open() error {
	o := &c.opt
	first, err := c.connect()
	if err != nil {
		return err
	}
	c.links = []*link{first}
	c.export = first.export
	c.block, c.limit = int64(c.export.Blocks.Minimum), int64(min(c.export.Blocks.Maximum, DefaultMaxPayload))
	c.size = c.export.Size - c.export.Size%c.block // what lies beyond cannot be addressed
	if !o.ReadOnly && c.export.Flags&ReadOnly != 0 {
		return ErrReadOnly
	}
	if c.export.Flags&(SendFlush|SendFUA) == SendFUA {
		c.always = CmdFlagFUA
	}
	for len(c.links) < o.Connections && c.export.Flags&CanMultiConn != 0 {
		l, err := c.connect()
		if err == nil && (l.export.Flags != c.export.Flags || !c.isSame(l.export)) {
			err = errors.New("the server describes another export on it")
			l.close(time.Now().Add(goodbyeTime))
		}
		if err != nil {
			o.Logger.Warn("nbd: fewer connections than asked for", "uri", c.name, "connections", len(c.links), "error", err)
			break
		}
		c.links = append(c.links, l)
	}
	return nil
}

// connect makes one connection.
func (c *Client) connect() (*link, error) {
	h, err := dial(c.ctx, c.uri, &c.opt)
	if err != nil {
		return nil, err
	}
	if err := h.choose(c.uri.Export); err != nil {
		h.abort()
		return nil, fmt.Errorf("export %q: %w", c.uri.Export, err)
	}
	return newLink(h, c.opt.RequestTimeout, &c.silence), nil
}

// Export is what the server told about the export when the client connected.
func (c *Client) Export() ExportInfo { return c.export }

// Connections is how many connections the client uses.
func (c *Client) Connections() int { return len(c.links) }

// isSame tells whether x is what requests to the export rely on.
func (c *Client) isSame(x ExportInfo) bool {
	return x.Size == c.export.Size && x.Blocks == c.export.Blocks && len(x.Contexts) == len(c.export.Contexts) && x.Replies == c.export.Replies
}

// link returns a connection that works. For reading only it connects again if it must. For writing, one lost
// connection ends all of them: a write that may still be on its way to the disk must not be repeated over
// another, nor a flush of the others pass for one of what it carried.
func (c *Client) link() (*link, error) {
	i := int(c.next.Add(1) % uint32(len(c.links)))
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return nil, c.err
	}
	if !c.opt.ReadOnly {
		for _, l := range c.links {
			if lost := l.failed(); lost != nil {
				return nil, c.fail(lost)
			}
		}
	}
	l := c.links[i]
	lost := l.failed()
	switch {
	case lost == nil:
		return l, nil
	case c.opt.ReconnectDelay < 0:
		return nil, c.fail(lost)
	}
	if c.lostSince.IsZero() {
		c.lostSince = time.Now()
		c.opt.Logger.Warn("nbd: connection lost, connecting again", "uri", c.name, "error", lost)
	}
	l, err := c.reconnect()
	switch {
	case err == nil:
	case c.err != nil: // what is there now is another export
		return nil, c.err
	case c.ctx.Err() != nil: // Close waits for mu
		return nil, fmt.Errorf("%s: %w", c.name, ErrClosed)
	default:
		return nil, fmt.Errorf("%s: %w (%w) and could not be made again: %w", c.name, ErrConnectionLost, lost, err)
	}
	c.opt.Logger.Info("nbd: connected again", "uri", c.name)
	c.links[i] = l
	c.lostSince = time.Time{}
	return l, nil
}

// fail makes the loss of a connection final. The caller holds mu.
func (c *Client) fail(lost error) error {
	c.err = fmt.Errorf("%s: %w: %w", c.name, ErrConnectionLost, lost)
	return c.err
}

// reconnect tries until the delay is over; from then on each request may cause one more attempt, at most
// one a second.
func (c *Client) reconnect() (*link, error) {
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		inTime := time.Since(c.lostSince) < c.opt.ReconnectDelay
		if !inTime && time.Since(c.lastTry) < time.Second {
			return nil, errors.New("tried a moment ago")
		}
		l, err := c.connect()
		c.lastTry = time.Now()
		if err == nil {
			if now := l.export; !c.isSame(now) {
				l.fail(ErrClosed)
				c.err = fmt.Errorf("%s: the export is not what it was: %d bytes, before %d; block sizes %v, before %v", c.name, now.Size, c.export.Size, now.Blocks, c.export.Blocks)
				return nil, c.err
			}
			return l, nil
		}
		if !inTime {
			return nil, err
		}
		select {
		case <-time.After(pause):
		case <-c.ctx.Done():
			return nil, ErrClosed
		}
	}
}

// do carries a call out on one of the connections.
func (c *Client) do(cl *call) error {
	c.silence.begin()
	defer c.silence.end()
	for try := 1; ; try++ {
		l, err := c.link()
		if err != nil {
			return err
		}
		lost := l.do(cl)
		if lost == nil {
			break
		}
		switch {
		case c.ctx.Err() != nil:
			return fmt.Errorf("%s: %w", c.name, ErrClosed)
		case try == maxTries:
			return fmt.Errorf("%s: %w: %w", c.name, ErrConnectionLost, lost)
		}
		cl.reset() // link says whether there will be another try
	}
	if cl.remote != 0 {
		return fmt.Errorf("%s: %w", c.name, &RemoteError{Command: cl.Command, Offset: cl.Offset, Length: cl.Length, Errno: cl.remote, Message: cl.message})
	}
	return nil
}

// request carries out a request that has no data, or whose data is a slice of the caller's.
func (c *Client) request(command Command, flags CommandFlags, p []byte, off, length int64) error {
	cl := newCall(command, flags, off, length)
	defer cl.free()
	cl.data = p
	return c.do(cl)
}

// pieces calls fn for the pieces of a range that suit the server: at most limit bytes each.
func pieces(off, length, limit int64, fn func(off, length int64) error) error {
	for length > 0 {
		n := min(length, limit)
		if err := fn(off, n); err != nil {
			return err
		}
		off += n
		length -= n
	}
	return nil
}

// split divides [off, off+length) into a part of a minimum block, whole minimum blocks, and a part again.
// Any of the three may be empty.
func (c *Client) split(off, length int64) (head, middle, tail int64) {
	if over := off % c.block; over != 0 {
		head = min(c.block-over, length)
	}
	middle = (length - head) / c.block * c.block
	return head, middle, length - head - middle
}

// clip cuts length so that off+length is not past the end.
func (c *Client) clip(off, length int64) int64 {
	return max(0, min(length, c.size-off))
}

func (c *Client) check(op string, off, length int64) error {
	if off < 0 || length < 0 {
		return fmt.Errorf("%s of %d bytes at %d in %s: negative", op, length, off, c.name)
	}
	return nil
}

// ReadAt implements storage.File.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	if err := c.check("read", off, 0); err != nil {
		return 0, err
	}
	n := c.clip(off, int64(len(p)))
	if n > 0 {
		if err := c.read(p[:n], off); err != nil {
			return 0, err
		}
	}
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// read reads a range inside the export.
func (c *Client) read(p []byte, off int64) error {
	head, middle, tail := c.split(off, int64(len(p)))
	if head > 0 {
		if err := c.readPart(p[:head], off); err != nil {
			return err
		}
	}
	if tail > 0 {
		if err := c.readPart(p[head+middle:], off+head+middle); err != nil {
			return err
		}
	}
	return pieces(off+head, middle, c.limit, func(o, n int64) error {
		return c.request(CmdRead, 0, p[o-off:][:n], o, n)
	})
}

// readPart reads a part of one minimum block.
func (c *Client) readPart(p []byte, off int64) error {
	whole := bufpool.Get(int(c.block))
	defer whole.Put()
	at := off - off%c.block
	err := c.request(CmdRead, 0, whole.B, at, c.block)
	copy(p, whole.B[off-at:])
	return err
}

// TryReadAt implements storage.File. It always would have to wait.
func (c *Client) TryReadAt([]byte, int64) (int, error) { return 0, storage.ErrWouldBlock }

// WriteAt implements storage.File.
func (c *Client) WriteAt(p []byte, off int64) (int, error) {
	n, err := c.beginChange("write", off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	err = c.change(off, n, c.limit,
		func(o, n int64) error { return c.request(CmdWrite, c.always, p[o-off:][:n], o, n) },
		func(b []byte, o int64) { copy(b, p[o-off:]) })
	if err != nil {
		return 0, err
	}
	return int(n), c.pastEnd("write", off, int64(len(p)), n)
}

// beginChange refuses changes that cannot be, and clips one to the size.
func (c *Client) beginChange(op string, off, length int64) (int64, error) {
	if err := c.check(op, off, length); err != nil {
		return 0, err
	}
	if c.opt.ReadOnly {
		return 0, fmt.Errorf("%s of %d bytes at %d in %s: %w", op, length, off, c.name, storage.ErrReadOnly)
	}
	return c.clip(off, length), nil
}

// change makes a change of a range inside the export: whole carries out pieces of at most limit bytes that
// are made of minimum blocks, then part applies the change to b, which holds what is at off in the export now.
func (c *Client) change(off, length, limit int64, whole func(off, length int64) error, part func(b []byte, off int64)) error {
	head, middle, tail := c.split(off, length)
	if c.block > 1 {
		if head+tail == 0 {
			c.edges.RLock()
			defer c.edges.RUnlock()
		} else {
			c.edges.Lock()
			defer c.edges.Unlock()
		}
	}
	if err := pieces(off+head, middle, limit, whole); err != nil {
		return err
	}
	for _, edge := range [...]struct{ off, length int64 }{{off, head}, {off + head + middle, tail}} {
		if edge.length == 0 {
			continue
		}
		b := bufpool.Get(int(c.block))
		at := edge.off - edge.off%c.block
		err := c.request(CmdRead, 0, b.B, at, c.block)
		if err == nil {
			from := edge.off - at
			part(b.B[from:from+edge.length], edge.off)
			err = c.request(CmdWrite, c.always, b.B, at, c.block)
		}
		b.Put()
		if err != nil {
			return err
		}
	}
	return nil
}

// zero makes a range inside the export read as zeros. errors.ErrUnsupported: nothing changed.
func (c *Client) zero(op string, flags CommandFlags, off, length int64) error {
	if c.export.Flags&SendWriteZeroes == 0 {
		return fmt.Errorf("%s in %s: the server does not offer WRITE_ZEROES: %w", op, c.name, errors.ErrUnsupported)
	}
	limit := c.limit // without extended headers a server may hold zeroing to the limit of payloads
	if c.export.Replies == ExtendedReplies {
		limit = math.MaxInt64 - MaxMinBlock + 1
	}
	first := true
	return c.change(off, length, limit,
		func(o, n int64) error {
			err := c.request(CmdWriteZeroes, flags|c.always, nil, o, n)
			if !first && errors.Is(err, errors.ErrUnsupported) {
				err = errors.New(err.Error()) // something did change
			}
			first = false
			return err
		},
		func(b []byte, _ int64) { clear(b) })
}

// PunchHole implements storage.File.
func (c *Client) PunchHole(off, length int64) error {
	n, err := c.beginChange("punching a hole", off, length)
	if err != nil || n == 0 {
		return err
	}
	return c.zero("punching a hole", 0, off, n)
}

// ZeroRange implements storage.File.
func (c *Client) ZeroRange(off, length int64) error {
	n, err := c.beginChange("zeroing", off, length)
	if err != nil {
		return err
	}
	if err := c.zero("zeroing", CmdFlagNoHole, off, n); err != nil {
		return err
	}
	return c.pastEnd("zeroing", off, length, n)
}

// pastEnd is the error of a change of length bytes of which only n lie in the export.
func (c *Client) pastEnd(op string, off, length, n int64) error {
	if n == length {
		return nil
	}
	return fmt.Errorf("%s of %d bytes at %d in %s, which has %d bytes: %w", op, length, off, c.name, c.size, io.ErrShortWrite)
}

// Sync implements storage.File: FLUSH. Where the server offers none but FUA, every change was durable when it
// returned. Where it offers neither, Sync of a client that may write fails with errors.ErrUnsupported:
// nothing can be promised.
func (c *Client) Sync() error {
	switch {
	case c.opt.ReadOnly:
		return nil
	case c.export.Flags&SendFlush != 0:
		return c.request(CmdFlush, 0, nil, 0, 0)
	case c.always&CmdFlagFUA != 0:
		return nil
	}
	return fmt.Errorf("sync of %s: the server offers neither FLUSH nor FUA: %w", c.name, errors.ErrUnsupported)
}

// Size implements storage.File. Bytes beyond the last multiple of the minimum block size do not count.
func (c *Client) Size() (int64, error) { return c.size, nil }

// Truncate implements storage.File: the size of an export cannot be changed.
func (c *Client) Truncate(size int64) error {
	if size == c.size {
		return nil
	}
	return fmt.Errorf("changing the size of %s from %d to %d bytes: %w", c.name, c.size, size, errors.ErrUnsupported)
}

// Allocate implements storage.File: NBD has no such request.
func (c *Client) Allocate(off, length int64) error {
	return fmt.Errorf("allocating %d bytes at %d in %s: %w", length, off, c.name, errors.ErrUnsupported)
}

// DataExtents implements storage.File with BLOCK_STATUS of base:allocation. Neighbouring runs differ in kind.
func (c *Client) DataExtents(off, length int64, fn func(storage.Extent) bool) error {
	if err := c.check("extents", off, length); err != nil {
		return err
	}
	length = c.clip(off, length)
	var run storage.Extent
	err := c.blockStatus(off, length, func(n int64, data bool) bool {
		if run.Length > 0 && run.Data != data {
			if !fn(run) {
				run.Length = 0
				return false
			}
			run = storage.Extent{Offset: run.Offset + run.Length}
		} else if run.Length == 0 {
			run.Offset = off
		}
		run.Length += n
		run.Data = data
		return true
	})
	if err == nil && run.Length > 0 {
		fn(run)
	}
	return err
}

// blockStatus calls fn for runs that together cover [off, off+length), which lies in the export.
func (c *Client) blockStatus(off, length int64, fn func(length int64, data bool) bool) error {
	if len(c.export.Contexts) == 0 {
		if length > 0 {
			fn(length, true)
		}
		return nil
	}
	limit := int64(1)<<32 - MaxMinBlock
	if c.export.Replies == ExtendedReplies {
		limit = math.MaxInt64 - MaxMinBlock + 1
	}
	for length > 0 {
		skip := off % c.block // the request is made of minimum blocks, what is reported need not be
		ask := min((skip+length+c.block-1)/c.block*c.block, limit)
		more, covered, err := c.status(off-skip, ask, skip, length, fn)
		if err != nil || !more {
			return err
		}
		off += covered
		length -= covered
	}
	return nil
}

// status is one BLOCK_STATUS request of ask bytes at off. It reports what lies skip bytes and more into it,
// at most length bytes, to fn, and returns how many those were and whether fn wants more.
func (c *Client) status(off, ask, skip, length int64, fn func(length int64, data bool) bool) (more bool, covered int64, err error) {
	cl := newCall(CmdBlockStatus, 0, off, ask)
	defer cl.free()
	if err := c.do(cl); err != nil {
		return false, 0, err
	}
	for _, d := range cl.runs {
		n := int64(d.Length)
		if over := min(n, skip); over > 0 {
			skip -= over
			n -= over
		}
		if n = min(n, length-covered); n == 0 {
			continue
		}
		covered += n
		if !fn(n, d.Flags&StateZero == 0) {
			return false, covered, nil
		}
	}
	if covered == 0 {
		return false, 0, protocolError("block status of %d bytes at %d reports less than one minimum block of %d bytes", ask, off, c.block)
	}
	return true, covered, nil
}

// Name implements storage.File: the URI.
func (c *Client) Name() string { return c.name }

// Close implements storage.File. Requests under way fail with ErrClosed. A second Close returns nil.
func (c *Client) Close() error {
	c.end()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = fmt.Errorf("%s: %w", c.name, ErrClosed)
	by := time.Now().Add(goodbyeTime) // for all of them: the servers of many connections hang together
	for _, l := range c.links {
		l.close(by)
	}
	return nil
}
