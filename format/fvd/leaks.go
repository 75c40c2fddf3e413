package fvd

import "fmt"

// judgeSpace counts what a compact image has mapped, and finds the leaks. It comes after the repair, so that
// only space which no entry names on the disk is given back.
func (k *checker) judgeSpace() error {
	m := k.m
	if !m.g.compact() {
		return nil
	}
	k.res.TotalChunks = int64(len(m.table))
	for c := range chunkIndex(len(m.table)) {
		if m.table.get(c).mapped() {
			k.res.AllocatedChunks++
		}
	}
	k.res.ImageEnd = int64(m.g.chunkData(k.use.next))
	if err := k.leaks(); err != nil || k.res.LeaksFixed == 0 {
		return err
	}
	return m.data.sync()
}

// kept says why leaked chunks are not given back; "" if they may be, and while nobody asks for that.
func (k *checker) kept() string {
	switch {
	case k.repair != RepairLeaks:
		return ""
	case k.damaged > 0:
		return "; kept, as the table is damaged: a damaged entry may have named it"
	case k.replay.anomalies > 0:
		return "; kept, as the journal is damaged: a record that cannot be read may name it"
	}
	return ""
}

// leaks finds chunks below the high-water mark that no entry names and that take space in the storage.
func (k *checker) leaks() error {
	used := bitset{words: k.use.used, n: blockIndex(k.use.next)}
	for id := blockIndex(0); id < used.n; {
		n, named := used.run(id, used.n)
		if !named {
			if err := k.leaksAmong(chunkID(id), chunkID(id+n)); err != nil {
				return err
			}
		}
		id += n
	}
	return nil
}

// maxLeakRuns bounds how many runs of leaked chunks are gathered before they are given back.
const maxLeakRuns = 4096

// leaksAmong finds those of chunks [first, last), none of which an entry names, that take space.
func (k *checker) leaksAmong(first, last chunkID) error {
	m := k.m
	for first < last {
		start := m.g.chunkData(first)
		var leaked [][2]chunkID // runs
		seen := first           // chunks below it are in leaked or take no space
		err := m.data.extents(start, int64(last-first)*m.g.chunkSize, func(off dataOffset, n int64, data bool) bool {
			from := max(seen, first+chunkID(int64(off-start)/m.g.chunkSize))
			seen = max(seen, first+chunkID(ceilDiv(int64(off-start)+n, m.g.chunkSize)))
			if data && from < seen {
				leaked = append(leaked, [2]chunkID{from, seen})
			}
			return len(leaked) < maxLeakRuns
		})
		if err != nil {
			return fmt.Errorf("fvd image %s: looking for leaked chunks: %w", m.name, err)
		}
		for _, run := range leaked {
			k.leakedRun(run[0], run[1])
		}
		if len(leaked) < maxLeakRuns {
			return nil
		}
		first = seen
	}
	return nil
}

// leakedRun notes, and gives back, chunks [first, last), except for those that metadata occupies.
func (k *checker) leakedRun(first, last chunkID) {
	m := k.m
	if first >= last {
		return
	}
	if from, to := m.reservedChunks(); from < int64(last) && int64(first) < to {
		k.leakedRun(first, chunkID(max(int64(first), from)))
		k.leakedRun(chunkID(min(int64(last), to)), last)
		return
	}
	kept := k.kept()
	fixed := k.repair != RepairNone && kept == "" && m.data.punch(m.g.chunkData(first), int64(last-first)*m.g.chunkSize) == nil
	for id := first; id < last; id++ {
		if fixed {
			k.res.LeaksFixed++
		} else {
			k.res.Leaks++
		}
		k.describe(FindingLeak, fixed, "chunk %#x of the storage takes space and no table entry names it%s", uint32(id), kept)
	}
}
