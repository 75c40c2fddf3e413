package bench

import (
	"io"
	"strings"
	"sync/atomic"

	"github.com/platter-disk/platter/storage"
)

// sign begins every sector that a guest writes in the measurements of disciplines: a write to the file that
// carries it brings guest data, new or copied up, and any other write is metadata.
const sign = "PlatterGuestData"

// signed fills a buffer of whole sectors with guest data.
func signed(p []byte) {
	for i := range p {
		p[i] = byte(i*7) | 1
	}
	for at := 0; at < len(p); at += storage.SectorSize {
		copy(p[at:], sign)
	}
}

// isGuestData reports whether a write carries guest data in any of its sectors. Copied-up data may have
// sectors of zeros around what the guest wrote.
func isGuestData(p []byte) bool {
	for ; len(p) >= len(sign); p = p[min(len(p), storage.SectorSize):] {
		if string(p[:len(sign)]) == sign {
			return true
		}
	}
	return false
}

// tally is what an engine did to its files.
type tally struct {
	Syncs        int64
	Writes       int64 // calls
	Metadata     int64 // bytes
	Data         int64 // bytes, of the guest and copied up
	Reads        int64 // calls
	BytesRead    int64
	OtherChanges int64 // truncations, holes, zeroings
}

func (t tally) minus(o tally) tally {
	return tally{
		Syncs: t.Syncs - o.Syncs, Writes: t.Writes - o.Writes, Metadata: t.Metadata - o.Metadata, Data: t.Data - o.Data,
		Reads: t.Reads - o.Reads, BytesRead: t.BytesRead - o.BytesRead, OtherChanges: t.OtherChanges - o.OtherChanges,
	}
}

// ledger keeps books about the files of an image: what counts counts, and what metadata is of it.
type ledger struct {
	changes                    counts
	reads, bytesRead, metadata atomic.Int64
}

func (l *ledger) tally() tally {
	n := l.changes.read()
	return tally{
		Syncs: n[syncs], Writes: n[writeCalls], OtherChanges: n[otherChanges],
		Metadata: l.metadata.Load(), Data: n[bytesWritten] - l.metadata.Load(),
		Reads: l.reads.Load(), BytesRead: l.bytesRead.Load(),
	}
}

func (l *ledger) wrap(f storage.File) storage.File { return ledgerFile{counter{f, &l.changes}, l} }

// ledgerFile is a file about which books are kept.
type ledgerFile struct {
	counter
	ledger *ledger
}

func (f ledgerFile) WriteAt(p []byte, off int64) (int, error) {
	n, err := f.counter.WriteAt(p, off)
	if !isGuestData(p) {
		f.ledger.metadata.Add(int64(n))
	}
	return n, err
}

func (f ledgerFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.counter.ReadAt(p, off)
	f.ledger.read(n)
	return n, err
}

func (f ledgerFile) TryReadAt(p []byte, off int64) (int, error) {
	n, err := f.counter.TryReadAt(p, off)
	f.ledger.read(n)
	return n, err
}

func (l *ledger) read(n int) {
	l.reads.Add(1)
	l.bytesRead.Add(int64(n))
}

// readCalls counts on from the kinds of calls that counters know.
const readCalls = numCounts

// tallyCalls are the system calls of a tally.
func tallyCalls() map[string]int {
	calls := map[string]int{"pread64": readCalls, "preadv": readCalls, "preadv2": readCalls}
	for name, kind := range tracedCalls {
		calls[name] = kind
	}
	return calls
}

// parseTally adds up a record of strace that shows the first len(sign) bytes of what is written.
func parseTally(r io.Reader) (t tally, err error) {
	err = eachCall(r, tallyCalls(), func(kind int, result int64, line string) {
		n := max(result, 0)
		switch kind {
		case readCalls:
			t.Reads++
			t.BytesRead += n
		case writeCalls:
			t.Writes++
			if strings.Contains(line, sign) {
				t.Data += n
			} else {
				t.Metadata += n
			}
		case syncs:
			t.Syncs++
		case otherChanges:
			t.OtherChanges++
		}
	})
	return t, err
}
