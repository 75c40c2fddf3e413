package server

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/platter-disk/platter/nbd"
)

// maxSkip is how many bytes of an option that is too long are read and thrown away, so that it can be
// answered. A longer one ends the connection.
const maxSkip = 4 << 20

// metaContext is a metadata context that the server knows.
type metaContext struct {
	id   uint32
	name string
	kind contextKind
}

// metaRequest is what metadata contexts were selected for.
type metaRequest struct {
	name   string  // as the client asked
	export *export // that answered to it
}

// knownContexts are all there are, by id.
func knownContexts() []metaContext {
	return []metaContext{
		{1, nbd.ContextAllocation, allocationContext},
		{2, nbd.ContextDepth, depthContext},
	}
}

// negotiate is the handshake. It returns true when the transmission phase begins, false when the client left.
//
// It reads exactly the bytes of each message: what follows a STARTTLS in the clear must reach the TLS
// handshake and fail there, not be taken for an option that came over TLS.
func (c *conn) negotiate() (bool, error) {
	if _, err := c.nc.Write(nbd.AppendGreeting(nil, nbd.FlagFixedNewstyle|nbd.FlagNoZeroes)); err != nil {
		return false, err
	}
	head := make([]byte, nbd.OptionHeaderSize)
	if _, err := io.ReadFull(c.nc, head[:nbd.ClientFlagsSize]); err != nil {
		if errors.Is(err, io.EOF) {
			return false, nil // a port scan, or a look whether anybody listens
		}
		return false, err
	}
	flags, err := nbd.DecodeClientFlags(head[:nbd.ClientFlagsSize])
	if err != nil {
		return false, err
	}
	c.fixed = flags&nbd.ClientFixedNewstyle != 0
	c.zeroes = flags&nbd.ClientNoZeroes == 0
	for {
		if _, err := io.ReadFull(c.nc, head); err != nil {
			if errors.Is(err, io.EOF) {
				return false, nil
			}
			return false, err
		}
		h, err := nbd.DecodeOptionHeader(head)
		if err != nil {
			return false, err
		}
		data, fits, err := c.readOption(h)
		if err != nil {
			return false, err
		}
		switch {
		case h.Code == nbd.OptAbort:
			return false, c.reply(h.Code, nbd.RepAck, nil)
		case c.srv.draining.Load():
			err = c.refuse(h.Code, nbd.RepErrShutdown, "the server is shutting down")
		case !fits:
			err = c.refuse(h.Code, nbd.RepErrTooBig, fmt.Sprintf("option data of %d bytes, at most %d allowed", h.Length, c.srv.cfg.MaxOption))
		case c.srv.cfg.TLS == TLSRequired && !c.secure && h.Code != nbd.OptStartTLS:
			err = c.refuse(h.Code, nbd.RepErrTLSRequired, "the server requires TLS")
		default:
			var done bool
			if done, err = c.handleOption(h.Code, data); done {
				return true, err
			}
		}
		if err != nil {
			return false, err
		}
	}
}

// readOption reads the data of an option into c.option. fits is false when it was too long and skipped.
func (c *conn) readOption(h nbd.OptionHeader) (data []byte, fits bool, err error) {
	n := int64(h.Length)
	if n > int64(c.srv.cfg.MaxOption) {
		if n > maxSkip {
			return nil, false, fmt.Errorf("%w: option %s with %d bytes of data, at most %d allowed", nbd.ErrProtocol, h.Code, n, c.srv.cfg.MaxOption)
		}
		_, err = io.CopyN(io.Discard, c.nc, n)
		return nil, false, err
	}
	if n > int64(cap(c.option)) {
		c.option = make([]byte, n)
	}
	data = c.option[:n]
	_, err = io.ReadFull(c.nc, data)
	return data, true, err
}

// handleOption carries out one option. done is true when the transmission phase begins.
func (c *conn) handleOption(code nbd.OptionCode, data []byte) (done bool, err error) {
	switch code {
	case nbd.OptList, nbd.OptStartTLS, nbd.OptStructuredReply, nbd.OptExtendedHeaders:
		if len(data) != 0 {
			return false, c.refuse(code, nbd.RepErrInvalid, fmt.Sprintf("the option takes no data, it came with %d bytes", len(data)))
		}
	}
	switch code {
	case nbd.OptExportName:
		return c.exportName(string(data))
	case nbd.OptList:
		for _, x := range c.srv.list() {
			r := nbd.ServerReply{Name: x.Name, Description: x.Description}
			if err := c.reply(code, nbd.RepServer, r.Append(nil)); err != nil {
				return false, err
			}
		}
		return false, c.reply(code, nbd.RepAck, nil)
	case nbd.OptStartTLS:
		return false, c.startTLS()
	case nbd.OptInfo, nbd.OptGo:
		return c.info(code, data)
	case nbd.OptStructuredReply:
		if c.mode == nbd.ExtendedReplies {
			return false, c.refuse(code, nbd.RepErrInvalid, "extended headers were negotiated already")
		}
		c.mode = nbd.StructuredReplies
		return false, c.reply(code, nbd.RepAck, nil)
	case nbd.OptExtendedHeaders:
		c.mode = nbd.ExtendedReplies
		return false, c.reply(code, nbd.RepAck, nil)
	case nbd.OptListMetaContext, nbd.OptSetMetaContext:
		return false, c.metaContexts(code, data)
	}
	return false, c.refuse(code, nbd.RepErrUnsupported, fmt.Sprintf("%s is unknown", code))
}

// exportName is EXPORT_NAME, which can only end the connection where it cannot succeed.
func (c *conn) exportName(name string) (bool, error) {
	if c.mode == nbd.ExtendedReplies {
		return false, fmt.Errorf("%w: EXPORT_NAME after EXTENDED_HEADERS", nbd.ErrProtocol)
	}
	x := c.choose(name)
	if x == nil {
		return false, fmt.Errorf("export %q does not exist", name)
	}
	_, err := c.nc.Write(nbd.AppendExportNameReply(nil, x.size, x.flags(c.mode), c.zeroes))
	return true, err
}

// choose settles the terms of the transmission phase with the export that answers to a name, which it returns, or nil.
// RemoveExport waits for the connection from then on, so it comes before the reply that gives the client the export.
func (c *conn) choose(name string) *export {
	c.srv.mu.Lock()
	defer c.srv.mu.Unlock()
	x := c.srv.findLocked(name)
	if x == nil {
		return nil
	}
	x.users.Add(1)
	c.export = x
	c.size, c.blocks, c.readOnly = x.size, x.blocks, x.ReadOnly
	// Contexts that were selected for another export are not valid. But who asked by the same name gets them: this one
	// may have come in the place of one that was removed meanwhile, and the client cannot know.
	if c.meta.export != x && c.meta.name != name {
		c.contexts = nil
	}
	return x
}

// info is INFO and GO.
func (c *conn) info(code nbd.OptionCode, data []byte) (bool, error) {
	r, err := nbd.DecodeInfoRequest(data)
	if err != nil {
		return false, c.refuse(code, nbd.RepErrInvalid, err.Error())
	}
	find := c.srv.find
	if code == nbd.OptGo {
		find = c.choose
	}
	x := find(r.Name)
	if x == nil {
		return false, c.refuse(code, nbd.RepErrUnknown, fmt.Sprintf("export %q does not exist", r.Name))
	}
	out := nbd.AppendOptionReply(nil, code, nbd.RepInfo, nbd.AppendInfoExport(nil, x.size, x.flags(c.mode)))
	if r.Wants(nbd.InfoName) {
		out = nbd.AppendOptionReply(out, code, nbd.RepInfo, nbd.AppendInfoString(nil, nbd.InfoName, x.Name))
	}
	if r.Wants(nbd.InfoDescription) && x.Description != "" {
		out = nbd.AppendOptionReply(out, code, nbd.RepInfo, nbd.AppendInfoString(nil, nbd.InfoDescription, x.Description))
	}
	if r.Wants(nbd.InfoBlockSize) {
		out = nbd.AppendOptionReply(out, code, nbd.RepInfo, nbd.AppendInfoBlockSize(nil, x.blocks))
	}
	out = nbd.AppendOptionReply(out, code, nbd.RepAck, nil)
	_, err = c.nc.Write(out)
	return code == nbd.OptGo, err
}

// startTLS upgrades the connection. What was negotiated in the clear is forgotten, as the protocol demands.
func (c *conn) startTLS() error {
	const code = nbd.OptStartTLS
	switch {
	case c.secure:
		return c.refuse(code, nbd.RepErrInvalid, "TLS is on already")
	case c.srv.cfg.TLS == TLSOff || !c.fixed:
		return c.refuse(code, nbd.RepErrPolicy, "the server does not use TLS")
	}
	if err := c.reply(code, nbd.RepAck, nil); err != nil {
		return err
	}
	t := tls.Server(c.nc, c.srv.cfg.TLSConfig)
	if err := t.Handshake(); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	c.nc, c.secure = t, true
	c.mode, c.contexts = nbd.SimpleReplies, nil
	return nil
}

// metaContexts is LIST_META_CONTEXT and SET_META_CONTEXT.
func (c *conn) metaContexts(code nbd.OptionCode, data []byte) error {
	set := code == nbd.OptSetMetaContext
	if set { // replaces what was set before, even if it fails
		c.contexts = nil
		if c.mode == nbd.SimpleReplies {
			return c.refuse(code, nbd.RepErrInvalid, "structured replies must be negotiated first")
		}
	}
	r, err := nbd.DecodeMetaContextRequest(data)
	if err != nil {
		return c.refuse(code, nbd.RepErrInvalid, err.Error())
	}
	x := c.srv.find(r.Name)
	if x == nil {
		return c.refuse(code, nbd.RepErrUnknown, fmt.Sprintf("export %q does not exist", r.Name))
	}
	for _, q := range r.Queries {
		if !strings.Contains(q, ":") {
			return c.refuse(code, nbd.RepErrInvalid, fmt.Sprintf("query %q has no namespace", q))
		}
	}
	var out []byte
	for _, m := range knownContexts() {
		if !m.matches(r.Queries, set) {
			continue
		}
		id := uint32(0) // reserved in a list
		if set {
			id = m.id
			c.contexts = append(c.contexts, m)
		}
		out = nbd.AppendOptionReply(out, code, nbd.RepMetaContext, nbd.MetaContext{ID: id, Name: m.name}.Append(nil))
	}
	if set {
		c.meta = metaRequest{r.Name, x}
	}
	_, err = c.nc.Write(nbd.AppendOptionReply(out, code, nbd.RepAck, nil))
	return err
}

// matches tells whether queries ask for m. In a list no query at all asks for everything, and a query that
// is only a namespace asks for all of it; for selection a context must be named.
func (m metaContext) matches(queries []string, set bool) bool {
	if len(queries) == 0 {
		return !set
	}
	namespace := m.name[:strings.Index(m.name, ":")+1]
	for _, q := range queries {
		if q == m.name || !set && q == namespace {
			return true
		}
	}
	return false
}

func (c *conn) reply(option nbd.OptionCode, code nbd.ReplyCode, data []byte) error {
	_, err := c.nc.Write(nbd.AppendOptionReply(nil, option, code, data))
	return err
}

// refuse answers with an error; where the client can take none, the connection ends.
func (c *conn) refuse(option nbd.OptionCode, code nbd.ReplyCode, message string) error {
	if option == nbd.OptExportName || !c.fixed {
		return fmt.Errorf("option %s: %s", option, message)
	}
	c.log.Debug("nbd: option refused", "option", option.String(), "reason", message)
	message = strings.ToValidUTF8(message[:min(len(message), nbd.MaxString)], "")
	return c.reply(option, code, []byte(message))
}
