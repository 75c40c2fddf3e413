package qcow2

import (
	"encoding/binary"
	"fmt"
	"sync"
	"time"
)

// journal writes every change of metadata to a log first and to its place later (docs/qcow2-journal.md).
//
//	flush:       data, new tables | barrier, if a transaction refers to them | log blocks | barrier
//	             data | log blocks with its checksums | barrier, with Options.JournalDataChecksums
//	checkpoint:  log blocks durable | tables in place | barrier | superblock with the new tail
//
// A transaction is everything that was accepted between two commits. It counts whole or not at all, and
// counts are raised and lowered by the update that links and unlinks, so a crash leaks nothing. A clean close
// checkpoints and removes the journal: what is left is a plain qcow2 image.
type journal struct {
	im      *Image
	commits combiner
	sums    *dataChecksums // nil: a barrier comes between data and what exposes it

	// Guarded by Image.mu: the transaction that is being collected.
	tx    *transaction
	op    operation  // the long operation that is under way
	need  generation // barrier that it owes
	freed []hostRun  // clusters that it freed
	idle  commitTimer

	logged      uint64             // file size in bytes that the log knows of
	tableDirty  map[hostOff]uint64 // words of the refcount table that are not in their place
	headerDirty bool
	stamp       generation // when the newest superblock was written
	newTail     uint64     // and the tail in it

	// Guarded by commits: the session.
	live      bool
	ext       JournalExtension
	super     superblock // newest written
	head      uint64     // next lsn
	began     uint64     // head when the newest checkpoint began
	changes   int        // words and revokes logged since then: sectors that a replay changes, at most
	tail      uint64     // of the newest superblock that is known to be durable
	durable   uint64     // every block with a smaller lsn is durable
	nextTx    uint64
	inPlace   sync.WaitGroup // a checkpoint in the background
	running   bool           // one is under way; guarded by Image.mu
	delayed   func()         // a checkpoint that MutantRingEarly holds back; guarded by commits
	postponed []hostRun      // table clusters freed while it is; guarded by Image.mu
}

func newJournal(im *Image) (*journal, error) {
	if im.header.Version < 3 {
		return nil, fmt.Errorf("%s: discipline %q needs an incompatible feature bit of version 3; the image has version %d", im.file.Name(), Journal, im.header.Version)
	}
	d := &journal{im: im, tx: newTransaction(), idle: newCommitTimer(&im.opts), tableDirty: map[hostOff]uint64{}}
	if im.opts.JournalDataChecksums {
		d.sums = newDataChecksums()
		im.beforeOverwrite = d.beforeOverwrite
	}
	if j := im.header.Journal; j != nil {
		d.ext = *j
	} else {
		d.ext.BlockOrder = min(defaultBlockOrder, im.header.ClusterBits)
	}
	if im.header.Incompatible&IncompatJournal == 0 { // a session that is resumed leaves the header alone
		old, err := im.readHeaderCluster()
		if err == nil {
			err = d.headerHasRoom(old, im.header)
		}
		if err != nil {
			return nil, fmt.Errorf("discipline %q: no room for its header extension: %w", Journal, err)
		}
	}
	if im.opts.JournalSize > 0 {
		d.ext.PreferredSize = uint64(min(max(im.opts.JournalSize, minJournalBlocks<<d.ext.BlockOrder), maxJournalBytes))
	}
	im.alloc.policy = countAtLink
	im.alloc.refs.log = d.log
	return d, nil
}

func newTransaction() *transaction { return &transaction{words: map[hostOff]uint64{}} }

// log notes the newest value of a metadata word. The caller holds Image.mu.
func (d *journal) log(at hostOff, word uint64) { d.tx.words[at] = word }

func (d *journal) accept(u *update) error {
	im := d.im
	// Growth of the file needs no waiting for: the transaction says how long the file has to be.
	_, err := im.linkUses(u)
	if err != nil {
		return err
	}
	im.changeWords(u)
	d.changed()
	at := im.l1.Load().at
	if u.slice != nil {
		at = hostOff(u.slice.where.Load())
	}
	for i, w := range u.words {
		d.log(at+hostOff((u.first+int64(i))*8), w)
	}
	if u.exposes < im.durable || !d.cover(u) {
		d.need = max(d.need, u.exposes)
	}
	return d.release(u.releases)
}

// release lowers counts as part of the transaction. What it frees stays busy until the transaction is durable.
func (d *journal) release(runs []hostRun) error {
	a := d.im.alloc
	for _, r := range runs {
		for c := r.start; c < r.start+hostCluster(r.n); c++ {
			d.uncover(c)
			last, err := a.lower(c)
			if err != nil {
				return err
			}
			if !last {
				continue
			}
			if d.im.opts.Mutant == MutantJournalReuse {
				a.recycle(c, r.punch)
				continue
			}
			if a.packer.pending(c) {
				a.keep(c) // once that is linked, this transaction frees nothing
				continue
			}
			a.busy[c] = struct{}{}
			one := hostRun{start: c, n: 1, punch: r.punch, table: r.table}
			d.freed = append(d.freed, one)
			if r.table {
				d.forgetTable(c)
				d.tx.revokes = append(d.tx.revokes, one)
			}
		}
	}
	return nil
}

// forgetTable drops changes of a table that is not in use any more, so that nobody writes them to a cluster
// that may hold something else by then.
func (d *journal) forgetTable(c hostCluster) {
	im := d.im
	from, to := im.geo.offsetOf(c), im.geo.offsetOf(c+1)
	im.dropTable(from)
	for at := range d.tx.words {
		if at >= from && at < to {
			delete(d.tx.words, at)
		}
	}
	for at := range d.tableDirty {
		if at >= from && at < to {
			delete(d.tableDirty, at)
		}
	}
}

func (d *journal) publishBlocks(words []tableWord) error {
	for _, t := range words {
		d.log(t.at, t.word)
		d.tableDirty[t.at] = t.word
	}
	d.need = max(d.need, d.im.gen)
	return nil
}

func (d *journal) changeHeader(f headerField, releases []hostRun) error {
	raw := make([]byte, headerLengthOut)
	d.im.header.encodeFields(raw)
	for at := f.from &^ 7; at < f.to; at += 8 {
		d.log(hostOff(at), binary.BigEndian.Uint64(raw[at:]))
	}
	d.headerDirty = true
	d.changed()
	d.need = max(d.need, d.im.gen)
	return d.release(releases)
}

// progress makes the state of a long operation part of the transaction. The table that it names was written past
// the journal.
func (d *journal) progress(o operation) {
	d.op = o
	state := o.encode()
	d.tx.opstate = &state
	d.need = max(d.need, d.im.gen)
}

// full keeps a transaction, and what one request may still add to it, far below what the ring and a replay can
// hold.
func (d *journal) full() bool {
	e := d.region()
	return d.tx.bound(int(e.blockSize())) > e.ringBlocks()/8 || len(d.tx.words)+len(d.tx.revokes) > e.replaySectors()/8
}

// settle commits a transaction that has become large, and writes tables to their places when they crowd the
// cache.
func (d *journal) settle() error {
	im := d.im
	im.mu.Lock()
	large := d.full() || int64(len(d.freed)) > im.alloc.maxBatch
	crowded := int64(len(im.dirtySlices))*im.tables.bytes > im.tables.capacity()*3/4
	im.mu.Unlock()
	switch {
	case crowded:
		return d.writeback()
	case large:
		return d.flush()
	}
	return nil
}

// settleCounts has nothing to do: counts become durable with what relies on them.
func (d *journal) settleCounts() error { return nil }

func (d *journal) flush() error {
	return d.commits.flush(func() error { return d.commit(false) })
}

// writeback commits and waits until every table is in its place.
func (d *journal) writeback() error {
	d.commits.Lock()
	defer d.commits.Unlock()
	return d.checkpointNow()
}

func (d *journal) quiesced(fn func() error) error {
	d.commits.Lock()
	defer d.commits.Unlock()
	if err := d.checkpointNow(); err != nil {
		return err
	}
	d.im.mu.Lock()
	defer d.im.mu.Unlock()
	return fn()
}

func (d *journal) checkpointNow() error {
	d.inPlace.Wait()
	if err := d.commit(true); err != nil {
		return err
	}
	if d.delayed != nil {
		d.inPlace.Go(d.delayed)
		d.delayed = nil
	}
	d.inPlace.Wait()
	return d.im.failed()
}

// commit makes the transaction durable, and starts a checkpoint if one is asked for or the ring is half full. The
// caller holds commits.
func (d *journal) commit(checkpoint bool) error {
	im := d.im
	if err := im.failed(); err != nil {
		return err
	}
	c, err := d.seal(checkpoint)
	if err != nil {
		return err
	}
	if c.places != nil && im.opts.Mutant == MutantNoWAL {
		if err := im.writeBatch(&c.places.writes); err != nil {
			return err
		}
	}
	if c.barrier || d.compute(c.tx.sums) != nil {
		c.tx.sums = nil
		if err := im.barrier(c.began); err != nil {
			return err
		}
	}
	if c.record {
		if err := d.append(c.tx); err != nil {
			return err
		}
	}
	if err := im.barrier(c.began); err != nil {
		return err
	}
	d.durable = d.head
	if c.record {
		d.proved(d.nextTx - 1)
	}
	d.recycle(c.freed)
	if d.inDoubt() {
		im.mu.Lock()
		d.changed()
		im.mu.Unlock()
	}
	if c.places != nil {
		head, tx := d.head, d.nextTx
		d.began, d.changes = head, 0
		run := func() { d.checkpoint(c.places, head, tx) }
		if im.opts.Mutant == MutantRingEarly {
			d.delayed = run // the wrong order shows only if the ring is full when the checkpoint ends
			return nil
		}
		d.inPlace.Go(run)
	}
	return nil
}

// sealed is a transaction that takes nothing more, with what goes with it.
type sealed struct {
	tx      *transaction
	freed   []hostRun
	began   generation  // everything before it is in the transaction
	record  bool        // it goes to the log
	barrier bool        // after a barrier
	places  *tableState // a checkpoint is to follow; nil: none
}

// seal ends the transaction that is being collected and begins the next one.
func (d *journal) seal(checkpoint bool) (c sealed, err error) {
	im := d.im
	im.mu.Lock()
	defer im.mu.Unlock()
	d.awaitRoom()
	if err := d.prepare(); err != nil {
		return c, err
	}
	if end := uint64(im.alloc.end.Load()); !d.tx.empty() && end > d.logged {
		d.tx.size, d.logged = end, end
	}
	c.tx, c.freed = d.tx, d.freed
	d.advanceTail()
	checkpoint = checkpoint || im.opts.Mutant == MutantNoWAL || d.crowded(d.head-d.tail)
	if d.live && !d.running && checkpoint {
		c.places = d.collect()
	}
	c.record = !c.tx.empty() || c.places != nil && d.inDoubt()
	c.barrier = !c.tx.empty() && d.need >= im.durable && im.opts.Mutant != MutantNoB1
	if d.sums != nil {
		// What a checkpoint copies must not be in doubt, and where there is a barrier nothing needs a checksum.
		sums, owed := d.sealSums(d.nextTx, !c.barrier && c.places == nil)
		c.tx.sums, c.barrier = sums, c.barrier || owed
	}
	d.changes += len(c.tx.words) + len(c.tx.revokes)
	d.tx, d.need, d.freed, d.idle.oldest = newTransaction(), 0, nil, time.Time{}
	im.gen++
	c.began = im.gen
	return c, nil
}

// prepare sets clusters aside for what comes and, for the first transaction, begins the session. Where that
// fails for want of space the transaction stays, and the next commit tries again. The caller holds Image.mu.
func (d *journal) prepare() error {
	d.im.alloc.topUp()
	if err := d.im.failed(); err != nil {
		return err
	}
	if d.tx.empty() || d.live {
		return nil
	}
	return d.begin()
}

// crowded reports whether the transaction that is being collected fills half the ring, of which a number of blocks
// are in use, or half of what a replay is to take. Checkpoints start then, early enough that commits go on while
// they run. The caller holds commits and Image.mu.
func (d *journal) crowded(blocks uint64) bool {
	return blocks+d.tx.bound(int(d.ext.blockSize())) > d.ext.ringBlocks()/2 ||
		d.changes+len(d.tx.words)+len(d.tx.revokes) > d.ext.replaySectors()/4
}

// awaitRoom waits for a checkpoint that the ring has little room left for. Half of it has to be free when the next
// one begins: what is in use then stays in use until that one has ended. The caller holds commits and Image.mu,
// which is given up meanwhile.
func (d *journal) awaitRoom() {
	if d.running && d.crowded(d.head-d.began) {
		d.im.mu.Unlock()
		d.inPlace.Wait()
		d.im.mu.Lock()
	}
}

// recycle makes clusters available that a durable transaction freed. A checkpoint that is under way may still
// write the old contents of a table, so tables wait for its end.
func (d *journal) recycle(freed []hostRun) {
	im := d.im
	im.mu.Lock()
	defer im.mu.Unlock()
	for _, r := range freed {
		if r.table && d.running {
			d.postponed = append(d.postponed, r)
			continue
		}
		im.alloc.recycle(r.start, r.punch)
	}
}

// advanceTail frees the ring up to the tail of the newest superblock, once that is durable. The caller holds
// commits and Image.mu.
func (d *journal) advanceTail() {
	if d.newTail > d.tail && (d.stamp < d.im.durable || d.delayed != nil) {
		d.tail = d.newTail
	}
}

// append writes a transaction to the ring.
func (d *journal) append(tx *transaction) error {
	w := tx.pack(int(d.ext.blockSize()), d.im.geo.clusterBits)
	n := uint64(len(w.blocks))
	if n > maxRingTxBlocks || n > d.ext.ringBlocks()/2 {
		return d.im.fail(fmt.Errorf("a transaction of %d blocks does not fit a journal of %d", n, d.ext.ringBlocks()))
	}
	if d.head+n-d.tail > d.ext.ringBlocks() {
		if err := d.makeRoom(); err != nil {
			return err
		}
	}
	for i, b := range w.blocks {
		h := ringHeader{
			session: d.super.session, lsn: d.head + uint64(i), tx: d.nextTx,
			index: uint16(i), count: uint16(n), used: uint32(w.used[i] - ringHeaderSize), durable: d.durable,
		}
		h.seal(b)
	}
	if err := d.writeRing(w.blocks); err != nil {
		return err
	}
	d.head += n
	d.nextTx++
	return nil
}

// writeRing writes consecutive blocks, in one write or, around the end of the ring, two.
func (d *journal) writeRing(blocks [][]byte) error {
	for lsn := d.head; len(blocks) > 0; {
		index := lsn % d.ext.ringBlocks()
		n := min(uint64(len(blocks)), d.ext.ringBlocks()-index)
		var joined []byte
		for _, b := range blocks[:n] {
			joined = append(joined, b...)
		}
		at := hostOff(d.ext.Offset + (2+index)<<d.ext.BlockOrder)
		if err := d.im.writeMetadata(joined, at); err != nil {
			return err
		}
		blocks, lsn = blocks[n:], lsn+n
	}
	return nil
}

// makeRoom waits for the checkpoint that is under way and makes its superblock durable.
func (d *journal) makeRoom() error {
	d.inPlace.Wait()
	im := d.im
	if d.delayed != nil {
		d.delayed()
	}
	im.mu.Lock()
	if d.delayed != nil {
		d.advanceTail()
		d.delayed = nil
		im.mu.Unlock()
		return im.failed()
	}
	im.gen++
	now := im.gen
	im.mu.Unlock()
	if err := im.barrier(now); err != nil {
		return err
	}
	im.mu.Lock()
	d.advanceTail()
	im.mu.Unlock()
	return im.failed()
}
