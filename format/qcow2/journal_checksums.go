package qcow2

import (
	"hash/crc32"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/platter-disk/platter/storage"
)

// Data checksums (Options.JournalDataChecksums) save the barrier between data and the transaction that exposes
// it. The transaction says what the data is, and counts after a crash only if the data is there: then one
// barrier makes both durable.
//
// What goes wrong without care is an overwrite in place: the transaction is durable, the data changes, and
// after a crash it looks as if the transaction had never been completed. Hence the rule: data that a checksum
// covers is not overwritten before it is known on the disk that the transaction was durable. The header of
// every later block says so (durable_lsn), and from then on nobody looks at the checksum. So only the newest
// transaction is ever in doubt, and only an overwrite of what the newest transaction exposed has to wait; one
// block and one barrier end its wait, the barrier that was saved before.
//
// Clusters that are given up need no care: they are used again when the transaction that released them is
// durable, and that one is later.
type dataChecksums struct {
	n atomic.Int64 // clusters in the sets below

	mu sync.Mutex // below Image.mu
	// pending holds the clusters that the transaction being collected is to have checksums of, and when their
	// contents were written.
	pending map[hostCluster]generation
	// unproven holds the clusters whose checksum is, or is about to be, in the log, and the number of their
	// transaction.
	unproven map[hostCluster]uint64
}

// maxSummedBytes bounds the data that a transaction has checksums of: what a commit, and a recovery, reads
// again. Of more data the barrier is the smaller part.
const maxSummedBytes = 4 << 20

func newDataChecksums() *dataChecksums {
	return &dataChecksums{pending: map[hostCluster]generation{}, unproven: map[hostCluster]uint64{}}
}

// counted updates n. The caller holds mu.
func (c *dataChecksums) counted() { c.n.Store(int64(len(c.pending) + len(c.unproven))) }

// cover notes clusters that an update links to words of L2 tables instead of owing a barrier to them. ok is
// false if the barrier is owed all the same. The caller holds Image.mu.
func (d *journal) cover(u *update) (ok bool) {
	c, g := d.sums, &d.im.geo
	if c == nil || d.need >= d.im.durable {
		return false // there is a barrier anyway
	}
	if u.slice == nil || len(u.uses) == 0 || u.compressed(g) {
		return false // tables change in place, and streams share their clusters with others
	}
	e := d.region()
	most := int(min(maxSummedBytes>>g.clusterBits, int64(e.ringBlocks()/8)*(e.blockSize()-ringHeaderSize)/sumBytes))
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.counted()
	for _, r := range u.uses {
		if d.tx.covered+int(r.n) > most {
			return false
		}
		for k := range hostCluster(r.n) {
			c.pending[r.start+k] = u.exposes
		}
		d.tx.covered += int(r.n)
	}
	return true
}

// compressed reports whether an update links compressed clusters.
func (u *update) compressed(g *geometry) bool {
	for i := 0; i < len(u.words); i += int(g.entryWords) {
		if l2Entry(u.words[i]).compressed() {
			return true
		}
	}
	return false
}

// uncover has a transaction owe a barrier for a cluster rather than have its checksum. The caller holds Image.mu.
func (d *journal) uncover(cluster hostCluster) {
	c := d.sums
	if c == nil || c.n.Load() == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	d.need = max(d.need, c.pending[cluster])
	delete(c.pending, cluster)
	c.counted()
}

// sealSums ends the collecting for the transaction with a number. From now on the clusters that it has checksums
// of are not overwritten before it is proven; their ranges are returned. Without wanted they are forgotten, and
// owed tells that a barrier has to take the place of the checksums. The caller holds Image.mu and commits.
func (d *journal) sealSums(number uint64, wanted bool) (sums []dataSum, owed bool) {
	c := d.sums
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.counted()
	var clusters []hostCluster
	for cluster, written := range c.pending {
		if written < d.im.durable {
			continue // a barrier came by
		}
		owed = true
		if wanted {
			clusters = append(clusters, cluster)
			c.unproven[cluster] = number
		}
	}
	clear(c.pending)
	return sumRanges(clusters, &d.im.geo), owed && !wanted
}

// sumRanges makes ranges of clusters, joined where they are neighbours.
func sumRanges(clusters []hostCluster, g *geometry) (sums []dataSum) {
	const most = 1 << 20 // bytes of a joined range
	slices.Sort(clusters)
	for _, cluster := range clusters {
		at := uint64(g.offsetOf(cluster))
		if k := len(sums) - 1; k >= 0 && sums[k].at+sums[k].n == at && sums[k].n < most {
			sums[k].n += uint64(g.clusterSize)
			continue
		}
		sums = append(sums, dataSum{at: at, n: uint64(g.clusterSize)})
	}
	return sums
}

// compute fills in the checksums of ranges that nobody overwrites meanwhile.
func (d *journal) compute(sums []dataSum) error {
	var buf []byte
	for i := range sums {
		s := &sums[i]
		buf = slices.Grow(buf[:0], int(s.n))[:s.n]
		if err := storage.ReadFull(d.im.data, buf, int64(s.at)); err != nil {
			return err
		}
		s.sum = crc32.Checksum(buf, castagnoli)
	}
	return nil
}

// proved forgets the clusters of transactions before the one with a number, whose blocks are durable and say that
// those were.
func (d *journal) proved(number uint64) {
	c := d.sums
	if c == nil || c.n.Load() == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.counted()
	for cluster, of := range c.unproven {
		if of < number {
			delete(c.unproven, cluster)
		}
	}
}

// inDoubt reports whether a transaction is in the log whose data nobody may overwrite.
func (d *journal) inDoubt() bool {
	c := d.sums
	if c == nil || c.n.Load() == 0 {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.unproven) > 0
}

// find looks for clusters of a range of the file in the sets.
func (c *dataChecksums) find(g *geometry, at hostOff, n int64) (pending, unproven bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for cluster := g.clusterOf(at); cluster <= g.clusterOf(at+hostOff(n)-1); cluster++ {
		_, p := c.pending[cluster]
		_, u := c.unproven[cluster]
		pending, unproven = pending || p, unproven || u
	}
	return pending, unproven
}

// beforeOverwrite returns when guest data in a range of the file may change. The caller holds the guest range, so
// that no cluster of it is linked meanwhile, and no lock.
func (d *journal) beforeOverwrite(at hostOff, n int64) error {
	c, im := d.sums, d.im
	for c.n.Load() > 0 && n > 0 {
		pending, unproven := c.find(&im.geo, at, n)
		if pending {
			im.mu.Lock()
			for cluster := im.geo.clusterOf(at); cluster <= im.geo.clusterOf(at+hostOff(n)-1); cluster++ {
				d.uncover(cluster)
			}
			im.mu.Unlock()
			continue // or it has been sealed meanwhile
		}
		if !unproven || im.opts.Mutant == MutantOverwriteEarly {
			return nil
		}
		d.commits.Lock()
		var err error
		if _, unproven = c.find(&im.geo, at, n); unproven {
			err = d.prove() // else a commit did meanwhile
		}
		d.commits.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// prove makes it durable that the newest transaction was, by an empty one. What is being collected goes on being
// collected: no other transaction comes to be in doubt, so that a guest that does not flush does not wait
// again. The caller holds commits.
func (d *journal) prove() error {
	im := d.im
	if err := im.failed(); err != nil {
		return err
	}
	im.mu.Lock()
	d.awaitRoom()
	d.advanceTail()
	im.gen++
	now := im.gen
	im.mu.Unlock()
	if err := d.append(newTransaction()); err != nil {
		return err
	}
	if err := im.barrier(now); err != nil {
		return err
	}
	d.durable = d.head
	d.proved(d.nextTx - 1)
	return nil
}
