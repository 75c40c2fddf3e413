package guestlog

import (
	"fmt"
	"strconv"
	"strings"
)

// Kind is what an operation does to a file.
type Kind string

// The operations.
const (
	Replace Kind = "replace" // another file of Length bytes takes the name, at once: written aside, synced, renamed
	Write   Kind = "write"   // the range is overwritten in place; it never goes past the end
	Punch   Kind = "punch"   // the range is given back and reads as zeros
	Delete  Kind = "delete"
)

// Op is one change of a file.
type Op struct {
	Path           string // relative to the file system's root, no spaces
	Gen            uint64 // 1 for the first change of Path, then 2 and so on
	Kind           Kind
	Offset, Length int64 // bytes; multiples of SectorSize for Write and Punch
}

// The words that lines begin with.
const (
	WordReady = "ready" // the guest waits for a line Start; said again and again
	wordStart = "start"
	wordWill  = "will"
	wordSafe  = "safe"
	WordOver  = "over" // a reason follows: the disk failed, nothing more is done
	WordEnd   = "end"  // everything was done, the file system is unmounted
)

// Start is the line that makes a guest begin. The workload follows from seed; each of its workers does ops
// operations, or goes on until the disk fails when ops is 0.
func Start(seed uint64, ops int) string { return fmt.Sprintf("%s %d %d", wordStart, seed, ops) }

// ParseStart is the reverse of Start.
func ParseStart(line string) (seed uint64, ops int, err error) {
	word, rest, _ := strings.Cut(line, " ")
	s, o, _ := strings.Cut(rest, " ")
	seed, err1 := strconv.ParseUint(s, 10, 64)
	ops, err2 := strconv.Atoi(o)
	if word != wordStart || err1 != nil || err2 != nil || ops < 0 {
		return 0, 0, fmt.Errorf("guestlog: the line is %q, want %q, a seed and a number of operations", line, wordStart)
	}
	return seed, ops, nil
}

// Will is the line that announces an operation.
func Will(o Op) string {
	return fmt.Sprintf("%s %s %d %s %d %d", wordWill, o.Path, o.Gen, o.Kind, o.Offset, o.Length)
}

// Safe is the line that promises that the operations on path up to gen are durable.
func Safe(path string, gen uint64) string { return fmt.Sprintf("%s %s %d", wordSafe, path, gen) }

// IsSafe tells whether a line makes a promise.
func IsSafe(line string) bool { return strings.HasPrefix(line, wordSafe+" ") }

// parseLine returns the operation that a line announces or, with safe, that it promises: then Path and Gen
// alone are set.
func parseLine(line string) (o Op, safe bool, err error) {
	fields := strings.Fields(line)
	bad := func(what string) (Op, bool, error) {
		return Op{}, false, fmt.Errorf("guestlog: %s in the line %q", what, line)
	}
	if len(fields) < 3 {
		return bad("too few words")
	}
	o.Path = fields[1]
	if o.Gen, err = strconv.ParseUint(fields[2], 10, 32); err != nil || o.Gen == 0 {
		return bad("a bad generation")
	}
	switch {
	case fields[0] == wordSafe && len(fields) == 3:
		return o, true, nil
	case fields[0] != wordWill || len(fields) != 6:
		return bad("neither an operation nor a promise")
	}
	o.Kind = Kind(fields[3])
	var err1, err2 error
	o.Offset, err1 = strconv.ParseInt(fields[4], 10, 64)
	o.Length, err2 = strconv.ParseInt(fields[5], 10, 64)
	const most = 1 << 30
	if err1 != nil || err2 != nil || o.Offset < 0 || o.Offset > most || o.Length < 0 || o.Length > most {
		return bad("a bad range")
	}
	switch o.Kind {
	case Replace:
		if o.Length < MinSize {
			return bad("a file that is too short")
		}
	case Write, Punch:
		if o.Offset%SectorSize != 0 || o.Length%SectorSize != 0 || o.Length == 0 {
			return bad("a range that is not of whole sectors")
		}
	case Delete:
	default:
		return bad("an unknown operation")
	}
	return o, false, nil
}
