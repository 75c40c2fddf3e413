package outbox_test

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/platter-disk/platter/internal/bufpool"
	"github.com/platter-disk/platter/nbd/internal/outbox"
)

// plain hides what kind of connection it is, as TLS does.
type plain struct{ net.Conn }

func pair(t *testing.T, vectored bool) (ours, theirs net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if ours, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if theirs, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close(); theirs.Close() })
	if !vectored {
		ours = plain{ours}
	}
	return ours, theirs
}

// TestMessagesStayWhole: messages of many goroutines, with and without bodies, arrive whole and each
// goroutine's in order.
func TestMessagesStayWhole(t *testing.T) {
	const senders, messages = 8, 300
	for _, vectored := range []bool{true, false} {
		ours, theirs := pair(t, vectored)
		q := outbox.New(ours)
		body := make([]byte, 100_000)
		rand.Read(body)
		var wg sync.WaitGroup
		for g := range uint32(senders) {
			wg.Go(func() {
				for i := range uint32(messages) {
					n := int(i*g*37) % len(body)
					if i%3 != 0 {
						n %= 600
					}
					head := binary.BigEndian.AppendUint32(nil, g)
					head = binary.BigEndian.AppendUint32(head, i)
					head = binary.BigEndian.AppendUint32(head, uint32(n))
					var err error
					if i%2 == 0 {
						b := bufpool.Get(n)
						copy(b.B, body)
						_, err = q.Send(head, b.B, b)
					} else {
						var ticket uint64
						mine := bytes.Clone(body[:n])
						ticket, err = q.Send(head, mine, nil)
						if err == nil {
							err = q.Wait(ticket)
						}
						clear(mine) // allowed after Wait
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		next := make([]uint32, senders)
		head, got := make([]byte, 12), make([]byte, len(body))
		for range senders * messages {
			if _, err := io.ReadFull(theirs, head); err != nil {
				t.Fatal(err)
			}
			g, i, n := binary.BigEndian.Uint32(head), binary.BigEndian.Uint32(head[4:]), binary.BigEndian.Uint32(head[8:])
			if g >= senders || next[g] != i || n > uint32(len(body)) {
				t.Fatalf("message %d of %d with %d bytes, expected %d", i, g, n, next)
			}
			next[g]++
			if _, err := io.ReadFull(theirs, got[:n]); err != nil || !bytes.Equal(got[:n], body[:n]) {
				t.Fatalf("message %d of %d is garbled, %v", i, g, err)
			}
		}
		wg.Wait()
		if err := q.Flush(); err != nil {
			t.Error(err)
		}
	}
}

// TestLongHead: a head that does not fit what is left of the buffer of heads.
func TestLongHead(t *testing.T) {
	ours, theirs := pair(t, true)
	q := outbox.New(ours)
	want := make([]byte, 50_000)
	rand.Read(want)
	go q.Send(want, nil, nil)
	got := make([]byte, len(want))
	if _, err := io.ReadFull(theirs, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("garbled, %v", err)
	}
}

// TestFailureEndsTheQueue: those who wait and those who come later get the error, and nobody hangs although
// much is queued.
func TestFailureEndsTheQueue(t *testing.T) {
	for _, vectored := range []bool{true, false} {
		ours, theirs := pair(t, vectored)
		q := outbox.New(ours)
		var wg sync.WaitGroup
		errs := make([]error, 16)
		for i := range errs {
			wg.Go(func() {
				for errs[i] == nil {
					b := bufpool.Get(200_000)
					var ticket uint64
					if ticket, errs[i] = q.Send([]byte("head"), b.B, b); errs[i] == nil && i%2 == 0 {
						errs[i] = q.Wait(ticket)
					}
				}
			})
		}
		time.Sleep(20 * time.Millisecond) // nobody reads: the queue is full
		theirs.Close()
		ours.Close()
		wg.Wait()
		for i, err := range errs {
			var op *net.OpError
			if !errors.As(err, &op) {
				t.Errorf("sender %d: %v", i, err)
			}
		}
		if _, err := q.Send([]byte("late"), nil, nil); err == nil {
			t.Error("a message was accepted after the failure")
		}
		if q.Flush() == nil {
			t.Error("flush after the failure")
		}
	}
}
