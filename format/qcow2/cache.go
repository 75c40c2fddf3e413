package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/platter-disk/platter/internal/bufpool"
	"github.com/platter-disk/platter/storage"
)

const (
	sliceBytes  = 4096 // cached piece of an L2 table; a whole table where clusters are smaller
	cacheWays   = 8
	sectorWords = sectorSize / 8

	// DefaultL2CacheSize bounds the memory for cached L2 tables, in bytes: enough for 128 GiB of disk at
	// 64 KiB clusters. Smaller disks use less.
	DefaultL2CacheSize = 16 << 20
)

// errCacheFull means that every place where a slice could go holds changes that must be written first.
var errCacheFull = errors.New("every cached table slice is dirty")

// tableSlice is a cached piece of an L2 table. Readers take no lock and leave no trace: they load words
// atomically and then look whether seq moved. Words change only while the guest range they map is held
// exclusively and the slice is pinned.
type tableSlice struct {
	seq    atomic.Uint64 // odd while the slice is being refilled
	used   atomic.Bool   // clock bit
	pins   atomic.Int32  // > 0: stays
	held   atomic.Bool   // has changes that are not in the file: stays
	words  []uint64      // big-endian words of the table in native order; accessed atomically
	dirty  uint64        // sectors of the slice that changed; guarded by Image.mu
	listed bool          // in Image.dirtySlices; guarded by Image.mu
	need   generation    // barrier that must have completed before the changes may be written; guarded by Image.mu
	where  atomic.Int64  // host offset, 0 when empty
}

// tableCache is a set-associative cache of table slices keyed by host offset. Its memory grows on demand up
// to its bound and never shrinks before the image is closed.
type tableCache struct {
	file  storage.File
	bytes int64 // of a slice
	sets  []cacheSet
}

type cacheSet struct {
	keys   [cacheWays]atomic.Int64 // host offsets, 0 when empty; one cache line
	mu     sync.Mutex              // held to fill, pin or drop
	hand   int
	slices [cacheWays]tableSlice
}

// newTableCache makes a cache for tables that total tableBytes, bounded by limit bytes.
func newTableCache(f storage.File, clusterSize, tableBytes, limit int64) *tableCache {
	c := &tableCache{file: f, bytes: min(sliceBytes, clusterSize)}
	want := min(max(limit, c.bytes*cacheWays), max(tableBytes, c.bytes)*2)
	sets := int64(1)
	for sets*2*cacheWays*c.bytes <= want {
		sets *= 2
	}
	c.sets = make([]cacheSet, sets)
	return c
}

// capacity is the most bytes the cache holds.
func (c *tableCache) capacity() int64 { return int64(len(c.sets)) * cacheWays * c.bytes }

func (c *tableCache) set(at hostOff) *cacheSet {
	h := uint64(at) / uint64(c.bytes) * 0x9e3779b97f4a7c15
	return &c.sets[h>>32&uint64(len(c.sets)-1)]
}

// start is the offset of the slice that holds the word at a host offset.
func (c *tableCache) start(at hostOff) hostOff { return at &^ hostOff(c.bytes-1) }

// view is a slice seen at one moment; valid tells afterwards whether what was read from it counts.
type view struct {
	s   *tableSlice
	seq uint64
}

func (v view) word(i int64) uint64 { return atomic.LoadUint64(&v.s.words[i]) }
func (v view) valid() bool         { return v.s.seq.Load() == v.seq }

// find returns a view of the slice at start if it is cached.
func (c *tableCache) find(start hostOff) (view, bool) {
	set := c.set(start)
	for i := range set.keys {
		if set.keys[i].Load() != int64(start) {
			continue
		}
		s := &set.slices[i]
		seq := s.seq.Load()
		if seq&1 == 0 && set.keys[i].Load() == int64(start) {
			if !s.used.Load() {
				s.used.Store(true)
			}
			return view{s, seq}, true
		}
	}
	return view{}, false
}

// view returns a view of the slice at start, reading it from the file if it is not cached. With tryOnly it
// returns storage.ErrWouldBlock instead of waiting for the file.
func (c *tableCache) view(start hostOff, tryOnly bool) (view, error) {
	for {
		if v, ok := c.find(start); ok {
			return v, nil
		}
		if _, err := c.load(start, tryOnly, false); err != nil {
			return view{}, err
		}
	}
}

// pin returns the slice at start, reading it if need be; it stays cached until unpin.
func (c *tableCache) pin(start hostOff) (*tableSlice, error) { return c.load(start, false, true) }

func (s *tableSlice) unpin() { s.pins.Add(-1) }

func (c *tableCache) load(start hostOff, tryOnly, pin bool) (*tableSlice, error) {
	set := c.set(start)
	set.mu.Lock()
	defer set.mu.Unlock()
	for i := range set.keys {
		if set.keys[i].Load() == int64(start) {
			s := &set.slices[i]
			if pin {
				s.pins.Add(1)
			}
			return s, nil
		}
	}
	i, ok := set.victim()
	if !ok {
		return nil, errCacheFull
	}
	s := &set.slices[i]
	raw := bufpool.Get(int(c.bytes))
	defer raw.Put()
	buf := raw.B
	if err := c.read(buf, start, tryOnly); err != nil {
		return nil, err
	}
	set.keys[i].Store(0)
	s.seq.Add(1)
	s.decode(buf)
	s.where.Store(int64(start))
	s.used.Store(true)
	if pin {
		s.pins.Add(1)
	}
	s.seq.Add(1)
	set.keys[i].Store(int64(start))
	return s, nil
}

// read reads the slice at start from the file.
func (c *tableCache) read(buf []byte, start hostOff, tryOnly bool) error {
	read := storage.ReadFull
	if tryOnly {
		read = storage.TryReadFull
	}
	err := read(c.file, buf, int64(start))
	if err != nil && !errors.Is(err, storage.ErrWouldBlock) {
		err = fmt.Errorf("%s: L2 table at offset %#x: %w", c.file.Name(), start, err)
	}
	return err
}

// decode fills the slice with the words of a table.
func (s *tableSlice) decode(buf []byte) {
	if s.words == nil {
		s.words = make([]uint64, len(buf)/8)
	}
	for w := range s.words {
		atomic.StoreUint64(&s.words[w], binary.BigEndian.Uint64(buf[w*8:]))
	}
}

// uncached returns a view of the slice at start that is nobody else's. The caller has found that it is not cached, and
// counts on nothing but the words of guest ranges that it holds: others may change meanwhile, in the cache.
func (c *tableCache) uncached(start hostOff) (view, error) {
	raw := bufpool.Get(int(c.bytes))
	defer raw.Put()
	if err := c.read(raw.B, start, false); err != nil {
		return view{}, err
	}
	s := &tableSlice{}
	s.decode(raw.B)
	return view{s: s}, nil
}

// victim picks an empty or clean unpinned way, or none. The caller holds set.mu.
func (set *cacheSet) victim() (int, bool) {
	for i := range set.keys {
		if set.keys[i].Load() == 0 && set.slices[i].pins.Load() == 0 {
			return i, true
		}
	}
	for range 2 * cacheWays {
		i := set.hand
		set.hand = (set.hand + 1) % cacheWays
		s := &set.slices[i]
		if s.pins.Load() != 0 || s.held.Load() {
			continue
		}
		if s.used.Swap(false) {
			continue
		}
		return i, true
	}
	for i := range set.slices { // readers set every clock bit again meanwhile
		if s := &set.slices[i]; s.pins.Load() == 0 && !s.held.Load() {
			return i, true
		}
	}
	return 0, false
}

// drop forgets the slices of a table that is not in use any more, changes included. The caller makes sure
// that nobody reaches the table (its guest range is held exclusively) and holds Image.mu.
func (c *tableCache) drop(table hostOff, length int64, dropped func(*tableSlice)) {
	for at := table; at < table+hostOff(length); at += hostOff(c.bytes) {
		set := c.set(at)
		set.mu.Lock()
		for i := range set.keys {
			if set.keys[i].Load() == int64(at) {
				s := &set.slices[i]
				set.keys[i].Store(0)
				s.seq.Add(2)
				if s.held.Load() {
					dropped(s)
				}
			}
		}
		set.mu.Unlock()
	}
}
