package nbd

import (
	"encoding/binary"
	"unicode/utf8"
)

// cursor takes big-endian fields from the front of a message. The first field that does not fit sets short,
// and everything after it is zero, so that a decoder checks once.
type cursor struct {
	b     []byte
	short bool
}

func (c *cursor) bytes(n uint64) []byte {
	if c.short || n > uint64(len(c.b)) {
		c.short = true
		return nil
	}
	p := c.b[:n]
	c.b = c.b[n:]
	return p
}

func (c *cursor) u16() uint16 {
	if p := c.bytes(2); p != nil {
		return binary.BigEndian.Uint16(p)
	}
	return 0
}

func (c *cursor) u32() uint32 {
	if p := c.bytes(4); p != nil {
		return binary.BigEndian.Uint32(p)
	}
	return 0
}

func (c *cursor) u64() uint64 {
	if p := c.bytes(8); p != nil {
		return binary.BigEndian.Uint64(p)
	}
	return 0
}

// checkString applies the protocol's rules for strings: UTF-8, no NUL, at most MaxString bytes.
func checkString(what string, p []byte) error {
	if len(p) > MaxString {
		return protocolError("%s of %d bytes, at most %d allowed", what, len(p), MaxString)
	}
	if !utf8.Valid(p) {
		return protocolError("%s is not UTF-8", what)
	}
	for _, c := range p {
		if c == 0 {
			return protocolError("%s contains a NUL byte", what)
		}
	}
	return nil
}

// ValidString tells why s cannot be sent as an export name, a description or a query; nil when it can.
func ValidString(what, s string) error { return checkString(what, []byte(s)) }
