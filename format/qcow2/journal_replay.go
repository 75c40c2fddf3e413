package qcow2

import (
	"container/heap"
	"fmt"
	"maps"
	"math/bits"
	"slices"

	"github.com/platter-disk/platter/storage"
)

// A replay computes the sectors that a journal changes. It goes through the log backwards: what the newest record
// says about a byte is final, and older records only fill in what is left. So every byte is decided once, and
// the work is bounded by the size of the log and of what it changes, however many records and revokes a
// hostile journal heaps on the same place.

// Bounds of what a replay may change: 16 times the size of the journal, within these. The writer of a journal
// begins checkpoints and ends transactions early enough for that; one that asks for more is refused.
const (
	minReplayBytes = 8 << 20
	maxReplayBytes = 256 << 20
	maxRevokes     = 4 << 20
)

// replaySectors is the number of sectors that a replay may change.
func (j *JournalExtension) replaySectors() int {
	return int(min(max(16*j.Size, minReplayBytes), maxReplayBytes) / sectorSize)
}

// changedSectors is what applying a journal changes: whole sectors, by their index in the file.
type changedSectors map[int64]*changedSector

// changedSector is a sector of the file with what the journal says about it.
type changedSector struct {
	bytes   [sectorSize]byte
	written byteSet // bytes that a record gives
	settled byteSet // those, and the ones that stay as they are in the file
}

// byteSet is a set of the bytes of a sector.
type byteSet [sectorSize / 64]uint64

func (s *byteSet) has(i int64) bool { return s[i/64]>>(i%64)&1 != 0 }
func (s *byteSet) add(i int64)      { s[i/64] |= 1 << (i % 64) }

func (s *byteSet) full() bool {
	return !slices.ContainsFunc(s[:], func(w uint64) bool { return bits.OnesCount64(w) != 64 })
}

func (s *byteSet) empty() bool { return *s == byteSet{} }

// replayer decides bytes, record after record, the newest first.
type replayer struct {
	log     *journalLog
	revokes revokeList
	sectors changedSectors
	most    int             // sectors
	skip    map[int64]int64 // from a sector in which nothing is left to decide to a later one
	steps   int             // of work done
}

func newReplayer(l *journalLog) *replayer {
	return &replayer{
		log: l, revokes: flattenRevokes(l.revokes), most: l.ext.replaySectors(), sectors: changedSectors{}, skip: map[int64]int64{},
	}
}

// run computes the sectors that the log changes.
func (p *replayer) run() error {
	l := p.log
	for lsn := l.end; lsn > l.super.tail; {
		lsn--
		_, records, ok, err := l.records(lsn)
		if err != nil {
			return err
		}
		if !ok {
			return l.damaged(lsn, "not valid any more")
		}
		for _, r := range slices.Backward(records) {
			p.steps++
			if err := p.apply(lsn, r); err != nil {
				return err
			}
		}
	}
	return p.complete()
}

// apply decides the bytes that a record gives and no newer one did.
func (p *replayer) apply(lsn uint64, r record) error {
	if r.kind != recordWrite && r.kind != recordFill {
		return nil
	}
	from, end := r.target, r.target+uint64(r.length)
	if err := p.log.checkTarget(lsn, from, end); err != nil {
		return err
	}
	seg := p.revokes.find(from)
	for at := from; at < end; {
		p.steps++
		sector := int64(at / sectorSize)
		if next := p.undecided(sector); next != sector {
			at = uint64(next) * sectorSize
			continue
		}
		seg += p.revokes[seg:].find(at)
		if next, ok := p.revokes.past(seg, lsn, at); ok {
			if len(p.skip) >= 4*p.most {
				return p.tooLarge()
			}
			p.skip[sector] = next
			continue
		}
		s, err := p.sector(sector)
		if err != nil {
			return err
		}
		stop := min(uint64(sector+1)*sectorSize, end)
		for ; at < stop; at++ {
			for seg < len(p.revokes) && p.revokes[seg].to <= at {
				seg++
			}
			in := int64(at % sectorSize)
			if s.settled.has(in) {
				continue
			}
			s.settled.add(in)
			if !p.revokes.covers(seg, lsn, at) {
				s.written.add(in)
				s.bytes[in] = r.body[(at-from)%uint64(len(r.body))]
			}
		}
		if s.settled.full() {
			p.skip[sector] = sector + 1
		}
	}
	return nil
}

// undecided returns the first sector from s on in which something may be left to decide.
func (p *replayer) undecided(s int64) int64 {
	for {
		next, ok := p.skip[s]
		if !ok {
			return s
		}
		p.steps++
		if further, ok := p.skip[next]; ok {
			p.skip[s] = further
		}
		s = next
	}
}

func (p *replayer) sector(i int64) (*changedSector, error) {
	if s := p.sectors[i]; s != nil {
		return s, nil
	}
	if len(p.sectors) >= p.most {
		return nil, p.tooLarge()
	}
	s := new(changedSector)
	p.sectors[i] = s
	return s, nil
}

func (p *replayer) tooLarge() error {
	return fmt.Errorf("%s: the metadata journal changes more than %d bytes", p.log.name, p.most*sectorSize)
}

// complete takes the bytes that no record gives from the file.
func (p *replayer) complete() error {
	maps.DeleteFunc(p.sectors, func(_ int64, s *changedSector) bool { return s.written.empty() })
	todo := make([]int64, 0, len(p.sectors))
	for i, s := range p.sectors {
		if !s.written.full() {
			todo = append(todo, i)
		}
	}
	slices.Sort(todo)
	const most = 512 // sectors read at once
	buf := make([]byte, min(len(todo), most)*sectorSize)
	for len(todo) > 0 {
		n := 1
		for n < min(len(todo), most) && todo[n] == todo[0]+int64(n) {
			n++
		}
		if err := storage.ReadFull(p.log.file, buf[:n*sectorSize], todo[0]*sectorSize); err != nil {
			return fmt.Errorf("%s: %d bytes at offset %#x that the metadata journal changes: %w", p.log.name, n*sectorSize, todo[0]*sectorSize, err)
		}
		for k, i := range todo[:n] {
			p.sectors[i].underlay(buf[k*sectorSize:])
		}
		todo = todo[n:]
	}
	return nil
}

// underlay fills in what no record gives.
func (s *changedSector) underlay(old []byte) {
	for i := range int64(sectorSize) {
		if !s.written.has(i) {
			s.bytes[i] = old[i]
		}
	}
}

// write applies what was computed, in order of offset.
func (p *replayer) write() error {
	const most = 4 << 20 // bytes collected at once
	var batch writeBatch
	for _, i := range slices.Sorted(maps.Keys(p.sectors)) {
		if len(batch.bytes) >= most {
			if err := batch.write(p.log.file); err != nil {
				return err
			}
			batch.reset()
		}
		batch.add(hostOff(i*sectorSize), p.sectors[i].bytes[:])
	}
	return batch.write(p.log.file)
}

// revoked is a range whose records of smaller lsn do not count.
type revoked struct {
	from, to uint64
	lsn      uint64
}

// revokeList is a list of ranges that do not overlap, in order of offset; each has the lsn of the newest REVOKE
// that covers it.
type revokeList []revoked

// flattenRevokes makes a revokeList of ranges as they were found. It takes n log n steps for n ranges.
func flattenRevokes(found []revoked) revokeList {
	slices.SortFunc(found, func(a, b revoked) int {
		if a.from < b.from {
			return -1
		}
		return 1
	})
	var out revokeList
	var open revokeHeap
	for i, at := 0, uint64(0); i < len(found) || len(open) > 0; {
		if len(open) == 0 {
			at = max(at, found[i].from)
		}
		for ; i < len(found) && found[i].from <= at; i++ {
			heap.Push(&open, found[i])
		}
		for len(open) > 0 && open[0].to <= at {
			heap.Pop(&open)
		}
		if len(open) == 0 {
			continue
		}
		to := open[0].to
		if i < len(found) {
			to = min(to, found[i].from)
		}
		if k := len(out) - 1; k >= 0 && out[k].to == at && out[k].lsn == open[0].lsn {
			out[k].to = to
		} else {
			out = append(out, revoked{at, to, open[0].lsn})
		}
		at = to
	}
	return out
}

// find returns the index of the first range that ends after at.
func (l revokeList) find(at uint64) int {
	i, _ := slices.BinarySearchFunc(l, at, func(r revoked, at uint64) int {
		if r.to <= at {
			return -1
		}
		return 1
	})
	return i
}

// covers reports whether range i, the first that ends after at, keeps a record from changing the byte there.
func (l revokeList) covers(i int, lsn, at uint64) bool {
	return i < len(l) && l[i].from <= at && lsn < l[i].lsn
}

// past returns the sector after those that begin at at and that range i revokes as a whole, if there are any.
func (l revokeList) past(i int, lsn, at uint64) (sector int64, ok bool) {
	if at%sectorSize != 0 || !l.covers(i, lsn, at) || l[i].to < at+sectorSize {
		return 0, false
	}
	return int64(l[i].to / sectorSize), true
}

// revokeHeap has the newest range on top.
type revokeHeap []revoked

func (h revokeHeap) Len() int           { return len(h) }
func (h revokeHeap) Less(i, j int) bool { return h[i].lsn > h[j].lsn }
func (h revokeHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *revokeHeap) Push(x any)        { *h = append(*h, x.(revoked)) }
func (h *revokeHeap) Pop() any {
	last := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return last
}
