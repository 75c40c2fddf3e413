package server

import (
	"errors"
	"io"
	"net"
	"time"

	"github.com/platter-disk/platter/internal/bufpool"
	"github.com/platter-disk/platter/nbd"
)

// Sizes in bytes of the reader's work. Measured with 4 KiB to 1 MiB requests from the page cache: in line a
// read of 64 to 256 KiB costs half of what it costs by way of a worker.
const (
	receiveSize = 64 << 10  // receive buffer
	batchFull   = 128 << 10 // a batch of replies that would grow beyond it is handed to the outbox first
	inlineRead  = 256 << 10 // longest read served in line
	inlineWrite = 256 << 10 // longest write served in line
	inPlace     = 32 << 10  // longest payload that is used where it was received

	// maxDrain is the longest payload of a refused request that is read and thrown away, so that the request
	// can be answered. A longer one ends the connection.
	maxDrain = 64 << 20
)

// An in-line write that takes longer than slowWrite, and slowWriteKiB for each KiB, shows that writes wait
// for something: the next ones go to the workers, more of them each time it happens in a row, and then one is
// tried again.
const (
	slowWrite    = 80 * time.Microsecond
	slowWriteKiB = 500 * time.Nanosecond
	minSlowWrite = 32
	maxSlowWrite = 4096
)

// transmit is the reader: it serves requests until the client leaves or breaks the protocol, or the export
// is removed or the server shuts down.
func (c *conn) transmit() error {
	buf := bufpool.Get(receiveSize)
	defer buf.Put()
	in := buf.B
	end := 0 // in[:end] is received and not yet served
	for {
		used, err := c.serve(in[:end])
		c.flushBatch()
		if err != nil {
			if errors.Is(err, errDisconnect) {
				return nil
			}
			return err
		}
		end = copy(in, in[used:end])
		n, err := c.nc.Read(in[end:])
		end += n
		if err != nil && n == 0 {
			if errors.Is(err, io.EOF) && end > 0 {
				return io.ErrUnexpectedEOF
			}
			return err
		}
	}
}

// errDisconnect is how serve says that the client sent DISC.
var errDisconnect = errors.New("client disconnected")

// serve takes the requests that are complete from in, and returns how many bytes they were. The payload of
// a large write may be received in here.
func (c *conn) serve(in []byte) (used int, err error) {
	var r nbd.Request
	extended := c.extended()
	head := nbd.RequestHeaderSize(extended)
	for len(in)-used >= head {
		if err := nbd.DecodeRequest(in[used:], extended, &r); err != nil {
			return used, err
		}
		if r.Command == nbd.CmdDisc {
			return used, errDisconnect
		}
		payload := r.PayloadLength(extended)
		code, rule := c.check(&r)
		if c.ending.Load() {
			code, rule = nbd.ESHUTDOWN, "the export was removed"
			if c.srv.draining.Load() {
				rule = "the server is shutting down"
			}
		}
		switch {
		case code != 0 && payload > maxDrain:
			return used, protocolViolation(&r, rule)
		case code != 0:
			here := min(payload, uint64(len(in)-used-head))
			c.refuseRequest(&r, code, rule)
			used += head + int(here)
			err = c.discard(int64(payload - here))
		case payload > inPlace:
			here := min(int(payload), len(in)-used-head)
			err = c.largeWrite(&r, in[used+head:used+head+here])
			used += head + here
		case len(in)-used < head+int(payload):
			return used, nil
		default:
			at := used + head
			used = at + int(payload)
			err = c.request(&r, in[at:used])
		}
		if err != nil {
			return used, err
		}
	}
	return used, nil
}

func protocolViolation(r *nbd.Request, rule string) error {
	return &violation{*r, rule}
}

// violation is a broken rule that ends the connection.
type violation struct {
	request nbd.Request
	rule    string
}

func (v *violation) Error() string {
	return "request " + v.request.Command.String() + " broke a rule: " + v.rule
}

func (v *violation) Unwrap() error { return nbd.ErrProtocol }

// refuseRequest answers a request that broke a rule.
func (c *conn) refuseRequest(r *nbd.Request, code nbd.Errno, rule string) {
	c.log.Debug("nbd: request refused", "command", r.Command.String(), "offset", r.Offset, "length", r.Length, "flags", uint16(r.Flags), "rule", rule)
	c.counters.failed(r.Command)
	c.room(nbd.ExtendedReplySize + 6 + len(rule))
	c.batch.B = nbd.AppendError(c.batch.B, c.mode, r, code, rule)
}

// discard throws n bytes of input away.
func (c *conn) discard(n int64) error {
	if n == 0 {
		return nil
	}
	c.flushBatch()
	buf := bufpool.Get(receiveSize)
	defer buf.Put()
	for n > 0 {
		got, err := c.nc.Read(buf.B[:min(n, receiveSize)])
		n -= int64(got)
		if err != nil && n > 0 {
			return err
		}
	}
	return nil
}

// request serves a valid request, or hands it to a worker. payload is in the receive buffer.
func (c *conn) request(r *nbd.Request, payload []byte) error {
	bytes := int64(len(payload))
	switch r.Command {
	case nbd.CmdRead:
		if r.Length <= inlineRead && c.readInline(r) {
			return nil
		}
		bytes = int64(r.Length)
	case nbd.CmdWrite:
		if c.writeInline(r, payload) {
			return nil
		}
	case nbd.CmdCache:
		bytes = int64(min(r.Length, cacheStep))
	}
	if err := c.takeBudget(bytes); err != nil {
		return err
	}
	var copied *bufpool.Buffer
	if len(payload) > 0 {
		copied = bufpool.Get(len(payload))
		copy(copied.B, payload)
	}
	c.dispatch(r, copied, bytes)
	return nil
}

// readInline answers a read if the device can do so without waiting.
func (c *conn) readInline(r *nbd.Request) bool {
	n := int(r.Length)
	if n == 0 {
		c.done(r)
		return true
	}
	head := nbd.ReadReplySize(c.mode)
	c.room(head + n)
	at := len(c.batch.B)
	if c.export.Device.TryReadAt(c.batch.B[at+head:at+head+n], int64(r.Offset)) != nil {
		return false // a worker will find out what is wrong, if anything is
	}
	nbd.AppendReadReply(c.batch.B[:at], c.mode, r)
	c.batch.B = c.batch.B[:at+head+n]
	c.counters.inline.Add(1)
	c.counters.succeeded(nbd.CmdRead, r.Length)
	return true
}

// writeInline carries out a write that need not be durable, while writes are quick.
func (c *conn) writeInline(r *nbd.Request, payload []byte) bool {
	if len(payload) > inlineWrite || r.Flags&nbd.CmdFlagFUA != 0 {
		return false
	}
	if c.slowWrites > 0 {
		c.slowWrites--
		return false
	}
	before := time.Now()
	if _, err := c.export.Device.WriteAt(payload, int64(r.Offset)); err != nil {
		c.fail(r, err)
		return true
	}
	c.counters.inline.Add(1)
	c.done(r)
	if time.Since(before) > slowWrite+slowWriteKiB*time.Duration(len(payload)>>10) {
		c.slowRun = min(max(2*c.slowRun, minSlowWrite), maxSlowWrite)
		c.slowWrites = c.slowRun
	} else {
		c.slowRun = 0
	}
	return true
}

// done answers a request without data, from the reader.
func (c *conn) done(r *nbd.Request) {
	c.counters.succeeded(r.Command, r.Length)
	c.room(nbd.ExtendedReplySize)
	c.batch.B = nbd.AppendDone(c.batch.B, c.mode, r)
}

// fail answers a request that the device failed, from the reader.
func (c *conn) fail(r *nbd.Request, err error) {
	code, text := c.deviceError(r, err)
	c.room(nbd.ExtendedReplySize + 6 + len(text))
	c.batch.B = nbd.AppendError(c.batch.B, c.mode, r, code, text)
}

// room makes sure that n more bytes, inlineRead and a reply header at most, fit the batch.
func (c *conn) room(n int) {
	if c.batch != nil && len(c.batch.B) > 0 && len(c.batch.B)+n > batchFull {
		c.flushBatch()
	}
	if c.batch == nil {
		c.batch = bufpool.Get(inlineRead + bufpool.Align)
		c.batch.B = c.batch.B[:0]
	}
}

// flushBatch hands the batch of replies to the outbox. A failed write ends the connection at the next read.
func (c *conn) flushBatch() {
	if c.batch == nil || len(c.batch.B) == 0 {
		return
	}
	batch := c.batch
	c.batch = nil
	if _, err := c.out.Send(nil, batch.B, batch); err != nil {
		c.kill()
	}
}

// largeWrite receives the payload of a write straight into a buffer that is the write's own. here is the
// part of it that is in the receive buffer.
func (c *conn) largeWrite(r *nbd.Request, here []byte) error {
	n := int64(r.Length)
	if err := c.takeBudget(n); err != nil {
		return err
	}
	buf := bufpool.Get(int(n))
	if copied := copy(buf.B, here); copied < int(n) {
		c.flushBatch()
		c.receiving.Store(time.Now().UnixNano())
		_, err := io.ReadFull(c.nc, buf.B[copied:])
		c.receiving.Store(0)
		if err != nil {
			buf.Put()
			c.putBudget(n)
			return err
		}
	}
	if c.writeInline(r, buf.B) {
		buf.Put()
		c.putBudget(n)
		return nil
	}
	c.dispatch(r, buf, n)
	return nil
}

// takeBudget waits for room in the connection's and the server's budget. Replies do not wait with it.
func (c *conn) takeBudget(bytes int64) error {
	if !c.budget.tryTake(bytes) {
		c.flushBatch()
		if !c.budget.take(bytes, &c.killed) {
			return net.ErrClosed
		}
	}
	if !c.srv.budget.tryTake(bytes) {
		c.flushBatch()
		c.waiting.Store(true)
		c.cut.Reset(c.srv.cfg.StallTimeout)
		ok := c.srv.budget.take(bytes, &c.killed)
		c.waiting.Store(false)
		c.cut.Stop()
		if !ok {
			c.budget.put(bytes)
			return net.ErrClosed
		}
	}
	return nil
}

func (c *conn) putBudget(bytes int64) {
	c.srv.budget.put(bytes)
	c.budget.put(bytes)
}
