// Package outbox sends messages of many goroutines over one connection with as few system calls as it can.
//
// A message is a head, which the queue copies, and a body, which it does not. Whoever finds the queue idle
// writes for everybody until it is empty; the others only leave their message and go. So messages that come
// together leave together, in one vectored write, and a lone message is written at once.
package outbox

import (
	"net"
	"sync"
	"time"

	"github.com/platter-disk/platter/internal/bufpool"
)

const (
	headSize  = 16 << 10  // bytes of one buffer of heads
	highWater = 256 << 10 // bytes queued beyond which Send waits
	scratch   = 64 << 10  // bytes gathered before a write where the connection has no vectored writes
)

// Queue is a connection's outbox. Its methods are safe for concurrent use.
type Queue struct {
	conn     net.Conn
	vectored bool

	mu      sync.Mutex
	changed sync.Cond // the bytes queued went down, or err was set

	segments []segment // waiting
	spare    []segment // the slice that segments becomes when it is taken for writing
	heads    *bufpool.Buffer
	bytes    int // in segments
	writing  bool
	since    time.Time // when the present write began; zero between writes
	queued   uint64    // messages ever queued
	sent     uint64    // messages ever written
	err      error

	vector  net.Buffers // for the goroutine that writes
	backing net.Buffers
}

type segment struct {
	b     []byte
	owner *bufpool.Buffer // given back when b is written; nil when it is somebody else's
	heads bool            // b is the tail of Queue.heads and may grow
}

// New returns a queue that writes to conn.
func New(conn net.Conn) *Queue {
	q := &Queue{conn: conn}
	switch conn.(type) {
	case *net.TCPConn, *net.UnixConn:
		q.vectored = true
	}
	q.changed.L = &q.mu
	return q
}

// Send queues a message: head is copied, body is not. If owner is not nil, body lies in it and the queue
// gives it back when it is done, whether the message was sent or not; otherwise the caller must not touch
// body before Wait with the returned ticket. Send waits while much is queued already. The error is that of
// the first write that failed, which also ends the queue: later messages go nowhere.
func (q *Queue) Send(head, body []byte, owner *bufpool.Buffer) (ticket uint64, err error) {
	q.mu.Lock()
	for q.bytes > highWater && q.err == nil {
		q.changed.Wait()
	}
	if q.err != nil {
		err = q.err
		q.mu.Unlock()
		if owner != nil {
			owner.Put()
		}
		return 0, err
	}
	if len(head) > 0 {
		q.appendHead(head)
	}
	if len(body) > 0 {
		q.segments = append(q.segments, segment{b: body, owner: owner})
		q.bytes += len(body)
	} else if owner != nil {
		owner.Put()
	}
	q.queued++
	ticket = q.queued
	if !q.writing {
		q.writing = true
		q.drain()
		q.writing = false
	}
	err = q.err
	q.mu.Unlock()
	return ticket, err
}

// Wait returns when the message of a ticket was handed to the connection, or never will be.
func (q *Queue) Wait(ticket uint64) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.sent < ticket && (q.err == nil || q.writing) {
		q.changed.Wait()
	}
	if q.sent < ticket {
		return q.err
	}
	return nil
}

// Flush returns when everything queued before the call was handed to the connection, or never will be.
func (q *Queue) Flush() error {
	q.mu.Lock()
	ticket := q.queued
	q.mu.Unlock()
	return q.Wait(ticket)
}

// Stalled is how long the connection has been taking the present write; 0 when nothing is being written.
func (q *Queue) Stalled() time.Duration {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.since.IsZero() {
		return 0
	}
	return time.Since(q.since)
}

func (q *Queue) appendHead(head []byte) {
	for len(head) > 0 {
		if q.heads == nil {
			q.heads = bufpool.Get(headSize)
			q.heads.B = q.heads.B[:0]
		}
		start := len(q.heads.B)
		n := min(len(head), headSize-start)
		q.heads.B = append(q.heads.B, head[:n]...)
		head = head[n:]
		q.bytes += n
		if last := len(q.segments) - 1; last >= 0 && q.segments[last].heads {
			q.segments[last].b = q.segments[last].b[:len(q.segments[last].b)+n]
		} else {
			q.segments = append(q.segments, segment{b: q.heads.B[start:], heads: true})
		}
		if len(q.heads.B) == headSize {
			last := &q.segments[len(q.segments)-1]
			last.owner, last.heads, q.heads = q.heads, false, nil
		}
	}
}

// drain writes until nothing is queued. It is called with mu held and writing set, and gives mu up around
// each write.
func (q *Queue) drain() {
	for len(q.segments) > 0 && q.err == nil {
		batch, upTo, heads := q.segments, q.queued, q.heads
		q.segments, q.spare, q.heads, q.bytes = q.spare[:0], nil, nil, 0
		q.since = time.Now()
		q.mu.Unlock()
		err := q.write(batch)
		release(batch)
		if heads != nil {
			heads.Put()
		}
		q.mu.Lock()
		q.since = time.Time{}
		q.spare = batch[:0]
		if err != nil {
			q.err = err
		} else {
			q.sent = upTo
		}
		q.changed.Broadcast()
	}
	if q.err != nil {
		release(q.segments)
		q.segments, q.bytes = q.segments[:0], 0
		q.changed.Broadcast()
	}
}

func release(batch []segment) {
	for i := range batch {
		if batch[i].owner != nil {
			batch[i].owner.Put()
		}
		batch[i] = segment{}
	}
}

func (q *Queue) write(batch []segment) error {
	if len(batch) == 1 {
		_, err := q.conn.Write(batch[0].b)
		return err
	}
	if !q.vectored {
		return q.gather(batch)
	}
	q.vector = q.backing[:0]
	for i := range batch {
		q.vector = append(q.vector, batch[i].b)
	}
	q.backing = q.vector[:0]
	_, err := q.vector.WriteTo(q.conn)
	clear(q.backing[:cap(q.backing)])
	return err
}

// gather copies small segments together: over TLS each write is a record of its own.
func (q *Queue) gather(batch []segment) error {
	buf := bufpool.Get(scratch)
	defer buf.Put()
	out := buf.B[:0]
	flush := func() error {
		if len(out) == 0 {
			return nil
		}
		_, err := q.conn.Write(out)
		out = out[:0]
		return err
	}
	for i := range batch {
		b := batch[i].b
		if len(out)+len(b) > scratch {
			if err := flush(); err != nil {
				return err
			}
		}
		if len(b) > scratch/2 {
			if err := flush(); err != nil {
				return err
			}
			if _, err := q.conn.Write(b); err != nil {
				return err
			}
			continue
		}
		out = append(out, b...)
	}
	return flush()
}
