package fvd

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/storage"
)

// tornFile notes what is written to a file between its syncs, a sector at a time.
type tornFile struct {
	*storage.Memory
	before  *storage.Memory // as of the last sync
	pending []tornSector    // written since
	epochs  [][]tornSector  // the same for every sync before
	bases   []*storage.Memory
}

type tornSector struct {
	off int64
	p   []byte
}

func newTornFile(f *storage.Memory) *tornFile {
	return &tornFile{Memory: f, before: clone(f)}
}

func (f *tornFile) WriteAt(p []byte, off int64) (int, error) {
	for done := int64(0); done < int64(len(p)); done += sectorSize {
		f.pending = append(f.pending, tornSector{off + done, bytes.Clone(p[done : done+sectorSize])})
	}
	return f.Memory.WriteAt(p, off)
}

func (f *tornFile) Sync() error {
	f.epochs, f.bases = append(f.epochs, f.pending), append(f.bases, f.before)
	f.pending, f.before = nil, clone(f.Memory)
	return nil
}

// crashes calls fn with what a crash may leave at every moment: everything up to a sync, and any sectors of what was
// written until the next. There are at most limit states a sync.
func (f *tornFile) crashes(limit int, fn func(left *storage.Memory)) {
	if len(f.pending) > 0 {
		if err := f.Sync(); err != nil {
			panic(err)
		}
	}
	rng := rand.New(rand.NewPCG(1, 2))
	for i, sectors := range f.epochs {
		var differ []tornSector // the others change nothing
		for _, s := range sectors {
			p := make([]byte, sectorSize)
			if err := storage.ReadFull(f.bases[i], p, s.off); err != nil {
				panic(err)
			}
			if !bytes.Equal(p, s.p) {
				differ = append(differ, s)
			}
		}
		all := 1 << min(len(differ), 20)
		for n := range min(all, limit) {
			keep := n
			if all > limit {
				keep = rng.IntN(all)
			}
			left := clone(f.bases[i])
			for k, s := range differ {
				if keep>>k&1 == 1 {
					if _, err := left.WriteAt(s.p, s.off); err != nil {
						panic(err)
					}
				}
			}
			fn(left)
		}
	}
	fn(clone(f.Memory))
}

// amendCase is an image and a change of its header.
type amendCase struct {
	name     string
	header   func(*Header) // what the image has before
	settings []Setting
}

func amendCases() []amendCase {
	long := func(c string) string { return strings.Repeat(c, 1000) }
	detached := func(h *Header) { h.FullyPrefetched = true }
	return []amendCase{
		{"one field", nil, []Setting{{"copy_on_read", "on"}, {"bytes_per_prefetch", "65536"}}},
		{"base image", nil, []Setting{{"base_img", "other"}, {"base_img_fmt", "qcow2"}}},
		{"long name", func(h *Header) { h.BaseImage = long("a") }, []Setting{{"base_img", long("b")}}},
		{"shorter name", func(h *Header) { h.BaseImage = long("a") }, []Setting{{"base_img", "b"}}},
		{"no base image any more", detached, []Setting{{"base_img", ""}}},
		{"no base image any more, long name", func(h *Header) { detached(h); h.BaseImage = long("a") }, []Setting{{"base_img", ""}}},
		{"far apart", nil, []Setting{{"base_img", long("b")}, {"base_img_fmt", "raw"}, {"storage_grow_unit", "1000000"}, {"journal_buf_size", "0"}}},
	}
}

// amendable makes the image of a case.
func amendable(t testing.TB, c amendCase, compact bool) *storage.Memory {
	base := newBase(64 << 10)
	o := smallCompact(8 << 10)
	o.Compact, o.Base, o.BaseImage = compact, base, "base"
	f := made(t, o)
	h, err := ReadHeader(f)
	must(t, err)
	if c.header != nil {
		c.header(h)
	}
	b, err := h.encode()
	must(t, err)
	_, err = f.WriteAt(b, 0)
	must(t, err)
	return f
}

// TestAmendIsAtomic: a crash in the middle of a change of the header, or of what an open does about such a crash,
// leaves the old header or the new one.
func TestAmendIsAtomic(t *testing.T) {
	for _, c := range amendCases() {
		for _, compact := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, compact %v", c.name, compact), func(t *testing.T) {
				f := amendable(t, c, compact)
				old, err := ReadHeader(f)
				must(t, err)
				torn := newTornFile(f)
				must(t, Amend(torn, c.settings))
				amended, err := ReadHeader(f)
				must(t, err)
				if *old == *amended {
					t.Fatal("nothing changed")
				}
				states := 0
				torn.crashes(64, func(left *storage.Memory) {
					states++
					h, err := ReadHeader(left)
					if err != nil || *h != *old && *h != *amended {
						t.Fatalf("after a crash: %+v, %v", h, err)
					}
					if states%8 != 1 { // the rest costs more
						return
					}
					reopen := newTornFile(left)
					openAfterAmend(t, reopen, h)
					reopen.crashes(4, func(left *storage.Memory) {
						again, err := ReadHeader(left)
						if err == nil { // what changes while an image is open
							again.CleanShutdown, again.StableEpoch = h.CleanShutdown, h.StableEpoch
						}
						if err != nil || *again != *h {
							t.Fatalf("after a crash while it was opened: %+v, %v", again, err)
						}
					})
					must(t, Amend(left, []Setting{{"prefetch_start_delay", "77"}}))
					after, err := ReadHeader(left)
					must(t, err)
					if after.PrefetchStartDelay != 77 || after.BaseImage != h.BaseImage {
						t.Fatalf("amended again: %+v", after)
					}
				})
				t.Logf("%d states", states)
			})
		}
	}
}

// openAfterAmend opens an image whose header was found to be h, writes to it and closes it.
func openAfterAmend(t *testing.T, f storage.File, h *Header) {
	var o Options
	if h.BaseImage != "" {
		o.Base = newBase(64 << 10)
	}
	im := opened(t, f, o)
	if got := im.Header(); got != *h {
		t.Fatalf("open: header %+v, want %+v", got, h)
	}
	put(t, im, 0, filled(1, 4096))
	must(t, im.Flush())
	must(t, im.Close())
	after, err := ReadHeader(f)
	must(t, err)
	if !after.CleanShutdown || after.BaseImage != h.BaseImage {
		t.Fatalf("after use: %+v", after)
	}
}

// TestOfflineFaults makes every operation of Amend and of a repair fail in turn: what is left can be amended, repaired
// and opened, and an amended header is the old one or the new one.
func TestOfflineFaults(t *testing.T) {
	var list []crashlab.Fault
	for _, text := range []string{"write:1:EIO", "write:1:short=512", "sync:1:EIO", "read:1:EIO", "punch:1:EIO", "truncate:1:EIO", "extents:1:EIO"} {
		f, err := crashlab.ParseFault(text)
		must(t, err)
		list = append(list, f)
	}
	for _, c := range amendCases() {
		must(t, crashlab.ForEachFault(list, 200, func(in *crashlab.Injector) error {
			f := amendable(t, c, true)
			old, err := ReadHeader(f)
			must(t, err)
			done := clone(f)
			must(t, Amend(done, c.settings))
			amended, err := ReadHeader(done)
			must(t, err)
			amendErr := Amend(in.Wrap(f), c.settings)
			if in.Hits() == 0 {
				return amendErr
			}
			h, err := ReadHeader(f)
			if err != nil {
				return err
			}
			if *h != *amended && (amendErr == nil || *h != *old) {
				return fmt.Errorf("amended with error %v: %+v", amendErr, h)
			}
			openAfterAmend(t, f, h)
			return Amend(f, c.settings)
		}))
	}
	must(t, crashlab.ForEachFault(list, 200, func(in *crashlab.Injector) error {
		f, base := damaged(t, func(f *storage.Memory, h *Header) {
			setEntry(t, f, h, 3, 7)
			setEntry(t, f, h, 4, 0x7FFFFFF0)
			setEntry(t, f, h, 5, 5|1<<31)
			h.CleanShutdown = false
			b, err := h.encode()
			must(t, err)
			_, err = f.WriteAt(b, 0)
			must(t, err)
		})
		res, err := Check(in.Wrap(f), CheckOptions{Repair: RepairAll})
		if in.Hits() == 0 && err != nil {
			return err
		}
		if err == nil && res.Corruptions > 0 {
			return fmt.Errorf("not repaired: %+v", res)
		}
		if res, err = Check(f, CheckOptions{Repair: RepairAll}); err != nil || res.Corruptions > 0 {
			return fmt.Errorf("repairing again: %+v, %w", res, err)
		}
		im, err := Open(f, Options{Base: base})
		if err != nil {
			return err
		}
		want := make([]byte, im.Size())
		if _, err := base.f.ReadAt(want[:base.Size()], 0); err != nil {
			return err
		}
		for i := range 16 {
			copy(want[i*4096:], filled(byte(i+1), 4096))
		}
		copy(want[3*4096:], filled(8, 4096)) // the damage
		copy(want[4*4096:], make([]byte, 4096))
		if err := diff(get(t, im, 0, im.Size()), want); err != nil {
			return err
		}
		return im.Close()
	}))
}
