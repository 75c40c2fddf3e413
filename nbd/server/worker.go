package server

import (
	"errors"
	"io"
	"strings"
	"sync"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/bufpool"
	"github.com/platter-disk/platter/nbd"
)

// request is a request that a worker carries out.
type request struct {
	nbd.Request
	payload *bufpool.Buffer // the bytes of a write, or what a block status request asks; nil without
	bytes   int64           // taken from the budgets
}

// data is the payload, nil when it is empty.
func (q *request) data() []byte {
	if q.payload == nil {
		return nil
	}
	return q.payload.B
}

// requests are reused. A worker puts back what the reader took.
var requests = sync.Pool{New: func() any { return new(request) }}

// cacheStep is how many bytes a CACHE request reads at a time.
const cacheStep = 256 << 10

// dispatch queues a request whose budget is taken, and starts a worker when none is free. The queue holds as
// many as the budget allows, so it never blocks.
func (c *conn) dispatch(r *nbd.Request, payload *bufpool.Buffer, bytes int64) {
	q := requests.Get().(*request)
	q.Request, q.payload, q.bytes = *r, payload, bytes
	if c.idle.Add(-1) < 0 && c.started < c.srv.cfg.Workers {
		c.started++
		c.idle.Add(1)
		c.workers.Add(1)
		go c.worker()
	}
	c.work <- q
}

// worker carries out requests until the reader ends.
func (c *conn) worker() {
	defer c.workers.Done()
	w := worker{conn: c}
	for q := range c.work {
		w.serve(q)
		bytes := q.bytes
		if q.payload != nil {
			q.payload.Put()
		}
		*q = request{}
		requests.Put(q)
		c.putBudget(bytes)
		c.idle.Add(1)
	}
}

// worker is what a worker goroutine keeps between requests.
type worker struct {
	*conn
	head  []byte
	lists []descriptors
}

func (w *worker) serve(q *request) {
	r, dev := &q.Request, w.export.Device
	off, n := int64(r.Offset), int64(r.Length)
	var err error
	switch r.Command {
	case nbd.CmdRead:
		if err = w.read(r); err == nil {
			return
		}
	case nbd.CmdWrite:
		_, err = dev.WriteAt(q.data(), off)
	case nbd.CmdFlush:
		err = dev.Flush()
	case nbd.CmdTrim:
		// A hint: a device that cannot discard has still done what was asked.
		if err = dev.Discard(off, n); errors.Is(err, errors.ErrUnsupported) {
			err = nil
		}
	case nbd.CmdCache:
		err = w.cache(off, n)
	case nbd.CmdWriteZeroes:
		var flags block.ZeroFlags
		if r.Flags&nbd.CmdFlagNoHole == 0 {
			flags |= block.MayUnmap
		}
		if r.Flags&nbd.CmdFlagFastZero != 0 {
			flags |= block.FastOnly
		}
		err = dev.WriteZeroes(off, n, flags)
	case nbd.CmdBlockStatus:
		if err = w.blockStatus(q); err == nil {
			return
		}
	}
	if err == nil && r.Flags&nbd.CmdFlagFUA != 0 && !w.readOnly {
		switch r.Command {
		case nbd.CmdWrite, nbd.CmdTrim, nbd.CmdWriteZeroes:
			err = dev.Flush()
		}
	}
	if err != nil {
		code, text := w.deviceError(r, err)
		w.head = nbd.AppendError(w.head[:0], w.mode, r, code, text)
	} else {
		w.counters.succeeded(r.Command, r.Length)
		w.head = nbd.AppendDone(w.head[:0], w.mode, r)
	}
	w.send(nil)
}

// send queues w.head and, after it, the data in body. A failed write ends the connection. Data that counts is
// waited for, so that it stays in the budgets until the client takes it.
func (w *worker) send(body *bufpool.Buffer) {
	var data []byte
	if body != nil {
		data = body.B
	}
	large := len(data) > inlineRead
	ticket, err := w.out.Send(w.head, data, body)
	if err == nil && large {
		err = w.out.Wait(ticket)
	}
	if err != nil {
		w.kill()
	}
}

// read answers a read; it answers nothing when it returns an error.
func (w *worker) read(r *nbd.Request) error {
	buf := bufpool.Get(int(r.Length))
	n, err := w.export.Device.ReadAt(buf.B, int64(r.Offset))
	if n < len(buf.B) {
		buf.Put()
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	w.counters.succeeded(nbd.CmdRead, r.Length)
	w.head = nbd.AppendReadReply(w.head[:0], w.mode, r)
	w.send(buf)
	return nil
}

// cache reads a range so that the layers below have it at hand.
func (w *worker) cache(off, n int64) error {
	buf := bufpool.Get(int(min(n, cacheStep)))
	defer buf.Put()
	for n > 0 {
		step := min(n, cacheStep)
		if got, err := w.export.Device.ReadAt(buf.B[:step], off); int64(got) < step {
			return err
		}
		off += step
		n -= step
	}
	return nil
}

// deviceError is the protocol's error and the text for what a device returned, or for a request that broke
// a rule which only showed in its payload. It counts and logs.
func (c *conn) deviceError(r *nbd.Request, err error) (nbd.Errno, string) {
	c.counters.failed(r.Command)
	code := errno(r.Command, err)
	var rule *violation
	switch {
	case errors.As(err, &rule):
		code = nbd.EINVAL
	case r.Flags&nbd.CmdFlagFastZero != 0 && errors.Is(err, errors.ErrUnsupported):
		code = nbd.ENOTSUP // the client asked to be told
	default:
		c.export.failures.log(c.log, "command", r.Command.String(), "offset", r.Offset, "length", r.Length, "error", err)
	}
	return code, strings.ToValidUTF8(err.Error(), "?")
}
