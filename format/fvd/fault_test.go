package fvd

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/crashlab"
)

// faultRun uses an image on files that fail and remembers what each sector may hold: values are those of its first
// byte, a tag that fills the whole sector or the beginning of what the sector held at first.
type faultRun struct {
	r       *rig
	first   []byte   // the disk as it was found
	live    [][]byte // by sector: what a read may return. A change that failed may have been made or not, in each sector
	allowed [][]byte // by sector: what may be there afterwards: what it read as when a flush last succeeded, or the tag of anything issued since
	broken  error    // a flush failed with it: nothing may succeed any more
}

// newFaultRun remembers the disk of r as it should be.
func newFaultRun(r *rig) *faultRun {
	f := &faultRun{r: r, first: bytes.Clone(r.want)}
	for i := 0; i < len(r.want); i += 512 {
		f.live, f.allowed = append(f.live, []byte{r.want[i]}), append(f.allowed, []byte{r.want[i]})
	}
	return f
}

// do is one change of [off, off+n) to tag.
func (f *faultRun) do(tag byte, off, n int64, change func() error) error {
	for s := off / 512; s < (off+n)/512; s++ {
		f.allowed[s] = append(f.allowed[s], tag)
	}
	err := change()
	if err == nil && f.broken != nil {
		return fmt.Errorf("a change succeeded after a flush had failed with: %w", f.broken)
	}
	for s := off / 512; s < (off+n)/512; s++ {
		if err == nil {
			f.live[s] = nil
		}
		f.live[s] = append(f.live[s], tag)
	}
	return nil
}

// holds wants sector s of a disk, p, to be one of the values.
func (f *faultRun) holds(s int64, p, values []byte) error {
	if bytes.IndexByte(values, p[0]) < 0 {
		return fmt.Errorf("sector %d holds %#x, want one of %#x", s, p[0], values)
	}
	start := f.first[min(int64(len(f.first)), s*512):min(int64(len(f.first)), (s+1)*512)]
	if bytes.Count(p, p[:1]) != len(p) && !bytes.Equal(p, start) {
		return fmt.Errorf("sector %d is a mixture that begins with %#x", s, p[0])
	}
	return nil
}

// read compares the disk with what was answered.
func (f *faultRun) read() error {
	now := make([]byte, len(f.live)*512)
	if _, err := f.r.im.ReadAt(now, 0); err != nil {
		return nil // it was made to fail
	}
	for s, values := range f.live {
		if err := f.holds(int64(s), now[s*512:(s+1)*512], values); err != nil {
			return fmt.Errorf("in use: %w", err)
		}
	}
	return nil
}

func (f *faultRun) flush() error {
	// What the disk reads as now is what a flush that succeeds makes last.
	now := make([]byte, f.r.im.Size())
	if _, err := f.r.im.ReadAt(now, 0); err != nil {
		return nil // a read that was made to fail: no statement
	}
	err := f.r.im.Flush()
	if err != nil {
		f.broken = err
		return nil
	}
	if f.broken != nil {
		return fmt.Errorf("a flush succeeded after one had failed with: %w", f.broken)
	}
	for s := range f.allowed {
		f.allowed[s] = []byte{now[s*512]}
	}
	return nil
}

func (f *faultRun) write(tag byte, off, n int64) func() error {
	return func() error {
		return f.do(tag, off, n, func() error {
			_, err := f.r.im.WriteAt(bytes.Repeat([]byte{tag}, int(n)), off)
			return err
		})
	}
}

func (f *faultRun) zero(off, n int64) func() error {
	return func() error {
		return f.do(0, off, n, func() error { return f.r.im.WriteZeroes(off, n, block.MayUnmap) })
	}
}

func (f *faultRun) soft(off, n int64) func() error {
	return func() error {
		p := make([]byte, n)
		if f.r.im.ReadBase(p, off) == nil {
			_, err := f.r.im.Populate(p, off)
			if err == nil && f.broken != nil {
				return fmt.Errorf("a copy was kept after a flush had failed with: %w", f.broken)
			}
		}
		return nil
	}
}

// TestFaults makes every operation fail in turn: nothing panics or hangs, nothing flushed is lost, a failed flush
// sticks, and what the process leaves behind opens again.
func TestFaults(t *testing.T) {
	faults := []string{"write:1:EIO", "write:1:ENOSPC", "write:1:short=512", "sync:1:EIO", "sync:1+:EIO", "read:1:EIO", "punch:1:EIO",
		"punch:1+:EOPNOTSUPP", "zero:1+:EOPNOTSUPP", "truncate:1:EIO", "truncate:1+:ENOSPC", "extents:1:EIO"}
	var list []crashlab.Fault
	for _, text := range faults {
		f, err := crashlab.ParseFault(text)
		must(t, err)
		list = append(list, f)
	}
	compact := CreateOptions{Size: 256 << 10, Compact: true, BlockSize: 4 << 10, ChunkSize: 16 << 10, GrowUnit: 64 << 10, JournalSize: 8 << 10, JournalBuffer: -1}
	buffered := compact
	buffered.JournalBuffer = 0
	overlay := CreateOptions{Size: 256 << 10, BlockSize: 4 << 10, JournalSize: 8 << 10, JournalBuffer: -1}
	shapes := []shape{
		{create: compact, base: 100 << 10, data: "file"},
		{create: overlay, base: 200 << 10},
		{create: compact, base: -1},
		{create: buffered, base: 100 << 10},
		{create: buffered, base: 100 << 10, data: "file", open: Options{Writethrough: true}},
		{create: compact, base: 100 << 10, data: "device"},
	}
	if raceEnabled { // every fault is a run of its own
		shapes = shapes[:1]
	}
	requests := func(f *faultRun) error {
		return script(
			f.write(0x81, 0, 512), f.write(0x83, 20<<10, 40<<10), f.flush,
			f.soft(64<<10, 16<<10), f.write(0x85, 66<<10, 1024), f.zero(16<<10, 32<<10), f.flush,
			f.write(0x87, 17<<10, 512), f.zero(16<<10, 16<<10), f.write(0x89, 128<<10, 512), ignoring(f.r.im.Checkpoint), f.flush,
			f.write(0x8B, 200<<10, 20<<10), f.write(0x8D, 0, 1024), f.zero(0, 64<<10), f.write(0x8F, 16<<10, 512),
		)
	}
	for _, s := range shapes {
		t.Run(s.String(), func(t *testing.T) {
			must(t, crashlab.ForEachFault(list, 200, func(in *crashlab.Injector) error { return runFaults(newRig(t, s), in, requests) }))
		})
	}
}

// runFaults opens the image of r on files that fail, has work use and close it, and judges what is left.
func runFaults(r *rig, in *crashlab.Injector, work func(*faultRun) error) error {
	if err := r.im.Close(); err != nil {
		return err
	}
	f := newFaultRun(r)
	o := r.options()
	if o.Data != nil {
		o.Data = in.Wrap(o.Data)
	}
	if o.DataDevice != nil {
		o.DataDevice = clustered{&ram{f: r.data}, in.Wrap(r.data)}
	}
	im, err := Open(in.Wrap(r.meta), o)
	if err == nil {
		r.im = im
		if err := errors.Join(work(f), f.read()); err != nil {
			return err
		}
		err = im.Close()
	}
	if err != nil && in.Hits() == 0 {
		return err
	}
	if err := r.reopen(); err != nil {
		return fmt.Errorf("opening again: %w", err)
	}
	return f.judge()
}

// judge wants each sector to hold what it may, what the disk grew by to be zero, and the image to be in order.
func (f *faultRun) judge() error {
	r := f.r
	disk := make([]byte, r.im.Size())
	if _, err := r.im.ReadAt(disk, 0); err != nil {
		return err
	}
	for s, allowed := range f.allowed {
		if err := f.holds(int64(s), disk[s*512:(s+1)*512], allowed); err != nil {
			return fmt.Errorf("opened again: %w", err)
		}
	}
	if len(bytes.Trim(disk[len(r.want):], "\x00")) > 0 {
		return errors.New("the disk does not grow with zeros")
	}
	if err := errors.Join(r.im.Audit(), r.im.Close()); err != nil {
		return err
	}
	o := r.options()
	res, err := Check(r.meta, CheckOptions{Data: o.Data, DataDevice: o.DataDevice})
	if err == nil && res.Corruptions > 0 { // chunks that could not be punched may leak
		err = fmt.Errorf("the checker found %v", res.Findings)
	}
	return err
}

// ignoring runs a request whose failure is not judged.
func ignoring(fn func() error) func() error {
	return func() error {
		_ = fn()
		return nil
	}
}
