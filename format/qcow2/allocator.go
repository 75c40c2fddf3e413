package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/platter-disk/platter/storage"
)

// generation counts barriers. Something that happened at generation g is durable once a barrier that began
// at a later generation has completed, that is when g < Image.durable. 0 is always durable.
type generation uint64

// never is the generation of what no barrier will make true.
const never = ^generation(0)

// hostRun is a run of host clusters.
type hostRun struct {
	start hostCluster
	n     int64
	punch bool // give the space back once nothing reaches it
	table bool // they held a table
}

func (r hostRun) contains(c hostCluster) bool { return c >= r.start && c < r.start+hostCluster(r.n) }

// freeRun is a run of clusters that is nobody's: of the reserve, or taken from it and not linked yet.
type freeRun struct {
	start  hostCluster
	n      int64
	raised bool       // their counts are 1 already
	ready  generation // when that was, and when the file came to reach over them
	zeroed generation // when the clusters began to read as zeros; never: they hold old bytes
}

// allocator hands out host clusters from a reserve whose counts were raised ahead of use. A whole batch of
// counts rides on one barrier, the guest's own where possible, so that in steady state an allocation costs
// none. Clusters of the reserve are what a crash may leak; Close gives them back.
// All methods run under Image.mu.
type allocator struct {
	file  storage.File
	geo   *geometry
	refs  *refcounts
	im    *Image
	hint  hostCluster  // no free cluster lies before it
	end   atomic.Int64 // file size in bytes
	atEnd int64        // Close leaves the file at least that long: its size when it was opened, or less once it was emptied

	reserve  []freeRun
	reserved int64 // clusters in reserve
	taken    bool  // something was taken since the last top-up
	transit  int64 // clusters taken since the last commit: counted, and not linked yet on the disk
	batch    int64 // clusters that are set aside at a time; grows with use
	maxBatch int64
	policy   countPolicy
	noZero   bool // the file cannot zero a range without writing it

	// busy holds clusters whose count is 0 and that are not free all the same: set aside under a policy that
	// does not raise counts early, released by an update that is not durable, or about to take another
	// compressed stream.
	busy map[hostCluster]struct{}

	journal hostRun // the region of the metadata journal: never free, never counted
	packer  packer
}

// countPolicy says when the count of a cluster is raised that is about to be used.
type countPolicy uint8

const (
	countAhead  countPolicy = iota // in batches, ahead of use
	countExact                     // when it is taken
	countAtLink                    // by the update that links it
)

const (
	firstBatch    = 16       // clusters
	maxBatchBytes = 64 << 20 // of a batch, once the image has shown that it grows
	maxBatch      = 1024     // clusters

	// maxStrayCounts bounds the search through clusters past the end of the file that have counts all the same,
	// in clusters. A sound image has none; one block that a hostile table names a million times has billions.
	maxStrayCounts = 1 << 20
)

func newAllocator(im *Image, refs *refcounts, fileSize int64) *allocator {
	a := &allocator{
		file: im.file, geo: &im.geo, refs: refs, im: im,
		atEnd: fileSize,
		busy:  map[hostCluster]struct{}{}, packer: packer{streams: map[hostCluster]int{}, kept: map[hostCluster]struct{}{}},
	}
	a.end.Store(fileSize)
	a.maxBatch = min(max(int64(maxBatchBytes)>>im.geo.clusterBits, firstBatch), maxBatch)
	if im.opts.Reserve > 0 {
		a.maxBatch = im.opts.Reserve
	}
	a.batch = min(firstBatch, a.maxBatch)
	return a
}

// take removes up to n contiguous clusters from the reserve, at least one. With zero it prefers clusters
// that read as zeros, without it those that do not.
func (a *allocator) take(n int64, zero bool) (freeRun, error) {
	if a.reserved < n {
		// What is added mostly goes on where the reserve ends, so that a large write stays in one piece.
		if err := a.refill(max(n-a.reserved, a.aheadBatch())); err != nil && len(a.reserve) == 0 {
			return freeRun{}, err
		}
		a.batch = min(a.batch*2, a.maxBatch)
	}
	best, bestScore := 0, -1
	for i, r := range a.reserve {
		score := 0
		if (r.zeroed != never) == zero {
			score += 2
		}
		if r.n >= n {
			score++
		}
		if score > bestScore {
			best, bestScore = i, score
		}
		if score == 3 {
			break
		}
	}
	r := &a.reserve[best]
	got := *r
	got.n = min(n, r.n)
	r.start += hostCluster(got.n)
	r.n -= got.n
	if r.n == 0 {
		a.reserve = slices.Delete(a.reserve, best, best+1)
	}
	a.reserved -= got.n
	a.taken = true
	a.transit += got.n
	return got, nil
}

func (a *allocator) aheadBatch() int64 {
	if a.policy == countExact {
		return 1
	}
	return a.batch
}

// giveBack returns clusters that were taken and not linked. Whatever was written into them stays there. Those of an image
// that has failed are not handed out again: the update that was to link them may be in the tables all the same, and
// requests that had begun still take clusters.
func (a *allocator) giveBack(r freeRun) {
	if a.im.failed() != nil {
		return
	}
	r.zeroed = never
	a.put(r)
}

func (a *allocator) put(r freeRun) {
	a.reserved += r.n
	if k := len(a.reserve); k > 0 {
		last := &a.reserve[k-1]
		if next := last.start + hostCluster(last.n); next == r.start && last.raised == r.raised && last.ready == r.ready && last.zeroed == r.zeroed {
			last.n += r.n
			return
		}
	}
	a.reserve = append(a.reserve, r)
}

// topUp sets the next batch aside ahead of need, so that its barrier is the one of the flush that is starting.
// Where there is no room for one, whoever needs a cluster finds out; what is to be flushed needs none.
func (a *allocator) topUp() {
	if !a.taken || a.policy == countExact {
		return
	}
	a.taken = false
	if a.reserved*2 > a.batch && a.reserved >= min(a.transit, a.maxBatch) {
		return // enough for as much as was taken since the last flush
	}
	a.batch = min(max(a.batch, a.transit)*2, a.maxBatch)
	if a.refill(max(a.batch-a.reserved, 1)) != nil {
		a.batch = min(firstBatch, a.maxBatch)
	}
}

// refill sets aside up to n more clusters, at least one.
func (a *allocator) refill(n int64) error {
	start, got, err := a.described(n)
	if err != nil {
		return err
	}
	from, to := int64(a.geo.offsetOf(start)), int64(a.geo.offsetOf(start+hostCluster(got)))
	zeroed := generation(0)
	if end := a.end.Load(); from < end {
		zeroed = a.zero(from, min(to, end))
	}
	r, err := a.setAside(start, got)
	if err != nil {
		return err
	}
	r.zeroed = zeroed
	a.hint = start + hostCluster(got)
	a.put(r)
	return nil
}

// freeRegion finds n contiguous free clusters for the journal: at the place it had before, if that is still
// free, or past everything that is in use.
func (a *allocator) freeRegion(before hostCluster, n int64) (hostCluster, error) {
	if before > 0 && before+hostCluster(n) <= a.fileClusters() {
		k := int64(0)
		for ; k < n; k++ {
			if free, err := a.free(before + hostCluster(k)); err != nil {
				return 0, err
			} else if !free {
				break
			}
		}
		if k == n {
			return before, nil
		}
	}
	c := a.fileClusters()
	for k := int64(0); k < n; k++ {
		if free, err := a.free(c + hostCluster(k)); err != nil {
			return 0, err
		} else if !free {
			c, k = c+hostCluster(k)+1, -1
		}
	}
	return c, nil
}

// link counts clusters as used by an update that is being accepted, and tells what the update has to wait for:
// the counts, unless they reach the disk together with it, and the growth of the file.
func (a *allocator) link(r freeRun) (generation, error) {
	if r.raised {
		return r.ready, nil
	}
	for c := r.start; c < r.start+hostCluster(r.n); c++ {
		v, err := a.refs.get(c)
		if err != nil {
			return 0, err
		}
		if err := a.refs.set(c, v+1); err != nil {
			return 0, err
		}
		delete(a.busy, c)
		delete(a.packer.kept, c)
	}
	if a.policy == countAtLink {
		return r.ready, nil
	}
	return a.im.gen, nil
}

// described finds a run of free clusters that refcount blocks exist for, at most n long, making blocks where
// there are none. A new block takes clusters of the run that it was made for.
func (a *allocator) described(n int64) (hostCluster, int64, error) {
	for {
		start, got, err := a.findFree(n)
		if err != nil {
			return 0, 0, err
		}
		made, err := a.ensureBlocks(start, got)
		if err != nil {
			return 0, 0, err
		}
		if !made {
			return start, got, nil
		}
	}
}

// zero makes a range of free clusters read as zeros without writing them; it tells since when they do.
func (a *allocator) zero(from, to int64) generation {
	if a.noZero {
		return never
	}
	if err := a.file.ZeroRange(from, to-from); err != nil {
		a.noZero = a.noZero || errors.Is(err, errors.ErrUnsupported)
		return never
	}
	a.im.wrote()
	return a.im.gen
}

// extend makes the file reach to the given offset, so that no pointer ever designates a place past its end.
func (a *allocator) extend(to int64) error {
	if to <= a.end.Load() {
		return nil
	}
	if err := a.file.Truncate(to); err != nil {
		return fmt.Errorf("%s: extending to %d bytes: %w", a.file.Name(), to, err)
	}
	a.end.Store(to)
	a.im.wrote()
	return nil
}

// allocate reserves space for metadata that is going to be written in place: after an update was accepted, a full
// file system must not keep its words from the file. What cannot reserve space does without.
func (a *allocator) allocate(at hostOff, n int64) error {
	if err := a.file.Allocate(int64(at), n); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return fmt.Errorf("%s: reserving %d bytes at offset %#x: %w", a.file.Name(), n, at, err)
	}
	return nil
}

// fileClusters is the number of clusters the file reaches over.
func (a *allocator) fileClusters() hostCluster { return hostCluster(a.geo.clustersFor(a.end.Load())) }

// findFree returns the first run of free clusters from the hint on, at most n long. The disk goes on past
// the end of the file; a cluster there is free unless it has a count all the same.
func (a *allocator) findFree(n int64) (hostCluster, int64, error) {
	c := a.hint
	for past := max(c, a.fileClusters()); ; c++ {
		free, err := a.free(c)
		if err != nil {
			return 0, 0, err
		}
		if free {
			break
		}
		if c-past > maxStrayCounts {
			return 0, 0, a.im.corrupt("reference counts", fmt.Sprintf("%d clusters from %d on in use, where the file has ended", c-past, past),
				"few or none past the end of the file; checking the image with repair takes them away")
		}
	}
	a.hint = c
	k := int64(1)
	for ; k < n; k++ {
		if free, err := a.free(c + hostCluster(k)); err != nil {
			return 0, 0, err
		} else if !free {
			break
		}
	}
	if edge := int64(a.fileClusters() - c); edge > 0 && k > edge {
		k = edge // what lies past the end reads as zeros and makes a run of its own
	}
	return c, k, nil
}

func (a *allocator) free(c hostCluster) (bool, error) {
	v, err := a.refs.get(c)
	if v != 0 || c == 0 || err != nil {
		return false, err
	}
	if _, busy := a.busy[c]; busy || a.journal.contains(c) {
		return false, nil
	}
	if a.im.guard.view.Load().overlaps(c, c) {
		return false, a.im.fail(a.im.corrupt(fmt.Sprintf("reference count of cluster %d", c), "0", "1, because metadata lies there"))
	}
	return true, nil
}

// contiguous allocates exactly n contiguous clusters, for tables that are one piece. The caller writes all of
// them, and links them or gives them back.
func (a *allocator) contiguous(n int64) (freeRun, error) {
	hint := a.hint
	defer func() { a.hint = hint }()
	for {
		start, got, err := a.described(n)
		if err != nil {
			return freeRun{}, err
		}
		if got == n {
			return a.setAside(start, n)
		}
		a.hint = start + hostCluster(got)
	}
}

// setAside takes a run of free clusters for a use to come, and counts it if the policy wants that now. The file
// is made to reach over it.
func (a *allocator) setAside(start hostCluster, n int64) (freeRun, error) {
	end := start + hostCluster(n)
	if err := a.extend(int64(a.geo.offsetOf(end))); err != nil {
		return freeRun{}, err
	}
	for c := start; c < end; c++ {
		if a.policy == countAtLink {
			a.busy[c] = struct{}{}
		} else if err := a.refs.set(c, 1); err != nil {
			return freeRun{}, err
		}
	}
	return freeRun{start: start, n: n, raised: a.policy != countAtLink, ready: a.im.gen, zeroed: never}, nil
}

// lower takes one reference from a cluster and tells whether it was the last.
func (a *allocator) lower(c hostCluster) (last bool, err error) {
	v, err := a.refs.get(c)
	if err != nil {
		return false, err
	}
	if v == 0 {
		return false, a.im.corrupt(fmt.Sprintf("reference count of cluster %d", c), "0", "1 or more, because something referred to it")
	}
	if v == 1 {
		if err := a.checkUnused(c); err != nil {
			return false, err
		}
	}
	return v == 1, a.refs.set(c, v-1)
}

// checkUnused refuses to give up a cluster that holds metadata: an entry that designated it is damaged.
func (a *allocator) checkUnused(c hostCluster) error {
	if !a.im.guard.view.Load().overlaps(c, c) {
		return nil
	}
	return a.im.fail(a.im.corrupt(fmt.Sprintf("the last reference to cluster %d", c), "an entry that is given up, metadata there", "metadata or data"))
}

// release lowers the counts of clusters that a durable update released. Under countAhead, clusters that lose
// their last reference go to the reserve while there is room, and their counts stay as they are.
func (a *allocator) release(r hostRun) error {
	for c := r.start; c < r.start+hostCluster(r.n); c++ {
		if a.policy == countAhead && a.wanted(c) {
			if v, err := a.refs.get(c); err != nil {
				return err
			} else if v == 1 {
				if err := a.checkUnused(c); err != nil {
					return err
				}
				if a.inReserve(c) {
					return a.im.corrupt(fmt.Sprintf("cluster %d", c), "two entries that own it", "one owner")
				}
				a.packer.leave(a.geo, c)
				a.put(freeRun{start: c, n: 1, raised: true, zeroed: a.punch(c, r.punch)})
				continue
			}
		}
		last, err := a.lower(c)
		if err != nil {
			return err
		}
		if last {
			a.recycle(c, r.punch)
		}
	}
	return nil
}

// inReserve reports whether a cluster is in the reserve already: then more entries than its count said owned it.
func (a *allocator) inReserve(c hostCluster) bool {
	return slices.ContainsFunc(a.reserve, func(r freeRun) bool { return r.start <= c && c < r.start+hostCluster(r.n) })
}

// wanted reports whether the reserve has room for a cluster that is being given up.
func (a *allocator) wanted(c hostCluster) bool {
	return a.policy != countExact && a.reserved < a.maxBatch && !a.packer.pending(c)
}

// recycle makes a cluster that lost its last reference available again; the update that released it is
// durable.
func (a *allocator) recycle(c hostCluster, punch bool) {
	if a.packer.pending(c) {
		a.keep(c) // another stream is on its way there
		return
	}
	a.packer.leave(a.geo, c)
	zeroed := a.punch(c, punch)
	if a.policy == countAtLink && a.wanted(c) {
		a.busy[c] = struct{}{}
		a.put(freeRun{start: c, n: 1, zeroed: zeroed})
		return
	}
	delete(a.busy, c)
	a.hint = min(a.hint, c)
}

// punch gives the space of an unreachable cluster back if that is wanted; it tells since when the cluster
// reads as zeros. A file that cannot do it keeps the space, which loses nothing.
func (a *allocator) punch(c hostCluster, wanted bool) generation {
	at := int64(a.geo.offsetOf(c))
	if !wanted || a.file.PunchHole(at, min(a.geo.clusterSize, max(a.end.Load()-at, 0))) != nil {
		return never
	}
	a.im.wrote()
	return a.im.gen
}

// returnReserve lowers the counts of everything that was raised and never used.
func (a *allocator) returnReserve() error {
	for _, r := range a.reserve {
		for c := r.start; c < r.start+hostCluster(r.n); c++ {
			delete(a.busy, c)
			if !r.raised {
				continue
			}
			if err := a.refs.set(c, 0); err != nil {
				return err
			}
		}
		a.hint = min(a.hint, r.start)
	}
	a.reserve, a.reserved = nil, 0
	return nil
}

// restart forgets what was set aside: the counts say that it is free. Nothing is in use but tables.
func (a *allocator) restart() {
	a.reserve, a.reserved, a.hint = nil, 0, 0
	clear(a.busy)
	a.packer.next = 0
}

// trim cuts off what the file was extended by in this session, or holds since the image was emptied or its disk became
// smaller, and does not need: free clusters, and refcount blocks that count nothing but themselves. The counts of the
// clusters that it cuts off are durably 0.
func (a *allocator) trim() error {
	c := a.fileClusters()
	var idle []int64 // blocks that go
	for c > 0 && int64(a.geo.offsetOf(c)) > a.atEnd {
		if !a.refs.hasBlock(c - 1) { // nothing is counted from the start of that block on
			_, index := a.refs.blockOf(c - 1)
			c -= hostCluster(index) + 1
			continue
		}
		free, err := a.free(c - 1)
		if err != nil {
			return err
		}
		if !free {
			b, _ := a.refs.blockOf(c - 1)
			if only, err := a.refs.countsOnlyItself(b, c-1); err != nil {
				return err
			} else if !only {
				break
			}
			idle = append(idle, b)
		}
		c--
	}
	end := max(int64(a.geo.offsetOf(c)), a.atEnd)
	if end >= a.end.Load() {
		return nil
	}
	if err := a.dropBlocks(idle); err != nil {
		return err
	}
	if err := a.file.Truncate(end); errors.Is(err, errors.ErrUnsupported) {
		return nil // a block device keeps its size
	} else if err != nil {
		return fmt.Errorf("%s: truncating to %d bytes: %w", a.file.Name(), end, err)
	}
	a.end.Store(end)
	return nil
}

// dropBlocks durably takes refcount blocks out of the table that count nothing but themselves.
func (a *allocator) dropBlocks(blocks []int64) error {
	if len(blocks) == 0 {
		return nil
	}
	for _, b := range blocks {
		if err := a.im.writeMetadata(make([]byte, 8), a.refs.at+hostOff(b*8)); err != nil {
			return err
		}
		a.im.guard.remove(a.geo.clusterOf(hostOff(a.refs.table[b] &^ 511)))
		a.refs.drop(b)
	}
	return a.im.syncFiles()
}

// ensureBlocks makes the refcount blocks that a run of free clusters lacks and reports whether it made any.
// A new block lies in the first cluster of the run that it counts, so it describes itself, and is durable
// before the table points to it (specification section 18.9).
func (a *allocator) ensureBlocks(start hostCluster, n int64) (bool, error) {
	first, _ := a.refs.blockOf(start)
	last, _ := a.refs.blockOf(start + hostCluster(n-1))
	if last >= int64(len(a.refs.table)) {
		return true, a.growTable(last + 1)
	}
	table := a.refs.table
	made := false
	for b := first; b <= last; b++ {
		if table[b]&^511 == 0 {
			at := max(start, hostCluster(b*a.geo.refPerBlock))
			if err := a.newBlock(b, at, at, at+1); err != nil {
				return false, err
			}
			made = true
		}
	}
	if !made {
		return false, nil
	}
	var words []tableWord
	for b := first; b <= last; b++ {
		if table[b]&^511 == 0 {
			at := max(start, hostCluster(b*a.geo.refPerBlock))
			table[b] = uint64(a.geo.offsetOf(at))
			words = append(words, tableWord{a.refs.at + hostOff(b*8), table[b]})
			a.im.guard.add(at)
		}
	}
	return true, a.im.discipline.publishBlocks(words)
}

// newBlock writes a new refcount block with index b to the cluster at; it counts [from, to) as used once, as
// far as they are its own.
func (a *allocator) newBlock(b int64, at, from, to hostCluster) error {
	if err := a.extend(int64(a.geo.offsetOf(at + 1))); err != nil {
		return err
	}
	buf := make([]byte, a.geo.clusterSize)
	base := hostCluster(b * a.geo.refPerBlock)
	for c := max(from, base); c < min(to, base+hostCluster(a.geo.refPerBlock)); c++ {
		setRefcount(buf, a.geo.refOrder, int(c-base), 1)
	}
	return a.im.writeFresh(buf, a.geo.offsetOf(at))
}

// growTable moves the refcount table to a larger place that lies, together with the blocks that count it,
// past everything the old table can describe (specification section 18.10).
func (a *allocator) growTable(need int64) error {
	old, oldAt := a.refs.table, a.refs.at
	perCluster := a.geo.clusterSize / 8
	start := max(a.fileClusters(), hostCluster(int64(len(old))*a.geo.refPerBlock))
	firstBlock, _ := a.refs.blockOf(start)
	// The blocks count the table and themselves: enlarge both until they agree.
	var blocks, clusters int64
	for {
		last, _ := a.refs.blockOf(start + hostCluster(max(blocks+clusters, 1)-1))
		entries := max(need, last+1, int64(len(old))*3/2)
		b, t := last-firstBlock+1, (entries+perCluster-1)/perCluster
		if b == blocks && t == clusters {
			break
		}
		blocks, clusters = b, t
	}
	if clusters*a.geo.clusterSize > maxRefcountTableBytes {
		return fmt.Errorf("%s: %w", a.file.Name(), errImageFull)
	}
	end := start + hostCluster(blocks+clusters)
	table := make([]uint64, clusters*perCluster)
	copy(table, old)
	for i := range blocks {
		at := start + hostCluster(i)
		if err := a.newBlock(firstBlock+i, at, start, end); err != nil {
			return err
		}
		table[firstBlock+i] = uint64(a.geo.offsetOf(at))
	}
	raw := make([]byte, 0, len(table)*8)
	for _, e := range table {
		raw = binary.BigEndian.AppendUint64(raw, e)
	}
	tableAt := a.geo.offsetOf(start + hostCluster(blocks))
	if err := a.extend(int64(a.geo.offsetOf(end))); err != nil {
		return err
	}
	if err := a.im.writeFresh(raw, tableAt); err != nil {
		return err
	}
	h := a.im.header
	h.RefcountTableOffset, h.RefcountTableClusters = uint64(tableAt), uint32(clusters)
	a.refs.table, a.refs.at = table, tableAt
	for i := range blocks {
		a.im.guard.add(start + hostCluster(i))
	}
	a.im.guard.place(a.im)
	return a.im.discipline.changeHeader(fieldRefcountTable, []hostRun{{
		start: a.geo.clusterOf(oldAt), n: a.geo.clustersFor(int64(len(old)) * 8), table: true,
	}})
}
