package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/image/gate"
	"github.com/platter-disk/platter/storage"
)

// guestDisk is what the measurements of disciplines ask of a disk.
type guestDisk interface {
	io.WriterAt
	Flush() error
	free(off, length int64) error // zero the range and give its space back
}

// contents is what a disk looks like before a discipline is measured on it.
type contents uint8

const (
	plainDisk   contents = iota // nothing was ever written
	filledDisk                  // data in the first filledClusters
	overlay                     // data there in a backing file
	snapshotted                 // data there that a snapshot shares
)

const (
	caseCluster = 64 << 10 // bytes; the default of qcow2
	caseBlock   = 4 << 10  // bytes of a guest's write
	caseDisk    = 4 << 30  // bytes; 8 L2 tables
	caseSparse  = 1 << 40  // bytes; 2048 L2 tables
)

// metadataCase is an operation whose cost depends on how metadata becomes durable: one or more requests of a
// guest, and the flush that follows them.
type metadataCase struct {
	name, title string
	disk        contents
	size        int64
	requests    int                                        // before the flush
	operations  int                                        // requests and flush together, how often they are measured
	filled      int                                        // clusters with data, in the image itself or below
	request     func(d guestDisk, buf []byte, i int) error // nil: the operation is to take a snapshot
}

// warm is how many operations come before those that are measured, for what happens once only: L2 tables come
// into being, and what an engine sets aside ahead grows to the guest's pace.
func (c *metadataCase) warm() int { return max(64/max(c.requests, 1), 4) }

// touched is how many requests a case makes.
func (c *metadataCase) touched() int { return (c.warm() + c.operations) * c.requests }

// writes is a request that writes one block at a place of its own.
func writes(at func(i int) int64) func(guestDisk, []byte, int) error {
	return func(d guestDisk, buf []byte, i int) error {
		_, err := d.WriteAt(buf, at(i))
		return err
	}
}

// scattered returns places in as many clusters, in random order that is the same at every run.
func scattered(clusters int) func(i int) int64 {
	order := rand.New(rand.NewPCG(1, 1)).Perm(clusters)
	return func(i int) int64 { return int64(order[i])*caseCluster + int64(order[i]%16)*caseBlock }
}

// metadataCases returns what is measured, in the order of the report, each at most limit times unless that is 0.
func metadataCases(limit int) []metadataCase {
	cases := []metadataCase{
		{name: "alloc-1", title: "allocating write, flush", requests: 1, operations: 512},
		{name: "alloc-64", title: "64 allocating writes, flush", requests: 64, operations: 24},
		{name: "alloc-long", title: "allocating write, flush, in the long run", requests: 1, operations: 6144}, // 3 checkpoints of the journal
		{name: "new-table-1", title: "allocating write into a new L2 table, flush", size: caseSparse, requests: 1, operations: 128},
		{name: "overlay-1", title: "overlay copy-on-write, flush", disk: overlay, requests: 1, operations: 512},
		{name: "overlay-64", title: "64 overlay copy-on-writes, flush", disk: overlay, requests: 64, operations: 24},
		{name: "snapshot-1", title: "snapshot copy-on-write, flush", disk: snapshotted, requests: 1, operations: 512},
		{name: "snapshot-64", title: "64 snapshot copy-on-writes, flush", disk: snapshotted, requests: 64, operations: 24},
		{name: "turns-1", title: "discard a cluster, allocate one, flush", disk: filledDisk, requests: 1, operations: 512},
		{name: "turns-64", title: "64 times discard and allocate, flush", disk: filledDisk, requests: 64, operations: 24},
		{name: "snapshot-create", title: "snapshot of 128 MiB of data", disk: filledDisk, operations: 1, filled: 2048},
		{name: "sequential-overlay", title: "1 MiB in order on an overlay, 4 KiB at a time, flush", disk: overlay, requests: 256, operations: 24},
	}
	for i := range cases {
		c := &cases[i]
		if limit > 0 {
			c.operations = min(c.operations, limit)
		}
		if c.size == 0 {
			c.size = caseDisk
		}
		c.filled = max(c.filled, c.touched())
		c.request = c.requestOf()
	}
	return cases
}

// requestOf is what a case asks of the disk.
func (c *metadataCase) requestOf() func(guestDisk, []byte, int) error {
	switch c.name {
	case "snapshot-create":
		return nil
	case "sequential-overlay":
		c.filled = c.touched()/(caseCluster/caseBlock) + 1
		return writes(func(i int) int64 { return int64(i) * caseBlock })
	case "new-table-1":
		return writes(func(i int) int64 { return int64(i) * (caseSparse / 2048) })
	case "turns-1", "turns-64":
		return func(d guestDisk, buf []byte, i int) error {
			if err := d.free(int64(i)*caseCluster, caseCluster); err != nil {
				return err
			}
			_, err := d.WriteAt(buf, int64(c.filled+i)*caseCluster)
			return err
		}
	}
	if c.disk == plainDisk {
		return writes(scattered(caseDisk / caseCluster))
	}
	return writes(scattered(c.filled))
}

// DisciplineCases names what is measured.
func DisciplineCases() []string {
	var names []string
	for _, c := range metadataCases(0) {
		names = append(names, c.name)
	}
	return names
}

// Discipline is a way of keeping qcow2 metadata that is measured: one of Platter's in this process, or a
// program that serves images.
type Discipline struct {
	Name     string
	lazy     bool // the image asks for lazy refcounts
	attach   func(ctx context.Context, b *DisciplineBench, dir, name string) (measuredDisk, error)
	snapshot func(ctx context.Context, b *DisciplineBench, dir, name string) (tally, error) // takes one and tells what it cost; nil: cannot
}

// measuredDisk is a disk about which books are kept.
type measuredDisk interface {
	guestDisk
	begin() error
	end() (tally, error) // what was done since begin
	Close() error
}

// Disciplines returns those of Platter.
func Disciplines() []Discipline {
	var all []Discipline
	for _, name := range qcow2.Disciplines() {
		all = append(all, Discipline{
			Name: name,
			attach: func(ctx context.Context, b *DisciplineBench, _, file string) (measuredDisk, error) {
				return b.open(ctx, file, name)
			},
			snapshot: snapshotHere(name),
		})
	}
	return all
}

// QemuDisciplines returns those of qemu-nbd, which are told apart by how it is started and by the image.
func QemuDisciplines() []Discipline {
	served := func(flags ...string) func(context.Context, *DisciplineBench, string, string) (measuredDisk, error) {
		return func(ctx context.Context, _ *DisciplineBench, dir, file string) (measuredDisk, error) {
			return serveTraced(ctx, QemuNBD(flags...), dir, file)
		}
	}
	return []Discipline{
		{Name: "qemu-nbd", attach: served("--cache=writeback"), snapshot: snapshotByQemu},
		{Name: "qemu-nbd, lazy_refcounts", lazy: true, attach: served("--cache=writeback"), snapshot: snapshotByQemu},
		{Name: "qemu-nbd, writethrough", attach: served("--cache=writethrough")},
	}
}

// bookedImage is an image in this process with a ledger under it.
type bookedImage struct {
	*image.Image
	ledger *ledger
	before tally
}

func (b *DisciplineBench) open(ctx context.Context, name, discipline string) (*bookedImage, error) {
	d := &bookedImage{ledger: &ledger{}}
	wrap := func(f storage.File) storage.File {
		if b.below != nil {
			f = b.below(f)
		}
		return d.ledger.wrap(f)
	}
	img, err := image.Open(ctx, name, image.Options{Format: "qcow2", Discipline: discipline, Discard: true, Wrap: wrap})
	if err != nil {
		return nil, err
	}
	d.Image = img
	return d, nil
}

func (b *bookedImage) free(off, length int64) error {
	return b.WriteZeroes(off, length, block.MayUnmap)
}

func (b *bookedImage) begin() error {
	b.before = b.ledger.tally()
	return nil
}

func (b *bookedImage) end() (tally, error) { return b.ledger.tally().minus(b.before), nil }

// tracedServer is a server whose system calls are recorded.
type tracedServer struct {
	*Remote
	process *process
	trace   tracer
}

func serveTraced(ctx context.Context, s Server, dir, name string) (*tracedServer, error) {
	p, err := s.start(ctx, dir, name)
	if err != nil {
		return nil, err
	}
	d, err := DialDisk(p.uri, DialOptions{})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", s.Name, err), p.stop())
	}
	return &tracedServer{Remote: d, process: p, trace: tracer{pid: p.cmd.Process.Pid, bytes: len(sign)}}, nil
}

func (t *tracedServer) free(off, length int64) error { return t.PunchHole(off, length) }

func (t *tracedServer) begin() error { return t.trace.attach(tallyCalls()) }

func (t *tracedServer) end() (n tally, err error) {
	err = t.trace.detach(func(r io.Reader) error {
		n, err = parseTally(r)
		return err
	})
	return n, err
}

func (t *tracedServer) Close() error { return errors.Join(t.Remote.Close(), t.process.stop()) }

// snapshotHere takes snapshots of images in this process, under a discipline. What a session costs to begin is
// not counted.
func snapshotHere(discipline string) func(context.Context, *DisciplineBench, string, string) (tally, error) {
	return func(ctx context.Context, b *DisciplineBench, _, name string) (spent tally, err error) {
		img, err := b.open(ctx, name, discipline)
		if err != nil {
			return spent, err
		}
		defer func() { err = errors.Join(err, img.Close()) }()
		buf := make([]byte, caseBlock)
		signed(buf)
		if _, err := img.WriteAt(buf, img.Size()-caseBlock); err != nil {
			return spent, err
		}
		if err := errors.Join(img.Flush(), img.begin()); err != nil {
			return spent, err
		}
		if _, err := img.Qcow2().CreateSnapshot("before", qcow2.SnapshotOptions{}); err != nil {
			return spent, err
		}
		return img.end()
	}
}

// snapshotByQemu has qemu-img take one. Opening and closing the image is counted as well.
func snapshotByQemu(ctx context.Context, _ *DisciplineBench, dir, name string) (tally, error) {
	return runTraced(ctx, dir, "qemu-img", "snapshot", "-c", "before", name)
}

// DisciplineResult is what an operation cost under a discipline, on average.
type DisciplineResult struct {
	Case       string  `json:"case"`
	Title      string  `json:"title"`
	Discipline string  `json:"discipline"`
	Operations int     `json:"operations"`
	Syncs      float64 `json:"fdatasyncs_per_operation"`
	Writes     float64 `json:"write_calls_per_operation"`
	Metadata   float64 `json:"metadata_bytes_per_operation"`
	Copied     float64 `json:"copied_bytes_per_operation"` // of data, from a backing file or a shared cluster
}

// DisciplineBench measures what metadata costs.
type DisciplineBench struct {
	Dir        string   // where the images go
	Cases      []string // what is measured, of DisciplineCases; none: everything
	Operations int      // how often an operation is measured at most; 0 for each case's own number
	Notes      io.Writer

	n     int
	below func(storage.File) storage.File // put between the books and the file; nil: nothing
}

// Run measures every case under every discipline given.
func (b *DisciplineBench) Run(ctx context.Context, disciplines []Discipline) ([]DisciplineResult, error) {
	var results []DisciplineResult
	for _, name := range b.Cases {
		if !slices.Contains(DisciplineCases(), name) {
			return nil, fmt.Errorf("there is no case %q; there are %s", name, strings.Join(DisciplineCases(), ", "))
		}
	}
	for _, c := range metadataCases(b.Operations) {
		if len(b.Cases) > 0 && !slices.Contains(b.Cases, c.name) {
			continue
		}
		for _, d := range disciplines {
			if c.request == nil && d.snapshot == nil {
				continue
			}
			r, err := b.measure(ctx, c, d)
			if err != nil {
				return nil, fmt.Errorf("%s, %s: %w", c.name, d.Name, err)
			}
			fmt.Fprintf(b.Notes, "%s, %s: %.2f fdatasyncs\n", c.title, d.Name, r.Syncs)
			results = append(results, r)
		}
	}
	return results, nil
}

func (b *DisciplineBench) measure(ctx context.Context, c metadataCase, d Discipline) (r DisciplineResult, err error) {
	b.n++
	dir := filepath.Join(b.Dir, fmt.Sprintf("%s-%d", c.name, b.n))
	if err := os.Mkdir(dir, 0o777); err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	name, err := b.prepare(ctx, c, dir, d.lazy)
	if err != nil {
		return r, fmt.Errorf("preparing the image: %w", err)
	}
	var spent tally
	if c.request == nil {
		spent, err = d.snapshot(ctx, b, dir, name)
	} else {
		spent, err = b.run(ctx, c, d, dir, name)
	}
	if err != nil {
		return r, err
	}
	n := float64(c.operations)
	written := int64(c.operations*c.requests) * caseBlock
	return DisciplineResult{
		Case: c.name, Title: c.title, Discipline: d.Name, Operations: c.operations,
		Syncs: float64(spent.Syncs) / n, Writes: float64(spent.Writes) / n, Metadata: float64(spent.Metadata) / n,
		Copied: float64(max(spent.Data-written, 0)) / n,
	}, nil
}

// run carries out the operations and tells what they cost.
func (b *DisciplineBench) run(ctx context.Context, c metadataCase, how Discipline, dir, name string) (spent tally, err error) {
	d, err := how.attach(ctx, b, dir, name)
	if err != nil {
		return spent, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	buf := make([]byte, caseBlock)
	signed(buf)
	at := 0
	one := func() error {
		for range c.requests {
			if err := c.request(d, buf, at); err != nil {
				return err
			}
			at++
		}
		return errors.Join(ctx.Err(), d.Flush())
	}
	for range c.warm() {
		if err := one(); err != nil {
			return spent, err
		}
	}
	if err := d.begin(); err != nil {
		return spent, err
	}
	for range c.operations {
		if err = one(); err != nil {
			break
		}
	}
	spent, eerr := d.end() // in any case: it may end a process
	return spent, errors.Join(err, eerr)
}

// prepare makes the image of a case and returns its name.
func (b *DisciplineBench) prepare(ctx context.Context, c metadataCase, dir string, lazy bool) (string, error) {
	name, base := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "base.qcow2")
	o := image.CreateOptions{Gate: gate.SameDirectory{}}
	o.Size, o.ClusterSize = c.size, caseCluster
	top := o
	top.LazyRefcounts = lazy
	if c.disk == overlay {
		if err := image.Create(ctx, "qcow2", base, o); err != nil {
			return "", err
		}
		if err := b.fill(ctx, base, c.filled); err != nil {
			return "", err
		}
		top.BackingFile, top.BackingFormat = filepath.Base(base), "qcow2"
	}
	if err := image.Create(ctx, "qcow2", name, top); err != nil {
		return "", err
	}
	if c.disk == filledDisk || c.disk == snapshotted {
		if err := b.fill(ctx, name, c.filled); err != nil {
			return "", err
		}
	}
	if c.disk == snapshotted {
		if _, err := snapshotHere(qcow2.Ordered)(ctx, b, dir, name); err != nil {
			return "", err
		}
	}
	return name, nil
}

// fill writes guest data to the first clusters of an image.
func (b *DisciplineBench) fill(ctx context.Context, name string, clusters int) error {
	img, err := b.open(ctx, name, qcow2.Ordered)
	if err != nil {
		return err
	}
	buf := make([]byte, caseCluster)
	signed(buf)
	for i := 0; i < clusters && err == nil; i++ {
		if _, err = img.WriteAt(buf, int64(i)*caseCluster); err == nil {
			err = ctx.Err()
		}
	}
	return errors.Join(err, img.Close())
}
