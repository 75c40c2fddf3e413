package nbd

import "encoding/binary"

// Sizes in bytes of the fixed messages of the handshake.
const (
	GreetingSize        = 18
	ClientFlagsSize     = 4
	OptionHeaderSize    = 16
	OptionReplySize     = 20
	ExportNameReplySize = 10  // after OptExportName, with NoZeroes agreed
	ExportNamePadding   = 124 // zeros that follow without NoZeroes
)

// AppendGreeting appends the server's first message.
func AppendGreeting(b []byte, flags HandshakeFlags) []byte {
	b = binary.BigEndian.AppendUint64(b, magicServer)
	b = binary.BigEndian.AppendUint64(b, magicOption)
	return binary.BigEndian.AppendUint16(b, uint16(flags))
}

// DecodeGreeting reads the server's first message, GreetingSize bytes.
func DecodeGreeting(b []byte) (HandshakeFlags, error) {
	c := cursor{b: b}
	first, second, flags := c.u64(), c.u64(), c.u16()
	switch {
	case c.short:
		return 0, protocolError("greeting of %d bytes, expected %d", len(b), GreetingSize)
	case first != magicServer:
		return 0, protocolError("greeting starts with %#016x, expected %#016x: not an NBD server", first, uint64(magicServer))
	case second != magicOption:
		return 0, protocolError("greeting magic is %#016x, expected %#016x: the server speaks only the oldstyle handshake", second, uint64(magicOption))
	}
	return HandshakeFlags(flags), nil
}

// AppendClientFlags appends the client's answer to the greeting.
func AppendClientFlags(b []byte, flags ClientFlags) []byte {
	return binary.BigEndian.AppendUint32(b, uint32(flags))
}

// DecodeClientFlags reads the client's answer to the greeting, ClientFlagsSize bytes. A flag that is not
// known is an error: the protocol requires the server to hang up.
func DecodeClientFlags(b []byte) (ClientFlags, error) {
	c := cursor{b: b}
	flags := ClientFlags(c.u32())
	if c.short {
		return 0, protocolError("client flags of %d bytes, expected %d", len(b), ClientFlagsSize)
	}
	if unknown := flags &^ (ClientFixedNewstyle | ClientNoZeroes); unknown != 0 {
		return 0, protocolError("client flags %#x have unknown bits %#x", uint32(flags), uint32(unknown))
	}
	return flags, nil
}

// OptionHeader begins an option; Length bytes of data follow.
type OptionHeader struct {
	Code   OptionCode
	Length uint32
}

// AppendOption appends an option with its data.
func AppendOption(b []byte, code OptionCode, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, magicOption)
	b = binary.BigEndian.AppendUint32(b, uint32(code))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// DecodeOptionHeader reads OptionHeaderSize bytes.
func DecodeOptionHeader(b []byte) (OptionHeader, error) {
	c := cursor{b: b}
	magic, code, length := c.u64(), c.u32(), c.u32()
	if c.short {
		return OptionHeader{}, protocolError("option header of %d bytes, expected %d", len(b), OptionHeaderSize)
	}
	if magic != magicOption {
		return OptionHeader{}, protocolError("option magic is %#016x, expected %#016x", magic, uint64(magicOption))
	}
	return OptionHeader{OptionCode(code), length}, nil
}

// OptionReply begins the server's answer to an option; Length bytes of data follow.
type OptionReply struct {
	Option OptionCode
	Code   ReplyCode
	Length uint32
}

// AppendOptionReply appends an answer with its data.
func AppendOptionReply(b []byte, option OptionCode, code ReplyCode, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, magicOptionReply)
	b = binary.BigEndian.AppendUint32(b, uint32(option))
	b = binary.BigEndian.AppendUint32(b, uint32(code))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// DecodeOptionReply reads OptionReplySize bytes.
func DecodeOptionReply(b []byte) (OptionReply, error) {
	c := cursor{b: b}
	magic, option, code, length := c.u64(), c.u32(), c.u32(), c.u32()
	if c.short {
		return OptionReply{}, protocolError("option reply of %d bytes, expected %d", len(b), OptionReplySize)
	}
	if magic != magicOptionReply {
		return OptionReply{}, protocolError("option reply magic is %#016x, expected %#016x", magic, uint64(magicOptionReply))
	}
	return OptionReply{OptionCode(option), ReplyCode(code), length}, nil
}

// AppendExportNameReply appends the server's answer to OptExportName; padding says that the client did not
// agree to leave the zeros out.
func AppendExportNameReply(b []byte, size uint64, flags TransmissionFlags, padding bool) []byte {
	b = binary.BigEndian.AppendUint64(b, size)
	b = binary.BigEndian.AppendUint16(b, uint16(flags))
	if padding {
		b = append(b, make([]byte, ExportNamePadding)...)
	}
	return b
}

// DecodeExportNameReply reads the ExportNameReplySize bytes before the padding.
func DecodeExportNameReply(b []byte) (size uint64, flags TransmissionFlags, err error) {
	c := cursor{b: b}
	size, flags = c.u64(), TransmissionFlags(c.u16())
	if c.short {
		return 0, 0, protocolError("export description of %d bytes, expected %d", len(b), ExportNameReplySize)
	}
	return size, flags, nil
}
