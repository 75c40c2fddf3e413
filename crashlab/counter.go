package crashlab

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/platter-disk/platter/storage"
)

// Tally is how many operations of a kind there were, and how many bytes they concerned.
type Tally struct{ Ops, Bytes int64 }

// Counter is a file that counts the operations on the file it wraps. Safe for concurrent use. What it counts
// is what was asked for: an operation that fails counts as well.
type Counter struct {
	storage.File
	kinds [numKinds]struct{ ops, bytes atomic.Int64 }
	sites *siteTable // nil: not wanted

	mu     sync.Mutex
	bySite map[siteKind]Tally
}

type siteKind struct {
	site *Site
	kind Kind
}

// NewCounter wraps f. With sites, it also finds out who asks, which costs about a microsecond an operation and
// some memory; without, nothing is allocated.
func NewCounter(f storage.File, sites bool) *Counter {
	c := &Counter{File: f}
	if sites {
		c.sites, c.bySite = newSiteTable(), make(map[siteKind]Tally)
	}
	return c
}

// Count returns what was counted of a kind since the beginning or the last Reset.
func (c *Counter) Count(k Kind) Tally {
	if k >= numKinds {
		return Tally{}
	}
	return Tally{c.kinds[k].ops.Load(), c.kinds[k].bytes.Load()}
}

// SiteTally is what one place of the engine's source asked of a file.
type SiteTally struct {
	Site Site
	Kind Kind
	Tally
}

// Sites returns what was counted by caller and kind, those with most operations first; nil when the counter
// was made without sites.
func (c *Counter) Sites() []SiteTally {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []SiteTally
	for k, t := range c.bySite {
		out = append(out, SiteTally{*k.site, k.kind, t})
	}
	slices.SortFunc(out, func(a, b SiteTally) int {
		return cmp.Or(cmp.Compare(b.Ops, a.Ops), cmp.Compare(a.Site.String(), b.Site.String()), cmp.Compare(a.Kind, b.Kind))
	})
	return out
}

// Reset forgets what was counted.
func (c *Counter) Reset() {
	for k := range c.kinds {
		c.kinds[k].ops.Store(0)
		c.kinds[k].bytes.Store(0)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.bySite)
}

func (c *Counter) add(k Kind, bytes int64) {
	c.kinds[k].ops.Add(1)
	c.kinds[k].bytes.Add(bytes)
	if c.sites == nil {
		return
	}
	key := siteKind{c.sites.caller(), k}
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.bySite[key]
	c.bySite[key] = Tally{t.Ops + 1, t.Bytes + bytes}
}

// ReadAt counts and reads.
func (c *Counter) ReadAt(p []byte, off int64) (int, error) {
	c.add(KindRead, int64(len(p)))
	return c.File.ReadAt(p, off)
}

// TryReadAt reads, and counts a read that was answered.
func (c *Counter) TryReadAt(p []byte, off int64) (int, error) {
	n, err := c.File.TryReadAt(p, off)
	if n > 0 || err == nil {
		c.add(KindRead, int64(len(p)))
	}
	return n, err
}

// WriteAt counts and writes.
func (c *Counter) WriteAt(p []byte, off int64) (int, error) {
	c.add(KindWrite, int64(len(p)))
	return c.File.WriteAt(p, off)
}

// Sync counts and syncs.
func (c *Counter) Sync() error {
	c.add(KindSync, 0)
	return c.File.Sync()
}

// Truncate counts and truncates.
func (c *Counter) Truncate(size int64) error {
	c.add(KindTruncate, 0)
	return c.File.Truncate(size)
}

// PunchHole counts and punches.
func (c *Counter) PunchHole(off, length int64) error {
	c.add(KindPunch, length)
	return c.File.PunchHole(off, length)
}

// ZeroRange counts and zeroes.
func (c *Counter) ZeroRange(off, length int64) error {
	c.add(KindZero, length)
	return c.File.ZeroRange(off, length)
}

// Allocate counts and allocates.
func (c *Counter) Allocate(off, length int64) error {
	c.add(KindAllocate, length)
	return c.File.Allocate(off, length)
}

// DataExtents counts and maps.
func (c *Counter) DataExtents(off, length int64, fn func(storage.Extent) bool) error {
	c.add(KindExtents, length)
	return c.File.DataExtents(off, length, fn)
}
