package server_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/internal/nbdtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// session is a client that says exactly what a test wants, right or wrong.
type session struct {
	net.Conn
	t    testing.TB
	mode nbd.ReplyMode
}

// connect connects and goes through the greeting.
func connect(t testing.TB, s *nbdtest.Served) *session {
	t.Helper()
	c, err := net.Dial("unix", s.Socket)
	if err != nil {
		t.Fatal(err)
	}
	return greet(t, c)
}

// greet goes through the greeting. The connection ends with the test.
func greet(t testing.TB, c net.Conn) *session {
	t.Helper()
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(testenv.Patience))
	x := &session{Conn: c, t: t}
	if flags, err := nbd.DecodeGreeting(x.read(nbd.GreetingSize)); err != nil || flags != nbd.FlagFixedNewstyle|nbd.FlagNoZeroes {
		t.Fatalf("greeting %#x, %v", flags, err)
	}
	return x
}

// enter connects and goes all the way into the transmission phase.
func enter(t testing.TB, s *nbdtest.Served, mode nbd.ReplyMode) *session {
	t.Helper()
	return connect(t, s).enter(mode)
}

// enter goes from the greeting into the transmission phase of the default export, with both metadata contexts where the
// form of replies allows them.
func (x *session) enter(mode nbd.ReplyMode) *session {
	x.t.Helper()
	x.write(nbd.AppendClientFlags(nil, nbd.ClientFixedNewstyle|nbd.ClientNoZeroes))
	x.mode = mode
	if mode != nbd.SimpleReplies {
		option := nbd.OptStructuredReply
		if mode == nbd.ExtendedReplies {
			option = nbd.OptExtendedHeaders
		}
		x.ack(option, nil)
		x.ack(nbd.OptSetMetaContext, nbd.MetaContextRequest{Queries: []string{nbd.ContextAllocation, nbd.ContextDepth}}.Append(nil))
	}
	x.ack(nbd.OptGo, nbd.InfoRequest{}.Append(nil))
	return x
}

func (x *session) write(b []byte) {
	x.t.Helper()
	if _, err := x.Write(b); err != nil {
		x.t.Fatal(err)
	}
}

func (x *session) read(n int) []byte {
	x.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(x, b); err != nil {
		x.t.Fatalf("reading %d bytes: %v", n, err)
	}
	return b
}

// ended checks that the server hangs up without another word.
func (x *session) ended() {
	x.t.Helper()
	b, err := io.ReadAll(x)
	var timeout net.Error
	if len(b) != 0 || errors.As(err, &timeout) && timeout.Timeout() {
		x.t.Fatalf("the server did not hang up: %q, %v", b, err)
	}
}

type optionReply struct {
	code nbd.ReplyCode
	data []byte
}

// option sends an option and returns the replies, the final one included.
func (x *session) option(code nbd.OptionCode, data []byte) []optionReply {
	x.t.Helper()
	x.write(nbd.AppendOption(nil, code, data))
	var replies []optionReply
	for {
		h, err := nbd.DecodeOptionReply(x.read(nbd.OptionReplySize))
		if err != nil || h.Option != code {
			x.t.Fatalf("reply %+v to option %s, %v", h, code, err)
		}
		replies = append(replies, optionReply{h.Code, x.read(int(h.Length))})
		if h.Code == nbd.RepAck || h.Code.IsError() {
			return replies
		}
	}
}

// ack sends an option that must succeed, and returns the replies before the acknowledgement.
func (x *session) ack(code nbd.OptionCode, data []byte) []optionReply {
	x.t.Helper()
	replies := x.option(code, data)
	last := replies[len(replies)-1]
	if last.code != nbd.RepAck {
		x.t.Fatalf("option %s: %v %q", code, last.code, last.data)
	}
	return replies[:len(replies)-1]
}

// refused sends an option that must fail with the given code.
func (x *session) refused(code nbd.OptionCode, data []byte, want nbd.ReplyCode) {
	x.t.Helper()
	replies := x.option(code, data)
	if len(replies) != 1 || replies[0].code != want || len(replies[0].data) == 0 {
		x.t.Fatalf("option %s: %v, want %v with a message", code, replies, want)
	}
}

// request sends a request with its payload.
func (x *session) request(r nbd.Request, payload []byte) {
	x.t.Helper()
	x.write(append(r.Append(nil, x.mode == nbd.ExtendedReplies), payload...))
}

// answer is a whole reply.
type answer struct {
	cookie  uint64
	errno   nbd.Errno
	message string
	data    []byte
	status  map[uint32][]nbd.BlockStatus
}

// answer receives a reply, of length bytes of data if it is simple and to a read.
func (x *session) answer(length int) answer {
	x.t.Helper()
	a := answer{status: map[uint32][]nbd.BlockStatus{}}
	for {
		head := x.read(nbd.MinReplySize(x.mode))
		size, err := nbd.ReplyHeaderSize(head, x.mode)
		if err != nil {
			x.t.Fatal(err)
		}
		head = append(head, x.read(size-len(head))...)
		var r nbd.Reply
		if err := nbd.DecodeReply(head, x.mode, &r); err != nil {
			x.t.Fatal(err)
		}
		a.cookie = r.Cookie
		if r.Simple {
			a.errno = r.Error
			if r.Error == 0 && length > 0 {
				a.data = x.read(length)
			}
			return a
		}
		payload := x.read(int(r.Length))
		switch r.Type {
		case nbd.ReplyOffsetData:
			binary.BigEndian.Uint64(payload)
			a.data = append(a.data, payload[8:]...)
		case nbd.ReplyBlockStatus, nbd.ReplyBlockStatusExt:
			id, runs, err := nbd.DecodeBlockStatus(payload, r.Type, nil)
			if err != nil || a.status[id] != nil {
				x.t.Fatalf("block status %d %v: %v, or for the second time", id, runs, err)
			}
			a.status[id] = runs
		case nbd.ReplyError:
			if a.errno, a.message, err = nbd.DecodeErrorPayload(payload); err != nil {
				x.t.Fatal(err)
			}
		case nbd.ReplyNone:
		default:
			x.t.Fatalf("chunk %+v", r)
		}
		if r.Flags&nbd.ReplyFlagDone != 0 {
			return a
		}
	}
}

// do sends a request and returns its reply.
func (x *session) do(r nbd.Request, payload []byte) answer {
	x.t.Helper()
	r.Cookie = 0x1234567890
	x.request(r, payload)
	length := 0
	if r.Command == nbd.CmdRead {
		length = int(r.Length)
	}
	a := x.answer(length)
	if a.cookie != r.Cookie {
		x.t.Fatalf("cookie %#x, want %#x", a.cookie, r.Cookie)
	}
	return a
}

// alive checks that the connection still serves requests.
func (x *session) alive() {
	x.t.Helper()
	if a := x.do(nbd.Request{Command: nbd.CmdRead, Length: 512}, nil); a.errno != 0 || len(a.data) != 512 {
		x.t.Fatalf("a read on the same connection: %+v", a)
	}
}

var modes = []nbd.ReplyMode{nbd.SimpleReplies, nbd.StructuredReplies, nbd.ExtendedReplies}

// filled is n bytes of one value.
func filled(value byte, n int) []byte { return bytes.Repeat([]byte{value}, n) }
