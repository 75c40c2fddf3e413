package qcow2

import (
	"encoding/binary"
	"slices"

	"github.com/platter-disk/platter/storage"
)

// writeBatch collects copies of changed table sectors and writes them in order of offset, neighbours
// together. It is reused, so that a flush allocates nothing once warm.
type writeBatch struct {
	runs  []batchRun
	bytes []byte
}

type batchRun struct {
	at   hostOff
	from int // in bytes
	n    int
}

func (w *writeBatch) reset() { w.runs, w.bytes = w.runs[:0], w.bytes[:0] }

func (w *writeBatch) empty() bool { return len(w.runs) == 0 }

func (w *writeBatch) add(at hostOff, p []byte) {
	w.runs = append(w.runs, batchRun{at, len(w.bytes), len(p)})
	w.bytes = append(w.bytes, p...)
}

// addWords adds words of a table in their on-disk form.
func (w *writeBatch) addWords(at hostOff, words []uint64) {
	w.runs = append(w.runs, batchRun{at, len(w.bytes), len(words) * 8})
	for _, v := range words {
		w.bytes = binary.BigEndian.AppendUint64(w.bytes, v)
	}
}

// write writes the batch. Runs must not overlap.
func (w *writeBatch) write(f storage.File) error {
	slices.SortFunc(w.runs, func(a, b batchRun) int {
		if a.at < b.at {
			return -1
		}
		return 1
	})
	var joined []byte
	for i := 0; i < len(w.runs); {
		first := w.runs[i]
		p := w.bytes[first.from : first.from+first.n]
		end := first.at + hostOff(first.n)
		j := i + 1
		for ; j < len(w.runs) && w.runs[j].at == end; j++ {
			r := w.runs[j]
			if j == i+1 {
				joined = append(joined[:0], p...)
			}
			joined = append(joined, w.bytes[r.from:r.from+r.n]...)
			p = joined
			end += hostOff(r.n)
		}
		if _, err := f.WriteAt(p, int64(first.at)); err != nil {
			return err
		}
		i = j
	}
	return nil
}
