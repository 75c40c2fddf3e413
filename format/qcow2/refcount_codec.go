package qcow2

import "encoding/binary"

// Reference counts are packed in a refcount block as unsigned integers of 1<<order bits, big-endian from
// one byte up; below a byte, entry 0 is in the low-order bits (qcow2 specification, "Refcounts").

// maxRefcount is the largest count that fits in 1<<order bits.
func maxRefcount(order uint32) uint64 {
	return ^uint64(0) >> (64 - uint(1)<<order)
}

// getRefcount returns count i of a refcount block. order is 0..6; i lies inside the block.
func getRefcount(block []byte, order uint32, i int) uint64 {
	switch order {
	case 3:
		return uint64(block[i])
	case 4:
		return uint64(binary.BigEndian.Uint16(block[2*i:]))
	case 5:
		return uint64(binary.BigEndian.Uint32(block[4*i:]))
	case 6:
		return binary.BigEndian.Uint64(block[8*i:])
	}
	at, shift := subByte(order, i)
	return uint64(block[at]) >> shift & maxRefcount(order)
}

// setRefcount stores v as count i of a refcount block. v must not exceed maxRefcount(order).
func setRefcount(block []byte, order uint32, i int, v uint64) {
	switch order {
	case 3:
		block[i] = byte(v)
	case 4:
		binary.BigEndian.PutUint16(block[2*i:], uint16(v))
	case 5:
		binary.BigEndian.PutUint32(block[4*i:], uint32(v))
	case 6:
		binary.BigEndian.PutUint64(block[8*i:], v)
	default:
		at, shift := subByte(order, i)
		block[at] = block[at]&^(byte(maxRefcount(order))<<shift) | byte(v)<<shift
	}
}

// subByte locates entry i of a block whose entries are 1, 2 or 4 bits wide.
func subByte(order uint32, i int) (at int, shift uint) {
	perByte := 8 >> order
	return i / perByte, uint(i%perByte) << order
}
