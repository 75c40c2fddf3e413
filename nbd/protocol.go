package nbd

import (
	"errors"
	"fmt"
)

// ErrProtocol is wrapped by every error that says the other side broke the protocol.
var ErrProtocol = errors.New("NBD protocol error")

func protocolError(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrProtocol}, args...)...)
}

// Magic numbers that begin the messages.
const (
	magicServer          = 0x4e42444d41474943 // "NBDMAGIC", the first eight bytes of a connection
	magicOption          = 0x49484156454f5054 // "IHAVEOPT"
	magicOptionReply     = 0x0003e889045565a9
	magicRequest         = 0x25609513
	magicSimpleReply     = 0x67446698
	magicStructuredReply = 0x668e33ef
	magicExtendedRequest = 0x21e41c71
	magicExtendedReply   = 0x6e8a278c
)

// DefaultPort is the TCP port assigned to NBD.
const DefaultPort = "10809"

// Limits that the protocol document sets or recommends.
const (
	// MaxString is the longest a string (export name, description, message, query) may be, in bytes.
	MaxString = 4096
	// DefaultMaxPayload is the largest read or write, in bytes, that may be assumed to work where the
	// server advertised nothing.
	DefaultMaxPayload = 32 << 20
	// MaxMinBlock is the largest minimum block size, in bytes, that a server may advertise.
	MaxMinBlock = 64 << 10
)

// HandshakeFlags are sent by the server in its greeting.
type HandshakeFlags uint16

// The handshake flags.
const (
	FlagFixedNewstyle HandshakeFlags = 1 << iota
	FlagNoZeroes
)

// ClientFlags answer the greeting.
type ClientFlags uint32

// The client flags.
const (
	ClientFixedNewstyle ClientFlags = 1 << iota
	ClientNoZeroes
)

// TransmissionFlags describe an export.
type TransmissionFlags uint16

// The transmission flags.
const (
	HasFlags               TransmissionFlags = 1 << iota
	ReadOnly                                 // the export cannot be written
	SendFlush                                // CmdFlush
	SendFUA                                  // CmdFlagFUA
	Rotational                               // seeks cost
	SendTrim                                 // CmdTrim
	SendWriteZeroes                          // CmdWriteZeroes, CmdFlagNoHole
	SendDF                                   // CmdFlagDF
	CanMultiConn                             // a flush on one connection covers the writes of all
	SendResize                               // never set by this implementation
	SendCache                                // CmdCache
	SendFastZero                             // CmdFlagFastZero
	SendBlockStatusPayload                   // CmdBlockStatus with CmdFlagPayloadLen
)

// Command is the type of a request.
type Command uint16

// The commands.
const (
	CmdRead Command = iota
	CmdWrite
	CmdDisc
	CmdFlush
	CmdTrim
	CmdCache
	CmdWriteZeroes
	CmdBlockStatus

	NumCommands // how many there are
)

var commandNames = [NumCommands]string{"READ", "WRITE", "DISC", "FLUSH", "TRIM", "CACHE", "WRITE_ZEROES", "BLOCK_STATUS"}

// String is the name in the protocol document without its prefix.
func (c Command) String() string {
	if c < NumCommands {
		return commandNames[c]
	}
	return fmt.Sprintf("command %d", uint16(c))
}

// CommandFlags modify one request.
type CommandFlags uint16

// The command flags, and the commands they are meant for.
const (
	CmdFlagFUA        CommandFlags = 1 << iota // all: durable before the reply
	CmdFlagNoHole                              // WriteZeroes: keep the space allocated
	CmdFlagDF                                  // Read: one content chunk
	CmdFlagReqOne                              // BlockStatus: one extent for each context
	CmdFlagFastZero                            // WriteZeroes: fail rather than write zeros out
	CmdFlagPayloadLen                          // extended headers: Length counts a payload that follows
)

// OptionCode names an option of the handshake.
type OptionCode uint32

// The options.
const (
	OptExportName      OptionCode = 1
	OptAbort           OptionCode = 2
	OptList            OptionCode = 3
	OptStartTLS        OptionCode = 5
	OptInfo            OptionCode = 6
	OptGo              OptionCode = 7
	OptStructuredReply OptionCode = 8
	OptListMetaContext OptionCode = 9
	OptSetMetaContext  OptionCode = 10
	OptExtendedHeaders OptionCode = 11
)

var optionNames = map[OptionCode]string{
	OptExportName: "EXPORT_NAME", OptAbort: "ABORT", OptList: "LIST", OptStartTLS: "STARTTLS", OptInfo: "INFO", OptGo: "GO",
	OptStructuredReply: "STRUCTURED_REPLY", OptListMetaContext: "LIST_META_CONTEXT", OptSetMetaContext: "SET_META_CONTEXT",
	OptExtendedHeaders: "EXTENDED_HEADERS",
}

// String is the name in the protocol document without its prefix.
func (o OptionCode) String() string {
	if n, ok := optionNames[o]; ok {
		return n
	}
	return fmt.Sprintf("option %d", uint32(o))
}

// ReplyCode is the type of an option reply. Errors have bit 31 set.
type ReplyCode uint32

// The option replies.
const (
	RepAck         ReplyCode = 1
	RepServer      ReplyCode = 2
	RepInfo        ReplyCode = 3
	RepMetaContext ReplyCode = 4

	RepErrUnsupported       ReplyCode = 1<<31 + 1
	RepErrPolicy            ReplyCode = 1<<31 + 2
	RepErrInvalid           ReplyCode = 1<<31 + 3
	RepErrPlatform          ReplyCode = 1<<31 + 4
	RepErrTLSRequired       ReplyCode = 1<<31 + 5
	RepErrUnknown           ReplyCode = 1<<31 + 6
	RepErrShutdown          ReplyCode = 1<<31 + 7
	RepErrBlockSizeRequired ReplyCode = 1<<31 + 8
	RepErrTooBig            ReplyCode = 1<<31 + 9
	RepErrExtHeaderRequired ReplyCode = 1<<31 + 10
)

var replyTexts = map[ReplyCode]string{
	RepAck: "acknowledged", RepServer: "an export", RepInfo: "information", RepMetaContext: "a metadata context",
	RepErrUnsupported: "not supported by the server", RepErrPolicy: "forbidden by the server's policy", RepErrInvalid: "invalid",
	RepErrPlatform: "not supported on the server's platform", RepErrTLSRequired: "the server requires TLS",
	RepErrUnknown: "no such export", RepErrShutdown: "the server is shutting down",
	RepErrBlockSizeRequired: "the server requires block sizes to be negotiated", RepErrTooBig: "too big",
	RepErrExtHeaderRequired: "the server requires extended headers",
}

// IsError tells whether the code is an error.
func (r ReplyCode) IsError() bool { return r>>31 == 1 }

// String is a text for people.
func (r ReplyCode) String() string {
	if n, ok := replyTexts[r]; ok {
		return n
	}
	return fmt.Sprintf("option reply %#x", uint32(r))
}

// InfoCode is the type of a piece of information about an export.
type InfoCode uint16

// The kinds of information.
const (
	InfoExport InfoCode = iota
	InfoName
	InfoDescription
	InfoBlockSize
)

// Names of the metadata contexts this implementation knows.
const (
	ContextAllocation = "base:allocation"
	ContextDepth      = "qemu:allocation-depth"
)

// Flags of ContextAllocation.
const (
	StateHole = 1 << iota // no space is allocated
	StateZero             // reads as zeros
)
