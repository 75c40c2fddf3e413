package nbd

import (
	"encoding/binary"
	"math"
)

// BlockStatus is one descriptor of a block status reply.
type BlockStatus struct {
	Length uint64 // bytes, not 0
	Flags  uint64 // meaning set by the context: StateHole and StateZero, or the allocation depth
}

// MaxBlockStatusPayload bounds in bytes the payload of a block status chunk, in both directions.
const MaxBlockStatusPayload = 1 << 20

// AppendBlockStatus appends a whole chunk: 32-bit descriptors in a structured chunk, 64-bit ones in an
// extended chunk. Without extended headers every Length must fit 32 bits.
func AppendBlockStatus(b []byte, extended bool, flags ReplyFlags, r *Request, context uint32, runs []BlockStatus) []byte {
	if extended {
		b = AppendChunk(b, true, flags, ReplyBlockStatusExt, r.Cookie, r.Offset, 8+16*uint64(len(runs)))
		b = binary.BigEndian.AppendUint32(b, context)
		b = binary.BigEndian.AppendUint32(b, uint32(len(runs)))
		for _, d := range runs {
			b = binary.BigEndian.AppendUint64(b, d.Length)
			b = binary.BigEndian.AppendUint64(b, d.Flags)
		}
		return b
	}
	b = AppendChunk(b, false, flags, ReplyBlockStatus, r.Cookie, r.Offset, 4+8*uint64(len(runs)))
	b = binary.BigEndian.AppendUint32(b, context)
	for _, d := range runs {
		b = binary.BigEndian.AppendUint32(b, uint32(d.Length))
		b = binary.BigEndian.AppendUint32(b, uint32(d.Flags))
	}
	return b
}

// DecodeBlockStatus reads the payload of a ReplyBlockStatus or ReplyBlockStatusExt chunk and appends its
// descriptors to runs.
func DecodeBlockStatus(b []byte, typ ReplyType, runs []BlockStatus) (context uint32, _ []BlockStatus, err error) {
	c := cursor{b: b}
	context = c.u32()
	size := 8
	if typ == ReplyBlockStatusExt {
		size = 16
		if n := c.u32(); !c.short && uint64(n)*16 != uint64(len(c.b)) {
			return 0, runs, protocolError("block status chunk says %d descriptors and has %d bytes of them", n, len(c.b))
		}
	}
	if c.short || len(c.b) == 0 || len(c.b)%size != 0 {
		return 0, runs, protocolError("block status chunk of %d bytes is not a list of descriptors", len(b))
	}
	var total uint64
	for len(c.b) > 0 {
		var d BlockStatus
		if typ == ReplyBlockStatusExt {
			d = BlockStatus{c.u64(), c.u64()}
		} else {
			d = BlockStatus{uint64(c.u32()), uint64(c.u32())}
		}
		if d.Length == 0 || d.Length > math.MaxInt64-total {
			return 0, runs, protocolError("block status descriptor of %d bytes after %d bytes", d.Length, total)
		}
		total += d.Length
		runs = append(runs, d)
	}
	return context, runs, nil
}

// BlockStatusPayload is the payload of a block status request in extended headers: a length, and the
// contexts the client wants of those it negotiated.
type BlockStatusPayload struct {
	Length   uint64 // bytes
	Contexts []uint32
}

// MaxBlockStatusRequest bounds in bytes the payload of a block status request: far more contexts than there are.
const MaxBlockStatusRequest = 8 + 4*64

// Append appends the encoded payload.
func (p BlockStatusPayload) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, p.Length)
	for _, id := range p.Contexts {
		b = binary.BigEndian.AppendUint32(b, id)
	}
	return b
}

// DecodeBlockStatusPayload reads the payload of a block status request, MaxBlockStatusRequest bytes at most.
func DecodeBlockStatusPayload(b []byte) (BlockStatusPayload, error) {
	c := cursor{b: b}
	p := BlockStatusPayload{Length: c.u64()}
	if c.short || len(b) > MaxBlockStatusRequest || len(c.b)%4 != 0 {
		return BlockStatusPayload{}, protocolError("block status request with a payload of %d bytes, expected 8 and 4 for each context, at most %d", len(b), MaxBlockStatusRequest)
	}
	for len(c.b) > 0 {
		p.Contexts = append(p.Contexts, c.u32())
	}
	return p, nil
}
