package nbd

import "encoding/binary"

// Sizes in bytes of a request header.
const (
	RequestSize         = 28
	ExtendedRequestSize = 32
)

// RequestHeaderSize is the size in bytes of every request header of a connection.
func RequestHeaderSize(extended bool) int {
	if extended {
		return ExtendedRequestSize
	}
	return RequestSize
}

// Request is the header of a request.
type Request struct {
	Flags   CommandFlags
	Command Command
	Cookie  uint64 // chosen by the client, repeated in the reply
	Offset  uint64 // bytes
	Length  uint64 // bytes; 32 bits without extended headers
}

// PayloadLength is how many bytes of payload follow the header.
func (r *Request) PayloadLength(extended bool) uint64 {
	if extended {
		if r.Flags&CmdFlagPayloadLen != 0 {
			return r.Length
		}
		return 0
	}
	if r.Command == CmdWrite {
		return r.Length
	}
	return 0
}

// Append appends the encoded header. Without extended headers Length must fit 32 bits.
func (r *Request) Append(b []byte, extended bool) []byte {
	magic := uint32(magicRequest)
	if extended {
		magic = magicExtendedRequest
	}
	b = binary.BigEndian.AppendUint32(b, magic)
	b = binary.BigEndian.AppendUint16(b, uint16(r.Flags))
	b = binary.BigEndian.AppendUint16(b, uint16(r.Command))
	b = binary.BigEndian.AppendUint64(b, r.Cookie)
	b = binary.BigEndian.AppendUint64(b, r.Offset)
	if extended {
		return binary.BigEndian.AppendUint64(b, r.Length)
	}
	return binary.BigEndian.AppendUint32(b, uint32(r.Length))
}

// DecodeRequest reads a header of RequestHeaderSize(extended) bytes into r. The only thing it judges is the
// magic: after a wrong one the stream cannot be followed any more.
func DecodeRequest(b []byte, extended bool, r *Request) error {
	size, want := RequestSize, uint32(magicRequest)
	if extended {
		size, want = ExtendedRequestSize, magicExtendedRequest
	}
	if len(b) < size {
		return protocolError("request header of %d bytes, expected %d", len(b), size)
	}
	if magic := binary.BigEndian.Uint32(b); magic != want {
		return protocolError("request magic is %#08x, expected %#08x", magic, want)
	}
	r.Flags = CommandFlags(binary.BigEndian.Uint16(b[4:]))
	r.Command = Command(binary.BigEndian.Uint16(b[6:]))
	r.Cookie = binary.BigEndian.Uint64(b[8:])
	r.Offset = binary.BigEndian.Uint64(b[16:])
	if extended {
		r.Length = binary.BigEndian.Uint64(b[24:])
	} else {
		r.Length = uint64(binary.BigEndian.Uint32(b[24:]))
	}
	return nil
}
