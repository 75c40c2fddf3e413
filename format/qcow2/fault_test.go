package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/storage"
)

// sectorTag is what a sector of a tagged disk holds: 64 copies of one number, 0 for zeros.
type sectorTag uint64

func (v sectorTag) fill(p []byte) {
	for i := 0; i < len(p); i += 8 {
		binary.BigEndian.PutUint64(p[i:], uint64(v))
	}
}

func tagOf(p []byte) (sectorTag, error) {
	v := binary.BigEndian.Uint64(p)
	for i := 8; i < len(p); i += 8 {
		if got := binary.BigEndian.Uint64(p[i:]); got != v {
			return 0, fmt.Errorf("a torn sector: %#x and %#x", v, got)
		}
	}
	return sectorTag(v), nil
}

// tagged is a disk whose sectors hold tags, and what each may hold: now, and if everything since the last
// successful flush is lost.
type tagged struct {
	im      *Image
	now     [][]sectorTag
	durable [][]sectorTag
	next    sectorTag
	sticky  error // the error after which the image refuses changes
}

func newTagged(im *Image, backing []byte) (*tagged, error) {
	d := &tagged{im: im, next: 1 << 32}
	sectors := int(im.Size() / sectorSize)
	for i := range sectors {
		v := sectorTag(0)
		if (i+1)*sectorSize <= len(backing) {
			var err error
			if v, err = tagOf(backing[i*sectorSize:][:sectorSize]); err != nil {
				return nil, err
			}
		}
		d.now, d.durable = append(d.now, []sectorTag{v}), append(d.durable, []sectorTag{v})
	}
	return d, nil
}

// did notes a change of n sectors from first on: exactly v where it succeeded, v or what was there before
// where it failed. unsure is for a discard, which may leave what was there.
func (d *tagged) did(first, n int, v sectorTag, unsure bool) {
	for i := first; i < first+n; i++ {
		d.durable[i] = append(d.durable[i], v)
		if unsure {
			d.now[i] = append(slices.Clone(d.now[i]), v)
		} else {
			d.now[i] = []sectorTag{v}
		}
	}
}

func (d *tagged) flushed() {
	for i := range d.now {
		d.durable[i] = slices.Clone(d.now[i])
	}
}

// verify reads the disk and compares it with what it may hold.
func (d *tagged) verify(im *Image, allowed [][]sectorTag) error {
	p := make([]byte, sectorSize)
	for i := range allowed {
		if _, err := im.ReadAt(p, int64(i)*sectorSize); err != nil {
			return fmt.Errorf("read sector %d: %w", i, err)
		}
		v, err := tagOf(p)
		if err != nil {
			return fmt.Errorf("sector %d: %w", i, err)
		}
		if !slices.Contains(allowed[i], v) {
			return fmt.Errorf("sector %d holds %#x, want one of %#x", i, uint64(v), allowed[i])
		}
	}
	return nil
}

// change does one change and checks that a failed image refuses it.
func (d *tagged) change(first, n int, v sectorTag, unsure bool, do func() error) error {
	err := do()
	if d.sticky != nil {
		if err == nil || err.Error() != d.sticky.Error() {
			return fmt.Errorf("a change of an image that failed with %q ends with %v", d.sticky, err)
		}
		return nil
	}
	d.did(first, n, v, unsure || err != nil)
	d.sticky = d.im.failed()
	return nil
}

func (d *tagged) flush() error {
	err := d.im.Flush()
	switch {
	case d.sticky != nil:
		if err == nil || err.Error() != d.sticky.Error() {
			return fmt.Errorf("a flush of an image that failed with %q ends with %v", d.sticky, err)
		}
	case err == nil:
		d.flushed()
	default:
		d.sticky = d.im.failed()
	}
	return nil
}

// step does one random request.
func (d *tagged) step(r *rand.Rand) error {
	first := r.IntN(len(d.now))
	n := 1 + r.IntN(min(24, len(d.now)-first))
	off, length := int64(first)*sectorSize, int64(n)*sectorSize
	switch op := r.IntN(14); op {
	case 0, 1, 2, 3, 4:
		d.next++
		p := make([]byte, length)
		d.next.fill(p)
		return d.change(first, n, d.next, false, func() error { _, err := d.im.WriteAt(p, off); return err })
	case 5, 6:
		return d.change(first, n, 0, false, func() error { return d.im.WriteZeroes(off, length, block.ZeroFlags(op-5)) })
	case 7, 8:
		return d.change(first, n, 0, true, func() error { return d.im.Discard(off, length) })
	case 9:
		per := int(d.im.geo.clusterSize / sectorSize)
		first = first / per * per
		n = min(per, len(d.now)-first)
		d.next++
		p := make([]byte, n*sectorSize)
		d.next.fill(p)
		return d.change(first, n, d.next, false, func() error { return d.im.WriteCompressed(p, int64(first)*sectorSize) })
	case 10, 11:
		return d.flush()
	}
	p := make([]byte, length)
	if _, err := d.im.ReadAt(p, off); err != nil {
		if injected(err) {
			return nil // the one read that was made to fail
		}
		return fmt.Errorf("read of %d at %d: %w", length, off, err)
	}
	for i := range n {
		v, err := tagOf(p[i*sectorSize:][:sectorSize])
		if err != nil || !slices.Contains(d.now[first+i], v) {
			return fmt.Errorf("sector %d holds %#x, want one of %#x (%v)", first+i, uint64(v), d.now[first+i], err)
		}
	}
	return nil
}

// injected reports whether an error is one of those that these tests inject.
func injected(err error) bool {
	return errors.Is(err, syscall.EIO) || errors.Is(err, syscall.ENOSPC)
}

// within runs do and fails the program, with all stacks, if it does not end in time.
func within(d time.Duration, do func() error) error {
	timer := time.AfterFunc(d, func() { panic(fmt.Sprintf("not done after %v", d)) })
	defer timer.Stop()
	return do()
}

// faultConfig is an image that faults are injected under.
type faultConfig struct {
	name    string
	create  CreateOptions
	backed  bool
	options Options
}

func faultConfigs() []faultConfig {
	small := CreateOptions{Size: 128 << 10, Version: 3, ClusterSize: 4096, RefcountBits: 16}
	tiny := CreateOptions{Size: 96 << 10, Version: 3, ClusterSize: 512, RefcountBits: 64}
	extended := CreateOptions{Size: 512 << 10, Version: 3, ClusterSize: 16384, RefcountBits: 8, ExtendedL2: true}
	return []faultConfig{
		{"plain", small, false, Options{Discard: true}},
		{"backed", small, true, Options{Discard: true, Reserve: 2}},
		{"tiny clusters and caches", tiny, false, Options{L2CacheSize: 1, RefcountCacheSize: 1}},
		{"extended", extended, true, Options{}},
	}
}

// TestFaults makes each operation on the file fail in turn and demands of every discipline: nothing hangs;
// what was flushed is there after the image was reopened, and what was acknowledged while it stays open; an
// image that nobody can vouch for refuses changes and flushes but goes on reading; what is left behind is at
// worst leaked.
func TestFaults(t *testing.T) {
	faults := []crashlab.Fault{
		{Kind: crashlab.KindWrite, Err: syscall.EIO},
		{Kind: crashlab.KindWrite, Err: syscall.ENOSPC, Onward: true},
		{Kind: crashlab.KindWrite, Short: 512},
		{Kind: crashlab.KindSync, Err: syscall.EIO},
		{Kind: crashlab.KindRead, Err: syscall.EIO},
		{Kind: crashlab.KindTruncate, Err: syscall.ENOSPC},
		{Kind: crashlab.KindTruncate, Err: syscall.ENOSPC, Onward: true},
		{Kind: crashlab.KindPunch, Err: syscall.EIO},
		{Kind: crashlab.KindZero, Err: syscall.EIO},
	}
	limit := envInt(t, "PLATTER_FAULTS", fewer(20)) // operations of each kind that fail, one after the other
	for _, cfg := range faultConfigs() {
		for _, how := range Disciplines() {
			t.Run(cfg.name+"/"+how, func(t *testing.T) {
				t.Parallel()
				for _, f := range faults {
					err := crashlab.ForEachFault([]crashlab.Fault{f}, limit, func(in *crashlab.Injector) error {
						return within(time.Minute, func() error { return surviveFault(cfg, how, in) })
					})
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
}

// surviveFault runs a workload over a failing file, reopens the image over the healthy one and judges it.
func surviveFault(cfg faultConfig, how string, in *crashlab.Injector) error {
	file := storage.NewMemory("image")
	create, o := cfg.create, cfg.options
	o.Discipline = how
	var backing []byte
	if cfg.backed {
		backing = make([]byte, create.Size-4096)
		for i := 0; i < len(backing); i += sectorSize {
			sectorTag(i / sectorSize / 5 * 7).fill(backing[i:][:sectorSize])
		}
		create.BackingFile, create.BackingFormat, create.BackingSize = "base", "raw", int64(len(backing))
		o.Backing = &memDevice{bytes: backing}
	}
	if err := Create(file, create); err != nil {
		return err
	}
	im, err := Open(in.Wrap(keepOpen{file}), o)
	if err != nil {
		if injected(err) {
			return nil
		}
		return err
	}
	d, err := newTagged(im, backing)
	if err != nil {
		return err
	}
	r := rand.New(rand.NewPCG(42, uint64(create.ClusterSize)))
	for range 160 {
		if err := d.step(r); err != nil {
			return err
		}
	}
	if in.Hits() == 0 || d.sticky != nil {
		if err := d.verify(im, d.now); err != nil && !injected(err) {
			return fmt.Errorf("while the image is open: %w", err)
		}
	}
	err = im.Close()
	allowed := d.now
	switch {
	case err != nil:
		allowed = d.durable
	case d.sticky != nil:
		return fmt.Errorf("close succeeds on an image that failed with %w", d.sticky)
	}
	return d.judge(file, o, allowed, how, err)
}

// judge reopens an image that a fault hit, and uses it.
func (d *tagged) judge(file *storage.Memory, o Options, allowed [][]sectorTag, how string, closed error) error {
	again, err := Open(keepOpen{file}, o)
	if err != nil {
		return fmt.Errorf("reopen (closed with %v): %w", closed, err)
	}
	if err := d.verify(again, allowed); err != nil {
		return fmt.Errorf("reopened (closed with %v): %w", closed, err)
	}
	p := bytes.Repeat([]byte{1}, 20000)
	if _, err := again.WriteAt(p, 3000); err != nil {
		return fmt.Errorf("reopened: %w", err)
	}
	if err := again.Close(); err != nil {
		return fmt.Errorf("close the reopened image: %w", err)
	}
	res, err := Check(file, CheckOptions{})
	if err != nil {
		return fmt.Errorf("check: %w", err)
	}
	if res.Corruptions+res.CheckErrors > 0 {
		return fmt.Errorf("check after a close with %v: %d corruptions, %d errors", closed, res.Corruptions, res.CheckErrors)
	}
	if res.Leaks > 0 && (how == Journal || closed == nil) {
		return fmt.Errorf("check after a close with %v: %d leaks", closed, res.Leaks)
	}
	return nil
}

// slowSync is a file whose barriers take their time, so that much comes together before each.
type slowSync struct{ storage.File }

func (f slowSync) Sync() error {
	time.Sleep(2 * time.Millisecond)
	return f.File.Sync()
}

// TestSmallJournal has many clients free and allocate clusters at once through the smallest journal there is:
// they wait for each other rather than collect a transaction that it cannot hold.
func TestSmallJournal(t *testing.T) {
	f := storage.NewMemory("image")
	if err := Create(f, CreateOptions{Size: 16 << 20, Version: 3, ClusterSize: 512, RefcountBits: 64}); err != nil {
		t.Fatal(err)
	}
	im, err := Open(slowSync{keepOpen{f}}, Options{Discipline: Journal, JournalSize: 1})
	if err != nil {
		t.Fatal(err)
	}
	const clients, part = 32, 512 << 10
	errs := make(chan error, clients)
	for id := range clients {
		go func() {
			p := make([]byte, 64<<10)
			for round := range 6 {
				off := int64(id*part + round%3*len(p))
				if _, err := im.WriteAt(p, off); err != nil {
					errs <- err
					return
				}
				if err := im.Discard(off, int64(len(p))); err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	for range clients {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	if res, err := Check(f, CheckOptions{}); err != nil || !res.Clean() {
		t.Errorf("check: %+v, %v", res, err)
	}
}

// fewer is a part of a budget where everything takes an order of magnitude longer.
func fewer(n int) int {
	if raceEnabled {
		return n / 4
	}
	return n
}

// sampled reports whether the i-th case of a matrix runs. The race detector has little to find in cases that one
// goroutine works on: it sees every fifth, a number that the dimensions of no matrix divide. Without it all run.
func sampled(i int) bool { return !raceEnabled || i%5 == 0 }

// withoutRace skips a test that one goroutine works on and that the race detector makes ten times slower.
func withoutRace(t *testing.T) {
	t.Helper()
	if raceEnabled {
		t.Skip("one goroutine: runs without the race detector")
	}
}

// fewerChecks has the rapid checks of t try fewer cases where each takes an order of magnitude longer.
func fewerChecks(t *testing.T) {
	t.Helper()
	const name = "rapid.checks"
	all := flag.Lookup(name).Value.String()
	n, err := strconv.Atoi(all)
	if err != nil {
		t.Fatal(err)
	}
	set := func(v string) {
		if err := flag.Set(name, v); err != nil {
			t.Fatal(err)
		}
	}
	set(strconv.Itoa(max(fewer(n), 1)))
	t.Cleanup(func() { set(all) })
}
