package nbd

import "encoding/binary"

// InfoRequest is the data of OptInfo and OptGo.
type InfoRequest struct {
	Name  string
	Infos []InfoCode // what the client asks to be told
}

// Append appends the encoded data.
func (r InfoRequest) Append(b []byte) []byte {
	b = appendString(b, r.Name)
	b = binary.BigEndian.AppendUint16(b, uint16(len(r.Infos)))
	for _, i := range r.Infos {
		b = binary.BigEndian.AppendUint16(b, uint16(i))
	}
	return b
}

// Wants tells whether the client asked for a piece of information.
func (r InfoRequest) Wants(code InfoCode) bool {
	for _, i := range r.Infos {
		if i == code {
			return true
		}
	}
	return false
}

// DecodeInfoRequest reads the data of OptInfo or OptGo.
func DecodeInfoRequest(b []byte) (InfoRequest, error) {
	c := cursor{b: b}
	name := c.bytes(uint64(c.u32()))
	n := int(c.u16())
	if c.short || len(c.b) != 2*n {
		return InfoRequest{}, protocolError("INFO or GO data of %d bytes does not hold what its lengths say", len(b))
	}
	if err := checkString("export name", name); err != nil {
		return InfoRequest{}, err
	}
	r := InfoRequest{Name: string(name), Infos: make([]InfoCode, n)}
	for i := range r.Infos {
		r.Infos[i] = InfoCode(c.u16())
	}
	return r, nil
}

// MetaContextRequest is the data of OptListMetaContext and OptSetMetaContext.
type MetaContextRequest struct {
	Name    string
	Queries []string
}

// Append appends the encoded data.
func (r MetaContextRequest) Append(b []byte) []byte {
	b = appendString(b, r.Name)
	b = binary.BigEndian.AppendUint32(b, uint32(len(r.Queries)))
	for _, q := range r.Queries {
		b = appendString(b, q)
	}
	return b
}

// DecodeMetaContextRequest reads the data of OptListMetaContext or OptSetMetaContext.
func DecodeMetaContextRequest(b []byte) (MetaContextRequest, error) {
	c := cursor{b: b}
	name := c.bytes(uint64(c.u32()))
	n := c.u32()
	if c.short || uint64(n)*4 > uint64(len(c.b)) { // each query takes four bytes at least
		return MetaContextRequest{}, protocolError("META_CONTEXT data of %d bytes does not hold its name and %d queries", len(b), n)
	}
	if err := checkString("export name", name); err != nil {
		return MetaContextRequest{}, err
	}
	r := MetaContextRequest{Name: string(name)}
	for range n {
		q := c.bytes(uint64(c.u32()))
		if c.short {
			break
		}
		if err := checkString("metadata context query", q); err != nil {
			return MetaContextRequest{}, err
		}
		r.Queries = append(r.Queries, string(q))
	}
	if c.short || len(c.b) != 0 {
		return MetaContextRequest{}, protocolError("META_CONTEXT data of %d bytes does not hold what its lengths say", len(b))
	}
	return r, nil
}

// ServerReply is the data of RepServer: one export of a list.
type ServerReply struct{ Name, Description string }

// Append appends the encoded data.
func (r ServerReply) Append(b []byte) []byte {
	return append(appendString(b, r.Name), r.Description...)
}

// DecodeServerReply reads the data of RepServer.
func DecodeServerReply(b []byte) (ServerReply, error) {
	c := cursor{b: b}
	name := c.bytes(uint64(c.u32()))
	if c.short {
		return ServerReply{}, protocolError("export reply of %d bytes does not hold its name", len(b))
	}
	if err := checkString("export name", name); err != nil {
		return ServerReply{}, err
	}
	if err := checkString("export description", c.b); err != nil {
		return ServerReply{}, err
	}
	return ServerReply{string(name), string(c.b)}, nil
}

// MetaContext is the data of RepMetaContext: a context and the id that replies use for it.
type MetaContext struct {
	ID   uint32
	Name string
}

// Append appends the encoded data.
func (r MetaContext) Append(b []byte) []byte {
	return append(binary.BigEndian.AppendUint32(b, r.ID), r.Name...)
}

// DecodeMetaContext reads the data of RepMetaContext.
func DecodeMetaContext(b []byte) (MetaContext, error) {
	c := cursor{b: b}
	id := c.u32()
	if c.short {
		return MetaContext{}, protocolError("metadata context reply of %d bytes, expected 4 at least", len(b))
	}
	if err := checkString("metadata context name", c.b); err != nil {
		return MetaContext{}, err
	}
	return MetaContext{id, string(c.b)}, nil
}

// BlockSizes are an export's constraints on requests, in bytes.
type BlockSizes struct {
	Minimum   uint32 // offsets and lengths are multiples of it; a power of two, at most MaxMinBlock
	Preferred uint32 // requests of this size and alignment are efficient; a power of two, at least 512
	Maximum   uint32 // longest payload
}

// Validate checks the rules for advertised sizes.
func (s BlockSizes) Validate() error {
	switch {
	case s.Minimum == 0 || s.Minimum&(s.Minimum-1) != 0 || s.Minimum > MaxMinBlock:
		return protocolError("minimum block size %d, expected a power of two from 1 to %d", s.Minimum, MaxMinBlock)
	case s.Preferred < 512 || s.Preferred&(s.Preferred-1) != 0 || s.Preferred < s.Minimum:
		return protocolError("preferred block size %d, expected a power of two of at least 512 and the minimum block size %d", s.Preferred, s.Minimum)
	case s.Maximum != 1<<32-1 && (s.Maximum < s.Minimum || s.Maximum%s.Minimum != 0):
		return protocolError("maximum block size %d, expected a multiple of the minimum block size %d", s.Maximum, s.Minimum)
	}
	return nil
}

// AppendInfoExport appends the data of RepInfo that describes an export's size, in bytes, and its flags.
func AppendInfoExport(b []byte, size uint64, flags TransmissionFlags) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(InfoExport))
	b = binary.BigEndian.AppendUint64(b, size)
	return binary.BigEndian.AppendUint16(b, uint16(flags))
}

// AppendInfoString appends the data of RepInfo for InfoName or InfoDescription.
func AppendInfoString(b []byte, code InfoCode, s string) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(code)), s...)
}

// AppendInfoBlockSize appends the data of RepInfo for InfoBlockSize.
func AppendInfoBlockSize(b []byte, s BlockSizes) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(InfoBlockSize))
	b = binary.BigEndian.AppendUint32(b, s.Minimum)
	b = binary.BigEndian.AppendUint32(b, s.Preferred)
	return binary.BigEndian.AppendUint32(b, s.Maximum)
}

// Info is the decoded data of RepInfo. Code says which of the other fields are set; none is for a code that
// is not known, which the protocol says to ignore.
type Info struct {
	Code   InfoCode
	Size   uint64            // InfoExport, bytes
	Flags  TransmissionFlags // InfoExport
	Text   string            // InfoName, InfoDescription
	Blocks BlockSizes        // InfoBlockSize
}

// DecodeInfo reads the data of RepInfo.
func DecodeInfo(b []byte) (Info, error) {
	c := cursor{b: b}
	i := Info{Code: InfoCode(c.u16())}
	if c.short {
		return Info{}, protocolError("information of %d bytes, expected 2 at least", len(b))
	}
	switch i.Code {
	case InfoExport:
		i.Size, i.Flags = c.u64(), TransmissionFlags(c.u16())
	case InfoBlockSize:
		i.Blocks = BlockSizes{c.u32(), c.u32(), c.u32()}
	case InfoName, InfoDescription:
		if err := checkString("export name or description", c.b); err != nil {
			return Info{}, err
		}
		i.Text = string(c.b)
		return i, nil
	default:
		return i, nil
	}
	if c.short || len(c.b) != 0 {
		return Info{}, protocolError("information of kind %d has %d bytes", i.Code, len(b))
	}
	if i.Code == InfoBlockSize {
		if err := i.Blocks.Validate(); err != nil {
			return Info{}, err
		}
	}
	return i, nil
}

func appendString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
}
