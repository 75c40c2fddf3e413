package qcow2

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
