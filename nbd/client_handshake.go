package nbd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net"
	"os"
	"path/filepath"
	"time"
)

// maxOptionReply bounds in bytes the data of an option reply: two of the longest strings and their lengths.
const maxOptionReply = 2*MaxString + 64

// maxReplies bounds the replies to one option, so that a server cannot keep a client listening for ever.
// With maxOptionReply it also bounds what a list of exports can take.
const maxReplies = 4096

// ExportInfo is what a server told about an export.
type ExportInfo struct {
	Name        string
	Description string
	Size        int64 // bytes
	Flags       TransmissionFlags
	Blocks      BlockSizes // Minimum 1, Preferred 4096, Maximum DefaultMaxPayload where the server said nothing
	Replies     ReplyMode
	TLS         bool
	Contexts    []MetaContext // that were selected
}

// handshake is the client's side of the handshake on one connection.
type handshake struct {
	nc      net.Conn
	export  ExportInfo
	padding bool // zeros follow the reply to EXPORT_NAME
	buf     []byte
	stop    func() bool // ends the connection's dependence on the context of dial
}

// dial connects to the server of u and goes through the handshake up to, but not including, the choice of an
// export. Everything until the connection is used for requests must be over before the deadline.
func dial(ctx context.Context, u URI, o *ClientOptions) (*handshake, error) {
	deadline := time.Now().Add(o.ConnectTimeout)
	d := net.Dialer{Deadline: deadline}
	address := u.Address
	if u.Network == "unix" && len(address) > 0 && address[0] == 0 {
		address = "@" + address[1:] // an abstract socket, as package net spells it
	}
	nc, err := d.DialContext(ctx, u.Network, address)
	if err != nil {
		return nil, err
	}
	nc.SetDeadline(deadline)
	h := &handshake{nc: nc}
	h.stop = context.AfterFunc(ctx, func() { nc.Close() })
	if err := h.begin(u, o); err != nil {
		h.stop()
		nc.Close()
		return nil, err
	}
	return h, nil
}

func (h *handshake) begin(u URI, o *ClientOptions) error {
	b, err := h.read(GreetingSize)
	if err != nil {
		return fmt.Errorf("NBD greeting: %w", err)
	}
	flags, err := DecodeGreeting(b)
	if err != nil {
		return err
	}
	if flags&FlagFixedNewstyle == 0 {
		return protocolError("handshake flags are %#x: the server does not speak fixed newstyle", uint16(flags))
	}
	answer := ClientFixedNewstyle
	if flags&FlagNoZeroes != 0 {
		answer |= ClientNoZeroes
	}
	h.padding = flags&FlagNoZeroes == 0
	if _, err := h.nc.Write(AppendClientFlags(nil, answer)); err != nil {
		return err
	}
	if u.TLS || o.TLS != nil {
		if err := h.startTLS(u, o.TLS); err != nil {
			return err
		}
	}
	for _, feature := range []struct {
		option OptionCode
		mode   ReplyMode
	}{{OptExtendedHeaders, ExtendedReplies}, {OptStructuredReply, StructuredReplies}} {
		err := h.option(feature.option, nil, nil)
		if err == nil {
			h.export.Replies = feature.mode
			return nil
		}
		if !refused(err) {
			return err
		}
	}
	return nil
}

// refused tells whether the server merely declined an option; it may then be done without.
func refused(err error) bool {
	var refusal *OptionError
	return errors.As(err, &refusal) && refusal.Code != RepErrTLSRequired && refusal.Code != RepErrShutdown
}

func (h *handshake) startTLS(u URI, base *tls.Config) error {
	config, err := tlsConfig(u, base)
	if err != nil {
		return err
	}
	if err := h.option(OptStartTLS, nil, nil); err != nil {
		return fmt.Errorf("the connection cannot be encrypted: %w", err)
	}
	t := tls.Client(h.nc, config)
	if err := t.Handshake(); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	h.nc, h.export.TLS = t, true
	return nil
}

// tlsConfig is base, or the default configuration, with what the URI says.
func tlsConfig(u URI, base *tls.Config) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if base != nil {
		config = base.Clone()
	}
	switch {
	case u.TLSHostname != "":
		config.ServerName = u.TLSHostname
	case config.ServerName != "":
	case u.Network == "tcp":
		config.ServerName, _, _ = net.SplitHostPort(u.Address)
	default:
		config.ServerName = "localhost"
	}
	if u.TLSNoVerify {
		config.InsecureSkipVerify = true
	}
	if dir := u.TLSCertificates; dir != "" {
		ca, err := os.ReadFile(filepath.Join(dir, "ca-cert.pem"))
		if err == nil {
			config.RootCAs = x509.NewCertPool()
			if !config.RootCAs.AppendCertsFromPEM(ca) {
				return nil, fmt.Errorf("%s: no certificate in it", filepath.Join(dir, "ca-cert.pem"))
			}
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "client-cert.pem"), filepath.Join(dir, "client-key.pem"))
		if err == nil {
			config.Certificates = []tls.Certificate{pair}
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("client certificate in %s: %w", dir, err)
		}
	}
	return config, nil
}

// read reads n bytes into a buffer that the next read reuses.
func (h *handshake) read(n int) ([]byte, error) {
	if cap(h.buf) < n {
		h.buf = make([]byte, max(n, 256))
	}
	b := h.buf[:n]
	_, err := io.ReadFull(h.nc, b)
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("the server hung up: %w", io.ErrUnexpectedEOF)
	}
	return b, err
}

// write sends b. Where a server hung up and said why before, a TLS alert for instance, that is the error.
func (h *handshake) write(b []byte) error {
	_, err := h.nc.Write(b)
	if err == nil {
		return nil
	}
	if _, why := h.nc.Read(make([]byte, 1)); why != nil && !errors.Is(why, io.EOF) {
		return why
	}
	return err
}

// option sends an option and hands the data of each reply before the final one to each; a refusal is an
// *OptionError.
func (h *handshake) option(code OptionCode, data []byte, each func(ReplyCode, []byte) error) error {
	if err := h.write(AppendOption(nil, code, data)); err != nil {
		return fmt.Errorf("option %s: %w", code, err)
	}
	for range maxReplies {
		b, err := h.read(OptionReplySize)
		if err != nil {
			return fmt.Errorf("option %s: %w", code, err)
		}
		r, err := DecodeOptionReply(b)
		if err != nil {
			return err
		}
		if r.Option != code {
			return protocolError("reply to option %s, expected one to %s", r.Option, code)
		}
		if r.Length > maxOptionReply {
			return protocolError("reply to option %s has %d bytes, at most %d expected", code, r.Length, maxOptionReply)
		}
		if b, err = h.read(int(r.Length)); err != nil {
			return fmt.Errorf("option %s: %w", code, err)
		}
		switch {
		case r.Code == RepAck:
			return nil
		case r.Code.IsError():
			refusal := &OptionError{Option: code, Code: r.Code}
			if checkString("message", b) == nil {
				refusal.Message = string(b)
			}
			return refusal
		case each == nil:
			return protocolError("reply %#x to option %s, expected an acknowledgement or an error", uint32(r.Code), code)
		}
		if err := each(r.Code, b); err != nil {
			return err
		}
	}
	return protocolError("more than %d replies to option %s", maxReplies, code)
}

// setContexts selects the metadata contexts that the client can use. That the server has none is no error.
func (h *handshake) setContexts(name string) error {
	if h.export.Replies == SimpleReplies {
		return nil
	}
	request := MetaContextRequest{Name: name, Queries: []string{ContextAllocation}}
	err := h.option(OptSetMetaContext, request.Append(nil), func(code ReplyCode, b []byte) error {
		if code != RepMetaContext {
			return protocolError("reply %#x to option %s, expected a metadata context", uint32(code), OptSetMetaContext)
		}
		m, err := DecodeMetaContext(b)
		if err == nil && m.Name == ContextAllocation {
			h.export.Contexts = []MetaContext{m}
		}
		return err
	})
	if err != nil {
		h.export.Contexts = nil
		if refused(err) {
			return nil
		}
	}
	return err
}

// info asks about an export with OptInfo, or chooses it with OptGo.
func (h *handshake) info(code OptionCode, name string) error {
	x := &h.export
	x.Name, x.Description = name, ""
	x.Blocks = BlockSizes{Minimum: 1, Preferred: 4096, Maximum: DefaultMaxPayload}
	described := false
	request := InfoRequest{Name: name, Infos: []InfoCode{InfoName, InfoDescription, InfoBlockSize}}
	err := h.option(code, request.Append(nil), func(reply ReplyCode, b []byte) error {
		if reply != RepInfo {
			return protocolError("reply %#x to option %s, expected information", uint32(reply), code)
		}
		i, err := DecodeInfo(b)
		if err != nil {
			return err
		}
		switch i.Code {
		case InfoExport:
			described = true
			return x.set(i.Size, i.Flags)
		case InfoName:
			x.Name = i.Text
		case InfoDescription:
			x.Description = i.Text
		case InfoBlockSize:
			x.Blocks = i.Blocks
		}
		return nil
	})
	if err == nil && !described {
		err = protocolError("the server accepted export %q without describing it", name)
	}
	return err
}

// choose enters the transmission phase with an export.
func (h *handshake) choose(name string) error {
	if err := h.setContexts(name); err != nil {
		return err
	}
	err := h.info(OptGo, name)
	var refusal *OptionError
	if errors.As(err, &refusal) && refusal.Code == RepErrUnsupported && h.export.Replies != ExtendedReplies {
		err = h.exportName(name)
	}
	return err
}

// exportName chooses an export of a server that does not know OptGo.
func (h *handshake) exportName(name string) error {
	if err := h.write(AppendOption(nil, OptExportName, []byte(name))); err != nil {
		return err
	}
	n := ExportNameReplySize
	if h.padding {
		n += ExportNamePadding
	}
	b, err := h.read(n)
	if err != nil {
		return fmt.Errorf("export %q: %w", name, err)
	}
	size, flags, err := DecodeExportNameReply(b)
	if err != nil {
		return err
	}
	return h.export.set(size, flags)
}

func (x *ExportInfo) set(size uint64, flags TransmissionFlags) error {
	if size > math.MaxInt64 {
		return protocolError("export %q has %d bytes, at most %d expected", x.Name, size, int64(math.MaxInt64))
	}
	x.Size, x.Flags = int64(size), flags
	return nil
}

// abort ends a handshake that is not to become a connection.
func (h *handshake) abort() {
	h.stop()
	h.nc.Write(AppendOption(nil, OptAbort, nil)) // a courtesy; the connection is closed either way
	h.nc.Close()
}

// List asks the server of a URI for its exports, and for the details of each where the server gives them.
// The export that the URI names does not matter.
func List(uri string, o ClientOptions) ([]ExportInfo, error) {
	u, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	if err := o.setDefaults(); err != nil {
		return nil, err
	}
	fail := func(err error) ([]ExportInfo, error) { return nil, fmt.Errorf("%s: %w", uri, err) }
	h, err := dial(context.Background(), u, &o)
	if err != nil {
		return fail(err)
	}
	defer h.abort()
	var exports []ExportInfo
	err = h.option(OptList, nil, func(code ReplyCode, b []byte) error {
		if code != RepServer {
			return protocolError("reply %#x to option %s, expected an export", uint32(code), OptList)
		}
		r, err := DecodeServerReply(b)
		exports = append(exports, ExportInfo{Name: r.Name, Description: r.Description})
		return err
	})
	if err != nil {
		return fail(err)
	}
	for i := range exports {
		description := exports[i].Description
		if err := h.info(OptInfo, exports[i].Name); err != nil {
			if refused(err) {
				continue
			}
			return fail(err)
		}
		exports[i] = h.export
		if exports[i].Description == "" {
			exports[i].Description = description
		}
	}
	return exports, nil
}
