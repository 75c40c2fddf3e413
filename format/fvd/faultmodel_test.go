package fvd

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/storage"
	"pgregory.net/rapid"
)

// clustered is a data device that keeps its bytes in clusters, as a qcow2 image does, in a file that may fail: a request
// that fails may have been made in some of its clusters, and space is given back by whole ones.
type clustered struct {
	*ram
	file storage.File
}

const clusterSize = 8192

// pieces calls fn for the part of [off, off+n) in each cluster until it fails.
func pieces(off, n int64, fn func(from, to int64) error) error {
	for from := off; from < off+n; {
		to := min(off+n, roundDown(from, clusterSize)+clusterSize)
		if err := fn(from, to); err != nil {
			return err
		}
		from = to
	}
	return nil
}

func (d clustered) ReadAt(p []byte, off int64) (int, error) { return d.file.ReadAt(p, off) }
func (d clustered) TryReadAt([]byte, int64) error           { return block.ErrWouldBlock }
func (d clustered) Flush() error                            { return d.file.Sync() }

func (d clustered) WriteAt(p []byte, off int64) (int, error) {
	n := 0
	err := pieces(off, int64(len(p)), func(from, to int64) error {
		done, err := d.file.WriteAt(p[from-off:to-off], from)
		n += done
		return err
	})
	return n, err
}

func (d clustered) WriteZeroes(off, n int64, flags block.ZeroFlags) error {
	if flags&block.FastOnly != 0 && (off%clusterSize != 0 || n%clusterSize != 0) {
		return errors.ErrUnsupported
	}
	return pieces(off, n, func(from, to int64) error {
		if to-from < clusterSize {
			_, err := d.file.WriteAt(make([]byte, to-from), from)
			return err
		}
		return d.file.PunchHole(from, to-from)
	})
}

func (d clustered) Discard(off, n int64) error {
	return pieces(off, n, func(from, to int64) error {
		if to-from < clusterSize {
			return nil
		}
		return d.file.PunchHole(from, to-from)
	})
}

func (d clustered) Resize(size int64, _ block.Preallocation) error {
	if size < d.Size() {
		return errors.ErrUnsupported
	}
	return d.file.Truncate(size)
}

func (d clustered) Limits() block.Limits { return block.Limits{Preferred: clusterSize} }

// both makes two changes at once: where they meet, either may be the one that is left.
func (f *faultRun) both(tags [2]byte, off, n [2]int64) error {
	var wg sync.WaitGroup
	var errs [2]error
	f.issued(tags, off, n)
	for i := range 2 {
		wg.Go(func() { _, errs[i] = f.r.im.WriteAt(bytes.Repeat(tags[i:i+1], int(n[i])), off[i]) })
	}
	wg.Wait()
	if f.broken != nil && (errs[0] == nil || errs[1] == nil) {
		return fmt.Errorf("a change succeeded after a flush had failed with: %w", f.broken)
	}
	for s := range int64(len(f.live)) {
		was := f.live[s]
		var now []byte
		sure := false // one of the two was made, whatever was there is gone
		for i := range 2 {
			if s*512 < off[i] || s*512 >= off[i]+n[i] {
				continue
			}
			now, sure = append(now, tags[i]), sure || errs[i] == nil
		}
		if sure {
			was = nil
		}
		f.live[s] = append(was, now...)
	}
	return nil
}

func (f *faultRun) issued(tags [2]byte, off, n [2]int64) {
	for i := range 2 {
		for s := off[i] / 512; s < (off[i]+n[i])/512; s++ {
			f.allowed[s] = append(f.allowed[s], tags[i])
		}
	}
}

// TestModelUnderFaults runs random requests on random shapes, odd blocks and data devices with clusters among them,
// while an operation on the files fails. A request that fails may have been made in any of its sectors; what was
// answered, and what nobody wrote, is as it should be, in use and afterwards.
func TestModelUnderFaults(t *testing.T) {
	hits := 0
	rapid.Check(t, func(t *rapid.T) {
		s := drawShape(t)
		if s.create.JournalSize < 0 { // such an image promises nothing until it is closed, and a failure keeps it from that
			s.create.JournalSize = 0
		}
		kind := rapid.SampledFrom([]string{"write", "write", "sync", "read", "punch", "zero", "truncate", "extents"}).Draw(t, "kind")
		actions := []string{"EIO", "ENOSPC", "EOPNOTSUPP"}
		if kind == "write" {
			actions = append(actions, "short=512", "short=1536", "short=8192")
		}
		text := fmt.Sprintf("%s:%d%s:%s", kind, rapid.IntRange(1, 40).Draw(t, "n"), rapid.SampledFrom([]string{"", "", "+"}).Draw(t, "onward"),
			rapid.SampledFrom(actions).Draw(t, "action"))
		fault, err := crashlab.ParseFault(text)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%v, fault %s", s, text)
		in := crashlab.NewInjector(fault)
		err = runFaults(newRig(t, s), in, func(f *faultRun) error {
			sectors, last := int(s.create.Size/512), 0
			span := func() (off, n int64) { // often where the last one was
				at := rapid.IntRange(0, sectors-1).Draw(t, "sector")
				if rapid.Bool().Draw(t, "near") {
					at = max(0, min(sectors-1, last+rapid.IntRange(-20, 20).Draw(t, "away")))
				}
				last = at
				most := rapid.SampledFrom([]int{1, 4, 30, 400}).Draw(t, "most")
				return int64(at) * 512, 512 * int64(rapid.IntRange(1, min(most, sectors-at)).Draw(t, "n"))
			}
			tag := byte(1)
			for range rapid.IntRange(3, 25).Draw(t, "requests") {
				var err error
				tag += 2
				switch rapid.SampledFrom([]string{"write", "write", "write", "both", "zero", "soft", "flush", "checkpoint", "read"}).Draw(t, "request") {
				case "write":
					off, n := span()
					err = f.write(tag, off, n)()
				case "both":
					var off, n [2]int64
					off[0], n[0] = span()
					off[1], n[1] = span()
					tag += 2
					err = f.both([2]byte{tag - 2, tag}, off, n)
				case "zero":
					off, n := span()
					err = f.zero(off, n)()
				case "soft":
					if base := f.r.im.BaseSize(); base > 0 {
						off, n := span()
						off = min(off, base-1)
						err = f.soft(off, min(n, base-off))()
					}
				case "flush":
					err = f.flush()
				case "checkpoint":
					err = ignoring(f.r.im.Checkpoint)()
				case "read":
					err = f.read()
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
		hits += in.Hits()
		if err != nil {
			t.Fatal(err)
		}
	})
	if hits < 10 {
		t.Errorf("only %d faults were met", hits)
	}
}
