package qcow2

import "encoding/binary"

// operation is how far a long change of metadata has come: the OPSTATE of the metadata journal (qcow2 journal
// specification, "Recovery"). Such a change raises or lowers the reference counts of everything that an L1
// table reaches, a chunk of an L2 table after the other. A crash in its middle leaves the journal with the
// state as of the last chunk that counts; who recovers the image goes on from there.
//
//	offset  bytes
//	     0      4  kind
//	     4      4  0
//	     8      8  host offset of the L1 table
//	    16      4  its entries
//	    20      4  index of the entry that is next
//	    24      8  chunks of that entry's L2 table that are done, of chunkEntries entries each
//	    32     32  0
type operation struct {
	kind    opKind
	tree    hostOff // L1 table that is walked
	entries int64   // of the L1 table
	next    treePos // everything before it is done
}

type opKind uint32

const (
	opNone   opKind = 0
	opRaise  opKind = 1 // counts are raised for a tree that nothing points to yet: undo
	opApply  opKind = 2 // the tree that was active before a snapshot was applied is given up: go on
	opDelete opKind = 3 // the tree of a deleted snapshot is given up: go on
)

// treePos is a chunk of a tree: the entry of the L1 table, and the chunk of the L2 table that the entry points
// to.
type treePos struct {
	entry int64
	chunk int64
}

func (o operation) encode() [opstateSize]byte {
	var b [opstateSize]byte
	be := binary.BigEndian
	be.PutUint32(b[0:], uint32(o.kind))
	be.PutUint64(b[8:], uint64(o.tree))
	be.PutUint32(b[16:], uint32(o.entries))
	be.PutUint32(b[20:], uint32(o.next.entry))
	be.PutUint64(b[24:], uint64(o.next.chunk))
	return b
}

// decodeOperation decodes the state of an operation. ok is false if there is none, or none that makes sense in
// an image of the given geometry: what it left unfinished is a leak then.
func decodeOperation(b [opstateSize]byte, g *geometry) (o operation, ok bool) {
	be := binary.BigEndian
	o = operation{
		kind: opKind(be.Uint32(b[0:])), tree: hostOff(be.Uint64(b[8:]) & (1<<63 - 1)), entries: int64(be.Uint32(b[16:])),
		next: treePos{entry: int64(be.Uint32(b[20:])), chunk: int64(be.Uint64(b[24:]) & (1<<63 - 1))},
	}
	known := o.kind == opRaise || o.kind == opApply || o.kind == opDelete
	return o, known && o.encode() == b && o.next.entry <= o.entries && o.next.chunk < g.tableChunks()
}
