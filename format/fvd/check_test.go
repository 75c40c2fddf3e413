package fvd

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/platter-disk/platter/storage"
)

// damaged is a clean image of 64 chunks over a base image, the first 16 chunks written, and then spoiled.
func damaged(t *testing.T, spoil func(f *storage.Memory, h *Header)) (*storage.Memory, *ram) {
	base := newBase(100 << 10)
	o := smallCompact(64 << 10)
	o.Base, o.BaseImage = base, "base"
	f := made(t, o)
	im := opened(t, f, Options{Base: base})
	for i := range 16 {
		put(t, im, int64(i)*4096, filled(byte(i+1), 4096))
	}
	must(t, im.Close())
	h, err := ReadHeader(f)
	must(t, err)
	spoil(f, h)
	return f, base
}

func setEntry(t *testing.T, f *storage.Memory, h *Header, c int64, e uint32) {
	_, err := f.WriteAt(binary.LittleEndian.AppendUint32(nil, e), int64(h.TableOffset)+4*c)
	must(t, err)
}

// TestCheckAndRepair: each class of damage is found, named, and put right; the disk is usable afterwards and what
// was not damaged is there.
func TestCheckAndRepair(t *testing.T) {
	for _, c := range []struct {
		name   string
		spoil  func(f *storage.Memory, h *Header)
		kind   FindingKind
		bad    int64
		leaks  int64
		loses  []int // chunks whose contents the damage took
		cannot bool  // opening the damaged image fails
	}{
		{"nothing", func(*storage.Memory, *Header) {}, "", 0, 0, nil, false},
		{"leak", func(f *storage.Memory, h *Header) { setEntry(t, f, h, 3, 0xFFFFFFFF) }, FindingLeak, 0, 1, []int{3}, false},
		{"duplicate", func(f *storage.Memory, h *Header) { setEntry(t, f, h, 3, 7) }, FindingDuplicate, 1, 1, []int{3}, true},
		{"outside", func(f *storage.Memory, h *Header) { setEntry(t, f, h, 3, 0x7FFFFFF0) }, FindingOutside, 1, 1, []int{3}, true},
		{"unusable number", func(f *storage.Memory, h *Header) { setEntry(t, f, h, 3, 0x7FFFFFFF) }, FindingOutside, 1, 1, []int{3}, true},
		{"DIRTY mark", func(f *storage.Memory, h *Header) { setEntry(t, f, h, 3, 3|1<<31) }, FindingDirtyEntry, 1, 0, nil, true},
		{"stray bits", func(f *storage.Memory, h *Header) {
			_, err := f.WriteAt([]byte{0xFF}, int64(h.BitmapOffset)+3)
			must(t, err)
		}, FindingStrayBits, 1, 0, nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, base := damaged(t, c.spoil)
			res, err := Check(f, CheckOptions{})
			must(t, err)
			if res.Corruptions != c.bad || res.Leaks != c.leaks {
				t.Errorf("found %d corruptions and %d leaks, want %d and %d: %+v", res.Corruptions, res.Leaks, c.bad, c.leaks, res.Findings)
			}
			if c.kind != "" && !slices.ContainsFunc(res.Findings, func(f Finding) bool { return f.Kind == c.kind && !f.Fixed }) {
				t.Errorf("no finding of kind %s: %+v", c.kind, res.Findings)
			}
			if im, err := Open(clone(f), Options{Base: base}); (err != nil) != c.cannot {
				t.Errorf("opening the damaged image: %v", err)
			} else if err == nil {
				must(t, im.Close())
			}
			if c.bad == 0 && c.leaks > 0 {
				repaired := clone(f)
				res, err := Check(repaired, CheckOptions{Repair: RepairLeaks})
				must(t, err)
				if res.LeaksFixed != c.leaks || res.Leaks != 0 {
					t.Errorf("repairing leaks: %+v", res)
				}
			}
			res, err = Check(f, CheckOptions{Repair: RepairAll})
			must(t, err)
			if res.Corruptions != 0 || res.Leaks != 0 || res.CorruptionsFixed != c.bad || res.LeaksFixed != c.leaks {
				t.Errorf("repair: %+v", res)
			}
			res, err = Check(f, CheckOptions{})
			must(t, err)
			if len(res.Findings) != 0 {
				t.Errorf("after the repair: %+v", res.Findings)
			}
			im := opened(t, f, Options{Base: base})
			for i := range 16 {
				if got := get(t, im, int64(i)*4096, 1)[0]; got != byte(i+1) && !slices.Contains(c.loses, i) {
					t.Errorf("chunk %d holds %#x", i, got)
				}
			}
			put(t, im, 128<<10, filled(9, 64<<10))
			must(t, im.Close())
		})
	}
}

// boundedFile has room for a number of bytes: for its length, or only for what is reserved.
type boundedFile struct {
	*storage.Memory
	length, reserved int64
}

func (f boundedFile) Truncate(size int64) error {
	if size > f.length {
		return syscall.EFBIG
	}
	return f.Memory.Truncate(size)
}

func (f boundedFile) Allocate(off, n int64) error {
	if off+n > f.reserved {
		return syscall.ENOSPC
	}
	return f.Memory.Allocate(off, n)
}

// TestRepairOfManyDuplicates: a repair that takes more room than there is changes nothing; one that is cut short can
// be made again.
func TestRepairOfManyDuplicates(t *testing.T) {
	full := func(f *storage.Memory, h *Header) {
		for c := range int64(64) {
			setEntry(t, f, h, c, 5) // 63 copies
		}
	}
	f, _ := damaged(t, full)
	h, err := ReadHeader(f)
	must(t, err)
	const needed = 63 * 4096
	end := int64(h.DataOffset) + 6*4096 + needed
	before := contents(t, f)
	for _, bounded := range []boundedFile{{f, end - 1, end}, {f, end, end - 1}} {
		_, err := Check(bounded, CheckOptions{Repair: RepairAll})
		if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), fmt.Sprintf("copies of %d bytes", needed)) {
			t.Errorf("room for %d bytes, %d reserved; %d needed: %v", bounded.length, bounded.reserved, end, err)
		}
		must(t, diff(contents(t, f), before))
	}
	for fail := 1; ; fail++ {
		f, base := damaged(t, full)
		whole := repairFailing(t, boundedFile{f, end, end}, fail)
		res, again := Check(boundedFile{f, end, end}, CheckOptions{Repair: RepairAll})
		must(t, again)
		if res.Corruptions != 0 {
			t.Fatalf("repair after one that failed from write %d on: %+v", fail, res)
		}
		im := opened(t, f, Options{Base: base})
		must(t, diff(get(t, im, 0, 64<<10), bytes.Repeat(filled(6, 4096), 16)))
		must(t, im.Close())
		if whole {
			break
		}
	}
}

// contents are the bytes of a file.
func contents(t *testing.T, f *storage.Memory) []byte {
	t.Helper()
	size, err := f.Size()
	must(t, err)
	p := make([]byte, size)
	must(t, storage.ReadFull(f, p, 0))
	return p
}

// TestRepairReplays: repairing a crashed image leaves what its journal says, with and without a base image.
func TestRepairReplays(t *testing.T) {
	f := made(t, smallCompact(64<<10))
	im := opened(t, f, Options{})
	put(t, im, 8192, filled(5, 4096))
	must(t, im.Flush())
	left := clone(f)
	must(t, im.Close())
	res, err := Check(left, CheckOptions{})
	must(t, err)
	if res.Corruptions != 0 || len(res.Findings) != 1 || res.Findings[0].Kind != FindingReplay {
		t.Errorf("check: %+v", res)
	}
	_, err = Check(left, CheckOptions{Repair: RepairAll})
	must(t, err)
	h, err := ReadHeader(left)
	must(t, err)
	if !h.CleanShutdown {
		t.Error("not clean after the repair")
	}
	im = opened(t, left, Options{})
	must(t, diff(get(t, im, 8192, 4096), filled(5, 4096)))
	must(t, im.Close())
}

// TestHostileImage: fields that ask for a lot of memory are refused.
func TestHostileImage(t *testing.T) {
	f := storage.NewMemory("huge")
	must(t, f.Truncate(1<<42))
	h := &Header{
		Version: 1, VirtualSize: 1 << 41, FullyPrefetched: true, CleanShutdown: true, ChunkSize: 4096, GrowUnit: 4096,
		TableOffset: 8192, TableSize: 1 << 31, DataOffset: 1 << 40,
	}
	b, err := h.encode()
	must(t, err)
	_, err = f.WriteAt(b, 0)
	must(t, err)
	for name, open := range map[string]func() error{
		"open":  func() error { _, err := Open(f, Options{}); return err },
		"check": func() error { _, err := Check(f, CheckOptions{}); return err },
	} {
		if err := open(); !errors.Is(err, ErrMaxMetadata) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Open(storage.NewMemory("empty"), Options{}); err == nil || !strings.Contains(err.Error(), "0 bytes") {
		t.Errorf("empty file: %v", err)
	}
}

func TestInfo(t *testing.T) {
	f, _ := damaged(t, func(*storage.Memory, *Header) {})
	info, err := ReadInfo(f)
	must(t, err)
	if !info.Compact || *info.ChunksAllocated != 16 || *info.Chunks != 64 || *info.Blocks != 25 || *info.BlocksInBase != 9 ||
		info.BaseImage != "base" || !info.CleanShutdown || info.VirtualSize != 256<<10 || !info.JournalTrailer {
		t.Errorf("info: %+v", info)
	}
}

// TestInfoTellsZeros: counts that are 0 are told, those that have no meaning are not.
func TestInfoTellsZeros(t *testing.T) {
	for name, c := range map[string]struct {
		o    CreateOptions
		base int64
		want map[string]float64
	}{
		"flat":    {CreateOptions{JournalBufferDelay: time.Second}, 0, map[string]float64{}},
		"compact": {CreateOptions{Compact: true, JournalBufferDelay: time.Nanosecond}, 0, map[string]float64{"chunks": 1, "chunks-allocated": 0, "journal-buffer-period": 0}},
		"overlay": {CreateOptions{BlockSize: 512 << 10}, 1 << 20, map[string]float64{"blocks": 2, "blocks-in-base": 2, "journal-buffer-period": 5000}},
		"moved over": {CreateOptions{BlockSize: 512 << 10, DetectSparseHole: 512 << 10, JournalBuffer: -1}, 1 << 20,
			map[string]float64{"blocks": 2, "blocks-in-base": 0}},
	} {
		c.o.Size = 1 << 20
		if c.base > 0 {
			c.o.Base, c.o.BaseImage = newRAM(c.base), "base"
		}
		f := made(t, c.o)
		for _, detached := range []bool{false, true} {
			if detached {
				if name != "moved over" {
					continue
				}
				im := opened(t, f, Options{Base: c.o.Base})
				must(t, im.DetachBase())
				must(t, im.Close())
			}
			info, err := ReadInfo(f)
			must(t, err)
			text, err := json.Marshal(info)
			must(t, err)
			var got map[string]any
			must(t, json.Unmarshal(text, &got))
			for _, key := range []string{"chunks", "chunks-allocated", "blocks", "blocks-in-base", "journal-buffer-period"} {
				want, known := c.want[key]
				if value, told := got[key]; told != known || known && value != want {
					t.Errorf("%s, detached %v: %s is %v", name, detached, key, value)
				}
			}
		}
	}
}

func TestAmend(t *testing.T) {
	f, base := damaged(t, func(*storage.Memory, *Header) {})
	for _, c := range []struct {
		name, value, want string // want: part of the error
	}{
		{"copy_on_read", "on", ""},
		{"copy_on_read", "maybe", `copy_on_read (byte 3220) is "maybe", want on or off`},
		{"prefetch_start_delay", "-5", ""},
		{"max_num_outstanding_prefetch_writes", "0", "num_prefetch_slots"},
		{"prefetch_over_threshold_throttle_time", "100", ""},
		{"prefetch_min_read_throughput_threshold", "1000", ""},
		{"prefetch_perf_calc_alpha", "101", "percentage"},
		{"virtual_disk_size", "0", "unknown setting"},
		{"stable_journal_epoch", "0", "unknown setting"},
		{"base_img", "", "still needed"},
		{"data_file", "elsewhere", "data_offset"},
	} {
		err := Amend(f, []Setting{{c.name, c.value}})
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s=%s: %v, want %q", c.name, c.value, err, c.want)
		}
	}
	h, err := ReadHeader(f)
	must(t, err)
	if !h.CopyOnRead || h.PrefetchStartDelay != -5 || h.PrefetchThrottle != 100 || h.PrefetchMinRead != 1000 {
		t.Errorf("header: %+v", h)
	}
	im := opened(t, f, Options{Base: base})
	p := make([]byte, 100<<10)
	must(t, im.ReadBase(p, 0))
	_, err = im.Populate(p, 0)
	must(t, err)
	must(t, im.DetachBase())
	must(t, im.Close())
	must(t, Amend(f, []Setting{{"base_img", ""}}))
	h, err = ReadHeader(f)
	must(t, err)
	if h.BaseImage != "" || h.BaseSize != 0 {
		t.Errorf("header: %+v", h)
	}
	im = opened(t, f, Options{})
	if got := get(t, im, 4096, 1)[0]; got != 2 {
		t.Errorf("read %#x", got)
	}
	must(t, im.Close())
}

func TestCreateRules(t *testing.T) {
	base := newBase(4096)
	for _, c := range []struct {
		o    CreateOptions
		want string
	}{
		{CreateOptions{Size: -1}, "option size"},
		{CreateOptions{BlockSize: 700}, "option block_size"},
		{CreateOptions{Base: base}, "base image takes both"},
		{CreateOptions{DataFile: "x"}, "data file takes both"},
		{CreateOptions{DetectSparseHole: 1}, "detect_sparse_hole"},
		{CreateOptions{AddStorageCmd: strings.Repeat("x", 1024)}, "add_storage_cmd"},
		{CreateOptions{BaseImage: strings.Repeat("x", 1024), Base: base}, "base_img"},
	} {
		if err := Create(storage.NewMemory("image"), c.o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.o, err, c.want)
		}
	}
	// Without bitmap and table there is nothing to journal; a size not given is the base image's.
	for _, c := range []struct {
		o       CreateOptions
		size    uint64
		journal uint64
	}{
		{CreateOptions{Size: 1000}, 1024, 0},
		{CreateOptions{Size: 1 << 40, Compact: true}, 1 << 40, DefaultJournalSize},
		{CreateOptions{Size: 8 << 40, Compact: true}, 8 << 40, 42385408},
		{CreateOptions{Size: 1 << 20, Compact: true, JournalSize: -1}, 1 << 20, 0},
		{CreateOptions{BaseImage: "base", Base: base}, 4096, DefaultJournalSize},
	} {
		h, err := ReadHeader(made(t, c.o))
		must(t, err)
		if h.VirtualSize != c.size || h.JournalSize != c.journal {
			t.Errorf("%+v: size %d journal %d, want %d and %d", c.o, h.VirtualSize, h.JournalSize, c.size, c.journal)
		}
	}
}

// TestDetectHoles: zeros of the base image are never read again, in plain and in compact images.
func TestDetectHoles(t *testing.T) {
	for _, compact := range []bool{false, true} {
		base := newBase(1 << 20)
		must(t, base.f.PunchHole(256<<10, 512<<10))
		_, err := base.f.WriteAt(make([]byte, 64<<10), 256<<10) // zeros that are stored
		must(t, err)
		f := made(t, CreateOptions{Compact: compact, Base: base, BaseImage: "base", DetectSparseHole: 64 << 10})
		h, err := ReadHeader(f)
		must(t, err)
		if h.NeedZeroInit == compact {
			t.Errorf("compact %v: need_zero_init %v", compact, h.NeedZeroInit)
		}
		if h.NeedZeroInit {
			if _, err := Open(f, Options{Base: base, DataNotZeroed: true}); err == nil || !strings.Contains(err.Error(), "need_zero_init") {
				t.Errorf("storage that does not read as zeros: %v", err)
			}
		}
		base.reads = func(off, n int64) error {
			if off < 768<<10 && off+n > 256<<10 {
				return errors.New("read of a hole")
			}
			return nil
		}
		im := opened(t, f, Options{Base: base})
		must(t, diff(get(t, im, 256<<10, 512<<10), make([]byte, 512<<10)))
		put(t, im, 300<<10, filled(1, 512))
		if start, n := im.NextInBase(200 << 10); start != 200<<10 || n != 56<<10 {
			t.Errorf("next in base: %d at %d", n, start)
		}
		must(t, im.Close())
	}
}

// repairFailing repairs a file of which every write from number fail on fails; whole says that there were fewer. The
// repair has to fail if one of them did, and only then.
func repairFailing(t *testing.T, f storage.File, fail int) (whole bool) {
	t.Helper()
	writes := 0
	_, err := Check(watchedFile{File: f, onWrite: func(int64, []byte) error {
		if writes++; writes >= fail {
			return syscall.EIO
		}
		return nil
	}}, CheckOptions{Repair: RepairAll})
	if (err != nil) != (writes >= fail) {
		t.Fatalf("failing from write %d on: %v", fail, err)
	}
	return err == nil
}
