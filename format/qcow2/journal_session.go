package qcow2

import "crypto/rand"

// region is the extension with the size of the journal, or what it is going to be.
func (d *journal) region() JournalExtension {
	e := d.ext
	if e.Size == 0 {
		e.Size = uint64(d.regionSize())
	}
	return e
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
func (d *journal) begin() (err error) {
	im := d.im
	size := d.regionSize()
	start, err := im.alloc.freeRegion(im.geo.clusterOf(hostOff(d.ext.Offset)), size>>im.geo.clusterBits)
	if err != nil {
		return err
	}
	d.ext.Offset = uint64(im.geo.offsetOf(start)) // the next attempt prefers the same place, or the file grew by each
	if err := im.alloc.extend(int64(im.geo.offsetOf(start)) + size); err != nil {
		return err
	}
	if err := im.alloc.allocate(im.geo.offsetOf(start), size); err != nil {
		return err
	}
	im.alloc.journal = hostRun{start: start, n: size >> im.geo.clusterBits}
	d.ext.Size = uint64(size)
	if err := d.identify(d.ext.UUID[:]); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			im.alloc.journal = hostRun{} // the next attempt may have the same place
		}
	}()
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
	if err := im.editHeader(func(h *Header) { h.Journal = &d.ext }); err != nil {
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

// headerHasRoom returns an error unless the header cluster raw, of which h is what it says, can come to hold the
// extension of any session.
func (d *journal) headerHasRoom(raw []byte, h *Header) error {
	next, ext := *h, d.ext
	for i := range ext.UUID {
		ext.UUID[i] ^= 0xff
	}
	next.Journal = &ext
	_, err := d.im.headerSteps(raw, &next)
	return err
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
	d.stopTimer()
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
