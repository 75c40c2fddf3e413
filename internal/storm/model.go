package storm

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"

	"github.com/platter-disk/platter/storage"
)

// Unnamed is the ID of a claim before its request begins.
const Unnamed = 1

// noisy is how many of the 64 words of a sector are random at most; the others are the ID.
const noisy = 54

// Claim is a request that gives bytes a value.
type Claim struct {
	ID         uint64 // a Model replaces Unnamed by one of its own; 0: zeros
	Bytes      []byte // of the whole disk, zeros past their end; nil: what is made from the ID
	start, end uint64 // end is 0 while the request runs
}

// Sector fills p with what a claim gives a sector.
func (c *Claim) Sector(p []byte, s int64) {
	clear(p)
	switch {
	case c.Bytes != nil:
		if at := s * storage.SectorSize; at < int64(len(c.Bytes)) {
			copy(p, c.Bytes[at:])
		}
	case c.ID != 0:
		noise := rand.New(rand.NewPCG(c.ID, uint64(s)))
		for w := range uint64(storage.SectorSize / 8) {
			v := c.ID
			if w < c.ID%4*(noisy/3) { // so that clusters compress to streams of any length
				v = noise.Uint64()
			}
			binary.LittleEndian.PutUint64(p[w*8:], v)
		}
	}
}

// fill fills p with what a claim gives the bytes from off on.
func (c *Claim) fill(p []byte, off int64) {
	var sector [storage.SectorSize]byte
	for len(p) > 0 {
		c.Sector(sector[:], off/storage.SectorSize)
		n := copy(p, sector[off%storage.SectorSize:])
		p, off = p[n:], off+int64(n)
	}
}

// gives reports whether got, which lies at from in sector s, is what the claim gives.
func (c *Claim) gives(got []byte, s, from int64) bool {
	if at := int64(noisy * 8); c.Bytes == nil && from <= at && at+8 <= from+int64(len(got)) &&
		binary.LittleEndian.Uint64(got[at-from:]) != c.ID {
		return false
	}
	var sector [storage.SectorSize]byte
	c.Sector(sector[:], s)
	return bytes.Equal(got, sector[from:from+int64(len(got))])
}

// possible is a claim that bytes may show the value of.
type possible struct {
	*Claim
	lost uint64 // when another claim took its place for good; 0: not yet
}

// piece is a part of a sector that every claim covers all of or nothing of.
type piece struct {
	from, to int64 // bytes of the sector
	list     []possible
}

// Model knows for each byte which values it may have, and might have had. A request that succeeded takes the place
// of all that ended before it began; one that failed is one more possibility; of requests that meet, either may be
// last. No sector has a part of what a request gave it, except where another request gave it a part.
type Model struct {
	mu      sync.Mutex
	now     func() uint64
	sectors [][]piece
	flushes []span
	sizes   []span // that began: the size, ended: since when the disk has it at least

	// Writethrough says that every change is durable when it returns. It is not to be changed once the model is in use.
	Writethrough bool
}

type span struct{ began, ended uint64 }

// NewModel returns the model of a disk that may grow to size bytes, has now of them, and has the value of first
// everywhere. now tells the time, later at each call; nil: the model's own.
func NewModel(size int64, first *Claim, now func() uint64) *Model {
	if now == nil {
		clock := uint64(1)
		now = func() uint64 { clock++; return clock }
	}
	m := &Model{now: now, sectors: make([][]piece, size/storage.SectorSize)}
	first.end = 1
	lists := make([]possible, len(m.sectors))
	for s := range m.sectors {
		lists[s].Claim = first
		m.sectors[s] = []piece{{0, storage.SectorSize, lists[s : s+1 : s+1]}}
	}
	return m
}

// tick is the time, above that of all claims so far. The caller holds mu.
func (m *Model) tick() uint64 { return m.now() + 2 }

// cover calls fn for each piece of [off, off+n), which it makes begin and end on pieces.
func (m *Model) cover(off, n int64, fn func(*piece)) {
	for end := off + n; off < end; {
		s, from := off/storage.SectorSize, off%storage.SectorSize
		to := min(storage.SectorSize, from+end-off)
		for _, at := range [...]int64{from, to} {
			m.split(s, at)
		}
		for i := range m.sectors[s] {
			if p := &m.sectors[s][i]; from <= p.from && p.to <= to {
				fn(p)
			}
		}
		off += to - from
	}
}

// split makes a piece begin at a byte of a sector.
func (m *Model) split(s, at int64) {
	for i, p := range m.sectors[s] {
		if p.from < at && at < p.to {
			m.sectors[s][i].to = at
			m.sectors[s] = slices.Insert(m.sectors[s], i+1, piece{at, p.to, slices.Clone(p.list)})
			return
		}
	}
}

// Begin notes a request that is about to give [off, off+n) a value, and names its claim.
func (m *Model) Begin(c *Claim, off, n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c.start = m.tick()
	if c.Bytes == nil && c.ID == Unnamed {
		c.ID = c.start
	}
	m.cover(off, n, func(p *piece) { p.list = append(p.list, possible{Claim: c}) })
}

// Finish ends a claim. Of what it was begun for, [off, off+n) has its value for sure.
func (m *Model) Finish(c *Claim, off, n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c.end = m.tick()
	m.cover(off, n, func(p *piece) {
		for i := range p.list {
			if q := &p.list[i]; q.Claim != c && q.lost == 0 && q.end != 0 && q.end < c.start {
				q.lost = c.end
			}
		}
	})
}

// Flushed notes that what had ended at a time is durable now.
func (m *Model) Flushed(began uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flushes = append(m.flushes, span{began, m.tick()})
}

// Grown notes that the disk has at least size bytes.
func (m *Model) Grown(size int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sizes = append(m.sizes, span{uint64(size), m.tick()})
}

// Now is the time.
func (m *Model) Now() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.tick()
}

// durable is the time up to which everything that had ended is on the disk at a time. The caller holds mu.
func (m *Model) durable(at uint64) uint64 {
	if m.Writethrough {
		return at
	}
	t := uint64(0)
	for _, f := range m.flushes {
		if f.ended <= at {
			t = max(t, f.began)
		}
	}
	return t
}

// Read compares what a device holds with what it may hold.
func (m *Model) Read(d io.ReaderAt, off, n int64) error {
	began := m.Now()
	got := make([]byte, n)
	if _, err := d.ReadAt(got, off); err != nil {
		return err
	}
	return m.Compare(got, off, began)
}

// Crashed compares all that a disk of a size holds with what it may hold after a crash at a time.
func (m *Model) Crashed(got []byte, at uint64) error {
	m.mu.Lock()
	since := m.durable(at)
	least := int64(0)
	for _, s := range m.sizes {
		if s.ended <= since {
			least = max(least, int64(s.began))
		}
	}
	m.mu.Unlock()
	if int64(len(got)) < least {
		return fmt.Errorf("the disk has %d bytes, it had %d", len(got), least)
	}
	return m.Compare(got, 0, since)
}

// Compare compares bytes at off with what may have been there at a time or later.
func (m *Model) Compare(got []byte, off int64, since uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for end := off + int64(len(got)); off < end; {
		s, from := off/storage.SectorSize, off%storage.SectorSize
		to := min(storage.SectorSize, from+end-off)
		for i := range m.sectors[s] {
			p := &m.sectors[s][i]
			a, b := max(p.from, from), min(p.to, to)
			if a < b && !p.allows(got[a-from:b-from], s, a, since) {
				return fmt.Errorf("bytes %d to %d of sector %d hold %s, which none of %s gave them", a, b, s, brief(got[a-from:b-from]), p.describe(since))
			}
		}
		got, off = got[to-from:], off+to-from
	}
	return nil
}

func (p *piece) allows(got []byte, s, from int64, since uint64) bool {
	for _, q := range slices.Backward(p.list) {
		if (q.lost == 0 || q.lost > since) && q.gives(got, s, from) {
			return true
		}
	}
	return false
}

// brief is the beginning and the end of some bytes.
func brief(p []byte) string {
	if len(p) <= 32 {
		return fmt.Sprintf("%x", p)
	}
	return fmt.Sprintf("%x…%x", p[:16], p[len(p)-16:])
}

func (p *piece) describe(since uint64) (list string) {
	for _, q := range p.list {
		if q.lost == 0 || q.lost > since {
			list += fmt.Sprintf("{%x from %d to %d, lost %d}", q.ID, q.start, q.end, q.lost)
		}
	}
	return fmt.Sprintf("%s (since %d)", list, since)
}
