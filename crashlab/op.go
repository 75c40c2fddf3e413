package crashlab

import "fmt"

// Kind is a kind of operation on a storage.File.
type Kind uint8

// The operations of storage.File. A Lab records those that change a file, and Sync.
const (
	KindRead Kind = iota
	KindWrite
	KindSync
	KindTruncate
	KindPunch
	KindZero
	KindAllocate
	KindExtents
	numKinds
)

var kindNames = [numKinds]string{"read", "write", "sync", "truncate", "punch", "zero", "allocate", "extents"}

// String returns the name that fault descriptions use: read, write, sync, truncate, punch, zero, allocate, extents.
func (k Kind) String() string {
	if k < numKinds {
		return kindNames[k]
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// ParseKind is the reverse of Kind.String.
func ParseKind(s string) (Kind, error) {
	for i, n := range kindNames {
		if n == s {
			return Kind(i), nil
		}
	}
	return 0, fmt.Errorf("operation %q: want one of %q", s, kindNames)
}

// op is one recorded operation. begin is the instant it took effect in memory and started to reach the disk;
// between begin and end it is in flight.
type op struct {
	index    int // position among the operations of the history
	file     int // position among the files of the lab
	kind     Kind
	off, len int64 // bytes; for a truncation off is the new size
	site     *Site
	begin    int // event numbers
	end      int // never when it did not return before the history ended
	oldSize  int64
	newSize  int64
	changes  []change // sectors it gave new contents
}

// never is the event number of what did not happen.
const never = int(^uint(0) >> 1)

// change is one sector's new contents.
type change struct {
	sector int64
	data   *sector
}

// event is one instant of the common history of a lab's files and guest: the beginning or end of an
// operation, or a mark. Its number is its position in the history.
type event struct {
	op   *op   // nil for a mark
	ends bool  // the end of op, not its beginning
	mark *Mark // nil for an operation
}

// Mark is an instant in the life of the guest: a request issued or answered, or a note of the caller's.
type Mark struct {
	Event int    `json:"event"` // its position in the history
	Text  string `json:"text"`
	// Promise says that from here on the guest may rely on more than before, as after a flush. States that
	// were judged earlier are judged again under the stricter rule.
	Promise bool `json:"promise,omitempty"`
}
