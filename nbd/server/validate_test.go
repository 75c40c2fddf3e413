package server_test

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/internal/nbdtest"
	"github.com/platter-disk/platter/nbd/server"
)

// TestRules: each request breaks one rule; the answer has the right error and names the rule, and the
// connection lives on.
func TestRules(t *testing.T) {
	const size = 1 << 20
	s := nbdtest.Serve(t, server.Config{MaxRequest: 64 << 10},
		server.Export{Device: nbdtest.Disk(t, size), MinBlock: 512},
		server.Export{Name: "ro", Device: nbdtest.Disk(t, size), ReadOnly: true})
	type bad struct {
		name    string
		mode    nbd.ReplyMode
		export  string
		request nbd.Request
		payload int
		errno   nbd.Errno
		rule    string
	}
	const st, ext = nbd.StructuredReplies, nbd.ExtendedReplies
	for _, c := range []bad{
		{"unknown command", st, "", nbd.Request{Command: 99}, 0, nbd.EINVAL, "command is unknown"},
		{"resize", st, "", nbd.Request{Command: 8}, 0, nbd.EINVAL, "command is unknown"},
		{"unknown flag", st, "", nbd.Request{Command: nbd.CmdRead, Flags: 1 << 9, Length: 512}, 0, nbd.EINVAL, "flag is unknown"},
		{"DF of a write", st, "", nbd.Request{Command: nbd.CmdWrite, Flags: nbd.CmdFlagDF, Length: 512}, 512, nbd.EINVAL, "flag is unknown"},
		{"NO_HOLE of a trim", st, "", nbd.Request{Command: nbd.CmdTrim, Flags: nbd.CmdFlagNoHole, Length: 512}, 0, nbd.EINVAL, "flag is unknown"},
		{"FAST_ZERO of a read", st, "", nbd.Request{Command: nbd.CmdRead, Flags: nbd.CmdFlagFastZero, Length: 512}, 0, nbd.EINVAL, "flag is unknown"},
		{"REQ_ONE of a cache", st, "", nbd.Request{Command: nbd.CmdCache, Flags: nbd.CmdFlagReqOne, Length: 512}, 0, nbd.EINVAL, "flag is unknown"},
		{"payload length without extended headers", st, "", nbd.Request{Command: nbd.CmdWrite, Flags: nbd.CmdFlagPayloadLen, Length: 512}, 512, nbd.EINVAL, "flag is unknown"},
		{"write without payload length", ext, "", nbd.Request{Command: nbd.CmdWrite, Length: 512}, 0, nbd.EINVAL, "payload length flag"},
		{"read with a payload", ext, "", nbd.Request{Command: nbd.CmdRead, Flags: nbd.CmdFlagPayloadLen, Length: 100_000}, 100_000, nbd.EINVAL, "flag is unknown"},
		{"flush with an offset", st, "", nbd.Request{Command: nbd.CmdFlush, Offset: 512}, 0, nbd.EINVAL, "must be 0"},
		{"flush with a length", st, "", nbd.Request{Command: nbd.CmdFlush, Length: 512}, 0, nbd.EINVAL, "must be 0"},
		{"status of nothing", st, "", nbd.Request{Command: nbd.CmdBlockStatus}, 0, nbd.EINVAL, "must not be 0"},
		{"status of a read-only export without contexts", st, "ro", nbd.Request{Command: nbd.CmdBlockStatus, Length: 512}, 0, nbd.EINVAL, "no metadata context"},
		{"long read", st, "", nbd.Request{Command: nbd.CmdRead, Length: 64<<10 + 512}, 0, nbd.EINVAL, "maximum block size"},
		{"long write", st, "", nbd.Request{Command: nbd.CmdWrite, Length: 512 << 10}, 512 << 10, nbd.EINVAL, "maximum block size"},
		{"long cache", st, "", nbd.Request{Command: nbd.CmdCache, Length: 64<<10 + 512}, 0, nbd.EINVAL, "maximum block size"},
		{"read past the end", st, "", nbd.Request{Command: nbd.CmdRead, Offset: size - 512, Length: 1024}, 0, nbd.EINVAL, "past the end"},
		{"write past the end", st, "", nbd.Request{Command: nbd.CmdWrite, Offset: size, Length: 512}, 512, nbd.ENOSPC, "past the end"},
		{"zeroes past the end", st, "", nbd.Request{Command: nbd.CmdWriteZeroes, Offset: size - 512, Length: 1024}, 0, nbd.ENOSPC, "past the end"},
		{"trim past the end", st, "", nbd.Request{Command: nbd.CmdTrim, Offset: size - 512, Length: 1024}, 0, nbd.EINVAL, "past the end"},
		{"offset that wraps", st, "", nbd.Request{Command: nbd.CmdRead, Offset: math.MaxUint64 - 511, Length: 1024}, 0, nbd.EINVAL, "past the end"},
		{"length that wraps", ext, "", nbd.Request{Command: nbd.CmdTrim, Offset: 512, Length: math.MaxUint64 - 511}, 0, nbd.EINVAL, "past the end"},
		{"offset of no block", st, "", nbd.Request{Command: nbd.CmdRead, Offset: 1, Length: 512}, 0, nbd.EINVAL, "minimum block size"},
		{"length of no block", st, "", nbd.Request{Command: nbd.CmdWriteZeroes, Length: 100}, 0, nbd.EINVAL, "minimum block size"},
		{"write of no block", st, "", nbd.Request{Command: nbd.CmdWrite, Length: 100}, 100, nbd.EINVAL, "minimum block size"},
		{"write, read-only", st, "ro", nbd.Request{Command: nbd.CmdWrite, Length: 40_000}, 40_000, nbd.EPERM, "read-only"},
		{"trim, read-only", st, "ro", nbd.Request{Command: nbd.CmdTrim, Length: 512}, 0, nbd.EPERM, "read-only"},
		{"zeroes, read-only", st, "ro", nbd.Request{Command: nbd.CmdWriteZeroes, Length: 512}, 0, nbd.EPERM, "read-only"},
		{"status payload too short", ext, "", nbd.Request{Command: nbd.CmdBlockStatus, Flags: nbd.CmdFlagPayloadLen, Length: 4}, 4, nbd.EINVAL, "shorter or longer"},
		{"status payload empty", ext, "", nbd.Request{Command: nbd.CmdBlockStatus, Flags: nbd.CmdFlagPayloadLen}, 0, nbd.EINVAL, "shorter or longer"},
		{"status payload too long", ext, "", nbd.Request{Command: nbd.CmdBlockStatus, Flags: nbd.CmdFlagPayloadLen, Length: 70_000}, 70_000, nbd.EINVAL, "shorter or longer"},
		{"status payload odd", ext, "", nbd.Request{Command: nbd.CmdBlockStatus, Flags: nbd.CmdFlagPayloadLen, Length: 9}, 9, nbd.EINVAL, "4 for each context"},
		{"status payload without contexts", ext, "", nbd.Request{Command: nbd.CmdBlockStatus, Flags: nbd.CmdFlagPayloadLen, Length: 8}, 8, nbd.EINVAL, "must not be 0"},
	} {
		for _, small := range []bool{false, true} { // all at once, and the header before the payload
			t.Run(c.name, func(t *testing.T) {
				x := begun(t, s)
				x.mode = c.mode
				option := nbd.OptStructuredReply
				if c.mode == ext {
					option = nbd.OptExtendedHeaders
				}
				x.ack(option, nil)
				x.ack(nbd.OptSetMetaContext, names("base:allocation"))
				x.ack(nbd.OptGo, nbd.InfoRequest{Name: c.export}.Append(nil))
				c.request.Cookie = 77
				if small {
					x.request(c.request, nil)
					time.Sleep(time.Millisecond)
					x.write(make([]byte, c.payload))
				} else {
					x.request(c.request, make([]byte, c.payload))
				}
				a := x.answer(0)
				if a.cookie != 77 || a.errno != c.errno || !strings.Contains(a.message, c.rule) {
					t.Errorf("got %v %q, want %v %q", a.errno, a.message, c.errno, c.rule)
				}
				x.alive()
			})
		}
	}
}

// TestRequestAbuse: what leaves the stream in disorder ends the connection.
func TestRequestAbuse(t *testing.T) {
	s := nbdtest.Serve(t, server.Config{}, server.Export{Device: nbdtest.Disk(t, 1<<20)})
	for name, c := range map[string]struct {
		mode nbd.ReplyMode
		say  []byte
		more bool // the client does not close its side
	}{
		"wrong magic":           {nbd.SimpleReplies, make([]byte, nbd.RequestSize), true},
		"compact in extended":   {nbd.ExtendedReplies, append((&nbd.Request{}).Append(nil, false), 0, 0, 0, 0), true},
		"extended in compact":   {nbd.StructuredReplies, (&nbd.Request{}).Append(nil, true), true},
		"gigantic payload":      {nbd.SimpleReplies, (&nbd.Request{Command: nbd.CmdWrite, Length: 1<<32 - 1}).Append(nil, false), true},
		"inconceivable payload": {nbd.ExtendedReplies, (&nbd.Request{Command: nbd.CmdWrite, Flags: nbd.CmdFlagPayloadLen, Length: 1 << 63}).Append(nil, true), true},
		"payload of a stranger": {nbd.ExtendedReplies, (&nbd.Request{Command: 50, Flags: nbd.CmdFlagPayloadLen, Length: 1 << 40}).Append(nil, true), true},
		"half a header":         {nbd.SimpleReplies, (&nbd.Request{}).Append(nil, false)[:10], false},
		"half a small payload":  {nbd.SimpleReplies, append((&nbd.Request{Command: nbd.CmdWrite, Length: 4096}).Append(nil, false), 1, 2, 3), false},
		"half a large payload":  {nbd.SimpleReplies, append((&nbd.Request{Command: nbd.CmdWrite, Length: 1 << 20}).Append(nil, false), 1, 2, 3), false},
	} {
		t.Run(name, func(t *testing.T) {
			x := enter(t, s, c.mode)
			x.write(c.say)
			if !c.more {
				x.Conn.(interface{ CloseWrite() error }).CloseWrite()
			}
			x.ended()
		})
	}
	x := enter(t, s, nbd.SimpleReplies)
	if a := x.do(nbd.Request{Command: nbd.CmdRead, Length: 1 << 20}, nil); a.errno != 0 || strings.Trim(string(a.data), "\x00") != "" {
		t.Error("half a write took place")
	}
}

// FuzzSession lets the fuzzer be a client, in either phase.
func FuzzSession(f *testing.F) {
	f.Add(uint8(0), nbd.AppendOption(nil, nbd.OptGo, nbd.InfoRequest{}.Append(nil)))
	f.Add(uint8(0), nbd.AppendOption(nil, nbd.OptSetMetaContext, names("base:allocation")))
	f.Add(uint8(1), (&nbd.Request{Command: nbd.CmdRead, Length: 4096}).Append(nil, false))
	f.Add(uint8(2), append((&nbd.Request{Command: nbd.CmdWrite, Length: 4}).Append(nil, false), "data"...))
	f.Add(uint8(2), (&nbd.Request{Command: nbd.CmdBlockStatus, Length: 4096}).Append(nil, false))
	f.Add(uint8(3), append((&nbd.Request{Command: nbd.CmdBlockStatus, Flags: nbd.CmdFlagPayloadLen, Length: 12}).Append(nil, true), nbd.BlockStatusPayload{Length: 512, Contexts: []uint32{2}}.Append(nil)...))
	s := nbdtest.Serve(f, server.Config{}, server.Export{Device: nbdtest.Disk(f, 1<<20)})
	f.Fuzz(func(t *testing.T, phase uint8, say []byte) {
		var x *session
		if phase %= 4; phase == 0 {
			x = connect(t, s)
			x.write(nbd.AppendClientFlags(nil, nbd.ClientFixedNewstyle))
		} else {
			x = enter(t, s, nbd.ReplyMode(phase-1))
		}
		x.Write(say) // the server may hang up in the middle
		x.Conn.(interface{ CloseWrite() error }).CloseWrite()
		buf := make([]byte, 64<<10)
		for {
			if _, err := x.Read(buf); err != nil {
				return
			}
		}
	})
}
