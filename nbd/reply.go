package nbd

import (
	"encoding/binary"
	"strings"
)

// Sizes in bytes of the reply headers.
const (
	SimpleReplySize     = 16
	StructuredReplySize = 20
	ExtendedReplySize   = 32
)

// ReplyFlags are the flags of a structured or extended reply chunk.
type ReplyFlags uint16

// ReplyFlagDone marks the last chunk of a reply.
const ReplyFlagDone ReplyFlags = 1

// ReplyType is the type of a structured or extended reply chunk. Errors have bit 15 set.
type ReplyType uint16

// The chunk types.
const (
	ReplyNone           ReplyType = 0
	ReplyOffsetData     ReplyType = 1
	ReplyOffsetHole     ReplyType = 2
	ReplyBlockStatus    ReplyType = 5
	ReplyBlockStatusExt ReplyType = 6
	ReplyError          ReplyType = 1<<15 + 1
	ReplyErrorOffset    ReplyType = 1<<15 + 2
)

// IsError tells whether the chunk is an error chunk, known or not.
func (t ReplyType) IsError() bool { return t>>15 == 1 }

// ReplyMode is the form of the replies of a connection, settled in the handshake.
type ReplyMode uint8

// The forms of replies.
const (
	SimpleReplies ReplyMode = iota
	StructuredReplies
	ExtendedReplies
)

// Reply is a decoded reply header.
type Reply struct {
	Simple bool
	Error  Errno      // simple replies only
	Flags  ReplyFlags // of a chunk
	Type   ReplyType  // of a chunk
	Cookie uint64
	Offset uint64 // of an extended chunk: the offset of the request
	Length uint64 // of a chunk: the bytes of payload that follow
}

// AppendSimpleReply appends a simple reply; after one without an error to a read the data follows.
func AppendSimpleReply(b []byte, cookie uint64, errno Errno) []byte {
	b = binary.BigEndian.AppendUint32(b, magicSimpleReply)
	b = binary.BigEndian.AppendUint32(b, uint32(errno))
	return binary.BigEndian.AppendUint64(b, cookie)
}

// AppendChunk appends the header of a structured chunk, or of an extended one.
func AppendChunk(b []byte, extended bool, flags ReplyFlags, typ ReplyType, cookie, offset, length uint64) []byte {
	magic := uint32(magicStructuredReply)
	if extended {
		magic = magicExtendedReply
	}
	b = binary.BigEndian.AppendUint32(b, magic)
	b = binary.BigEndian.AppendUint16(b, uint16(flags))
	b = binary.BigEndian.AppendUint16(b, uint16(typ))
	b = binary.BigEndian.AppendUint64(b, cookie)
	if extended {
		b = binary.BigEndian.AppendUint64(b, offset)
		return binary.BigEndian.AppendUint64(b, length)
	}
	return binary.BigEndian.AppendUint32(b, uint32(length))
}

// ReadReplySize is how many bytes AppendReadReply appends.
func ReadReplySize(mode ReplyMode) int {
	switch mode {
	case ExtendedReplies:
		return ExtendedReplySize + 8
	case StructuredReplies:
		return StructuredReplySize + 8
	}
	return SimpleReplySize
}

// AppendReadReply appends everything that goes before the data of a successful read answered in one piece.
// Length must not be 0 unless replies are simple.
func AppendReadReply(b []byte, mode ReplyMode, r *Request) []byte {
	if mode == SimpleReplies {
		return AppendSimpleReply(b, r.Cookie, 0)
	}
	b = AppendChunk(b, mode == ExtendedReplies, ReplyFlagDone, ReplyOffsetData, r.Cookie, r.Offset, 8+r.Length)
	return binary.BigEndian.AppendUint64(b, r.Offset)
}

// AppendDone appends a successful reply without data.
func AppendDone(b []byte, mode ReplyMode, r *Request) []byte {
	if mode == SimpleReplies {
		return AppendSimpleReply(b, r.Cookie, 0)
	}
	return AppendChunk(b, mode == ExtendedReplies, ReplyFlagDone, ReplyNone, r.Cookie, r.Offset, 0)
}

// AppendError appends a failed reply. The message is left out of simple replies and cut at MaxString bytes.
func AppendError(b []byte, mode ReplyMode, r *Request, errno Errno, message string) []byte {
	if mode == SimpleReplies {
		return AppendSimpleReply(b, r.Cookie, errno)
	}
	if len(message) > MaxString {
		message = strings.ToValidUTF8(message[:MaxString], "") // without the half of a character
	}
	b = AppendChunk(b, mode == ExtendedReplies, ReplyFlagDone, ReplyError, r.Cookie, r.Offset, 6+uint64(len(message)))
	b = binary.BigEndian.AppendUint32(b, uint32(errno))
	b = binary.BigEndian.AppendUint16(b, uint16(len(message)))
	return append(b, message...)
}

// MinReplySize is how many bytes of a reply must be at hand to call ReplyHeaderSize or DecodeReply: the
// shortest header of the connection.
func MinReplySize(mode ReplyMode) int {
	if mode == ExtendedReplies {
		return ExtendedReplySize
	}
	return SimpleReplySize
}

// ReplyHeaderSize is the size in bytes of the header that starts b, or an error when its magic is not one
// the connection may use. Where structured replies were agreed a server may still send simple ones, except
// to a read.
func ReplyHeaderSize(b []byte, mode ReplyMode) (int, error) {
	if len(b) < 4 {
		return 0, protocolError("reply of %d bytes has no magic", len(b))
	}
	switch magic := binary.BigEndian.Uint32(b); {
	case magic == magicSimpleReply && mode != ExtendedReplies:
		return SimpleReplySize, nil
	case magic == magicStructuredReply && mode == StructuredReplies:
		return StructuredReplySize, nil
	case magic == magicExtendedReply && mode == ExtendedReplies:
		return ExtendedReplySize, nil
	default:
		return 0, protocolError("reply magic is %#08x, which does not fit the negotiated form of replies", magic)
	}
}

// DecodeReply reads a reply header of ReplyHeaderSize bytes into r.
func DecodeReply(b []byte, mode ReplyMode, r *Reply) error {
	size, err := ReplyHeaderSize(b, mode)
	if err != nil {
		return err
	}
	c := cursor{b: b[4:]}
	switch size {
	case SimpleReplySize:
		*r = Reply{Simple: true, Error: Errno(c.u32()), Cookie: c.u64()}
	case StructuredReplySize:
		*r = Reply{Flags: ReplyFlags(c.u16()), Type: ReplyType(c.u16()), Cookie: c.u64(), Length: uint64(c.u32())}
	default:
		*r = Reply{Flags: ReplyFlags(c.u16()), Type: ReplyType(c.u16()), Cookie: c.u64(), Offset: c.u64(), Length: c.u64()}
	}
	if c.short {
		return protocolError("reply header of %d bytes, expected %d", len(b), size)
	}
	if !r.Simple && r.Type == ReplyNone && (r.Length != 0 || r.Flags&ReplyFlagDone == 0) {
		return protocolError("empty reply chunk with length %d and flags %#x, expected 0 and the done flag", r.Length, uint16(r.Flags))
	}
	return nil
}

// MaxErrorPayload bounds in bytes the payload of an error chunk: the fixed fields, the longest string, and
// room for fields that a later protocol may add.
const MaxErrorPayload = 6 + MaxString + 64

// DecodeErrorPayload reads the payload of an error chunk of any type.
func DecodeErrorPayload(b []byte) (errno Errno, message string, err error) {
	c := cursor{b: b}
	errno = Errno(c.u32())
	text := c.bytes(uint64(c.u16()))
	if c.short {
		return 0, "", protocolError("error chunk of %d bytes does not hold its message", len(b))
	}
	if errno == 0 {
		return 0, "", protocolError("error chunk without an error")
	}
	if checkString("error message", text) != nil {
		text = nil // a garbled message does not make the error any less of one
	}
	return errno, string(text), nil
}

// DecodeHole reads the payload of a ReplyOffsetHole chunk: a range, in bytes, that reads as zeros.
func DecodeHole(b []byte) (offset uint64, length uint32, err error) {
	c := cursor{b: b}
	offset, length = c.u64(), c.u32()
	if c.short || len(c.b) != 0 || length == 0 {
		return 0, 0, protocolError("hole chunk of %d bytes with a hole of %d, expected 12 and more than 0", len(b), length)
	}
	return offset, length, nil
}

// HolePayloadSize is the size in bytes of the payload of a ReplyOffsetHole chunk.
const HolePayloadSize = 12
