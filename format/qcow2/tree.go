package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/platter-disk/platter/storage"
)

// The tree of a snapshot is an L1 table and everything that it reaches. To take a snapshot is to raise the
// reference counts of the active tree, once for each reference, and to keep a copy of the L1 table; from then
// on nothing of the tree may be written in place, so its COPIED bits are cleared in the same step. To give a
// tree up is the reverse.
//
// Trees are walked chunk by chunk, through the cache of tables: memory does not grow with the image. Whoever
// walks one holds the whole disk exclusively, and Image.resizing.

// chunkEntries bounds the L2 entries that one step of a walk looks at, so that its changes fit a transaction
// of the smallest journal.
const chunkEntries = 128

// tableChunks is the number of chunks in an L2 table.
func (g *geometry) tableChunks() int64 { return max(g.l2Entries()/chunkEntries, 1) }

// next is the position after p.
func (p treePos) next(g *geometry) treePos {
	if p.chunk+1 < g.tableChunks() {
		return treePos{p.entry, p.chunk + 1}
	}
	return treePos{p.entry + 1, 0}
}

// before is the position in front of p, which is not the first.
func (p treePos) before(g *geometry) treePos {
	if p.chunk > 0 {
		return treePos{p.entry, p.chunk - 1}
	}
	return treePos{p.entry - 1, g.tableChunks() - 1}
}

// closes reports whether p is the last chunk of its table: the step that counts the table itself.
func (p treePos) closes(g *geometry) bool { return p.chunk == g.tableChunks()-1 }

// readTree reads an L1 table that is not the active one. Nothing in it has been validated.
func (im *Image) readTree(at uint64, entries int64) (*l1Table, error) {
	field := fmt.Sprintf("L1 table of a snapshot at offset %#x", at)
	end, err := im.file.Size()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", im.file.Name(), err)
	}
	switch {
	case entries > maxL1Bytes/8:
		return nil, im.corrupt(field, fmt.Sprintf("%d entries", entries), fmt.Sprintf("at most %d", maxL1Bytes/8))
	case at == 0 || at&uint64(im.geo.clusterSize-1) != 0:
		return nil, im.corrupt(field, fmt.Sprintf("%#x", at), fmt.Sprintf("a multiple of the cluster size %d, not 0", im.geo.clusterSize))
	case at > uint64(end):
		return nil, im.corrupt(field, fmt.Sprintf("%#x", at), fmt.Sprintf("at most the file size %d", end))
	}
	raw := make([]byte, entries*8)
	if err := storage.ReadFull(im.file, raw, int64(at)); err != nil {
		return nil, fmt.Errorf("%s: %s: %w", im.file.Name(), field, err)
	}
	t := &l1Table{at: hostOff(at), words: make([]uint64, entries)}
	for i := range t.words {
		t.words[i] = binary.BigEndian.Uint64(raw[i*8:])
		if e := l1Entry(t.words[i]); e&l1ReservedMask != 0 || im.geo.inCluster(int64(e.offset())) != 0 {
			return nil, im.corrupt(fmt.Sprintf("entry %d of the %s", i, field), fmt.Sprintf("%#x", uint64(e)),
				fmt.Sprintf("reserved bits clear and a multiple of the cluster size %d", im.geo.clusterSize))
		}
	}
	return t, nil
}

// chunk is a part of a cached L2 table.
type chunk struct {
	slice *tableSlice // pinned
	first int64       // index of its first word in the slice
	n     int64       // words
}

// pinChunk makes sure that a chunk of an L2 table is cached until its slice is unpinned.
func (im *Image) pinChunk(table hostOff, k int64) (chunk, error) {
	words := min(chunkEntries, im.geo.l2Entries()) * im.geo.entryWords
	at := table + hostOff(k*words*8)
	start := im.tables.start(at)
	s, err := im.pin(start)
	return chunk{s, int64(at-start) / 8, words}, err
}

// mappings calls fn for each entry of a chunk, with the index of its first word.
func (im *Image) mappings(c chunk, fn func(word int64, m mapping) error) error {
	v := view{s: c.slice}
	for w := c.first; w < c.first+c.n; w += im.geo.entryWords {
		if err := fn(w, im.mappingAt(v, w)); err != nil {
			return err
		}
	}
	return nil
}

// clusters lists the host clusters that a chunk refers to, as often as it does.
func (im *Image) clusters(c chunk) ([]hostRun, error) {
	g := &im.geo
	var runs []hostRun
	err := im.mappings(c, func(_ int64, m mapping) error {
		if g.hasHost(m) && g.inCluster(int64(m.entry.offset())) != 0 {
			return im.corrupt("L2 entry", fmt.Sprintf("%#x", uint64(m.entry)), fmt.Sprintf("a multiple of the cluster size %d", g.clusterSize))
		}
		for _, r := range im.releases(m, true) {
			if k := len(runs); k > 0 && runs[k-1].start+hostCluster(runs[k-1].n) == r.start {
				runs[k-1].n += r.n
				continue
			}
			runs = append(runs, r)
		}
		return nil
	})
	return runs, err
}

// checkCounts makes sure, before anything changes, that the counts of clusters can be raised or lowered as
// often as they are listed. The caller holds mu.
func (im *Image) checkCounts(runs []hostRun, raise bool) error {
	times := map[hostCluster]uint64{}
	for _, r := range runs {
		for c := r.start; c < r.start+hostCluster(r.n); c++ {
			times[c]++
		}
	}
	highest := maxRefcount(im.geo.refOrder)
	for c, n := range times {
		v, err := im.alloc.refs.get(c)
		switch {
		case err != nil:
			return err
		case v == 0 || !raise && v < n:
			return im.corrupt(fmt.Sprintf("reference count of cluster %d, which is in use %d times", c, n), fmt.Sprint(v), "no less; check the image")
		case raise && n > highest-v:
			return fmt.Errorf("%s: reference count of cluster %d would become %d: %w: they are %d bits wide and end at %d",
				im.file.Name(), c, v+n, errRefcountWidth, 1<<im.geo.refOrder, highest)
		}
	}
	return nil
}

var errRefcountWidth = errors.New("the image's counts cannot hold it")

// raiseTree raises the counts of everything that t reaches and clears the COPIED bits of its L2 tables, and of
// the active L1 table where that shares them. It returns how far it came.
func (im *Image) raiseTree(t *l1Table, stale bool) (treePos, error) {
	g := &im.geo
	p := treePos{}
	for p.entry < int64(len(t.words)) {
		if t.entry(p.entry).offset() == 0 {
			p = treePos{entry: p.entry + 1}
			continue
		}
		if err := im.raiseChunk(t, p, stale); err != nil {
			return p, err
		}
		p = p.next(g)
		if err := im.settle(); err != nil {
			return p, err
		}
	}
	return p, nil
}

func (im *Image) raiseChunk(t *l1Table, p treePos, stale bool) error {
	table := t.entry(p.entry).offset()
	c, runs, err := im.pinReferences(table, p)
	if err != nil {
		return err
	}
	defer c.slice.unpin()
	im.mu.Lock()
	defer im.mu.Unlock()
	if err := im.checkCounts(runs, true); err != nil {
		return err
	}
	flags, err := im.flagWords(c, func(at hostCluster) (bool, error) { return stale && im.single(at), nil })
	if err != nil {
		return err
	}
	for _, r := range runs {
		flags.uses = append(flags.uses, freeRun{start: r.start, n: r.n})
	}
	if err := im.discipline.accept(&flags); err != nil {
		return im.fail(err)
	}
	active := im.l1.Load()
	if p.closes(&im.geo) && p.entry < int64(len(active.words)) {
		if e := active.entry(p.entry); e.offset() == table && e.copied() {
			u := update{first: p.entry, words: []uint64{uint64(e &^ entryCopied)}}
			if err := im.discipline.accept(&u); err != nil {
				return im.fail(err)
			}
		}
	}
	im.discipline.progress(operation{opRaise, t.at, int64(len(t.words)), p.next(&im.geo)})
	return nil
}

// pinReferences pins a chunk of an L2 table and returns what it refers to; with the last chunk goes the table
// itself. The caller unpins the chunk.
func (im *Image) pinReferences(table hostOff, p treePos) (chunk, []hostRun, error) {
	c, err := im.pinChunk(table, p.chunk)
	if err != nil {
		return c, nil, err
	}
	runs, err := im.clusters(c)
	if err != nil {
		c.slice.unpin()
		return c, nil, err
	}
	if p.closes(&im.geo) {
		runs = append(runs, hostRun{start: im.geo.clusterOf(table), n: 1, table: true})
	}
	return c, runs, nil
}

// single reports whether a cluster's count is 1. The caller holds mu.
func (im *Image) single(c hostCluster) bool {
	v, err := im.alloc.refs.get(c)
	return err == nil && v == 1
}

// flagWords is the update that gives the entries of a chunk the COPIED bits that want says. Without a change
// it has no words; clusters of an external data file have no counts that could change them. The caller holds mu and
// has the chunk pinned.
func (im *Image) flagWords(c chunk, want func(hostCluster) (bool, error)) (update, error) {
	var u update
	if im.geo.dataFile {
		return u, nil
	}
	v := view{s: c.slice}
	err := im.mappings(c, func(w int64, m mapping) error {
		if !im.geo.hasHost(m) || im.geo.inCluster(int64(m.entry.offset())) != 0 {
			return nil
		}
		copied, err := want(im.geo.clusterOf(m.entry.offset()))
		if err != nil || copied == m.entry.copied() {
			return err
		}
		if u.slice == nil {
			u.slice, u.first = c.slice, w
		}
		for at := u.first + int64(len(u.words)); at < w; at++ {
			u.words = append(u.words, v.word(at))
		}
		u.words = append(u.words, uint64(m.entry)^entryCopied)
		return nil
	})
	return u, err
}

// lowerChunk gives up what one chunk of a tree refers to. done is what is true afterwards. What is left with one
// reference gets its COPIED bit in the active tree in the same step, which shares clusters with other trees at
// equal places.
func (im *Image) lowerChunk(t *l1Table, p treePos, done operation) error {
	table := t.entry(p.entry).offset()
	c, runs, err := im.pinReferences(table, p)
	if err != nil {
		return err
	}
	defer c.slice.unpin()
	active, err := im.pinActive(p)
	if err != nil {
		return err
	}
	defer active.unpin()
	im.mu.Lock()
	defer im.mu.Unlock()
	if err := im.checkCounts(runs, false); err != nil {
		return err
	}
	if err := im.discipline.accept(&update{releases: runs, unlinked: true}); err != nil {
		return im.fail(err)
	}
	if err := im.refreshChunk(active, p); err != nil {
		return err
	}
	im.discipline.progress(done)
	return nil
}

// pinActive pins a chunk of the active tree; without an L2 table there it is empty.
func (im *Image) pinActive(p treePos) (chunk, error) {
	t := im.l1.Load()
	if p.entry >= int64(len(t.words)) {
		return chunk{}, nil
	}
	table := t.entry(p.entry).offset()
	if table == 0 || im.geo.inCluster(int64(table)) != 0 {
		return chunk{}, nil
	}
	return im.pinChunk(table, p.chunk)
}

func (c chunk) unpin() {
	if c.slice != nil {
		c.slice.unpin()
	}
}

// refreshChunk makes the COPIED bits of a chunk of the active tree agree with the counts. The caller holds mu.
func (im *Image) refreshChunk(c chunk, p treePos) error {
	if c.slice == nil {
		return nil
	}
	count := func(at hostCluster) (bool, error) {
		v, err := im.alloc.refs.get(at)
		return v == 1, err
	}
	u, err := im.flagWords(c, count)
	if err != nil {
		return err
	}
	if len(u.words) > 0 {
		if err := im.discipline.accept(&u); err != nil {
			return im.fail(err)
		}
	}
	if !p.closes(&im.geo) {
		return nil
	}
	e := im.l1.Load().entry(p.entry)
	copied, err := count(im.geo.clusterOf(e.offset()))
	if err != nil || copied == e.copied() {
		return err
	}
	if err := im.discipline.accept(&update{first: p.entry, words: []uint64{uint64(e ^ entryCopied)}}); err != nil {
		return im.fail(err)
	}
	return nil
}

// finishOperation goes on with an operation that a crash interrupted, or undoes it.
func (im *Image) finishOperation(o operation) error {
	t, err := im.readTree(uint64(o.tree), o.entries)
	if err != nil {
		return im.abandon(err)
	}
	if o.kind == opRaise {
		return im.undoRaise(t, o.next)
	}
	return im.lowerTree(t, o.kind, o.next)
}

// lowerTree gives up everything that t reaches from a position on, and then t itself.
func (im *Image) lowerTree(t *l1Table, kind opKind, p treePos) error {
	g := &im.geo
	for p.entry < int64(len(t.words)) {
		if t.entry(p.entry).offset() == 0 {
			p = treePos{entry: p.entry + 1}
			continue
		}
		next := p.next(g)
		if err := im.lowerChunk(t, p, operation{kind, t.at, int64(len(t.words)), next}); err != nil {
			return im.abandon(err)
		}
		p = next
		if err := im.settle(); err != nil {
			return err
		}
	}
	return im.dropTree(t)
}

// undoRaise lowers again what raiseTree raised in front of a position, backwards, and gives up t itself.
func (im *Image) undoRaise(t *l1Table, p treePos) error {
	g := &im.geo
	for p != (treePos{}) {
		p = p.before(g)
		if t.entry(p.entry).offset() == 0 {
			p.chunk = 0
			continue
		}
		if err := im.lowerChunk(t, p, operation{opRaise, t.at, int64(len(t.words)), p}); err != nil {
			return im.abandon(err)
		}
		if err := im.settle(); err != nil {
			return err
		}
	}
	return im.dropTree(t)
}

// dropTree ends an operation: the COPIED bits of the active tree are brought up to date where an image shares
// clusters at odd places, and the clusters of an L1 table are given up that nothing points to any more.
func (im *Image) dropTree(t *l1Table) error {
	if err := im.refreshTree(); err != nil {
		return im.abandon(err)
	}
	im.mu.Lock()
	area := im.l1Area(t)
	err := im.checkCounts([]hostRun{area}, false)
	if err == nil {
		if err = im.discipline.accept(&update{releases: []hostRun{area}, unlinked: true}); err != nil {
			err = im.fail(err)
		}
	}
	im.discipline.progress(operation{})
	im.mu.Unlock()
	return errors.Join(err, im.settle(), im.discipline.flush())
}

// abandon ends an operation that cannot be finished because the image is damaged. What is left are leaks.
func (im *Image) abandon(err error) error {
	if im.failed() != nil {
		return err
	}
	im.mu.Lock()
	im.discipline.progress(operation{})
	im.mu.Unlock()
	return errors.Join(err, im.discipline.flush())
}

// refreshTree makes the COPIED bits of the active tree agree with the counts.
func (im *Image) refreshTree() error {
	entries := int64(len(im.l1.Load().words))
	for p := (treePos{}); p.entry < entries; p = p.next(&im.geo) {
		c, err := im.pinActive(p)
		if err != nil {
			return err
		}
		if c.slice == nil {
			p.chunk = im.geo.tableChunks() - 1
			continue
		}
		im.mu.Lock()
		err = im.refreshChunk(c, p)
		im.mu.Unlock()
		c.unpin()
		if err != nil {
			return err
		}
		if err := im.settle(); err != nil {
			return err
		}
	}
	return nil
}
