package fvd

import (
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
					err := runFaults(newRig(t, s), in, work)
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
