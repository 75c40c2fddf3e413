package server_test

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/internal/nbdtest"
	"github.com/platter-disk/platter/nbd/server"
)

func twoExports(t *testing.T, cfg server.Config) *nbdtest.Served {
	t.Helper()
	return nbdtest.Serve(t, cfg,
		server.Export{Name: "", Description: "the default", Device: nbdtest.Disk(t, 1<<20)},
		server.Export{Name: "ro", Device: nbdtest.Disk(t, 2<<20+512), ReadOnly: true, MinBlock: 4096})
}

// begun is a connection after the greeting was answered.
func begun(t *testing.T, s *nbdtest.Served) *session {
	t.Helper()
	x := connect(t, s)
	x.write(nbd.AppendClientFlags(nil, nbd.ClientFixedNewstyle|nbd.ClientNoZeroes))
	return x
}

func names(queries ...string) []byte { return nbd.MetaContextRequest{Queries: queries}.Append(nil) }

func contexts(t *testing.T, replies []optionReply) []nbd.MetaContext {
	t.Helper()
	var all []nbd.MetaContext
	for _, r := range replies {
		m, err := nbd.DecodeMetaContext(r.data)
		if r.code != nbd.RepMetaContext || err != nil {
			t.Fatalf("reply %v, %v", r, err)
		}
		all = append(all, m)
	}
	return all
}

func TestOptions(t *testing.T) {
	x := begun(t, twoExports(t, server.Config{}))
	list := x.ack(nbd.OptList, nil)
	if len(list) != 2 {
		t.Fatalf("list: %v", list)
	}
	if e, err := nbd.DecodeServerReply(list[0].data); err != nil || e != (nbd.ServerReply{Name: "", Description: "the default"}) {
		t.Errorf("first export %+v, %v", e, err)
	}
	x.refused(nbd.OptList, []byte{1}, nbd.RepErrInvalid)
	x.refused(99, []byte("whatever"), nbd.RepErrUnsupported)
	x.refused(nbd.OptStartTLS, nil, nbd.RepErrPolicy)
	x.refused(nbd.OptInfo, []byte{1}, nbd.RepErrInvalid)
	x.refused(nbd.OptInfo, nbd.InfoRequest{Name: "none"}.Append(nil), nbd.RepErrUnknown)
	x.refused(nbd.OptGo, nbd.InfoRequest{Name: strings.Repeat("n", nbd.MaxString)}.Append(nil), nbd.RepErrUnknown)
	x.refused(nbd.OptSetMetaContext, names("base:allocation"), nbd.RepErrInvalid) // no structured replies yet

	if got := contexts(t, x.ack(nbd.OptListMetaContext, names())); len(got) != 2 || got[0] != (nbd.MetaContext{ID: 0, Name: "base:allocation"}) || got[1].Name != "qemu:allocation-depth" {
		t.Errorf("all contexts: %v", got)
	}
	for query, want := range map[string]string{"base:": "base:allocation", "qemu:": "qemu:allocation-depth", "qemu:allocation-depth": "qemu:allocation-depth", "x-none:": "", "base:other": ""} {
		got := contexts(t, x.ack(nbd.OptListMetaContext, names(query)))
		if want == "" && len(got) != 0 || want != "" && (len(got) != 1 || got[0].Name != want) {
			t.Errorf("list of %q: %v", query, got)
		}
	}
	x.refused(nbd.OptListMetaContext, names("nocolon"), nbd.RepErrInvalid)
	x.refused(nbd.OptListMetaContext, nbd.MetaContextRequest{Name: "none"}.Append(nil), nbd.RepErrUnknown)
	x.refused(nbd.OptListMetaContext, []byte{0, 0, 0, 0, 9, 9, 9, 9}, nbd.RepErrInvalid)

	x.ack(nbd.OptStructuredReply, nil)
	if got := contexts(t, x.ack(nbd.OptSetMetaContext, names("base:", "qemu:", "base:allocation", "base:allocation", "qemu:x"))); len(got) != 1 || got[0].Name != "base:allocation" || got[0].ID == 0 {
		t.Errorf("set contexts: %v", got)
	}
	if got := contexts(t, x.ack(nbd.OptSetMetaContext, names())); len(got) != 0 {
		t.Errorf("set without a query: %v", got)
	}
	x.ack(nbd.OptExtendedHeaders, nil)
	x.refused(nbd.OptStructuredReply, nil, nbd.RepErrInvalid)

	got := map[nbd.InfoCode]nbd.Info{}
	for _, r := range x.ack(nbd.OptInfo, nbd.InfoRequest{Name: "ro", Infos: []nbd.InfoCode{nbd.InfoName, nbd.InfoDescription, nbd.InfoBlockSize, 77}}.Append(nil)) {
		i, err := nbd.DecodeInfo(r.data)
		if err != nil || r.code != nbd.RepInfo {
			t.Fatal(err)
		}
		got[i.Code] = i
	}
	if e := got[nbd.InfoExport]; e.Size != 2<<20 || e.Flags != nbd.HasFlags|nbd.ReadOnly|nbd.SendFlush|nbd.CanMultiConn|nbd.SendCache|nbd.SendDF|nbd.SendBlockStatusPayload {
		t.Errorf("export %+v", e)
	}
	if got[nbd.InfoName].Text != "ro" || got[nbd.InfoBlockSize].Blocks != (nbd.BlockSizes{Minimum: 4096, Preferred: 4096, Maximum: 32 << 20}) || len(got) != 3 {
		t.Errorf("information %+v", got)
	}
	x.refused(nbd.OptList, make([]byte, 100_000), nbd.RepErrTooBig)
	x.ack(nbd.OptAbort, nil)
	x.ended()
}

func TestExportName(t *testing.T) {
	s := twoExports(t, server.Config{})
	for _, padding := range []bool{false, true} {
		x := connect(t, s)
		flags, n := nbd.ClientFixedNewstyle|nbd.ClientNoZeroes, nbd.ExportNameReplySize
		if padding { // not even fixed newstyle
			flags, n = 0, n+nbd.ExportNamePadding
		}
		x.write(nbd.AppendClientFlags(nil, flags))
		x.write(nbd.AppendOption(nil, nbd.OptExportName, nil))
		size, got, err := nbd.DecodeExportNameReply(x.read(n))
		want := nbd.HasFlags | nbd.SendFlush | nbd.SendFUA | nbd.SendTrim | nbd.SendWriteZeroes | nbd.SendFastZero | nbd.CanMultiConn | nbd.SendCache
		if err != nil || size != 1<<20 || got != want {
			t.Errorf("size %d, flags %#x, want %#x, %v", size, got, want, err)
		}
		x.alive()
	}
	for name, prepare := range map[string]func(x *session){
		"none": func(*session) {},
		"":     func(x *session) { x.ack(nbd.OptExtendedHeaders, nil) },
	} {
		x := begun(t, s)
		prepare(x)
		x.write(nbd.AppendOption(nil, nbd.OptExportName, []byte(name)))
		x.ended()
	}
	x := connect(t, s)
	x.write(nbd.AppendClientFlags(nil, 0))
	x.write(nbd.AppendOption(nil, 99, nil)) // which a client without fixed newstyle must not send
	x.ended()
}

// TestContextsBelongToTheirExport: contexts selected for one export do not hold for another.
func TestContextsBelongToTheirExport(t *testing.T) {
	s := twoExports(t, server.Config{})
	for name, works := range map[string]bool{"": true, "ro": false} {
		x := begun(t, s)
		x.mode = nbd.StructuredReplies
		x.ack(nbd.OptStructuredReply, nil)
		x.ack(nbd.OptSetMetaContext, names("base:allocation"))
		x.ack(nbd.OptGo, nbd.InfoRequest{Name: name}.Append(nil))
		if a := x.do(nbd.Request{Command: nbd.CmdBlockStatus, Length: 4096}, nil); (a.errno == 0) != works {
			t.Errorf("export %q: %+v", name, a)
		}
	}
}

// TestHandshakeAbuse: whatever comes, the server ends the connection and goes on.
func TestHandshakeAbuse(t *testing.T) {
	good := nbd.AppendClientFlags(nil, nbd.ClientFixedNewstyle)
	huge := binary.BigEndian.AppendUint32(nbd.AppendOption(nil, nbd.OptList, nil)[:12], 1<<31)
	for name, say := range map[string][]byte{
		"unknown client flags":    {0, 0, 0, 0x80},
		"garbage":                 append(slices.Clone(good), make([]byte, 64)...),
		"huge option":             append(slices.Clone(good), huge...),
		"silence":                 nil,
		"silence after the flags": good,
		"half an option":          append(slices.Clone(good), nbd.AppendOption(nil, nbd.OptGo, make([]byte, 100))[:50]...),
		"a request":               append(slices.Clone(good), (&nbd.Request{}).Append(nil, false)...),
		"the other magic":         append(slices.Clone(good), nbd.AppendOptionReply(nil, nbd.OptGo, nbd.RepAck, nil)...),
	} {
		handshakeAbuse(t, name, func(x *session) {
			_, _ = x.Write(say) // the server may hang up before it has all of it
			x.ended()
		})
	}
	handshakeAbuse(t, "a byte at a time", func(x *session) {
		go io.Copy(io.Discard, x) // the refusals of what is whole
		for _, b := range slices.Concat(good, slices.Repeat(nbd.AppendOption(nil, 99, nil), 100)) {
			if _, err := x.Write([]byte{b}); err != nil {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		x.t.Error("a handshake may last as long as the client likes")
	})
}

// handshakeAbuse lets a client say something after the greeting, on a clock that moves when nothing else does, and
// expects that the server goes on. The handshake may take as long as it may by default.
func handshakeAbuse(t *testing.T, name string, say func(x *session)) {
	t.Helper()
	t.Run(name, func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			p := newPipes()
			s := p.serve(t, server.Config{}, server.Export{Device: nbdtest.Disk(t, 1<<20)})
			x := p.connect(t)
			say(x)
			x.Close()
			synctest.Wait()
			if n := s.Stats().Connections; n != 0 {
				t.Errorf("%d connections after the client has left", n)
			}
			p.connect(t).enter(nbd.StructuredReplies).alive()
		})
	})
}

func TestTLSModes(t *testing.T) {
	certs := nbdtest.NewCertificates(t)
	x := begun(t, twoExports(t, server.Config{TLS: server.TLSRequired, TLSConfig: certs.ServerConfig(t, false)}))
	for _, o := range []nbd.OptionCode{nbd.OptList, nbd.OptInfo, nbd.OptGo, nbd.OptStructuredReply, 99} {
		x.refused(o, nil, nbd.RepErrTLSRequired)
	}
	x.refused(nbd.OptStartTLS, []byte{1}, nbd.RepErrInvalid)
	x.write(nbd.AppendOption(nil, nbd.OptExportName, nil))
	x.ended()

	// An option in the clear behind STARTTLS must not be taken for one that came over TLS.
	x = begun(t, twoExports(t, server.Config{TLS: server.TLSRequired, TLSConfig: certs.ServerConfig(t, false)}))
	x.write(append(nbd.AppendOption(nil, nbd.OptStartTLS, nil), nbd.AppendOption(nil, nbd.OptList, nil)...))
	if r, err := nbd.DecodeOptionReply(x.read(nbd.OptionReplySize)); err != nil || r.Code != nbd.RepAck {
		t.Fatalf("%+v, %v", r, err)
	}
	rest := make([]byte, 100)
	n, err := x.Read(rest)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		t.Fatal("the server waits")
	}
	if n > 0 && rest[0] != 21 { // a TLS alert
		t.Fatalf("the server answered %q", rest[:n])
	}
}

// TestPreferredBlock: what clients are told to prefer is what the device does, within bounds.
func TestPreferredBlock(t *testing.T) {
	for _, c := range []struct {
		export     server.Export
		device     int64
		maxRequest int
		want       uint32
	}{
		{device: 64 << 10, want: 64 << 10},
		{device: 512, want: 4096},
		{device: 0, want: 4096},
		{device: 2 << 20, want: 1 << 20},
		{device: 1 << 40, want: 1 << 20},
		{device: 1 << 20, maxRequest: 100_000, want: 64 << 10},
		{device: 4096, export: server.Export{MinBlock: 16 << 10}, want: 16 << 10},
		{device: 64 << 10, export: server.Export{PreferredBlock: 512}, want: 512},
		{device: 64 << 10, export: server.Export{PreferredBlock: 8 << 20}, want: 8 << 20},
	} {
		x := c.export
		x.Device = &preferring{nbdtest.Disk(t, 16<<20), c.device}
		s := nbdtest.Serve(t, server.Config{MaxRequest: c.maxRequest}, x)
		list, err := nbd.List(s.URI(""), nbd.ClientOptions{})
		if err != nil || len(list) != 1 || list[0].Blocks.Preferred != c.want {
			t.Errorf("%+v: got %+v, %v", c, list, err)
		}
		s.Stop()
	}
}

// preferring is a disk with a unit of its own.
type preferring struct {
	block.Device
	unit int64
}

// Limits implements block.Device.
func (p *preferring) Limits() block.Limits {
	l := p.Device.Limits()
	l.Preferred = p.unit
	return l
}
