package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// ErrNoSnapshot is wrapped when an image has no snapshot with the given id or name.
var ErrNoSnapshot = errors.New("snapshot not found")

// ErrSnapshotInUse is wrapped when a snapshot cannot be deleted because a device from SnapshotDevice shows it.
var ErrSnapshotInUse = errors.New("the snapshot is in use")

// SnapshotOptions says how CreateSnapshot describes a snapshot.
type SnapshotOptions struct {
	Date time.Time // zero: now
}

// Snapshots lists the snapshots in the image, in the order in which they were taken. Entries that do not say
// how large the disk was (version 2) have its present size.
func (im *Image) Snapshots() ([]Snapshot, error) {
	im.resizing.Lock()
	defer im.resizing.Unlock()
	if err := im.errIfClosed(); err != nil {
		return nil, err
	}
	list, _, err := im.snapshotTable()
	return list, err
}

// snapshotTable reads the snapshot table, and its size in bytes. The caller holds resizing.
func (im *Image) snapshotTable() ([]Snapshot, int64, error) {
	h := im.Header()
	list, size, err := readSnapshots(im.file, &h)
	for i := range list {
		if list[i].ExtraSize < snapshotExtraV3 {
			list[i].DiskSize = h.Size
		}
	}
	return list, size, err
}

// findSnapshot returns the index of the snapshot with an id, or else of the first with that name.
func (im *Image) findSnapshot(list []Snapshot, idOrName string) (int, error) {
	i := slices.IndexFunc(list, func(s Snapshot) bool { return s.ID == idOrName })
	if i < 0 {
		i = slices.IndexFunc(list, func(s Snapshot) bool { return s.Name == idOrName })
	}
	if i < 0 {
		return 0, fmt.Errorf("%s: snapshot %q: %w", im.file.Name(), idOrName, ErrNoSnapshot)
	}
	return i, nil
}

// nextSnapshotID is one more than the highest id, as far as ids begin with decimal digits.
func nextSnapshotID(list []Snapshot) string {
	highest := uint64(0)
	for _, s := range list {
		id := uint64(0)
		for _, c := range strings.TrimLeft(s.ID, " \t\n\v\f\r+") {
			if c < '0' || c > '9' || id > (1<<64-1-9)/10 {
				break
			}
			id = id*10 + uint64(c-'0')
		}
		highest = max(highest, id)
	}
	return fmt.Sprint(highest + 1)
}

// alone prepares a change of the whole image: no request is under way until the returned function is called,
// and everything that was answered is durable.
func (im *Image) alone(what string) (done func(), err error) {
	im.resizing.Lock()
	if err := im.checkChange(what, 0, 0); err != nil {
		im.resizing.Unlock()
		return nil, err
	}
	hold, err := im.quiet()
	if err != nil {
		im.resizing.Unlock()
		return nil, err
	}
	return func() {
		im.locks.unlock(hold)
		im.resizing.Unlock()
	}, nil
}

// quiet waits until no request is under way, makes everything that was answered durable, and holds requests off until
// the caller unlocks what it returns. The caller holds resizing.
func (im *Image) quiet() (rangeHold, error) {
	hold, err := im.hold(0, 1<<62, true)
	if err != nil {
		return rangeHold{}, err
	}
	err = im.failed()
	for _, at := range im.partials.all() {
		if err == nil {
			err = im.completePartial(at)
		}
	}
	if err == nil {
		err = im.discipline.flush()
	}
	if err != nil {
		im.locks.unlock(hold)
		return rangeHold{}, err
	}
	return hold, nil
}

// aloneForSnapshot is alone for operations that an image with an external data file has no place for.
func (im *Image) aloneForSnapshot(what string) (done func(), err error) {
	if im.geo.dataFile {
		return nil, fmt.Errorf("%s: %s: the image has an external data file: %w", im.file.Name(), what, errors.ErrUnsupported)
	}
	return im.alone(what)
}

// CreateSnapshot keeps the present contents of the disk as a snapshot, durably. name is at most 65535 bytes and
// need not be unique; the new snapshot's id is. Requests wait meanwhile. It fails, and changes nothing, where
// the reference counts of the image are too narrow for one more reference, and on an image with an external
// data file (errors.ErrUnsupported).
func (im *Image) CreateSnapshot(name string, o SnapshotOptions) (Snapshot, error) {
	done, err := im.aloneForSnapshot("create a snapshot")
	if err != nil {
		return Snapshot{}, err
	}
	defer done()
	list, oldSize, err := im.snapshotTable()
	if err != nil {
		return Snapshot{}, err
	}
	if o.Date.IsZero() {
		o.Date = time.Now()
	}
	active := im.l1.Load()
	size := im.size.Load()
	// What lies past the end of the disk is the saved state of some virtual machine, not of this one.
	entries := max(im.geo.l1Needed(size), 1)
	s := Snapshot{
		L1Size: uint32(entries), ID: nextSnapshotID(list), Name: name,
		Seconds: uint32(o.Date.Unix()), Nanoseconds: uint32(o.Date.Nanosecond()),
		DiskSize: uint64(size), ICount: ^uint64(0), ExtraSize: snapshotKnown,
	}
	list = append(list, s)
	if _, err := encodeSnapshots(list); err != nil {
		return Snapshot{}, fmt.Errorf("%s: %w", im.file.Name(), err)
	}
	t, err := im.newTree(active.words[:min(entries, int64(len(active.words)))], entries)
	if err != nil {
		return Snapshot{}, err
	}
	p, err := im.raiseTree(t, false)
	if err == nil {
		s.L1Offset = uint64(t.at)
		list[len(list)-1] = s
		err = im.switchSnapshots(list, oldSize, operation{})
	}
	if err != nil {
		return Snapshot{}, im.takeBack(t, p, err)
	}
	return s, im.discipline.flush()
}

// newTree writes a copy of the words of an L1 table, without COPIED bits, to clusters of its own, and begins to
// raise the counts of what it reaches.
func (im *Image) newTree(words []uint64, entries int64) (*l1Table, error) {
	own := make([]uint64, len(words))
	for i, w := range words {
		own[i] = w &^ entryCopied
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	t, run, err := im.newL1(own, entries)
	if err != nil {
		return nil, err
	}
	if _, err := im.alloc.link(run); err != nil {
		return nil, im.fail(err)
	}
	im.discipline.progress(operation{kind: opRaise, tree: t.at, entries: entries})
	return t, nil
}

// takeBack undoes what raiseTree did in front of p, because of err.
func (im *Image) takeBack(t *l1Table, p treePos, err error) error {
	if im.failed() != nil {
		return err
	}
	return errors.Join(err, im.undoRaise(t, p))
}

// switchSnapshots writes a new snapshot table and has the header point to it; oldSize is the size in bytes of
// the table that it replaces. after is the operation that is under way from then on.
func (im *Image) switchSnapshots(list []Snapshot, oldSize int64, after operation) error {
	raw, err := encodeSnapshots(list)
	if err != nil {
		return fmt.Errorf("%s: %w", im.file.Name(), err)
	}
	var run freeRun
	if len(list) > 0 {
		im.mu.Lock()
		run, err = im.writeTable(raw)
		im.mu.Unlock()
		if err != nil {
			return err
		}
	}
	if err := im.discipline.settleCounts(); err != nil {
		if run.n > 0 {
			im.giveBack(run)
		}
		return err
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	if _, err := im.alloc.link(run); err != nil {
		return im.fail(err)
	}
	h := im.header
	var old []hostRun
	if h.NbSnapshots > 0 {
		old = []hostRun{{start: im.geo.clusterOf(hostOff(h.SnapshotsOffset)), n: im.geo.clustersFor(oldSize), table: true}}
	}
	h.NbSnapshots, h.SnapshotsOffset = uint32(len(list)), uint64(im.geo.offsetOf(run.start))
	im.guard.place(im)
	if err := im.discipline.changeHeader(fieldSnapshots, old); err != nil {
		return err
	}
	im.discipline.progress(after)
	return nil
}

// ApplySnapshot makes the disk what it was when a snapshot was taken, its size included, durably and as one
// change; what the disk held is lost unless another snapshot has it. The snapshot stays. Requests wait
// meanwhile; of those that lie past the end of a disk that has become smaller, the ones already under way may
// still be answered. A version 2 image, and one with persistent dirty bitmaps, cannot change its size.
func (im *Image) ApplySnapshot(idOrName string) error {
	done, err := im.aloneForSnapshot("apply a snapshot")
	if err != nil {
		return err
	}
	defer done()
	list, _, err := im.snapshotTable()
	if err != nil {
		return err
	}
	i, err := im.findSnapshot(list, idOrName)
	if err != nil {
		return err
	}
	s := &list[i]
	size := int64(s.DiskSize) &^ (sectorSize - 1)
	if err := im.checkSnapshotSize(s); err != nil {
		return err
	}
	source, err := im.readTree(s.L1Offset, int64(s.L1Size))
	if err != nil {
		return err
	}
	// The active table ends with the disk: the saved state of a virtual machine stays with the snapshot.
	entries := im.geo.l1Needed(size)
	stale := im.opts.Mutant == MutantStaleCopied
	t, err := im.newTree(source.words[:min(entries, int64(len(source.words)))], max(entries, 1))
	if err != nil {
		return err
	}
	p, err := im.raiseTree(t, stale)
	if err != nil {
		return im.takeBack(t, p, err)
	}
	return im.replaceTree(t, p, size)
}

// replaceTree makes t, which is raised up to p, the active tree of a disk of a size, and gives up the tree that was.
func (im *Image) replaceTree(t *l1Table, p treePos, size int64) error {
	err := im.discipline.settleCounts()
	if err == nil {
		// The old tree has to be in its place, so that whoever recovers the image after a crash can give it up.
		err = im.discipline.writeback()
	}
	if err != nil {
		return im.takeBack(t, p, err)
	}
	old := im.l1.Load()
	if im.opts.Mutant == MutantInPlaceL1 {
		if old, t, err = im.overwriteL1(t); err != nil {
			return err
		}
	}
	if err := im.activate(t, size, operation{kind: opApply, tree: old.at, entries: int64(len(old.words))}); err != nil {
		return err
	}
	return im.lowerTree(old, opApply, treePos{})
}

// overwriteL1 is the wrong order of MutantInPlaceL1. The active table gets the words of t where it is; it returns
// what is left to give up, and the active table.
func (im *Image) overwriteL1(t *l1Table) (old, now *l1Table, err error) {
	was := im.l1.Load()
	raw := make([]byte, 0, len(t.words)*8)
	for _, w := range t.words {
		raw = binary.BigEndian.AppendUint64(raw, w)
	}
	return &l1Table{at: t.at, words: was.words}, &l1Table{at: was.at, words: t.words}, im.writeMetadata(raw, was.at)
}

// checkSnapshotSize refuses to give the disk the size that it had when a snapshot was taken where that cannot be.
func (im *Image) checkSnapshotSize(s *Snapshot) error {
	if err := im.checkSizeFits(s); err != nil || int64(s.DiskSize)&^(sectorSize-1) == im.size.Load() {
		return err
	}
	return im.checkChangeOfSize()
}

// checkSizeFits refuses a snapshot of a disk larger than an image can have.
func (im *Image) checkSizeFits(s *Snapshot) error {
	if s.DiskSize > 1<<62 || im.geo.l1Needed(int64(s.DiskSize))*8 > maxL1Bytes {
		return im.corrupt(fmt.Sprintf("disk size of snapshot %q", s.ID), fmt.Sprint(s.DiskSize), fmt.Sprintf("one that %d L1 entries map", maxL1Bytes/8))
	}
	return nil
}

// activate has the header point to the L1 table t and the disk have a size.
func (im *Image) activate(t *l1Table, size int64, after operation) error {
	im.mu.Lock()
	defer im.mu.Unlock()
	im.header.Size = uint64(size)
	im.header.L1Offset, im.header.L1Size = uint64(t.at), uint32(len(t.words))
	im.l1.Store(t)
	im.size.Store(size)
	clear(im.l1Dirty) // the old table is in its place
	im.guard.init(im)
	im.inflated.forget()
	if err := im.discipline.changeHeader(fieldDisk, nil); err != nil {
		return err
	}
	im.discipline.progress(after)
	return nil
}

// DeleteSnapshot deletes a snapshot, durably; what only it held becomes free. Requests wait meanwhile. A
// snapshot that a device from SnapshotDevice shows cannot be deleted (ErrSnapshotInUse).
func (im *Image) DeleteSnapshot(idOrName string) error {
	done, err := im.aloneForSnapshot("delete a snapshot")
	if err != nil {
		return err
	}
	defer done()
	list, tableSize, err := im.snapshotTable()
	if err != nil {
		return err
	}
	i, err := im.findSnapshot(list, idOrName)
	if err != nil {
		return err
	}
	s := list[i]
	im.mu.Lock()
	viewed := im.viewed[s.ID] > 0
	im.mu.Unlock()
	if viewed {
		return fmt.Errorf("%s: snapshot %q: %w", im.file.Name(), idOrName, ErrSnapshotInUse)
	}
	t, err := im.readTree(s.L1Offset, int64(s.L1Size))
	if err != nil {
		return err
	}
	rest := slices.Delete(list, i, i+1)
	if err := im.switchSnapshots(rest, tableSize, operation{kind: opDelete, tree: t.at, entries: int64(len(t.words))}); err != nil {
		return err
	}
	return im.lowerTree(t, opDelete, treePos{})
}
