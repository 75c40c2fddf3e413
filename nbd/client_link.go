package nbd

import (
	"cmp"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/platter-disk/platter/internal/bufpool"
	"github.com/platter-disk/platter/nbd/internal/outbox"
)

const (
	maxInFlight   = 128      // requests on one connection; a power of two
	linkBuffer    = 64 << 10 // bytes of receive buffer
	maxReadChunks = 1 << 12  // separate pieces of one read's reply, in an order that does not join them
)

// errRequestTimeout ends a connection on which a request was not answered in time.
var errRequestTimeout = errors.New("the server did not answer in time")

// call is one request on its way. The link's reader fills it in and then signals done.
type call struct {
	Request
	data []byte // what a write sends, or where a read puts what it gets

	done    chan struct{} // one signal
	err     error         // why the connection failed
	remote  Errno         // why the server refused
	message string        // and what it said
	pieces  []piece       // of data that arrived
	runs    []BlockStatus // of the reply to a block status request
}

// piece is a range of a read that arrived, relative to its start.
type piece struct{ from, to uint64 }

var calls = sync.Pool{New: func() any { return &call{done: make(chan struct{}, 1)} }}

func newCall(command Command, flags CommandFlags, off, length int64) *call {
	cl := calls.Get().(*call)
	cl.Request = Request{Flags: flags, Command: command, Offset: uint64(off), Length: uint64(length)}
	return cl
}

func (cl *call) free() {
	cl.data, cl.err, cl.remote, cl.message = nil, nil, 0, ""
	cl.pieces, cl.runs = cl.pieces[:0], cl.runs[:0]
	calls.Put(cl)
}

// reset makes a call that failed with its connection ready for another one.
func (cl *call) reset() {
	cl.err, cl.remote, cl.message = nil, 0, ""
	cl.pieces, cl.runs = cl.pieces[:0], cl.runs[:0]
}

// arrived notes a piece of a read.
func (cl *call) arrived(from, to uint64) error {
	if last := len(cl.pieces) - 1; last >= 0 && cl.pieces[last].to == from {
		cl.pieces[last].to = to
		return nil
	}
	if len(cl.pieces) == maxReadChunks {
		return protocolError("the reply to a read of %d bytes comes in more than %d scattered chunks", cl.Length, maxReadChunks)
	}
	cl.pieces = append(cl.pieces, piece{from, to})
	return nil
}

// complete checks that the reply answers the request: a read must be covered exactly, or the caller would see
// whatever its buffer held before.
func (cl *call) complete() error {
	if cl.remote != 0 {
		return nil
	}
	switch cl.Command {
	case CmdBlockStatus:
		if len(cl.runs) == 0 {
			return protocolError("the reply to a block status request reports nothing")
		}
	case CmdRead:
		slices.SortFunc(cl.pieces, func(a, b piece) int { return cmp.Compare(a.from, b.from) })
		var at uint64
		for _, p := range cl.pieces {
			if p.from != at {
				return protocolError("the reply to a read of %d bytes at %d has a gap or an overlap at %d", cl.Length, cl.Offset, cl.Offset+at)
			}
			at = p.to
		}
		if at != cl.Length {
			return protocolError("the reply to a read of %d bytes at %d has %d bytes", cl.Length, cl.Offset, at)
		}
	}
	return nil
}

// link is one connection in the transmission phase.
type link struct {
	nc      net.Conn
	raw     net.Conn // nc, or what lies under its TLS: closing that waits for nobody
	export  ExportInfo
	timeout time.Duration // for the answer to a request; 0: for ever
	silence *silence      // of the server
	out     *outbox.Queue
	free    chan uint32   // slots without a request; a slot and a count make a cookie
	dead    chan struct{} // closed when the connection failed
	ended   chan struct{} // closed when the reader is gone

	mu    sync.Mutex
	slots [maxInFlight]*call
	count uint64
	err   error // why the connection failed
}

// newLink takes the connection over from the handshake and starts its reader.
func newLink(h *handshake, timeout time.Duration, silence *silence) *link {
	l := &link{
		nc:      h.nc,
		export:  h.export,
		timeout: timeout,
		silence: silence,
		out:     outbox.New(h.nc),
		free:    make(chan uint32, maxInFlight),
		dead:    make(chan struct{}),
		ended:   make(chan struct{}),
	}
	for i := range uint32(maxInFlight) {
		l.free <- i
	}
	l.raw = l.nc
	if t, ok := l.nc.(*tls.Conn); ok {
		l.raw = t.NetConn()
	}
	l.nc.SetDeadline(time.Time{})
	h.stop()
	go l.receive()
	return l
}

// fail ends the connection. The reader then fails what is in flight.
func (l *link) fail(err error) {
	l.mu.Lock()
	if l.err == nil {
		l.err = err
		close(l.dead)
	}
	l.mu.Unlock()
	l.raw.Close()
}

// goodbyeTime bounds how long Close tries to tell the server.
const goodbyeTime = time.Second

// close says goodbye, if the server takes that by a certain time, and ends the connection.
func (l *link) close(by time.Time) {
	if l.failed() == nil {
		l.nc.SetWriteDeadline(by)
		goodbye := Request{Command: CmdDisc}
		l.out.Send(goodbye.Append(nil, l.export.Replies == ExtendedReplies), nil, nil) // the server copes without
		sent := l.out.Flush()
		if t, ok := l.nc.(*tls.Conn); ok && sent == nil {
			t.CloseWrite()
		}
	}
	l.fail(ErrClosed)
	<-l.ended
}

// failed is why the connection failed, or nil.
func (l *link) failed() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// do sends a request and waits for its answer. An error says that the connection failed; what the server
// thought of the request is in the call.
func (l *link) do(cl *call) error {
	var slot uint32
	select {
	case slot = <-l.free:
	case <-l.dead:
		return l.failed()
	}
	l.mu.Lock()
	if l.err != nil {
		l.mu.Unlock()
		return l.failed()
	}
	l.count++
	cl.Cookie = l.count*maxInFlight + uint64(slot)
	l.slots[slot] = cl
	l.mu.Unlock()

	if l.timeout > 0 { // for sending, too: a server that takes nothing does not answer either
		timer := time.AfterFunc(l.timeout, func() { l.fail(errRequestTimeout) })
		defer timer.Stop()
	}
	extended := l.export.Replies == ExtendedReplies
	var body []byte
	if cl.Command == CmdWrite {
		body = cl.data
		if extended {
			cl.Flags |= CmdFlagPayloadLen
		}
	}
	var head [ExtendedRequestSize]byte
	ticket, err := l.out.Send(cl.Request.Append(head[:0], extended), body, nil)
	if err != nil {
		l.fail(err)
	}
	<-cl.done
	if body != nil {
		l.out.Wait(ticket) // a server may answer, or the connection fail, before all of body was sent
	}
	return cl.err
}

// finish hands an answered call back.
func (l *link) finish(cl *call) {
	slot := cl.Cookie % maxInFlight
	l.mu.Lock()
	l.slots[slot] = nil
	l.mu.Unlock()
	cl.done <- struct{}{}
	l.free <- uint32(slot)
}

// receive is the reader: it alone touches a call between do's registration of it and its end.
func (l *link) receive() {
	defer close(l.ended)
	buf := bufpool.Get(linkBuffer)
	in := receiver{nc: l.nc, buf: buf.B, silence: l.silence}
	var err error
	for err == nil {
		err = l.reply(&in)
	}
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("the server hung up: %w", io.ErrUnexpectedEOF)
	}
	l.fail(err)
	buf.Put()
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, cl := range l.slots {
		if cl != nil {
			l.slots[i] = nil
			cl.err = l.err
			cl.done <- struct{}{}
		}
	}
}

// reply takes one reply, or one chunk of a reply.
func (l *link) reply(in *receiver) error {
	mode := l.export.Replies
	head, err := in.peek(MinReplySize(mode))
	if err != nil {
		return err
	}
	size, err := ReplyHeaderSize(head, mode)
	if err != nil {
		return err
	}
	if head, err = in.peek(size); err != nil {
		return err
	}
	var r Reply
	if err := DecodeReply(head, mode, &r); err != nil {
		return err
	}
	in.skip(size)

	l.mu.Lock()
	cl := l.slots[r.Cookie%maxInFlight]
	l.mu.Unlock()
	if cl == nil || cl.Cookie != r.Cookie {
		return protocolError("reply with cookie %#x, which no request has", r.Cookie)
	}
	if r.Simple {
		return l.simpleReply(in, cl, &r, mode)
	}
	if err := cl.chunk(in, &r, l.export.Contexts); err != nil {
		return err
	}
	if r.Flags&ReplyFlagDone == 0 {
		return nil
	}
	if err := cl.complete(); err != nil {
		return err
	}
	l.finish(cl)
	return nil
}

func (l *link) simpleReply(in *receiver, cl *call, r *Reply, mode ReplyMode) error {
	cl.remote = r.Error
	switch {
	case cl.Command == CmdBlockStatus && r.Error == 0,
		cl.Command == CmdRead && mode != SimpleReplies:
		return protocolError("simple reply to %s, expected a structured one", cl.Command)
	case cl.Command == CmdRead && r.Error == 0:
		if err := in.read(cl.data); err != nil {
			return err
		}
	}
	l.finish(cl)
	return nil
}

// chunk takes the payload of a chunk.
func (cl *call) chunk(in *receiver, r *Reply, contexts []MetaContext) error {
	switch {
	case r.Type == ReplyNone:
		return nil
	case r.Type == ReplyOffsetData && cl.Command == CmdRead:
		if r.Length < 9 {
			return protocolError("data chunk of %d bytes, expected 9 at least", r.Length)
		}
		b, err := in.peek(8)
		if err != nil {
			return err
		}
		offset := binary.BigEndian.Uint64(b)
		in.skip(8)
		p, err := cl.place(offset, r.Length-8)
		if err != nil {
			return err
		}
		return in.read(p)
	case r.Type == ReplyOffsetHole && cl.Command == CmdRead:
		b, err := in.payload(r, HolePayloadSize)
		if err != nil {
			return err
		}
		offset, length, err := DecodeHole(b)
		in.skip(len(b))
		if err != nil {
			return err
		}
		p, err := cl.place(offset, uint64(length))
		clear(p)
		return err
	case (r.Type == ReplyBlockStatus || r.Type == ReplyBlockStatusExt) && cl.Command == CmdBlockStatus:
		return cl.status(in, r, contexts)
	case r.Type.IsError():
		b, err := in.payload(r, MaxErrorPayload)
		if err != nil {
			return err
		}
		errno, message, err := DecodeErrorPayload(b)
		in.skip(len(b))
		if err == nil && cl.remote == 0 {
			cl.remote, cl.message = errno, message
		}
		return err
	}
	return protocolError("reply chunk of type %#x to %s", uint16(r.Type), cl.Command)
}

// place is where a piece of a read's data goes.
func (cl *call) place(offset, length uint64) ([]byte, error) {
	from := offset - cl.Offset
	if offset < cl.Offset || from > cl.Length || length > cl.Length-from {
		return nil, protocolError("chunk of %d bytes at %d in reply to a read of %d bytes at %d", length, offset, cl.Length, cl.Offset)
	}
	return cl.data[from : from+length], cl.arrived(from, from+length)
}

// status takes a block status chunk. It may be larger than the receive buffer.
func (cl *call) status(in *receiver, r *Reply, contexts []MetaContext) error {
	if r.Length > MaxBlockStatusPayload {
		return protocolError("block status chunk of %d bytes, at most %d expected", r.Length, MaxBlockStatusPayload)
	}
	buf := bufpool.Get(int(r.Length))
	defer buf.Put()
	if err := in.read(buf.B); err != nil {
		return err
	}
	if len(cl.runs) > 0 {
		return protocolError("two block status chunks for one metadata context")
	}
	context, runs, err := DecodeBlockStatus(buf.B, r.Type, cl.runs)
	if err != nil {
		return err
	}
	if len(contexts) != 1 || contexts[0].ID != context {
		return protocolError("block status for metadata context %d, which was not negotiated", context)
	}
	cl.runs = runs
	return nil
}

// receiver is a connection's receive buffer.
type receiver struct {
	nc         net.Conn
	buf        []byte
	start, end int // buf[start:end] was received and not used
	silence    *silence
}

// Read reads past the buffer. Whatever else reads from the connection comes by here.
func (r *receiver) Read(p []byte) (int, error) {
	n, err := r.nc.Read(p)
	if n > 0 {
		r.silence.hear()
	}
	return n, err
}

// peek returns the next n bytes without using them; n must not exceed the buffer.
func (r *receiver) peek(n int) ([]byte, error) {
	for r.end-r.start < n {
		if r.start > 0 {
			r.end = copy(r.buf, r.buf[r.start:r.end])
			r.start = 0
		}
		got, err := r.Read(r.buf[r.end:])
		r.end += got
		if err != nil && r.end < n {
			return nil, err
		}
	}
	return r.buf[r.start : r.start+n], nil
}

// payload peeks at the whole payload of a chunk, which must not exceed limit.
func (r *receiver) payload(c *Reply, limit int) ([]byte, error) {
	if c.Length > uint64(limit) {
		return nil, protocolError("reply chunk of type %#x with %d bytes, at most %d expected", uint16(c.Type), c.Length, limit)
	}
	return r.peek(int(c.Length))
}

// skip uses n bytes that peek returned.
func (r *receiver) skip(n int) { r.start += n }

// read fills p, straight from the connection what is not received yet.
func (r *receiver) read(p []byte) error {
	n := copy(p, r.buf[r.start:r.end])
	r.start += n
	if n == len(p) {
		return nil
	}
	_, err := io.ReadFull(r, p[n:])
	return err
}
