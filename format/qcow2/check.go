package qcow2

import (
	"errors"
	"fmt"
	"math"

	"github.com/platter-disk/platter/storage"
)

// FindingKind says what a Finding is counted as.
type FindingKind uint8

const (
	FindingCorruption FindingKind = iota // data may be wrong, or become wrong by writing to the image
	FindingLeak                          // a cluster that is marked as used but not referenced; wastes space only
	FindingError                         // something could not be examined
	FindingNote                          // not counted
)

// String returns the name of the kind: corruption, leak, error, note.
func (k FindingKind) String() string {
	return [...]string{"corruption", "leak", "error", "note"}[min(k, FindingNote)]
}

// MarshalText implements encoding.TextMarshaler: the name, also in JSON.
func (k FindingKind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// Finding is one inconsistency, in the words of qemu-img check. Its JSON form is that of a finding of package fvd.
type Finding struct {
	Kind    FindingKind `json:"kind"`
	Message string      `json:"text"`  // may have several lines; no newline at the end
	Fixed   bool        `json:"fixed"` // it is being repaired
	Named   bool        `json:"-"`     // qemu-img prints it with the program's name and a colon in front
}

// Repair says what Check may change.
type Repair uint8

const (
	RepairNone  Repair = iota // nothing: the file is only read
	RepairLeaks               // give leaked clusters back
	RepairAll                 // everything that can be repaired without losing data
)

// String returns the name qemu-img check -r uses: none, leaks, all.
func (r Repair) String() string { return [...]string{"none", "leaks", "all"}[min(r, RepairAll)] }

// CheckOptions are the options of Check.
type CheckOptions struct {
	// Report is called for every inconsistency as it is found, from the goroutine that called Check.
	Report func(Finding)

	// Memory bounds what is kept for each host cluster of the image: a byte for each that is in use, a little
	// more where many compressed clusters share one. In bytes; 0 is 1 GiB, which suffices for 64 TiB of data
	// in clusters of 64 KiB. A check that needs more ends with an error that wraps ErrCheckMemory.
	Memory int64

	Repair Repair // what to repair; needs a writable file

	// Interrupt is asked for every piece of a table that is read; the error that it returns ends the check. Nil never
	// does. A repair that is interrupted leaves an image that is no worse than before.
	Interrupt func() error

	// DiscardJournal drops a pending metadata journal instead of replaying it, with RepairAll only: for a
	// journal that cannot be read any more.
	DiscardJournal bool
}

const defaultCheckMemory = 1 << 30

// CheckResult is what a check found; its JSON form is that of qemu-img check --output=json.
type CheckResult struct {
	Filename          string `json:"filename"`
	Format            string `json:"format"`
	CheckErrors       int64  `json:"check-errors"`
	ImageEndOffset    int64  `json:"image-end-offset,omitempty"` // bytes: the end of the last cluster in use
	Corruptions       int64  `json:"corruptions,omitempty"`
	Leaks             int64  `json:"leaks,omitempty"`
	CorruptionsFixed  int64  `json:"corruptions-fixed,omitempty"`
	LeaksFixed        int64  `json:"leaks-fixed,omitempty"`
	TotalClusters     int64  `json:"total-clusters,omitempty"`      // guest clusters of the disk
	AllocatedClusters int64  `json:"allocated-clusters,omitempty"`  // of these, with a host cluster
	Fragmented        int64  `json:"fragmented-clusters,omitempty"` // of these, not right after the one before
	Compressed        int64  `json:"compressed-clusters,omitempty"`

	// Collisions is the number of host clusters with two owners that must not share one, for instance an L2
	// table and data. Each is one of the Corruptions too. QEMU does not look for them.
	Collisions int64 `json:"-"`
}

// Clean reports that nothing is wrong.
func (r *CheckResult) Clean() bool { return r.CheckErrors+r.Corruptions+r.Leaks == 0 }

// CheckFailure is the error of a check, or a repair, that could not be completed because of what the image holds. That
// its file cannot be read is an error of another type.
type CheckFailure struct {
	File   string
	Reason string // in the words of the C library, as qemu-img prints it
}

func (e *CheckFailure) Error() string { return fmt.Sprintf("%s: Check failed: %s", e.File, e.Reason) }

const (
	reasonInvalid  = "Invalid argument"
	reasonTooLarge = "File too large"
	reasonIO       = "Input/output error"
)

// Check examines the tables of an image: every reference in them is counted and compared with the stored
// reference counts, every entry validated. The image must not be in use for writing. Guest data is not read.
//
// An image that can be examined yields a result, whatever is wrong with it; an error means that the check
// could not be completed: the header is invalid, a read failed, a table cannot be made sense of at all
// (*CheckFailure).
//
// Every table is read once, however many snapshots share it, so the work is bounded by the size of the file;
// memory is bounded by o.Memory.
//
// With o.Repair it repairs what it finds, in an order that can be interrupted anywhere: a crash in
// the middle leaves an image that is no worse than before and that can be repaired again. The result then tells what is left.
func Check(f storage.File, o CheckOptions) (*CheckResult, error) {
	h, err := readHeader(f, forCheck)
	if err != nil {
		return nil, err
	}
	var journal *JournalExtension
	if h.Incompatible&IncompatJournal != 0 {
		journal = h.Journal
		if f, h, err = checkJournalled(f, h, o); err != nil {
			return nil, err
		}
	}
	if o.Repair != RepairNone {
		return repairImage(f, h, o)
	}
	c, err := newChecker(f, h, o)
	if err != nil {
		return nil, err
	}
	if err := c.run(); err != nil {
		return nil, err
	}
	if journal != nil {
		if err := c.checkJournalRegion(journal); err != nil {
			return nil, err
		}
	}
	return c.res, nil
}

// checker is one examination of an image.
type checker struct {
	f storage.File
	h *Header
	g geometry
	o CheckOptions

	size     int64 // of the file in bytes, rounded up to a sector
	clusters int64 // host clusters of the file, the last one maybe cut short
	counts   *clusterCounts
	stored   *storedCounts
	l2       *clusterCounts // how often each L2 table is referenced and still to be examined

	snapshots []Snapshot
	tableSize int64 // bytes of the snapshot table

	damaged     int64   // findings about the refcount table and its blocks
	tooLow      int64   // counts that are lower than the references
	uncounted   bool    // a cluster is referenced although its count is 0
	blockless   bool    // and there is no refcount block for it
	wrongBlocks []int64 // indices of the refcount blocks with wrong counts, ascending

	dangling    int64  // references past the end of the file
	danglingEnd uint64 // the highest byte one of them reaches

	zeroTables  []hostOff // L2 tables with entries that unalignedZero is true of
	repair      Repair    // what is being repaired in this pass
	newTable    bool      // the snapshot table has to be written anew
	withoutRefs bool      // leave the refcount table and its blocks out: they are about to be replaced

	next hostOff // where the next cluster of the L2 table continues the one before; 0 at its start
	res  *CheckResult
}

func newChecker(f storage.File, h *Header, o CheckOptions) (*checker, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	size = (size + sectorSize - 1) &^ (sectorSize - 1)
	c := &checker{f: f, h: h, g: newGeometry(h), o: o, size: size, res: &CheckResult{Filename: f.Name(), Format: "qcow2"}}
	c.clusters = c.g.clustersFor(size)
	if c.clusters > maxCheckClusters {
		return nil, &CheckFailure{File: f.Name(), Reason: reasonTooLarge}
	}
	budget := &memoryBudget{left: o.Memory}
	if budget.left <= 0 {
		budget.left = defaultCheckMemory
	}
	c.counts = newClusterCounts(budget)
	c.l2 = newClusterCounts(budget)
	c.stored = newStoredCounts(f, h, &c.g)
	c.res.TotalClusters = c.g.clustersFor(int64(h.Size))
	return c, nil
}

// run does everything in the order qemu-img does it, so that the reports can be compared.
func (c *checker) run() error {
	phases := []func() error{
		c.readSnapshotTable,
		c.countReferences,
		c.compareCounts,
		func() error { return c.checkCopied(false) },
	}
	for _, phase := range phases {
		if err := phase(); err != nil {
			return err
		}
	}
	return nil
}

// countReferences counts every reference there is to a host cluster.
func (c *checker) countReferences() error {
	if err := c.reference(ownerHeader, 0, c.g.clusterSize, 1); err != nil {
		return err
	}
	if err := c.countTrees(); err != nil {
		return err
	}
	if c.h.NbSnapshots > 0 && !c.newTable {
		if err := c.reference(ownerSnapshotTable, hostOff(c.h.SnapshotsOffset), c.tableSize, 1); err != nil {
			return err
		}
	}
	if crypto := c.h.Crypto; crypto != nil {
		if err := c.reference(ownerEncryption, hostOff(crypto.Offset), int64(crypto.Length), 1); err != nil {
			return err
		}
	}
	if err := c.countBitmaps(); err != nil {
		return err
	}
	if c.withoutRefs {
		return nil
	}
	if err := c.reference(ownerRefcountTable, hostOff(c.h.RefcountTableOffset), c.stored.tableEntries()*8, 1); err != nil {
		return err
	}
	return c.countRefcountBlocks()
}

// reference counts references of one owner to [off, off+size), weight of them.
func (c *checker) reference(who owner, off hostOff, size int64, weight uint32) error {
	if size <= 0 {
		return nil
	}
	if off < 0 || int64(off) > math.MaxInt64-size || int64(off)+size-c.size >= c.g.clusterSize {
		c.dangling += int64(weight)
		c.danglingEnd = max(c.danglingEnd, uint64(off)+uint64(size))
		c.corrupt(int64(weight), "ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset 0x%x size 0x%x",
			uint64(off), size)
		return nil
	}
	limit := maxRefcount(c.h.RefcountOrder)
	for at, end := c.g.clusterOf(off), c.g.clusterOf(off+hostOff(size-1)); at <= end; at++ {
		before := c.counts.get(at)
		w := weight
		if uint64(w) > limit-before {
			w = uint32(limit - before)
			c.corrupt(int64(weight-w), "ERROR: overflow cluster offset=0x%x\n"+
				"Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy if the image cannot be opened for writing", c.g.offsetOf(at))
		}
		collides, err := c.counts.add(at, who, w)
		if err != nil {
			return err
		}
		if collides != ownerNone {
			c.res.Collisions++
			c.corrupt(1, "ERROR cluster %d has two owners: %s, %s", at, collides, who)
		}
	}
	return nil
}

// corrupt counts n corruptions and reports them once.
func (c *checker) corrupt(n int64, format string, args ...any) {
	c.res.Corruptions += n
	c.report(Finding{Kind: FindingCorruption, Message: fmt.Sprintf(format, args...)})
}

// fixed counts n corruptions that are being repaired and reports them once.
func (c *checker) fixed(n int64, format string, args ...any) {
	c.res.CorruptionsFixed += n
	c.report(Finding{Kind: FindingCorruption, Fixed: true, Message: fmt.Sprintf(format, args...)})
}

func (c *checker) report(f Finding) {
	if c.o.Report != nil {
		c.o.Report(f)
	}
}

// readError wraps a failed read of a table.
func (c *checker) readError(what string, err error) error {
	if errors.Is(err, ErrCheckMemory) {
		return fmt.Errorf("%s: %w", c.f.Name(), err)
	}
	return fmt.Errorf("%s: read %s: %w", c.f.Name(), what, err)
}

// interrupted returns why the check is to end here, if it is.
func (c *checker) interrupted() error {
	if c.o.Interrupt == nil {
		return nil
	}
	return c.o.Interrupt()
}

// countBitmaps counts the directory of persistent dirty bitmaps, their tables and their data.
func (c *checker) countBitmaps() error {
	b := c.h.Bitmaps
	if b == nil {
		return nil
	}
	if err := c.reference(ownerBitmapDirectory, hostOff(b.DirectoryOffset), int64(b.DirectorySize), 1); err != nil {
		return err
	}
	err := forEachBitmap(c.f, c.h, c.countBitmap)
	var broken *FormatError
	if errors.As(err, &broken) {
		c.corrupt(1, "ERROR %s", broken)
		return &CheckFailure{File: c.f.Name(), Reason: reasonInvalid}
	}
	return err
}

func (c *checker) countBitmap(b Bitmap) error {
	size := int64(b.TableSize) * 8
	if err := c.reference(ownerBitmapTable, hostOff(b.TableOffset), size, 1); err != nil {
		return err
	}
	return c.forEachWord("a bitmap table", hostOff(b.TableOffset), int64(b.TableSize), func(_ int64, e uint64) error {
		at, err := bitmapTableEntry(e, c.g.clusterSize)
		if err != nil {
			c.corrupt(1, "ERROR bitmap %s: %v", printable(b.Name), err)
			return nil
		}
		if at == 0 {
			return nil
		}
		return c.reference(ownerBitmapData, at, c.g.clusterSize, 1)
	})
}
