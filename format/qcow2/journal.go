package qcow2

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"sync"
)

// journal writes every change of metadata to a log first and to its place later (docs/qcow2-journal.md).
//
//	flush:       data, new tables | barrier, if a transaction refers to them | log blocks | barrier
//	checkpoint:  log blocks durable | tables in place | barrier | superblock with the new tail
//
// A transaction is everything that was accepted between two commits. It counts whole or not at all, and
// counts are raised and lowered by the update that links and unlinks, so a crash leaks nothing. A clean close
// checkpoints and removes the journal: what is left is a plain qcow2 image.
type journal struct {
	im      *Image
	commits combiner

	// Guarded by Image.mu: the transaction that is being collected.
	tx    *transaction
	op    operation  // the long operation that is under way
	need  generation // barrier that it owes
	freed []hostRun  // clusters that it freed

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
	d := &journal{im: im, tx: newTransaction(), tableDirty: map[hostOff]uint64{}}
	if j := im.header.Journal; j != nil {
		d.ext = *j
	} else {
		d.ext.BlockOrder = min(defaultBlockOrder, im.header.ClusterBits)
		h := *im.header
		h.Journal = &d.ext
		if _, err := h.Encode(); err != nil {
			return nil, fmt.Errorf("%s: discipline %q: no room for its header extension: %w", im.file.Name(), Journal, err)
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
	at := im.l1.Load().at
	if u.slice != nil {
		at = hostOff(u.slice.where.Load())
	}
	for i, w := range u.words {
		d.log(at+hostOff((u.first+int64(i))*8), w)
	}
	d.need = max(d.need, u.exposes)
	return d.release(u.releases)
}

// release lowers counts as part of the transaction. What it frees stays busy until the transaction is durable.
func (d *journal) release(runs []hostRun) error {
	a := d.im.alloc
	for _, r := range runs {
		for c := r.start; c < r.start+hostCluster(r.n); c++ {
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

// full keeps a transaction, and what one request may still add to it, far below what the ring can hold.
func (d *journal) full() bool { return d.tx.bound(int(d.ext.blockSize())) > d.ringBlocks()/8 }

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

// ringBlocks is the size of the ring, or what it is going to be.
func (d *journal) ringBlocks() uint64 {
	e := d.ext
	if e.Size == 0 {
		e.Size = uint64(d.regionSize())
	}
	return e.ringBlocks()
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

// commit makes the transaction durable, and starts a checkpoint if one is asked for or the ring is half full.
// The caller holds commits.
func (d *journal) commit(checkpoint bool) error {
	im := d.im
	if err := im.failed(); err != nil {
		return err
	}
	im.mu.Lock()
	if d.running && d.head-d.began+d.tx.bound(int(d.ext.blockSize())) > d.ext.ringBlocks()/2 {
		// Half the ring has to be free when the next checkpoint begins: what is in use then stays in use until
		// that one has ended.
		im.mu.Unlock()
		d.inPlace.Wait()
		im.mu.Lock()
	}
	if err := d.prepare(); err != nil {
		im.mu.Unlock()
		return err
	}
	if end := uint64(im.alloc.end.Load()); !d.tx.empty() && end > d.logged {
		d.tx.size, d.logged = end, end
	}
	tx, need, freed := d.tx, d.need, d.freed
	d.tx, d.need, d.freed = newTransaction(), 0, nil
	d.advanceTail()
	used := d.head - d.tail + tx.bound(int(d.ext.blockSize()))
	var places *tableState
	if d.live && !d.running && (checkpoint || used > d.checkpointAt()) {
		places = d.collect()
	}
	im.gen++
	now := im.gen
	reached := im.durable
	im.mu.Unlock()

	if places != nil && im.opts.Mutant == MutantNoWAL {
		if err := im.writeBatch(&places.writes); err != nil {
			return err
		}
	}
	if !tx.empty() {
		if need >= reached && im.opts.Mutant != MutantNoB1 {
			if err := im.barrier(now); err != nil {
				return err
			}
		}
		if err := d.append(tx); err != nil {
			return err
		}
	}
	if err := im.barrier(now); err != nil {
		return err
	}
	d.durable = d.head
	d.recycle(freed)
	if places != nil {
		head, tx := d.head, d.nextTx
		d.began = head
		run := func() { d.checkpoint(places, head, tx) }
		if im.opts.Mutant == MutantRingEarly {
			d.delayed = run // the wrong order shows only if the ring is full when the checkpoint ends
			return nil
		}
		d.inPlace.Go(run)
	}
	return nil
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

// checkpointAt is the number of blocks in use at which a checkpoint starts: early enough that commits go on
// while it runs.
func (d *journal) checkpointAt() uint64 {
	if d.im.opts.Mutant == MutantNoWAL {
		return 0
	}
	return d.ext.ringBlocks() / 2
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

// tableState is what is to be written to its place: all changed tables as of one commit.
type tableState struct {
	writes writeBatch
	slices []*tableSlice
	op     operation // under way at that commit
}

// collect copies everything that is not in its place. The caller holds Image.mu.
func (d *journal) collect() *tableState {
	im := d.im
	c := &tableState{op: d.op}
	im.collectTables(&c.writes, &c.slices)
	im.alloc.refs.collect(&c.writes)
	for at, word := range d.tableDirty {
		c.writes.addWords(at, []uint64{word})
	}
	clear(d.tableDirty)
	if d.headerDirty {
		raw := make([]byte, headerLengthOut)
		im.header.encodeFields(raw)
		c.writes.add(hostOff(fieldSize.from), raw[fieldSize.from:fieldFeatures.from])
		d.headerDirty = false
	}
	d.running = true
	return c
}

// checkpoint writes tables to their places and then moves the tail of the journal. All their changes are
// durable in the journal below head.
func (d *journal) checkpoint(c *tableState, head, tx uint64) {
	im := d.im
	defer func() {
		im.mu.Lock()
		d.running = false
		for _, r := range d.postponed {
			im.alloc.recycle(r.start, r.punch)
		}
		d.postponed = nil
		im.mu.Unlock()
	}()
	if im.writeBatch(&c.writes) != nil {
		return // the image takes no further changes
	}
	if im.opts.Mutant != MutantNoCheckpointB && im.syncFiles() != nil {
		return
	}
	// The superblock before this one was written before that barrier: the two never fail together.
	d.super.generation++
	d.super.tail, d.super.tailTx, d.super.opstate = head, tx, c.op.encode()
	if d.writeSuper() != nil {
		return
	}
	im.mu.Lock()
	im.writtenBack(c.slices)
	im.alloc.refs.writtenBack()
	d.newTail, d.stamp = head, im.gen
	im.mu.Unlock()
}

func (d *journal) writeSuper() error {
	at := d.ext.Offset + d.super.generation%2<<d.ext.BlockOrder
	return d.im.writeMetadata(d.super.encode(), hostOff(at))
}

// regionSize is the size of the journal in bytes: what the image prefers, in whole clusters.
func (d *journal) regionSize() int64 {
	size := int64(defaultJournal)
	if d.ext.PreferredSize != 0 {
		size = int64(d.ext.PreferredSize)
	}
	size = min(max(size, minJournalBlocks<<d.ext.BlockOrder), maxJournalBytes)
	return d.im.geo.clustersFor(size) << d.im.geo.clusterBits
}

// begin starts a session: a place for the journal, its first superblock, the extension in the header, and
// then, once all that is durable, the feature bit. The caller holds commits and Image.mu.
func (d *journal) begin() error {
	im := d.im
	size := d.regionSize()
	start, err := im.alloc.freeRegion(im.geo.clusterOf(hostOff(d.ext.Offset)), size>>im.geo.clusterBits)
	if err != nil {
		return err
	}
	if err := im.alloc.extend(int64(im.geo.offsetOf(start)) + size); err != nil {
		return err
	}
	im.alloc.journal = hostRun{start: start, n: size >> im.geo.clusterBits}
	d.ext.Offset, d.ext.Size = uint64(im.geo.offsetOf(start)), uint64(size)
	if err := d.identify(d.ext.UUID[:]); err != nil {
		return err
	}
	d.super = superblock{
		uuid: d.ext.UUID, generation: 1, blocks: d.ext.ringBlocks(), blockSize: uint32(d.ext.blockSize()),
		minSize: uint64(im.alloc.end.Load()), tail: 1, tailTx: 1,
	}
	if err := d.identify(d.super.session[:]); err != nil {
		return err
	}
	d.head, d.began, d.tail, d.durable, d.nextTx = 1, 1, 1, 1, 1
	if err := im.writeMetadata(make([]byte, d.ext.blockSize()), hostOff(d.ext.Offset)); err != nil {
		return err
	}
	if err := d.writeSuper(); err != nil {
		return err
	}
	h := im.header
	h.Journal = &d.ext
	if err := im.rewriteHeader(); err != nil {
		return err
	}
	h.Incompatible |= IncompatJournal
	if err := im.switchHeader(fieldFeatures); err != nil {
		return err
	}
	d.live = true
	return nil
}

// resume starts a session in the place of one that a crash ended, with an operation under way. Everything in the
// log of that session is in its place, durably.
func (d *journal) resume(l *journalLog, o operation) error {
	im := d.im
	d.ext, d.super, d.op = l.ext, l.super, o
	if err := d.identify(d.super.session[:]); err != nil {
		return err
	}
	d.super.generation++
	d.super.tail, d.super.tailTx, d.super.opstate = l.end, l.super.tailTx+uint64(l.pending), o.encode()
	d.head, d.tail, d.durable, d.nextTx = l.end, l.end, l.end, d.super.tailTx
	d.live = true
	im.alloc.journal = hostRun{start: im.geo.clusterOf(hostOff(d.ext.Offset)), n: im.geo.clustersFor(int64(d.ext.Size))}
	if err := d.writeSuper(); err != nil {
		return err
	}
	return im.syncFiles()
}

// identify makes a random identity.
func (d *journal) identify(id []byte) error {
	if d.im.opts.Mutant == MutantSameSession {
		return nil
	}
	_, err := rand.Read(id)
	return err
}

// close checkpoints and ends the session. What is left is an ordinary image that asks to be journalled the
// next time it is opened for writing.
func (d *journal) close() error {
	im := d.im
	defer d.inPlace.Wait() // the file is about to be closed, whatever happens here
	if err := d.flush(); err != nil {
		return err
	}
	d.commits.Lock()
	defer d.commits.Unlock()
	if d.live {
		if err := d.checkpointNow(); err != nil {
			return err
		}
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	if err := im.alloc.returnReserve(); err != nil {
		return im.fail(err)
	}
	if !d.live {
		return im.alloc.trim()
	}
	im.header.Incompatible &^= IncompatJournal
	if err := im.switchHeader(fieldFeatures); err != nil {
		return err
	}
	d.live = false
	im.alloc.journal = hostRun{}
	return im.alloc.trim()
}
