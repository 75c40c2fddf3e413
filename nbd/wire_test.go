package nbd

import (
	"bytes"
	"errors"
	"io/fs"
	"math"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"pgregory.net/rapid"
)

// TestGoldenMessages pins the messages to the bytes of the protocol document, so that an encoder and a decoder that are
// wrong together do not go unnoticed.
func TestGoldenMessages(t *testing.T) {
	request := Request{Flags: CmdFlagFUA, Command: CmdWrite, Cookie: 0x0102030405060708, Offset: 0x1122334455667788, Length: 0x99aabbcc}
	for _, c := range []struct {
		name string
		got  []byte
		want string
	}{
		{"greeting", AppendGreeting(nil, FlagFixedNewstyle|FlagNoZeroes), "NBDMAGICIHAVEOPT\x00\x03"},
		{"client flags", AppendClientFlags(nil, ClientFixedNewstyle|ClientNoZeroes), "\x00\x00\x00\x03"},
		{"option", AppendOption(nil, OptGo, []byte("x")), "IHAVEOPT\x00\x00\x00\x07\x00\x00\x00\x01x"},
		{"option reply", AppendOptionReply(nil, OptSetMetaContext, RepErrInvalid, []byte("no")), "\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x0a\x80\x00\x00\x03\x00\x00\x00\x02no"},
		{"extended headers", AppendOption(nil, OptExtendedHeaders, nil), "IHAVEOPT\x00\x00\x00\x0b\x00\x00\x00\x00"},
		{"info request", InfoRequest{"ab", []InfoCode{InfoBlockSize}}.Append(nil), "\x00\x00\x00\x02ab\x00\x01\x00\x03"},
		{"meta request", MetaContextRequest{"ab", []string{"c:"}}.Append(nil), "\x00\x00\x00\x02ab\x00\x00\x00\x01\x00\x00\x00\x02c:"},
		{"server reply", ServerReply{"ab", "text"}.Append(nil), "\x00\x00\x00\x02abtext"},
		{"meta reply", MetaContext{7, "a:b"}.Append(nil), "\x00\x00\x00\x07a:b"},
		{"info export", AppendInfoExport(nil, 1<<20, HasFlags|SendFlush), "\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x05"},
		{"info blocks", AppendInfoBlockSize(nil, BlockSizes{1, 4096, 32 << 20}), "\x00\x03\x00\x00\x00\x01\x00\x00\x10\x00\x02\x00\x00\x00"},
		{"request", request.Append(nil, false), "\x25\x60\x95\x13\x00\x01\x00\x01\x01\x02\x03\x04\x05\x06\x07\x08\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc"},
		{"extended request", request.Append(nil, true), "\x21\xe4\x1c\x71\x00\x01\x00\x01\x01\x02\x03\x04\x05\x06\x07\x08\x11\x22\x33\x44\x55\x66\x77\x88\x00\x00\x00\x00\x99\xaa\xbb\xcc"},
		{"simple reply", AppendSimpleReply(nil, 9, EIO), "\x67\x44\x66\x98\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00\x09"},
		{"structured done", AppendDone(nil, StructuredReplies, &Request{Cookie: 9}), "\x66\x8e\x33\xef\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x09\x00\x00\x00\x00"},
		{"extended done", AppendDone(nil, ExtendedReplies, &Request{Cookie: 9, Offset: 512}), "\x6e\x8a\x27\x8c\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x09\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00"},
		{"structured read", AppendReadReply(nil, StructuredReplies, &Request{Cookie: 9, Offset: 512, Length: 16}), "\x66\x8e\x33\xef\x00\x01\x00\x01\x00\x00\x00\x00\x00\x00\x00\x09\x00\x00\x00\x18\x00\x00\x00\x00\x00\x00\x02\x00"},
		{"error", AppendError(nil, StructuredReplies, &Request{Cookie: 9}, EINVAL, "no"), "\x66\x8e\x33\xef\x00\x01\x80\x01\x00\x00\x00\x00\x00\x00\x00\x09\x00\x00\x00\x08\x00\x00\x00\x16\x00\x02no"},
		{"status", AppendBlockStatus(nil, false, 0, &Request{Cookie: 9}, 3, []BlockStatus{{512, 1}}), "\x66\x8e\x33\xef\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00\x09\x00\x00\x00\x0c\x00\x00\x00\x03\x00\x00\x02\x00\x00\x00\x00\x01"},
		{"extended status", AppendBlockStatus(nil, true, ReplyFlagDone, &Request{Cookie: 9, Offset: 2}, 3, []BlockStatus{{512, 1}}), "\x6e\x8a\x27\x8c\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00\x00\x09\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x18" +
			"\x00\x00\x00\x03\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x00\x01"},
	} {
		if string(c.got) != c.want {
			t.Errorf("%s:\n got %q\nwant %q", c.name, c.got, c.want)
		}
	}
	if n := len(AppendReadReply(nil, SimpleReplies, &request)); n != ReadReplySize(SimpleReplies) {
		t.Errorf("simple read reply has %d bytes, ReadReplySize says %d", n, ReadReplySize(SimpleReplies))
	}
	for _, mode := range []ReplyMode{StructuredReplies, ExtendedReplies} {
		if n := len(AppendReadReply(nil, mode, &request)); n != ReadReplySize(mode) {
			t.Errorf("read reply of mode %d has %d bytes, ReadReplySize says %d", mode, n, ReadReplySize(mode))
		}
	}
}

func TestRoundTrips(t *testing.T) {
	text := rapid.StringMatching(`[a-zä/:% ]{0,20}`)
	rapid.Check(t, func(t *rapid.T) {
		extended := rapid.Bool().Draw(t, "extended")
		q := Request{
			Flags: CommandFlags(rapid.Uint16().Draw(t, "flags")), Command: Command(rapid.Uint16().Draw(t, "command")),
			Cookie: rapid.Uint64().Draw(t, "cookie"), Offset: rapid.Uint64().Draw(t, "offset"), Length: uint64(rapid.Uint32().Draw(t, "length")),
		}
		var q2 Request
		if err := DecodeRequest(q.Append(nil, extended), extended, &q2); err != nil || q2 != q {
			t.Fatalf("request %+v came back as %+v, %v", q, q2, err)
		}

		info := InfoRequest{text.Draw(t, "name"), []InfoCode{}}
		for _, i := range rapid.SliceOfN(rapid.Uint16(), 0, 5).Draw(t, "infos") {
			info.Infos = append(info.Infos, InfoCode(i))
		}
		if got, err := DecodeInfoRequest(info.Append(nil)); err != nil || !reflect.DeepEqual(got, info) {
			t.Fatalf("info request %+v came back as %+v, %v", info, got, err)
		}
		meta := MetaContextRequest{Name: text.Draw(t, "name"), Queries: rapid.SliceOfN(text, 1, 4).Draw(t, "queries")}
		if got, err := DecodeMetaContextRequest(meta.Append(nil)); err != nil || !reflect.DeepEqual(got, meta) {
			t.Fatalf("meta context request %+v came back as %+v, %v", meta, got, err)
		}
		srv := ServerReply{text.Draw(t, "name"), text.Draw(t, "description")}
		if got, err := DecodeServerReply(srv.Append(nil)); err != nil || got != srv {
			t.Fatalf("server reply %+v came back as %+v, %v", srv, got, err)
		}
		payload := BlockStatusPayload{rapid.Uint64().Draw(t, "length"), rapid.SliceOfN(rapid.Uint32(), 1, 5).Draw(t, "contexts")}
		if got, err := DecodeBlockStatusPayload(payload.Append(nil)); err != nil || !reflect.DeepEqual(got, payload) {
			t.Fatalf("block status payload %+v came back as %+v, %v", payload, got, err)
		}

		runs := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) BlockStatus {
			return BlockStatus{uint64(rapid.Uint32Range(1, math.MaxUint32).Draw(t, "length")), uint64(rapid.Uint32().Draw(t, "flags"))}
		}), 1, 20).Draw(t, "runs")
		mode := StructuredReplies
		if extended {
			mode = ExtendedReplies
		}
		b := AppendBlockStatus(nil, extended, ReplyFlagDone, &q, 77, runs)
		var r Reply
		if err := DecodeReply(b, mode, &r); err != nil {
			t.Fatal(err)
		}
		size, _ := ReplyHeaderSize(b, mode)
		if r.Cookie != q.Cookie || r.Length != uint64(len(b)-size) {
			t.Fatalf("block status chunk header %+v for %d bytes", r, len(b))
		}
		if id, got, err := DecodeBlockStatus(b[size:], r.Type, nil); err != nil || id != 77 || !reflect.DeepEqual(got, runs) {
			t.Fatalf("block status %v came back as %d %v, %v", runs, id, got, err)
		}
	})
}

func TestDecodersRefuse(t *testing.T) {
	long := strings.Repeat("x", MaxString+1)
	for name, decode := range map[string]func() error{
		"greeting short": func() error { _, err := DecodeGreeting(make([]byte, 17)); return err },
		"greeting magic": func() error { _, err := DecodeGreeting(make([]byte, 18)); return err },
		"greeting oldstyle": func() error {
			_, err := DecodeGreeting([]byte("NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x00"))
			return err
		},
		"client flags unknown":    func() error { _, err := DecodeClientFlags([]byte{0, 0, 0, 4}); return err },
		"client flags short":      func() error { _, err := DecodeClientFlags([]byte{0}); return err },
		"option magic":            func() error { _, err := DecodeOptionHeader(make([]byte, 16)); return err },
		"option short":            func() error { _, err := DecodeOptionHeader(make([]byte, 15)); return err },
		"option reply magic":      func() error { _, err := DecodeOptionReply(make([]byte, 20)); return err },
		"option reply short":      func() error { _, err := DecodeOptionReply(nil); return err },
		"export name reply short": func() error { _, _, err := DecodeExportNameReply(make([]byte, 9)); return err },
		"info name too long":      func() error { _, err := DecodeInfoRequest(InfoRequest{Name: long}.Append(nil)); return err },
		"info name NUL":           func() error { _, err := DecodeInfoRequest(InfoRequest{Name: "a\x00"}.Append(nil)); return err },
		"info name not UTF-8":     func() error { _, err := DecodeInfoRequest(InfoRequest{Name: "\xff"}.Append(nil)); return err },
		"info list too short":     func() error { _, err := DecodeInfoRequest([]byte{0, 0, 0, 0, 0, 2, 0, 1}); return err },
		"info list too long":      func() error { _, err := DecodeInfoRequest([]byte{0, 0, 0, 0, 0, 0, 0, 1}); return err },
		"info name length wraps":  func() error { _, err := DecodeInfoRequest([]byte{0xff, 0xff, 0xff, 0xff, 0, 0}); return err },
		"meta many queries": func() error {
			_, err := DecodeMetaContextRequest([]byte{0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff})
			return err
		},
		"meta trailing": func() error { _, err := DecodeMetaContextRequest([]byte{0, 0, 0, 0, 0, 0, 0, 0, 1}); return err },
		"meta query short": func() error {
			_, err := DecodeMetaContextRequest([]byte{0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 9})
			return err
		},
		"meta query long": func() error {
			_, err := DecodeMetaContextRequest(MetaContextRequest{"", []string{long}}.Append(nil))
			return err
		},
		"server reply short": func() error { _, err := DecodeServerReply([]byte{0, 0, 0, 1}); return err },
		"server description": func() error { _, err := DecodeServerReply([]byte{0, 0, 0, 0, 0xff}); return err },
		"meta reply short":   func() error { _, err := DecodeMetaContext([]byte{0, 0, 0}); return err },
		"info short":         func() error { _, err := DecodeInfo([]byte{0}); return err },
		"info export long":   func() error { _, err := DecodeInfo(append(AppendInfoExport(nil, 1, 1), 0)); return err },
		"info blocks min 0":  func() error { _, err := DecodeInfo(AppendInfoBlockSize(nil, BlockSizes{0, 512, 512})); return err },
		"info blocks min 3":  func() error { _, err := DecodeInfo(AppendInfoBlockSize(nil, BlockSizes{3, 512, 513})); return err },
		"info blocks min huge": func() error {
			_, err := DecodeInfo(AppendInfoBlockSize(nil, BlockSizes{1 << 17, 1 << 17, 1 << 17}))
			return err
		},
		"info blocks preferred":  func() error { _, err := DecodeInfo(AppendInfoBlockSize(nil, BlockSizes{1, 256, 1 << 17})); return err },
		"info blocks max":        func() error { _, err := DecodeInfo(AppendInfoBlockSize(nil, BlockSizes{512, 512, 1000})); return err },
		"info blocks max 0":      func() error { _, err := DecodeInfo(AppendInfoBlockSize(nil, BlockSizes{1, 512, 0})); return err },
		"info name":              func() error { _, err := DecodeInfo(AppendInfoString(nil, InfoName, "\xff")); return err },
		"request short":          func() error { return DecodeRequest(make([]byte, 27), false, new(Request)) },
		"request extended magic": func() error { return DecodeRequest((&Request{}).Append(nil, true), false, new(Request)) },
		"request compact magic": func() error {
			return DecodeRequest((&Request{Length: 1 << 31}).Append(make([]byte, 0), false), true, new(Request))
		},
		"simple in extended": func() error { return DecodeReply(AppendSimpleReply(nil, 1, 0), ExtendedReplies, new(Reply)) },
		"structured in simple": func() error {
			return DecodeReply(AppendDone(nil, StructuredReplies, &Request{}), SimpleReplies, new(Reply))
		},
		"reply short": func() error { return DecodeReply(AppendSimpleReply(nil, 1, 0)[:15], SimpleReplies, new(Reply)) },
		"reply empty": func() error { return DecodeReply(nil, SimpleReplies, new(Reply)) },
		"none with length": func() error {
			return DecodeReply(AppendChunk(nil, false, 1, ReplyNone, 1, 0, 1), StructuredReplies, new(Reply))
		},
		"none not done": func() error {
			return DecodeReply(AppendChunk(nil, false, 0, ReplyNone, 1, 0, 0), StructuredReplies, new(Reply))
		},
		"error without error": func() error { _, _, err := DecodeErrorPayload(make([]byte, 6)); return err },
		"error message short": func() error { _, _, err := DecodeErrorPayload([]byte{0, 0, 0, 1, 0, 9}); return err },
		"hole of nothing":     func() error { _, _, err := DecodeHole(make([]byte, 12)); return err },
		"hole long":           func() error { _, _, err := DecodeHole(make([]byte, 13)); return err },
		"status empty":        func() error { _, _, err := DecodeBlockStatus(make([]byte, 4), ReplyBlockStatus, nil); return err },
		"status odd":          func() error { _, _, err := DecodeBlockStatus(make([]byte, 13), ReplyBlockStatus, nil); return err },
		"status zero run":     func() error { _, _, err := DecodeBlockStatus(make([]byte, 12), ReplyBlockStatus, nil); return err },
		"status count":        func() error { _, _, err := DecodeBlockStatus(make([]byte, 24), ReplyBlockStatusExt, nil); return err },
		"status run past everything": func() error {
			_, _, err := DecodeBlockStatus(append([]byte{0, 0, 0, 1, 0, 0, 0, 1}, bytes.Repeat([]byte{0xff}, 16)...), ReplyBlockStatusExt, nil)
			return err
		},
		"status payload short": func() error { _, err := DecodeBlockStatusPayload(make([]byte, 7)); return err },
		"status payload odd":   func() error { _, err := DecodeBlockStatusPayload(make([]byte, 9)); return err },
		"status payload long":  func() error { _, err := DecodeBlockStatusPayload(make([]byte, MaxBlockStatusRequest+4)); return err },
	} {
		if err := decode(); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: got %v, want a protocol error", name, err)
		}
	}
}

func TestInfoIgnoresUnknownKinds(t *testing.T) {
	if i, err := DecodeInfo([]byte{0x77, 0x77, 1, 2, 3}); err != nil || i.Code != 0x7777 {
		t.Fatalf("got %+v, %v", i, err)
	}
}

func TestErrnoMatchesLocalErrors(t *testing.T) {
	for _, c := range []struct {
		errno  Errno
		target error
	}{
		{EPERM, fs.ErrPermission}, {EPERM, syscall.EPERM}, {ENOTSUP, errors.ErrUnsupported}, {ENOSPC, syscall.ENOSPC},
		{EIO, syscall.EIO}, {EINVAL, syscall.EINVAL}, {ENOMEM, syscall.ENOMEM},
	} {
		err := error(&RemoteError{Command: CmdWrite, Errno: c.errno, Message: "why"})
		if !errors.Is(err, c.target) {
			t.Errorf("%v is not %v", err, c.target)
		}
		if !strings.Contains(err.Error(), c.errno.Error()) || !strings.Contains(err.Error(), "why") || !strings.Contains(err.Error(), "WRITE") {
			t.Errorf("%v does not say what happened", err)
		}
	}
	for _, e := range []Errno{EOVERFLOW, ESHUTDOWN, 4242} {
		if errors.Is(e, syscall.EIO) || e.Error() == "" {
			t.Errorf("%v is taken for an input/output error", e)
		}
	}
}

func TestNames(t *testing.T) {
	for got, want := range map[string]string{
		CmdBlockStatus.String(): "BLOCK_STATUS", Command(99).String(): "command 99",
		OptGo.String(): "GO", OptionCode(99).String(): "option 99",
		RepErrUnknown.String(): "no such export", ReplyCode(99).String(): "option reply 0x63",
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// FuzzDecoders feeds the same bytes to every decoder; each must end with an error that wraps ErrProtocol or
// with a value whose encoding is decoded to the same value.
func FuzzDecoders(f *testing.F) {
	q := Request{Command: CmdRead, Length: 4096}
	for _, b := range [][]byte{
		AppendGreeting(nil, 3), AppendOption(nil, OptGo, nil), AppendOptionReply(nil, OptGo, RepAck, nil),
		InfoRequest{"x", []InfoCode{3}}.Append(nil), MetaContextRequest{"x", []string{"base:"}}.Append(nil), ServerReply{"a", "b"}.Append(nil),
		MetaContext{1, "base:allocation"}.Append(nil), AppendInfoExport(nil, 1, 1), AppendInfoBlockSize(nil, BlockSizes{1, 512, 512}),
		q.Append(nil, false), q.Append(nil, true), AppendSimpleReply(nil, 1, EIO), AppendDone(nil, StructuredReplies, &q), AppendDone(nil, ExtendedReplies, &q),
		AppendError(nil, StructuredReplies, &q, EIO, "text")[StructuredReplySize:], []byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1},
		AppendBlockStatus(nil, false, 0, &q, 1, []BlockStatus{{1, 2}})[StructuredReplySize:], AppendBlockStatus(nil, true, 0, &q, 1, []BlockStatus{{1, 2}})[ExtendedReplySize:],
		BlockStatusPayload{1, []uint32{1}}.Append(nil),
	} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		judge := func(what string, err error, again func() bool) {
			switch {
			case err != nil && !errors.Is(err, ErrProtocol):
				t.Fatalf("%s: %v does not wrap ErrProtocol", what, err)
			case err == nil && !again():
				t.Fatalf("%s: decoding the encoding of what was decoded gives something else", what)
			}
		}
		always := func() bool { return true }
		_, err := DecodeGreeting(b)
		judge("greeting", err, always)
		_, err = DecodeClientFlags(b)
		judge("client flags", err, always)
		_, err = DecodeOptionHeader(b)
		judge("option", err, always)
		_, err = DecodeOptionReply(b)
		judge("option reply", err, always)
		_, _, err = DecodeExportNameReply(b)
		judge("export name reply", err, always)
		info, err := DecodeInfoRequest(b)
		judge("info request", err, func() bool { return bytes.Equal(info.Append(nil), b) })
		meta, err := DecodeMetaContextRequest(b)
		judge("meta context request", err, func() bool { return bytes.Equal(meta.Append(nil), b) })
		srv, err := DecodeServerReply(b)
		judge("server reply", err, func() bool { return bytes.Equal(srv.Append(nil), b) })
		mc, err := DecodeMetaContext(b)
		judge("meta context", err, func() bool { return bytes.Equal(mc.Append(nil), b) })
		_, err = DecodeInfo(b)
		judge("info", err, always)
		payload, err := DecodeBlockStatusPayload(b)
		judge("block status payload", err, func() bool { return bytes.Equal(payload.Append(nil), b) })
		_, _, err = DecodeErrorPayload(b)
		judge("error payload", err, always)
		_, _, err = DecodeHole(b)
		judge("hole", err, always)
		for _, extended := range []bool{false, true} {
			var r Request
			err = DecodeRequest(b, extended, &r)
			judge("request", err, func() bool { return bytes.HasPrefix(b, r.Append(nil, extended)) })
		}
		for _, mode := range []ReplyMode{SimpleReplies, StructuredReplies, ExtendedReplies} {
			var r Reply
			judge("reply", DecodeReply(b, mode, &r), always)
		}
		for _, typ := range []ReplyType{ReplyBlockStatus, ReplyBlockStatusExt} {
			_, runs, err := DecodeBlockStatus(b, typ, nil)
			judge("block status", err, func() bool { return len(runs) > 0 && len(runs)*8 < len(b) })
		}
	})
}
