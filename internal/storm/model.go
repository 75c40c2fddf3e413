package storm

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"

	"github.com/platter-disk/platter/storage"
)

// Unnamed is the ID of a claim before its request begins.
const Unnamed = 1

// Claim is a request that gives sectors a value.
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
			if w < c.ID%4*18 { // so that clusters compress to streams of any length
				v = noise.Uint64()
			}
			binary.LittleEndian.PutUint64(p[w*8:], v)
		}
	}
}

// possible is a claim that a sector may show the value of.
type possible struct {
	*Claim
	lost uint64 // when another claim took its place for good; 0: not yet
}

// Model knows for each sector which values it may have. A request that succeeded takes the place of all that
// ended before it began; one that failed is one more possibility; of requests that meet, either may be last.
type Model struct {
	mu      sync.Mutex
	clock   uint64
	readers int
	sectors [][]possible
}

// NewModel returns the model of a disk that may grow to size bytes and has the value of first everywhere.
func NewModel(size int64, first *Claim) *Model {
	m := &Model{clock: 1, sectors: make([][]possible, size/storage.SectorSize)}
	first.end = 1
	for s := range m.sectors {
		m.sectors[s] = []possible{{Claim: first}}
	}
	return m
}

// Begin notes a request that is about to give [off, off+n), whole sectors, a value, and names its claim.
func (m *Model) Begin(c *Claim, off, n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.clock++
	c.start = m.clock
	if c.Bytes == nil && c.ID == Unnamed {
		c.ID = m.clock
	}
	for s := off / storage.SectorSize; s < (off+n)/storage.SectorSize; s++ {
		m.sectors[s] = append(m.sectors[s], possible{Claim: c})
	}
}

// Finish ends a claim. Of what it was begun for, [off, off+n) has its value for sure.
func (m *Model) Finish(c *Claim, off, n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.clock++
	c.end = m.clock
	for s := off / storage.SectorSize; s < (off+n)/storage.SectorSize; s++ {
		list := m.sectors[s]
		kept := list[:0]
		for _, p := range list {
			if p.Claim != c && p.lost == 0 && p.end != 0 && p.end < c.start {
				p.lost = m.clock
			}
			if p.lost == 0 || m.readers > 0 {
				kept = append(kept, p)
			}
		}
		m.sectors[s] = kept
	}
}

// Read compares what a device holds with what it may hold.
func (m *Model) Read(d io.ReaderAt, off, n int64) error {
	m.mu.Lock()
	began := m.clock
	m.readers++
	m.mu.Unlock()
	got := make([]byte, n)
	_, err := d.ReadAt(got, off)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.readers--
	if err != nil {
		return err
	}
	want := make([]byte, storage.SectorSize)
	for at := int64(0); at < n; at += storage.SectorSize {
		s := (off + at) / storage.SectorSize
		if !m.allows(s, got[at:at+storage.SectorSize], want, began) {
			return fmt.Errorf("sector %d holds %x…%x, which none of %s gave it", s, got[at:at+8], got[at+504:at+512], m.describe(s, began))
		}
	}
	return nil
}

func (m *Model) allows(s int64, got, want []byte, began uint64) bool {
	for _, p := range m.sectors[s] {
		if p.lost == 0 || p.lost > began {
			if p.Sector(want, s); bytes.Equal(got, want) {
				return true
			}
		}
	}
	return false
}

func (m *Model) describe(s int64, began uint64) (list string) {
	for _, p := range m.sectors[s] {
		if p.lost == 0 || p.lost > began {
			list += fmt.Sprintf("{%x from %d to %d}", p.ID, p.start, p.end)
		}
	}
	return list
}
