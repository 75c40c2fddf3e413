package fvd

import (
	"cmp"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync"
	"syscall"
)

const (
	prepareChunks = 64       // free chunks zeroed for one barrier
	prepareBytes  = 64 << 20 // and at most this much, one chunk at least
	zeroAhead     = 16 << 20 // bytes of storage of unknown contents zeroed for one barrier
)

// allocator hands out physical chunks that durably read as zeros. That spares the writes that allocate a
// barrier: a mapping that reaches the disk before its data shows zeros, the old contents. It is also what keeps a
// chunk's former bytes, or those of the device under it, from shining through (defect D-10).
//
// Sources, in this order: clean chunks; chunks between the high-water mark and the end of the storage that is
// known to be zero; free chunks, zeroed in batches with one barrier for all; growth of the storage.
//
// The way of a chunk that lost its mapping: quarantine, until that is durable and no request can still hold its
// number; punched, its space given back, until that is durable too; clean.
type allocator struct {
	mu   sync.Mutex
	m    *metadata
	grow func(need int64) error // the caller's way to enlarge storage that cannot be resized; may be nil

	next  chunkID   // high-water mark: chunks from here on were never handed out
	limit chunkID   // chunks below it lie in the storage, those from next on durably zero
	clean []chunkID // free and durably zero, the next to use last

	free      []uint64 // bit a chunk below next: free, contents unknown
	freeCount int

	quarantine []retired
	frozen     int       // while positive nothing leaves the quarantine
	punched    []retired // tag is of the data barrier, age is not used

	reserved func(chunkID) bool // chunks that metadata occupies
}

// retired is a chunk that lost its mapping. It is free once the metadata barrier tag has passed and no request
// that began at or before age still runs.
type retired struct {
	id  chunkID
	tag uint64
	age uint64
}

// growUnit is the storage growth step in whole chunks.
func (a *allocator) growUnit() int64 {
	return max(1, int64(a.m.headerCopy().GrowUnit)/a.m.g.chunkSize)
}

// setFree adds a chunk below next to the free set.
func (a *allocator) setFree(id chunkID) {
	for int(id>>6) >= len(a.free) {
		a.free = append(a.free, 0)
	}
	if bit := uint64(1) << (id & 63); a.free[id>>6]&bit == 0 {
		a.free[id>>6] |= bit
		a.freeCount++
	}
}

// adoptFree makes the complement of used, which has a bit a chunk below next, the free set. It takes the slice over.
func (a *allocator) adoptFree(used []uint64) {
	for i := range used {
		used[i] = ^used[i]
	}
	if rest := a.next & 63; rest > 0 {
		used[len(used)-1] &= 1<<rest - 1
	}
	first, last := a.m.reservedChunks()
	for id := first; id < min(last, int64(a.next)); id++ {
		used[id>>6] &^= 1 << (id & 63)
	}
	a.free, a.freeCount = used, 0
	for _, w := range used {
		a.freeCount += bits.OnesCount64(w)
	}
}

// punchFree gives the space of the free chunks back, as far as the storage does that.
func (a *allocator) punchFree() {
	free := bitset{words: a.free, n: blockIndex(a.next)}
	for id := blockIndex(0); id < free.n; {
		n, isFree := free.run(id, free.n)
		if isFree && a.m.data.punch(a.m.g.chunkData(chunkID(id)), int64(n)*a.m.g.chunkSize) != nil {
			return // they are zeroed when they are used again: at worst that is a leak
		}
		id += n
	}
}

// take returns a chunk; the caller holds mu and enters it into the table.
func (a *allocator) take() (chunkID, error) {
	for {
		if n := len(a.clean); n > 0 {
			id := a.clean[n-1]
			a.clean = a.clean[:n-1]
			return id, nil
		}
		if len(a.punched) > 0 || len(a.quarantine) > 0 {
			a.reclaim()
			if len(a.clean) > 0 {
				continue
			}
		}
		if id, ok := a.bump(); ok {
			return id, nil
		}
		more := a.extend
		if a.freeCount > 0 {
			more = a.prepare
		}
		if err := more(); err != nil {
			return 0, err
		}
	}
}

// bump raises the high-water mark by one usable chunk.
func (a *allocator) bump() (chunkID, bool) {
	for a.next < a.limit {
		id := a.next
		a.next++
		if a.reserved == nil || !a.reserved(id) {
			return id, true
		}
	}
	return 0, false
}

// retire puts chunks whose unmapping was just written to the journal into quarantine.
func (a *allocator) retire(ids []chunkID) {
	if len(ids) == 0 {
		return
	}
	tag, age := a.m.metaSync.tag(), a.m.guard.age.Load()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.m.mutant == MutantReuseEarly {
		a.clean = append(a.clean, ids...)
		return
	}
	for _, id := range ids {
		a.quarantine = append(a.quarantine, retired{id, tag, age})
	}
}

// reclaim moves chunks along the way from quarantine to clean, as far as they are due, without a barrier.
func (a *allocator) reclaim() {
	// Both lists are in the order of tags and ages: who finds the first chunk not due looks no further.
	for len(a.punched) > 0 && a.m.dataSync.reached(a.punched[0].tag) {
		a.clean = append(a.clean, a.punched[0].id)
		a.punched = a.punched[1:]
	}
	if len(a.quarantine) == 0 || a.frozen > 0 {
		return
	}
	a.m.guard.advance()
	age := a.m.guard.advance()
	n := 0
	for n < len(a.quarantine) && a.m.metaSync.reached(a.quarantine[n].tag) && age >= a.quarantine[n].age+2 {
		n++
	}
	due := a.quarantine[:n:n]
	a.quarantine = a.quarantine[n:]
	a.punch(due)
}

// punch gives the space of chunks back. Those whose space cannot be given back join the free set, to be zeroed when
// they are used again: at worst that is a leak.
func (a *allocator) punch(due []retired) {
	slices.SortFunc(due, func(x, y retired) int { return cmp.Compare(x.id, y.id) })
	for i := 0; i < len(due); {
		n := 1
		for i+n < len(due) && due[i+n].id == due[i].id+chunkID(n) {
			n++
		}
		err := a.m.data.punch(a.m.g.chunkData(due[i].id), int64(n)*a.m.g.chunkSize)
		tag := a.m.dataSync.tag()
		for _, r := range due[i : i+n] {
			if err != nil {
				a.setFree(r.id)
				continue
			}
			a.punched = append(a.punched, retired{id: r.id, tag: tag})
		}
		i += n
	}
}

// giveBack reclaims if there is anything to reclaim; after a flush more may be due.
func (a *allocator) giveBack() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.quarantine) > 0 {
		a.reclaim()
	}
}

func (a *allocator) holdsQuarantine() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.quarantine) > 0
}

// release punches everything in quarantine. Nobody else uses the image, and what the tables say is durable.
func (a *allocator) release() {
	a.mu.Lock()
	defer a.mu.Unlock()
	due := a.quarantine
	a.quarantine = nil
	a.punch(due)
}

// freeze keeps the quarantine shut during a checkpoint, so that no chunk gets from one table entry to another
// and back between the checkpoint's snapshot and its end. It is undone with thaw. An image without table has no
// allocator; both do nothing then.
func (a *allocator) freeze() {
	if a == nil {
		return
	}
	a.mu.Lock()
	a.frozen++
	a.mu.Unlock()
}

func (a *allocator) thaw() {
	if a == nil {
		return
	}
	a.mu.Lock()
	a.frozen--
	a.mu.Unlock()
}

// prepare zeroes a batch of free chunks and makes that durable.
func (a *allocator) prepare() error {
	batch := a.clean[:0]
	most := min(prepareChunks, max(1, prepareBytes/a.m.g.chunkSize))
	for i := 0; i < len(a.free) && int64(len(batch)) < most; i++ {
		for a.free[i] != 0 && int64(len(batch)) < most {
			id := chunkID(i<<6 + bits.TrailingZeros64(a.free[i]))
			a.free[i] &= a.free[i] - 1
			batch = append(batch, id)
		}
	}
	a.freeCount -= len(batch)
	err := a.zero(batch)
	if err != nil {
		for _, id := range batch {
			a.setFree(id)
		}
		return err
	}
	slices.Reverse(batch) // lowest first
	a.clean = batch
	return nil
}

// zero makes the chunks, given in ascending order, durably zero.
func (a *allocator) zero(ids []chunkID) error {
	if a.m.mutant == MutantReuseUnzeroed {
		return nil
	}
	for i := 0; i < len(ids); {
		n := 1
		for i+n < len(ids) && ids[i+n] == ids[i]+chunkID(n) {
			n++
		}
		if err := zeroStore(a.m.data, a.m.g.chunkData(ids[i]), int64(n)*a.m.g.chunkSize, true, false); err != nil {
			return fmt.Errorf("fvd image %s: zeroing a free chunk: %w", a.m.name, err)
		}
		i += n
	}
	return a.m.dataSync.wait()
}

// stored is how many whole chunks with a legal number the storage has room for.
func (a *allocator) stored() (int64, error) {
	size, err := a.m.data.size()
	if err != nil {
		return 0, fmt.Errorf("fvd image %s: size of the data storage: %w", a.m.name, err)
	}
	return min(maxChunks, max(0, size-int64(a.m.g.dataStart))/a.m.g.chunkSize), nil
}

// extend makes room: chunks that the storage has and nobody used are zeroed, else the storage grows. Either is
// durable before the first of them is handed out.
func (a *allocator) extend() error {
	have, err := a.stored()
	if err != nil {
		return err
	}
	if int64(a.limit) >= maxChunks {
		return a.errNoNumbers()
	}
	if have <= int64(a.limit) {
		if have, err = a.enlarge(); err != nil {
			return err
		}
		// Storage that was resized reads as zeros; storage that others enlarged holds anything.
		if have > 0 {
			a.limit = chunkID(min(have, maxChunks))
			return a.m.dataSync.wait()
		}
		if have, err = a.stored(); err != nil {
			return err
		}
		if have <= int64(a.limit) {
			return fmt.Errorf("fvd image %s: the data storage is full and did not grow: %w", a.m.name, syscall.ENOSPC)
		}
	}
	n := min(have-int64(a.limit), max(1, zeroAhead/a.m.g.chunkSize), maxChunks-int64(a.limit))
	ids := make([]chunkID, n)
	for i := range ids {
		ids[i] = a.limit + chunkID(i)
	}
	if a.reserved != nil {
		ids = slices.DeleteFunc(ids, a.reserved)
	}
	if err := a.zero(ids); err != nil {
		return err
	}
	a.limit += chunkID(n)
	return nil
}

// trim cuts storage above the high-water mark off, where the storage can be cut. Metadata there stays.
func (a *allocator) trim() error {
	end := int64(a.m.g.chunkData(a.next))
	if !a.m.separate() {
		for _, r := range a.m.header.regions() {
			end = max(end, int64(r.off+r.size))
		}
	}
	size, err := a.m.data.size()
	if err != nil {
		return fmt.Errorf("fvd image %s: size of the data storage: %w", a.m.name, err)
	}
	a.limit = a.next
	if size <= end || a.m.data.resize(end) != nil {
		return nil
	}
	return a.m.dataSync.wait()
}

// reserve enlarges storage that can grow so that n more chunks can be taken from it.
func (a *allocator) reserve(n int64) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	have, err := a.stored()
	if err != nil || have > int64(a.limit) { // storage of unknown contents: extend zeroes it bit by bit
		return err
	}
	most := int64(a.next) + n - int64(len(a.clean)+a.freeCount+len(a.punched)+len(a.quarantine))
	if most <= int64(a.limit) {
		return nil
	}
	if most > maxChunks {
		return a.errNoNumbers()
	}
	size := int64(a.m.g.chunkData(chunkID(most)))
	switch err := a.m.data.resize(size); {
	case err == nil:
		a.limit = chunkID(most)
		return a.m.dataSync.wait()
	case a.grow != nil:
		return nil // it is asked when the chunks are taken
	default:
		return a.errGrow(size, err)
	}
}

func (a *allocator) errNoNumbers() error {
	return fmt.Errorf("fvd image %s: all %d chunk numbers are used: %w", a.m.name, maxChunks, syscall.ENOSPC)
}

func (a *allocator) errGrow(size int64, err error) error {
	return fmt.Errorf("fvd image %s: growing the data storage to %d bytes: %w", a.m.name, size, noSpace(err))
}

// enlarge grows the storage by its grow unit and returns how many chunks it then has, all new ones zero; or asks
// the caller's grow function and returns 0.
func (a *allocator) enlarge() (int64, error) {
	unit := a.growUnit()
	for try := unit; ; try = 1 { // where the whole unit does not fit, one chunk may
		size := int64(a.m.g.dataStart) + (int64(a.limit)+try)*a.m.g.chunkSize
		err := a.m.data.resize(size)
		if err == nil {
			return int64(a.limit) + try, nil
		}
		if try > 1 {
			continue
		}
		if a.grow == nil {
			return 0, a.errGrow(size, err)
		}
		if err := a.grow(unit * a.m.g.chunkSize); err != nil {
			return 0, fmt.Errorf("fvd image %s: growing the data storage: %w", a.m.name, noSpace(err))
		}
		return 0, nil
	}
}

// noSpace makes sure that an error to grow is understood as a lack of space.
func noSpace(err error) error {
	if errors.Is(err, syscall.ENOSPC) {
		return err
	}
	return fmt.Errorf("%w: %w", syscall.ENOSPC, err)
}
