package fvd

import (
	"slices"
	"strings"
	"testing"

	"github.com/platter-disk/platter/storage"
)

// finding returns the findings of a kind.
func finding(res *CheckResult, kind FindingKind) (all []Finding) {
	for _, f := range res.Findings {
		if f.Kind == kind {
			all = append(all, f)
		}
	}
	return all
}

// checked is Check of an image that can be checked.
func checked(t *testing.T, f storage.File, r Repair) *CheckResult {
	t.Helper()
	res, err := Check(f, CheckOptions{Repair: r})
	must(t, err)
	return res
}

// putHeader replaces the header of an image that nobody has open.
func putHeader(t *testing.T, f storage.File, h *Header) {
	t.Helper()
	b, err := h.encode()
	must(t, err)
	_, err = f.WriteAt(b, 0)
	must(t, err)
}

// TestLeaksAreKeptForDamagedTables: repairing leaks never takes the chunk away that a damaged entry, or a record that
// cannot be read, should name.
func TestLeaksAreKeptForDamagedTables(t *testing.T) {
	spoiled := func(e uint32) func(f *storage.Memory, h *Header) {
		return func(f *storage.Memory, h *Header) { setEntry(t, f, h, 3, e) }
	}
	for _, c := range []struct {
		name  string
		spoil func(f *storage.Memory, h *Header)
		says  string // what a full repair says of the entry
	}{
		{"outside", spoiled(0x1388), "bytes 12288 to 16383 of the disk reads as zeros from now on"},
		{"duplicate", spoiled(7), "now it names a copy"},
		{"metadata", func(f *storage.Memory, h *Header) { // the table in the data area, over chunk 40
			at := h.DataOffset + 40*4096
			must(t, f.Truncate(int64(h.DataOffset)+64*4096))
			p := make([]byte, h.TableSize)
			must(t, storage.ReadFull(f, p, int64(h.TableOffset)))
			_, err := f.WriteAt(p, int64(at))
			must(t, err)
			h.Features |= FeatureTableInData
			h.TableOffset = at
			putHeader(t, f, h)
			setEntry(t, f, h, 3, 40)
		}, "bytes 12288 to 16383 of the disk reads as zeros from now on"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, base := damaged(t, c.spoil)
			h, err := ReadHeader(f)
			must(t, err)
			all := checked(t, clone(f), RepairAll)
			if all.Corruptions != 0 || all.Leaks != 0 || all.LeaksFixed != 1 || !strings.Contains(all.Findings[0].Text, c.says) {
				t.Errorf("full repair: %+v, want %q", all, c.says)
			}
			res := checked(t, f, RepairLeaks)
			if res.Leaks != 1 || res.LeaksFixed != 0 || res.Corruptions != 1 {
				t.Errorf("repairing leaks: %+v", res)
			}
			if kept := finding(res, FindingLeak); len(kept) != 1 || kept[0].Fixed || !strings.Contains(kept[0].Text, "kept, as the table is damaged") {
				t.Errorf("findings: %+v", res.Findings)
			}
			setEntry(t, f, h, 3, 3) // what somebody who knows would do
			im := opened(t, f, Options{Base: base})
			must(t, diff(get(t, im, 3*4096, 4096), filled(4, 4096)))
			must(t, im.Close())
		})
	}
	t.Run("journal", func(t *testing.T) {
		f, _ := damaged(t, func(f *storage.Memory, h *Header) {
			setEntry(t, f, h, 3, 0xFFFFFFFF)
			_, err := f.WriteAt(journalSector(h, h.StableEpoch+1, []byte("what is this?")), int64(h.JournalOffset))
			must(t, err)
		})
		res := checked(t, f, RepairLeaks)
		if res.Leaks != 1 || res.LeaksFixed != 0 || !strings.Contains(finding(res, FindingLeak)[0].Text, "kept, as the journal is damaged") {
			t.Errorf("repairing leaks: %+v", res)
		}
		if res = checked(t, f, RepairAll); res.LeaksFixed != 1 || res.Corruptions != 0 {
			t.Errorf("full repair: %+v", res)
		}
	})
}

// journalSector is a sealed sector with these records.
func journalSector(h *Header, generation uint64, records []byte) []byte {
	sec := make([]byte, sectorSize)
	sealSector(sec, copy(sec, records), h.Features&FeatureJournalTrailer != 0, epoch(generation), castagnoliTable())
	return sec
}

// TestStrayBitsAreFoundEverywhere: nothing may be set in what is left of the bitmap region, and repair clears it.
func TestStrayBitsAreFoundEverywhere(t *testing.T) {
	base := newBase(100 << 10) // 25 blocks
	for _, at := range []int64{3, 4, 8, 100, 4095, 4096, 9000, 5*4096 - 1} {
		o := CreateOptions{Size: 256 << 10, BlockSize: 4096, JournalSize: 8192, Base: base, BaseImage: "base"}
		f := made(t, o)
		im := opened(t, f, Options{Base: borrowedDevice{base}})
		put(t, im, 0, filled(1, 4096))
		must(t, im.Close())
		h, err := ReadHeader(f)
		must(t, err)
		size, err := f.Size()
		must(t, err)
		p := make([]byte, 5*4096) // the bitmap gets a region with room to spare, behind the data
		must(t, storage.ReadFull(f, p[:4096], int64(h.BitmapOffset)))
		h.BitmapOffset, h.BitmapSize = uint64(roundUp(size, pageSize)), 5*4096
		_, err = f.WriteAt(p, int64(h.BitmapOffset))
		must(t, err)
		putHeader(t, f, h)
		if res := checked(t, f, RepairNone); len(res.Findings) > 0 {
			t.Fatalf("nothing is wrong: %+v", res.Findings)
		}
		_, err = f.WriteAt([]byte{0x80}, int64(h.BitmapOffset)+at)
		must(t, err)
		if res := checked(t, f, RepairNone); res.Corruptions != 1 || len(finding(res, FindingStrayBits)) != 1 {
			t.Errorf("bit in byte %d: %+v", at, res)
		}
		if res := checked(t, f, RepairAll); res.Corruptions != 0 || res.CorruptionsFixed != 1 {
			t.Errorf("repair of byte %d: %+v", at, res)
		}
		must(t, storage.ReadFull(f, p, int64(h.BitmapOffset)))
		if p[0] != 1 || slices.ContainsFunc(p[1:], func(b byte) bool { return b != 0 }) {
			t.Errorf("byte %d: the bitmap is % x ... after the repair", at, p[:8])
		}
		im = opened(t, f, Options{Base: borrowedDevice{base}})
		must(t, diff(get(t, im, 0, 4096), filled(1, 4096)))
		must(t, im.Close())
	}
}

// TestJournalOfCleanImage: records that would count although the image was closed cleanly are found, and a repair, cut
// short anywhere, never brings them to life.
func TestJournalOfCleanImage(t *testing.T) {
	table := func(e uint64) []byte {
		return append(appendTableHead(nil, epoch(e), 1, 2), 9, 0, 0, 0x80) // chunk 2 at 9
	}
	for _, c := range []struct {
		name    string
		plain   bool
		records func(h *Header) []byte
		bad     int64
	}{
		{"table", false, func(h *Header) []byte { return table(h.StableEpoch + 5) }, 1},
		{"bits", false, func(*Header) []byte { return appendBitmapRecord(nil, 24*8, 8) }, 1},
		{"plain table", true, func(h *Header) []byte { return table(h.StableEpoch + 5) }, 1},
		{"outdated table", true, func(h *Header) []byte { return table(h.StableEpoch) }, 0},
		{"plain bits", true, func(*Header) []byte { return appendBitmapRecord(appendBitmapRecord(nil, 0, 8), 24*8, 8) }, 1},
		{"plain bits that are set", true, func(*Header) []byte { return appendBitmapRecord(nil, 0, 16*8) }, 0},
		{"rubbish", true, func(*Header) []byte { return []byte("rubbish") }, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			base := newBase(100 << 10)
			o := smallCompact(64 << 10)
			o.Base, o.BaseImage, o.PlainJournal = base, "base", c.plain
			f := made(t, o)
			im := opened(t, f, Options{Base: borrowedDevice{base}})
			put(t, im, 0, filled(1, 64<<10))
			must(t, im.Close())
			if res := checked(t, f, RepairNone); len(res.Findings) > 0 {
				t.Fatalf("nothing is wrong: %+v", res.Findings)
			}
			h, err := ReadHeader(f)
			must(t, err)
			_, err = f.WriteAt(journalSector(h, h.StableEpoch+5, c.records(h)), int64(h.JournalOffset)+9*sectorSize)
			must(t, err)
			res := checked(t, f, RepairNone)
			if res.Corruptions != c.bad || int64(len(finding(res, FindingJournal))) != c.bad {
				t.Errorf("check: %+v", res)
			}
			if c.bad == 0 {
				return
			}
			want := append(filled(1, 64<<10), contents(t, base.f)[64<<10:]...)
			for fail := 1; ; fail++ {
				left := clone(f)
				whole := repairFailing(t, left, fail)
				im := opened(t, left, Options{Base: borrowedDevice{base}})
				must(t, diff(get(t, im, 0, int64(len(want))), want))
				must(t, im.Close())
				if whole {
					if res := checked(t, left, RepairNone); len(res.Findings) > 0 {
						t.Errorf("after the repair: %+v", res.Findings)
					}
					return
				}
			}
		})
	}
}

// TestPrefetchedTooEarly: an image that says it needs no base image, while blocks live there, is found; repair has it
// need the base image again.
func TestPrefetchedTooEarly(t *testing.T) {
	f, base := damaged(t, func(f *storage.Memory, h *Header) {
		h.FullyPrefetched, h.PrefetchSlots, h.BytesPerPrefetch = true, 0, 1 // nobody looks at the latter then
		putHeader(t, f, h)
	})
	res := checked(t, f, RepairNone)
	if got := finding(res, FindingPrefetched); res.Corruptions != 1 || len(got) != 1 || !strings.Contains(got[0].Text, "9 of the 25 blocks") {
		t.Errorf("check: %+v", res)
	}
	if res = checked(t, f, RepairAll); res.Corruptions != 0 || res.CorruptionsFixed != 1 {
		t.Errorf("repair: %+v", res)
	}
	if res = checked(t, f, RepairNone); len(res.Findings) != 0 {
		t.Errorf("after the repair: %+v", res.Findings)
	}
	im := opened(t, f, Options{Base: borrowedDevice{base}})
	must(t, diff(get(t, im, 0, 4096), filled(1, 4096)))
	must(t, diff(get(t, im, 64<<10, 36<<10), contents(t, base.f)[64<<10:]))
	must(t, im.Close())
}

// TestEpochsUsedUpAreRepaired: an image that can no longer be opened for writing says what to do, and doing that helps.
func TestEpochsUsedUpAreRepaired(t *testing.T) {
	for _, clean := range []bool{true, false} {
		f, base := damaged(t, func(f *storage.Memory, h *Header) {
			h.StableEpoch, h.CleanShutdown = maxEpoch-epochReserve+3, clean
			putHeader(t, f, h)
		})
		if _, err := Open(f, Options{Base: borrowedDevice{base}}); err == nil || !strings.Contains(err.Error(), "used up") {
			t.Errorf("clean %v: open: %v", clean, err)
		}
		res := checked(t, f, RepairNone)
		if got := finding(res, FindingEpochs); len(got) != 1 || !strings.Contains(got[0].Text, "check -r all clears the journal") {
			t.Errorf("clean %v: check: %+v", clean, res)
		}
		if res = checked(t, f, RepairAll); res.Corruptions != 0 || res.CorruptionsFixed != 1 {
			t.Errorf("clean %v: repair: %+v", clean, res)
		}
		if res = checked(t, f, RepairNone); len(res.Findings) != 0 {
			t.Errorf("clean %v: after the repair: %+v", clean, res.Findings)
		}
		im := opened(t, f, Options{Base: borrowedDevice{base}})
		put(t, im, 128<<10, filled(9, 4096))
		must(t, im.Flush())
		left := clone(f)
		must(t, im.Close())
		im = opened(t, left, Options{Base: borrowedDevice{base}}) // the records of the new epochs count
		must(t, diff(get(t, im, 128<<10, 4096), filled(9, 4096)))
		must(t, diff(get(t, im, 0, 4096), filled(1, 4096)))
		must(t, im.Close())
	}
}

// TestRepairLeavesTheMark: no repair makes an image clean that may have lost writes; its operator's word does.
func TestRepairLeavesTheMark(t *testing.T) {
	f := made(t, smallCompact(-1))
	im := opened(t, f, Options{})
	put(t, im, 0, filled(1, 512))
	must(t, im.Checkpoint())
	put(t, im, 8192, filled(2, 512))
	left := clone(f)
	must(t, im.Close())
	h, err := ReadHeader(left)
	must(t, err)
	setEntry(t, left, h, 0, 0x80000000) // something that repair can put right
	for _, fixed := range []int64{1, 0} {
		res := checked(t, left, RepairAll)
		if got := finding(res, FindingDirtyImage); len(got) != 1 || got[0].Fixed || res.Corruptions != 1 || res.CorruptionsFixed != fixed ||
			!strings.Contains(got[0].Text, "amend -o clean_shutdown=on") {
			t.Errorf("repair: %+v", res)
		}
		_, err := Open(left, Options{})
		if err == nil || !strings.Contains(err.Error(), "--allow-dirty") || !strings.Contains(err.Error(), "clean_shutdown=on") {
			t.Errorf("open: %v", err)
		}
	}
	must(t, Amend(left, []Setting{{"clean_shutdown", "on"}}))
	im = opened(t, left, Options{})
	must(t, diff(get(t, im, 0, 512), filled(1, 512)))
	must(t, im.Close())
}
