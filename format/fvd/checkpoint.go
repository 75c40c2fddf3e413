package fvd

// pages are copies of 4 KiB pages of the bitmap or the table, with the numbers they have there.
type pages struct {
	numbers []int
	data    []byte
}

func (p *pages) page(i int) []byte { return p.data[i*pageSize : (i+1)*pageSize] }

// snapshot copies the pages that changed since they were last written.
func snapshot(changed pageSet, encode func(page int, p []byte)) (p pages) {
	changed.drain(func(page int) { p.numbers = append(p.numbers, page) })
	p.data = make([]byte, len(p.numbers)*pageSize)
	for i, page := range p.numbers {
		encode(page, p.page(i))
	}
	return p
}

// tables is a copy of what changed in bitmap and table, on its way to the disk.
type tables struct {
	bits, entries pages
}

// snapshotTables copies what changed in bitmap and table since it was last written; checkpoint
// ends the life of the copy. With a journal the caller holds journal.lead: a record that is written later must not be
// older than the copy, else its replay would take an entry back that the copy made durable.
func (m *metadata) snapshotTables() (t tables) {
	m.alloc.freeze()
	// The bitmap first: whatever bit it holds, its block is mapped by the time the table is copied, and its
	// data was written before and is covered by the next barrier.
	if m.fresh.n > 0 {
		t.bits = snapshot(m.bitmapPages, m.fresh.encodePage)
	}
	if m.g.compact() {
		t.entries = snapshot(m.tablePages, m.table.encodePage)
	}
	return t
}

// again copies the same pages once more, too late: MutantLateSnapshot.
func (t *tables) again(m *metadata) {
	for i, page := range t.bits.numbers {
		m.fresh.encodePage(page, t.bits.page(i))
	}
	for i, page := range t.entries.numbers {
		m.table.encodePage(page, t.entries.page(i))
	}
}

// checkpoint writes the copies and then the header, in the order of FVD specification 1.8 with its corrections:
// table and data durable before the bitmap; both durable before the header says so (D-01); only then do the
// entries and bits of the copies count as recoverable (D-03, D-04). Writes go on meanwhile.
func (m *metadata) checkpoint(t tables, change headerChange) error {
	defer m.alloc.thaw()
	if err := m.failed(); err != nil {
		return err
	}
	if err := m.markInUse(); err != nil {
		return err
	}
	if len(t.bits.numbers) > 0 && m.separate() {
		if err := m.dataSync.wait(); err != nil {
			return err
		}
		if m.mutant == MutantLateSnapshot {
			t.again(m)
		}
	}
	if m.mutant == MutantClearDirtyEarly {
		m.settleEntries(t.entries)
	}
	if m.mutant == MutantStaleEarly {
		m.settleBits(t.bits)
	}
	if err := m.writePages(writingTable, t.entries, m.g.tableStart); err != nil {
		return err
	}
	if len(t.bits.numbers) > 0 {
		if err := m.metaSync.wait(); err != nil { // with one file this is the data barrier too
			return err
		}
		if m.mutant == MutantLateSnapshot {
			t.again(m)
		}
		if err := m.writePages("writing the bitmap", t.bits, m.g.bitmapAt); err != nil {
			return err
		}
	}
	if m.mutant != MutantNoTableBarrier {
		if err := m.metaSync.wait(); err != nil {
			return err
		}
	}
	err := m.writeHeader(func(h *Header) {
		h.StableEpoch = max(h.StableEpoch, uint64(change.seal))
		h.CleanShutdown = change.clean && (!m.doubtful || m.mutant == MutantForgetDirty)
		h.FullyPrefetched = h.FullyPrefetched || change.prefetched
	})
	if err != nil {
		return err
	}
	if err := m.metaSync.wait(); err != nil {
		return err
	}
	if change.clean {
		m.inUse.Store(false)
	}
	m.settleBits(t.bits)
	m.settleEntries(t.entries)
	return nil
}

// writePages writes page copies to a region that begins at start, neighbours together.
func (m *metadata) writePages(doing string, p pages, start metaOffset) error {
	for i := 0; i < len(p.numbers); {
		n := 1
		for i+n < len(p.numbers) && p.numbers[i+n] == p.numbers[i]+n && (n+1)*pageSize <= ioUnit {
			n++
		}
		if err := m.writeMeta(doing, p.data[i*pageSize:(i+n)*pageSize], start+metaOffset(p.numbers[i])*pageSize); err != nil {
			return err
		}
		i += n
	}
	return nil
}

// settleBits and settleEntries tell memory that these copies are durable.
func (m *metadata) settleBits(bits pages) {
	for i, page := range bits.numbers {
		m.stale.union(page, bits.page(i))
	}
}

func (m *metadata) settleEntries(entries pages) {
	var decoded [pageEntries]uint32
	for i, page := range entries.numbers {
		decodeEntries(decoded[:], entries.page(i))
		first := chunkIndex(page) * pageEntries
		for c := first; c < min(first+pageEntries, m.g.chunks()); c++ {
			// Whoever took a mapping away sees to its record itself: an unmapping of now need not be the one
			// in the copy, there may have been a mapping in between.
			if e := entry(decoded[c-first]); e.mapped() {
				m.table.settle(c, e)
			}
		}
	}
}

// settleSpan marks the bits and entries of a span as recoverable, for disciplines that answer for that
// themselves.
func (m *metadata) settleSpan(s *span) {
	if s.bits {
		m.stale.setRange(m.g.blockRange(s.off, s.end))
	}
	if s.entries {
		first, last := m.g.chunkRange(s.off, s.end)
		for c := first; c < last; c++ {
			if e := m.table.get(c); e.pending() {
				m.table.settle(c, e.settled())
			}
		}
	}
}
