package fvd

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/platter-disk/platter/crashlab"
)

// TestFaultsOfRareChanges makes every operation of growth, of a table that moves, of emptying and of detaching fail in
// turn: nothing flushed is lost, what stuck sticks, and what is left opens and checks clean.
func TestFaultsOfRareChanges(t *testing.T) {
	var list []crashlab.Fault
	for _, text := range []string{"write:1:EIO", "write:1:short=512", "sync:1:EIO", "punch:1:EIO", "punch:1+:EOPNOTSUPP", "truncate:1:EIO", "zero:1+:EOPNOTSUPP"} {
		f, err := crashlab.ParseFault(text)
		must(t, err)
		list = append(list, f)
	}
	compact := CreateOptions{Size: 256 << 10, Compact: true, BlockSize: 4 << 10, ChunkSize: 4 << 10, GrowUnit: 64 << 10, JournalSize: 64 << 10, JournalBuffer: -1}
	plain := compact
	plain.PlainJournal = true
	overlay := CreateOptions{Size: 256 << 10, BlockSize: 4 << 10, JournalSize: 8 << 10}
	shapes := []shape{
		{create: compact, base: 100 << 10},
		{create: plain, base: 100 << 10, data: "file"},
		{create: overlay, base: 200 << 10},
		{create: overlay, base: 200 << 10, data: "file"},
	}
	if raceEnabled { // every fault is a run of its own
		shapes = shapes[:1]
	}
	works := map[string]func(f *faultRun) error{
		"grow": func(f *faultRun) error {
			return script(f.write(0x81, 0, 20<<10), f.flush, f.change(func() error { return f.r.im.Resize(5<<20, 0) }),
				f.write(0x83, 200<<10, 40<<10), f.flush, f.change(func() error { return f.r.im.Resize(6<<20, 0) }), f.write(0x85, 0, 512), f.flush)
		},
		"empty": func(f *faultRun) error {
			return script(f.write(0x81, 0, 20<<10), f.write(0x83, 64<<10, 4<<10), f.write(0x85, 220<<10, 512), f.flush, f.commit,
				f.change(f.r.im.Empty), f.write(0x87, 8<<10, 1024), f.flush, f.commit, f.change(f.r.im.Empty), f.write(0x89, 64<<10, 512), f.flush)
		},
		"detach": func(f *faultRun) error {
			return script(f.write(0x81, 6<<10, 20<<10), f.flush, f.soft(0, f.r.im.BaseSize()), f.change(f.r.im.DetachBase),
				f.write(0x83, 64<<10, 1024), f.flush, f.zero(0, 64<<10), f.flush)
		},
	}
	for name, work := range works {
		for _, s := range shapes {
			t.Run(name+" "+s.String(), func(t *testing.T) {
				hits := 0
				must(t, crashlab.ForEachFault(list, 200, func(in *crashlab.Injector) error {
					err := rareChanges(newRig(t, s), in, work)
					hits += in.Hits()
					return err
				}))
				if hits < 10 {
					t.Errorf("%d faults were met", hits)
				}
			})
		}
	}
}

// change is one that no sector shows.
func (f *faultRun) change(fn func() error) func() error {
	return func() error {
		if err := fn(); err == nil && f.broken != nil {
			return fmt.Errorf("a change succeeded after a flush had failed with: %w", f.broken)
		}
		return nil
	}
}

// commit writes what the disk reads as to the base image. Blocks that no flush covers may be of either.
func (f *faultRun) commit() error {
	d := f.r.baseDev
	p := make([]byte, d.Size())
	if _, err := f.r.im.ReadAt(p, 0); err != nil {
		return err
	}
	_, err := d.f.WriteAt(p, 0)
	return err
}

func rareChanges(r *rig, in *crashlab.Injector, work func(*faultRun) error) error {
	if err := r.im.Close(); err != nil {
		return err
	}
	f := &faultRun{r: r}
	for i := 0; i < len(r.want); i += 512 {
		f.allowed = append(f.allowed, []byte{r.want[i]})
	}
	o := r.options()
	if o.Data != nil {
		o.Data = in.Wrap(o.Data)
	}
	im, err := Open(in.Wrap(r.meta), o)
	if err == nil {
		r.im = im
		if err := work(f); err != nil {
			return err
		}
		if err := im.Close(); err != nil && in.Hits() == 0 {
			return err
		}
	} else if in.Hits() == 0 {
		return err
	}
	if im, err = Open(r.meta, r.options()); err != nil {
		return fmt.Errorf("opening again: %w", err)
	}
	disk := make([]byte, len(r.want))
	if _, err := im.ReadAt(disk, 0); err != nil {
		return err
	}
	for s, allowed := range f.allowed {
		if got := disk[s*512]; bytes.IndexByte(allowed, got) < 0 {
			return fmt.Errorf("sector %d holds %#x, want one of %#x", s, got, allowed)
		}
	}
	if size := im.Size(); size > int64(len(r.want)) {
		grown := make([]byte, size-int64(len(r.want)))
		if _, err := im.ReadAt(grown, int64(len(r.want))); err != nil || len(bytes.Trim(grown, "\x00")) > 0 {
			return fmt.Errorf("the disk does not grow with zeros, %w", errors.Join(err))
		}
	}
	if err := errors.Join(im.Audit(), im.Close()); err != nil {
		return err
	}
	res, err := Check(r.meta, CheckOptions{Data: r.options().Data})
	if err == nil && res.Corruptions > 0 { // chunks that could not be punched may leak
		err = fmt.Errorf("the checker found %v", res.Findings)
	}
	return err
}
