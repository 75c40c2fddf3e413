package nbd_test

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/server"
)

// fake is a server that says and does what a test tells it, right or wrong.
type fake struct {
	mode    nbd.ReplyMode         // the best form of replies it agrees to
	flags   nbd.TransmissionFlags // besides HasFlags
	size    uint64
	blocks  *nbd.BlockSizes
	noMeta  bool // refuses metadata contexts
	noGo    bool // knows only EXPORT_NAME
	padding bool // does not offer to leave the zeros out

	// serve answers one request in whatever way; an error ends the connection.
	serve func(c net.Conn, mode nbd.ReplyMode, r *nbd.Request, payload []byte) error
	// option, when not nil and returning true, has dealt with an option itself.
	option func(c net.Conn, h nbd.OptionHeader) bool
	// gone, when not nil, is called when the client has hung up, or the connection ended otherwise.
	gone func(c net.Conn)
}

// start listens, and returns the URI. Everything ends with the test.
func (f *fake) start(t testing.TB) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := server.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
			wg.Go(func() {
				defer c.Close()
				f.conn(c)
				if f.gone != nil {
					f.gone(c)
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return nbd.URI{Network: "unix", Address: socket}.String()
}

func (f *fake) conn(c net.Conn) error {
	handshake := nbd.FlagFixedNewstyle
	if !f.padding {
		handshake |= nbd.FlagNoZeroes
	}
	c.Write(nbd.AppendGreeting(nil, handshake))
	b := make([]byte, 64<<10)
	if _, err := io.ReadFull(c, b[:nbd.ClientFlagsSize]); err != nil {
		return err
	}
	mode := nbd.SimpleReplies
	for {
		if _, err := io.ReadFull(c, b[:nbd.OptionHeaderSize]); err != nil {
			return err
		}
		h, err := nbd.DecodeOptionHeader(b)
		if err != nil {
			return err
		}
		if _, err := io.ReadFull(c, b[:h.Length]); err != nil {
			return err
		}
		if f.option != nil && f.option(c, h) {
			continue
		}
		reply := func(code nbd.ReplyCode, data []byte) { c.Write(nbd.AppendOptionReply(nil, h.Code, code, data)) }
		switch h.Code {
		case nbd.OptExtendedHeaders, nbd.OptStructuredReply:
			want := nbd.StructuredReplies
			if h.Code == nbd.OptExtendedHeaders {
				want = nbd.ExtendedReplies
			}
			if f.mode < want {
				reply(nbd.RepErrUnsupported, nil)
				continue
			}
			mode = want
			reply(nbd.RepAck, nil)
		case nbd.OptSetMetaContext:
			if f.noMeta {
				reply(nbd.RepErrUnsupported, nil)
				continue
			}
			reply(nbd.RepMetaContext, nbd.MetaContext{ID: 42, Name: nbd.ContextAllocation}.Append(nil))
			reply(nbd.RepAck, nil)
		case nbd.OptGo:
			if f.noGo {
				reply(nbd.RepErrUnsupported, nil)
				continue
			}
			reply(nbd.RepInfo, nbd.AppendInfoExport(nil, f.size, nbd.HasFlags|f.flags))
			if f.blocks != nil {
				reply(nbd.RepInfo, nbd.AppendInfoBlockSize(nil, *f.blocks))
			}
			reply(nbd.RepAck, nil)
			return f.transmit(c, mode, b)
		case nbd.OptExportName:
			c.Write(nbd.AppendExportNameReply(nil, f.size, nbd.HasFlags|f.flags, f.padding))
			return f.transmit(c, mode, b)
		case nbd.OptAbort:
			reply(nbd.RepAck, nil)
			return nil
		default:
			reply(nbd.RepErrUnsupported, nil)
		}
	}
}

func (f *fake) transmit(c net.Conn, mode nbd.ReplyMode, b []byte) error {
	extended := mode == nbd.ExtendedReplies
	for {
		var r nbd.Request
		head := b[:nbd.RequestHeaderSize(extended)]
		if _, err := io.ReadFull(c, head); err != nil {
			return err
		}
		if err := nbd.DecodeRequest(head, extended, &r); err != nil {
			return err
		}
		payload := make([]byte, r.PayloadLength(extended))
		if _, err := io.ReadFull(c, payload); err != nil {
			return err
		}
		if r.Command == nbd.CmdDisc {
			return nil
		}
		if err := f.serve(c, mode, &r, payload); err != nil {
			return err
		}
	}
}

// dataChunk and holeChunk are content chunks of the reply to a read.
func dataChunk(mode nbd.ReplyMode, r *nbd.Request, flags nbd.ReplyFlags, off uint64, data []byte) []byte {
	b := nbd.AppendChunk(nil, mode == nbd.ExtendedReplies, flags, nbd.ReplyOffsetData, r.Cookie, r.Offset, 8+uint64(len(data)))
	b = binary.BigEndian.AppendUint64(b, off)
	return append(b, data...)
}

func holeChunk(mode nbd.ReplyMode, r *nbd.Request, flags nbd.ReplyFlags, off uint64, length uint32) []byte {
	b := nbd.AppendChunk(nil, mode == nbd.ExtendedReplies, flags, nbd.ReplyOffsetHole, r.Cookie, r.Offset, nbd.HolePayloadSize)
	b = binary.BigEndian.AppendUint64(b, off)
	return binary.BigEndian.AppendUint32(b, length)
}

// TestClientRefusesWrongReplies: whatever a server sends, the client ends with a protocol error, never with
// wrong data, a panic or a hang.
func TestClientRefusesWrongReplies(t *testing.T) {
	const n = 4096
	data := make([]byte, n)
	structured := func(reply func(r *nbd.Request) []byte) fake {
		return fake{mode: nbd.StructuredReplies, serve: func(c net.Conn, _ nbd.ReplyMode, r *nbd.Request, _ []byte) error {
			_, err := c.Write(reply(r))
			return err
		}}
	}
	read := func(c *nbd.Client) error { _, err := c.ReadAt(make([]byte, n), n); return err }
	status := func(c *nbd.Client) error { return c.DataExtents(0, n, discardExtents) }
	const s, done = nbd.StructuredReplies, nbd.ReplyFlagDone
	for name, c := range map[string]struct {
		fake
		do func(*nbd.Client) error
	}{
		"magic":            {structured(func(r *nbd.Request) []byte { return make([]byte, 64) }), read},
		"cookie":           {structured(func(r *nbd.Request) []byte { return nbd.AppendDone(nil, s, &nbd.Request{Cookie: r.Cookie + 1<<20}) }), read},
		"cookie of nobody": {structured(func(r *nbd.Request) []byte { return nbd.AppendDone(nil, s, &nbd.Request{Cookie: r.Cookie ^ 1}) }), read},
		"simple reply":     {structured(func(r *nbd.Request) []byte { return nbd.AppendSimpleReply(nil, r.Cookie, 0) }), read},
		"extended reply":   {structured(func(r *nbd.Request) []byte { return nbd.AppendDone(nil, nbd.ExtendedReplies, r) }), read},
		"nothing":          {structured(func(r *nbd.Request) []byte { return nbd.AppendDone(nil, s, r) }), read},
		"too little":       {structured(func(r *nbd.Request) []byte { return dataChunk(s, r, done, r.Offset, data[:n-1]) }), read},
		"too much":         {structured(func(r *nbd.Request) []byte { return dataChunk(s, r, done, r.Offset, make([]byte, n+1)) }), read},
		"before":           {structured(func(r *nbd.Request) []byte { return dataChunk(s, r, done, r.Offset-1, data) }), read},
		"far behind":       {structured(func(r *nbd.Request) []byte { return dataChunk(s, r, done, 1<<63, data) }), read},
		"overlap": {structured(func(r *nbd.Request) []byte {
			return append(dataChunk(s, r, 0, r.Offset, data[:2048]), dataChunk(s, r, done, r.Offset+1024, data[:2048])...)
		}), read},
		"gap": {structured(func(r *nbd.Request) []byte {
			return append(dataChunk(s, r, 0, r.Offset, data[:1024]), holeChunk(s, r, done, r.Offset+2048, 2048)...)
		}), read},
		"hole past the end": {structured(func(r *nbd.Request) []byte { return holeChunk(s, r, done, r.Offset, n+1) }), read},
		"empty hole":        {structured(func(r *nbd.Request) []byte { return holeChunk(s, r, done, r.Offset, 0) }), read},
		"empty data":        {structured(func(r *nbd.Request) []byte { return dataChunk(s, r, done, r.Offset, nil) }), read},
		"long hole": {structured(func(r *nbd.Request) []byte {
			return nbd.AppendChunk(nil, false, done, nbd.ReplyOffsetHole, r.Cookie, 0, 1<<30)
		}), read},
		"long error": {structured(func(r *nbd.Request) []byte {
			return nbd.AppendChunk(nil, false, done, nbd.ReplyError, r.Cookie, 0, 1<<30)
		}), read},
		"garbled error": {structured(func(r *nbd.Request) []byte {
			return append(nbd.AppendChunk(nil, false, done, nbd.ReplyError, r.Cookie, 0, 2), 0, 0)
		}), read},
		"unknown type": {structured(func(r *nbd.Request) []byte { return nbd.AppendChunk(nil, false, done, 77, r.Cookie, 0, 0) }), read},
		"status to a read": {structured(func(r *nbd.Request) []byte {
			return nbd.AppendBlockStatus(nil, false, done, r, 42, []nbd.BlockStatus{{1, 0}})
		}), read},
		"data to a status": {structured(func(r *nbd.Request) []byte { return dataChunk(s, r, done, r.Offset, data) }), status},
		"no status":        {structured(func(r *nbd.Request) []byte { return nbd.AppendDone(nil, s, r) }), status},
		"simple status":    {structured(func(r *nbd.Request) []byte { return nbd.AppendSimpleReply(nil, r.Cookie, 0) }), status},
		"wrong context": {structured(func(r *nbd.Request) []byte {
			return nbd.AppendBlockStatus(nil, false, done, r, 43, []nbd.BlockStatus{{1, 0}})
		}), status},
		"status of nothing": {structured(func(r *nbd.Request) []byte {
			return nbd.AppendBlockStatus(nil, false, done, r, 42, []nbd.BlockStatus{{0, 0}})
		}), status},
		"huge status": {structured(func(r *nbd.Request) []byte {
			return nbd.AppendChunk(nil, false, done, nbd.ReplyBlockStatus, r.Cookie, 0, 1<<31)
		}), status},
		"status twice": {structured(func(r *nbd.Request) []byte {
			return append(nbd.AppendBlockStatus(nil, false, 0, r, 42, []nbd.BlockStatus{{1, 0}}), nbd.AppendBlockStatus(nil, false, done, r, 42, []nbd.BlockStatus{{1, 0}})...)
		}), status},
		"structured, simple": {fake{mode: nbd.SimpleReplies, serve: func(c net.Conn, _ nbd.ReplyMode, r *nbd.Request, _ []byte) error {
			c.Write(nbd.AppendDone(nil, s, r))
			return nil
		}}, read},
		"scattered": {structured(func(r *nbd.Request) []byte {
			var b []byte
			for i := uint64(0); i < r.Length; i += 2 { // every other byte
				b = append(b, dataChunk(s, r, 0, r.Offset+i, data[:1])...)
			}
			return nbd.AppendDone(b, s, r)
		}), func(c *nbd.Client) error { _, err := c.ReadAt(make([]byte, 16384), 0); return err }},
	} {
		t.Run(name, func(t *testing.T) {
			f := c.fake
			f.size = 1 << 20
			client := dial(t, f.start(t), nbd.ClientOptions{ReadOnly: true, ReconnectDelay: -1})
			if err := c.do(client); !errors.Is(err, nbd.ErrProtocol) {
				t.Fatalf("got %v, want a protocol error", err)
			}
			if err := c.do(client); !errors.Is(err, nbd.ErrProtocol) {
				t.Fatalf("afterwards got %v, want the same error", err)
			}
		})
	}
}

// TestClientTakesChunksInAnyOrder: data and holes in pieces, backwards, with an unrelated flag set.
func TestClientTakesChunksInAnyOrder(t *testing.T) {
	for _, mode := range []nbd.ReplyMode{nbd.StructuredReplies, nbd.ExtendedReplies} {
		f := fake{mode: mode, size: 1 << 20, serve: func(c net.Conn, mode nbd.ReplyMode, r *nbd.Request, _ []byte) error {
			var b []byte
			for at := int64(r.Length) - 512; at >= 0; at -= 512 {
				off := r.Offset + uint64(at)
				if at%1024 == 0 {
					b = append(b, holeChunk(mode, r, 1<<7, off, 512)...)
				} else {
					b = append(b, dataChunk(mode, r, 0, off, pattern(off, 512))...)
				}
			}
			c.Write(nbd.AppendDone(b, mode, r))
			return nil
		}}
		client := dial(t, f.start(t), nbd.ClientOptions{ReadOnly: true})
		got := slices.Repeat([]byte{0xee}, 8192)
		if _, err := client.ReadAt(got, 4096); err != nil {
			t.Fatal(err)
		}
		for at := 0; at < len(got); at += 512 {
			want := make([]byte, 512)
			if at%1024 != 0 {
				want = pattern(uint64(4096+at), 512)
			}
			if !slices.Equal(got[at:at+512], want) {
				t.Fatalf("mode %d: wrong data at %d", mode, at)
			}
		}
	}
}

// TestClientErrorReplies: an error with an offset, with an unknown type, and one after data is an error of
// the read, and the connection lives on.
func TestClientErrorReplies(t *testing.T) {
	var reply func(r *nbd.Request) []byte
	f := fake{mode: nbd.StructuredReplies, size: 1 << 20, serve: func(c net.Conn, _ nbd.ReplyMode, r *nbd.Request, _ []byte) error {
		c.Write(reply(r))
		return nil
	}}
	client := dial(t, f.start(t), nbd.ClientOptions{ReadOnly: true, ReconnectDelay: -1})
	payload := []byte{0, 0, 0, byte(nbd.ENOSPC), 0, 2, 'h', 'i'}
	for name, typ := range map[string]nbd.ReplyType{"plain": nbd.ReplyError, "offset": nbd.ReplyErrorOffset, "unknown": 1<<15 + 99} {
		reply = func(r *nbd.Request) []byte {
			b := dataChunk(nbd.StructuredReplies, r, 0, r.Offset, pattern(0, 512))
			b = nbd.AppendChunk(b, false, nbd.ReplyFlagDone, typ, r.Cookie, 0, uint64(len(payload))+8)
			return append(append(b, payload...), make([]byte, 8)...)
		}
		_, err := client.ReadAt(make([]byte, 1024), 0)
		var remote *nbd.RemoteError
		if !errors.As(err, &remote) || remote.Errno != nbd.ENOSPC || remote.Message != "hi" {
			t.Fatalf("%s: got %v", name, err)
		}
	}
}

// TestClientHandshakes: what servers of all ages and of ill will answer.
func TestClientHandshakes(t *testing.T) {
	answer := func(c net.Conn, _ nbd.ReplyMode, r *nbd.Request, _ []byte) error {
		c.Write(append(nbd.AppendSimpleReply(nil, r.Cookie, 0), pattern(r.Offset, int(r.Length))...))
		return nil
	}
	for name, f := range map[string]fake{
		"EXPORT_NAME only":           {noGo: true, size: 1 << 20, serve: answer},
		"EXPORT_NAME and padding":    {noGo: true, padding: true, size: 1 << 20, serve: answer},
		"GO, no padding offered":     {padding: true, size: 1 << 20, serve: answer},
		"size not of minimum blocks": {size: 1<<20 + 5, blocks: &nbd.BlockSizes{Minimum: 512, Preferred: 4096, Maximum: 1 << 20}, serve: answer},
	} {
		t.Run(name, func(t *testing.T) {
			client := dial(t, f.start(t), nbd.ClientOptions{ReadOnly: true})
			if n, _ := client.Size(); n != 1<<20 {
				t.Fatalf("size is %d", n)
			}
			got := make([]byte, 1000)
			if _, err := client.ReadAt(got, 512); err != nil || !slices.Equal(got, pattern(512, 1000)) {
				t.Fatalf("read: %v", err)
			}
			if err := client.DataExtents(0, 1<<20, func(e extent) bool {
				if !e.Data || e.Length != 1<<20 {
					t.Errorf("extent %+v, want everything to be data", e)
				}
				return true
			}); err != nil {
				t.Fatal(err)
			}
		})
	}

	raw := func(say []byte) func(c net.Conn, h nbd.OptionHeader) bool {
		return func(c net.Conn, h nbd.OptionHeader) bool { c.Write(say); return true }
	}
	for name, option := range map[string]func(c net.Conn, h nbd.OptionHeader) bool{
		"garbage":        raw(make([]byte, 100)),
		"wrong option":   raw(nbd.AppendOptionReply(nil, nbd.OptList, nbd.RepAck, nil)),
		"long reply":     raw(append(nbd.AppendOptionReply(nil, nbd.OptExtendedHeaders, nbd.RepAck, nil)[:16], 0xff, 0xff, 0xff, 0xff)),
		"unasked reply":  raw(nbd.AppendOptionReply(nil, nbd.OptExtendedHeaders, nbd.RepServer, nil)),
		"endless info":   answerGo(slices.Repeat(nbd.AppendOptionReply(nil, nbd.OptGo, nbd.RepInfo, []byte{9, 9}), 5000)),
		"no info":        answerGo(nbd.AppendOptionReply(nil, nbd.OptGo, nbd.RepAck, nil)),
		"huge export":    answerGo(nbd.AppendOptionReply(nil, nbd.OptGo, nbd.RepInfo, nbd.AppendInfoExport(nil, 1<<63, 1))),
		"bad block size": answerGo(nbd.AppendOptionReply(nil, nbd.OptGo, nbd.RepInfo, nbd.AppendInfoBlockSize(nil, nbd.BlockSizes{}))),
		"wrong kind":     answerGo(nbd.AppendOptionReply(nil, nbd.OptGo, nbd.RepServer, nil)),
	} {
		t.Run(name, func(t *testing.T) {
			f := fake{mode: nbd.StructuredReplies, size: 1 << 20, option: option}
			if _, err := nbd.Dial(f.start(t), nbd.ClientOptions{ConnectTimeout: testenv.Patience}); !errors.Is(err, nbd.ErrProtocol) {
				t.Fatalf("got %v, want a protocol error", err)
			}
		})
	}

	t.Run("silence", func(t *testing.T) {
		f := fake{option: func(c net.Conn, h nbd.OptionHeader) bool { return true }}
		start := time.Now()
		_, err := nbd.Dial(f.start(t), nbd.ClientOptions{ConnectTimeout: 100 * time.Millisecond})
		var timeout net.Error
		if !errors.As(err, &timeout) || !timeout.Timeout() || time.Since(start) > 29*time.Second {
			t.Fatalf("got %v after %v, want a timeout", err, time.Since(start))
		}
	})
	t.Run("shutting down", func(t *testing.T) {
		f := fake{option: func(c net.Conn, h nbd.OptionHeader) bool {
			c.Write(nbd.AppendOptionReply(nil, h.Code, nbd.RepErrShutdown, []byte("bye")))
			return true
		}}
		_, err := nbd.Dial(f.start(t), nbd.ClientOptions{})
		var refusal *nbd.OptionError
		if !errors.As(err, &refusal) || refusal.Code != nbd.RepErrShutdown || refusal.Message != "bye" {
			t.Fatalf("got %v", err)
		}
	})
}

func answerGo(say []byte) func(c net.Conn, h nbd.OptionHeader) bool {
	return func(c net.Conn, h nbd.OptionHeader) bool {
		if h.Code == nbd.OptGo {
			c.Write(say)
		}
		return h.Code == nbd.OptGo
	}
}

// TestClientDurability: how Sync keeps its promise with each combination of what the server offers.
func TestClientDurability(t *testing.T) {
	for _, c := range []struct {
		flags   nbd.TransmissionFlags
		fua     bool // on changes
		flushes int
		fails   bool
	}{
		{nbd.SendFlush | nbd.SendFUA | nbd.SendWriteZeroes, false, 1, false},
		{nbd.SendFlush | nbd.SendWriteZeroes, false, 1, false},
		{nbd.SendFUA | nbd.SendWriteZeroes, true, 0, false},
		{nbd.SendWriteZeroes, false, 0, true},
	} {
		flushes := 0
		f := fake{flags: c.flags, size: 1 << 20, serve: func(conn net.Conn, mode nbd.ReplyMode, r *nbd.Request, _ []byte) error {
			switch r.Command {
			case nbd.CmdFlush:
				flushes++
			default:
				if got := r.Flags&nbd.CmdFlagFUA != 0; got != c.fua {
					t.Errorf("flags %#x: %s has FUA %v, want %v", c.flags, r.Command, got, c.fua)
				}
			}
			conn.Write(nbd.AppendSimpleReply(nil, r.Cookie, 0))
			return nil
		}}
		client := dial(t, f.start(t), nbd.ClientOptions{})
		_, err := client.WriteAt([]byte("x"), 0)
		if err = errors.Join(err, client.ZeroRange(0, 512), client.PunchHole(0, 512)); err != nil {
			t.Fatal(err)
		}
		if err := client.Sync(); c.fails != errors.Is(err, errors.ErrUnsupported) || !c.fails && err != nil {
			t.Errorf("flags %#x: sync says %v", c.flags, err)
		}
		if flushes != c.flushes {
			t.Errorf("flags %#x: %d flushes, want %d", c.flags, flushes, c.flushes)
		}
	}
}

// FuzzClient lets the fuzzer be the server of the transmission phase.
func FuzzClient(f *testing.F) {
	r := &nbd.Request{Cookie: 128, Length: 4096}
	f.Add(uint8(0), append(nbd.AppendSimpleReply(nil, 128, 0), make([]byte, 4096)...))
	f.Add(uint8(1), dataChunk(nbd.StructuredReplies, r, 1, 0, make([]byte, 4096)))
	f.Add(uint8(1), holeChunk(nbd.StructuredReplies, r, 1, 0, 4096))
	f.Add(uint8(1), nbd.AppendBlockStatus(nil, false, 1, r, 42, []nbd.BlockStatus{{Length: 4096, Flags: 3}}))
	f.Add(uint8(1), nbd.AppendError(nil, nbd.StructuredReplies, r, nbd.EIO, "text"))
	f.Add(uint8(2), nbd.AppendBlockStatus(nil, true, 1, r, 42, []nbd.BlockStatus{{Length: 4096, Flags: 3}}))
	f.Fuzz(func(t *testing.T, mode uint8, say []byte) {
		server := fake{mode: nbd.ReplyMode(mode % 3), size: 1 << 20, serve: func(c net.Conn, _ nbd.ReplyMode, _ *nbd.Request, _ []byte) error {
			c.Write(say)
			return io.EOF
		}}
		client := dial(t, server.start(t), nbd.ClientOptions{ReadOnly: true, ReconnectDelay: -1})
		client.ReadAt(make([]byte, 4096), 0)
		client.DataExtents(0, 1<<20, discardExtents)
	})
}
