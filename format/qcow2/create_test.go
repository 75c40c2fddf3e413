package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
)

// createMatrix is every cluster size, width and version once, and the combinations where options meet.
func createMatrix() []CreateOptions {
	var m []CreateOptions
	sizes := []int64{0, 512, 1 << 20, 1<<26 + 512}
	for cb := minClusterBits; cb <= maxClusterBits; cb++ {
		m = append(m, CreateOptions{Size: sizes[cb%len(sizes)], ClusterSize: 1 << cb, RefcountBits: 1 << (cb % 7)},
			CreateOptions{Size: sizes[(cb+1)%len(sizes)], ClusterSize: 1 << cb, Version: 2})
	}
	for _, p := range []block.Preallocation{block.PreallocMetadata, block.PreallocFalloc, block.PreallocFull} {
		m = append(m,
			CreateOptions{Size: 1<<20 + 512, Preallocation: p},
			CreateOptions{Size: 1 << 20, Preallocation: p, Version: 2},
			CreateOptions{Size: 3 << 20, Preallocation: p, ClusterSize: 512, RefcountBits: 64},
			CreateOptions{Size: 3 << 20, Preallocation: p, ClusterSize: 512, RefcountBits: 1},
			CreateOptions{Size: 5 << 20, Preallocation: p, ClusterSize: 16384, ExtendedL2: true},
			CreateOptions{Size: 5 << 20, Preallocation: p, ExtendedL2: true, BackingFile: "base", BackingFormat: "raw"},
		)
	}
	return append(m,
		CreateOptions{Size: 1000, CompressionType: "zstd", LazyRefcounts: true},
		CreateOptions{Size: 1 << 30, BackingFile: "base", BackingFormat: "raw", Version: 2},
		CreateOptions{BackingSize: 1 << 30, BackingFile: "base", BackingFormat: "raw"},
		CreateOptions{Size: 1 << 30, ClusterSize: 2 << 20, ExtendedL2: true, RefcountBits: 32},
		CreateOptions{Size: 128 << 30, ClusterSize: 512},
		CreateOptions{Size: 2 << 50},
	)
}

func TestCreateAgreesWithQEMU(t *testing.T) {
	for i, o := range createMatrix() {
		if !sampled(i) {
			continue
		}
		t.Run(fmt.Sprintf("%+v", o), func(t *testing.T) {
			dir := t.TempDir()
			if o.BackingFile != "" {
				if err := os.WriteFile(filepath.Join(dir, o.BackingFile), make([]byte, 1<<20), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			path := filepath.Join(dir, "disk.qcow2")
			createFile(t, path, o)
			qemuMustAgree(t, path)
			compareInfo(t, path, o)
			if o.Preallocation == block.PreallocOff || o.BackingFile != "" || o.Version == 2 {
				return
			}
			// A preallocated disk reads as zeros.
			raw := filepath.Join(dir, "zero.raw")
			if err := os.WriteFile(raw, make([]byte, o.Size), 0o600); err != nil {
				t.Fatal(err)
			}
			if code, out, errs := qemu(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, raw); code != 0 {
				t.Errorf("does not read as zeros: %s%s", out, errs)
			}
		})
	}
}

// createFile creates an image in a local file.
func createFile(t testing.TB, path string, o CreateOptions) {
	t.Helper()
	f, err := storage.Open(path, storage.OpenOptions{Create: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = Create(f, o)
	if o.Preallocation == block.PreallocFalloc && errors.Is(err, errors.ErrUnsupported) {
		testenv.Missing(t, "a temporary directory on a file system with fallocate")
	}
	if err != nil {
		t.Fatal(err)
	}
}

// compareInfo compares what qemu-img info reports with the options.
func compareInfo(t *testing.T, path string, o CreateOptions) {
	t.Helper()
	info := qemuInfo(t, path)
	data := info["format-specific"].(map[string]any)["data"].(map[string]any)
	want := map[string]any{
		"compat": "1.1", "compression-type": "zlib", "refcount-bits": 16.0, "cluster-size": 65536.0,
		"virtual-size": float64((o.Size + 511) &^ 511), "extended-l2": o.ExtendedL2, "lazy-refcounts": o.LazyRefcounts,
		"corrupt": false, "backing-filename": nil, "backing-filename-format": nil, "data-file": nil, "data-file-raw": nil,
	}
	if o.Version == 2 {
		want["compat"], want["extended-l2"], want["lazy-refcounts"], want["corrupt"] = "0.10", nil, nil, nil
	}
	if o.CompressionType != "" {
		want["compression-type"] = o.CompressionType
	}
	if o.RefcountBits != 0 {
		want["refcount-bits"] = float64(o.RefcountBits)
	}
	if o.ClusterSize != 0 {
		want["cluster-size"] = float64(o.ClusterSize)
	}
	if o.BackingFile != "" {
		want["backing-filename"], want["backing-filename-format"] = o.BackingFile, o.BackingFormat
		if o.Size == 0 {
			want["virtual-size"] = float64(o.BackingSize)
		}
	}
	if o.DataFileName != "" {
		want["data-file"], want["data-file-raw"] = o.DataFileName, o.DataFileRaw
	}
	for key, w := range want {
		got := data[key]
		if got == nil {
			got = info[key]
		}
		if got != w {
			t.Errorf("qemu-img info: %s is %v, want %v", key, got, w)
		}
	}
}

func TestCreateDataFile(t *testing.T) {
	for _, o := range []CreateOptions{
		{Size: 1 << 20}, {Size: 1 << 20, DataFileRaw: true},
		{Size: 1 << 20, DataFileRaw: true, Preallocation: block.PreallocFull, ExtendedL2: true},
	} {
		t.Run(fmt.Sprintf("%+v", o), func(t *testing.T) {
			dir := t.TempDir()
			path, dataPath := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "data.raw")
			if err := os.WriteFile(dataPath, []byte("old contents"), 0o600); err != nil {
				t.Fatal(err)
			}
			d, err := storage.Open(dataPath, storage.OpenOptions{})
			if err != nil {
				t.Fatal(err)
			}
			o.DataFile, o.DataFileName = d, "data.raw"
			createFile(t, path, o)
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			got, err := os.ReadFile(dataPath)
			if err != nil {
				t.Fatal(err)
			}
			if int64(len(got)) != o.Size || strings.Trim(string(got), "\x00") != "" {
				t.Errorf("data file has %d bytes, want %d zeros", len(got), o.Size)
			}
			compareInfo(t, path, o)
			testenv.Need(t, "qemu-img", "qemu-io")
			check := []string{"check", "--image-opts", "driver=qcow2,file.filename=" + path + ",data-file.driver=file,data-file.filename=" + dataPath}
			if code, out, errs := qemu(t, "qemu-img", check...); code != 0 {
				t.Fatalf("qemu-img check: exit %d\n%s%s", code, out, errs)
			}
		})
	}
}

// Whatever the file held before is gone, even where it cannot be truncated.
func TestCreateOverwrites(t *testing.T) {
	for _, fixed := range []bool{false, true} {
		for _, p := range []block.Preallocation{block.PreallocOff, block.PreallocMetadata} {
			f := storage.NewMemory("old")
			junk := make([]byte, 4<<20)
			for i := range junk {
				junk[i] = 0xff
			}
			apply(t, f, edit{0, junk})
			var target storage.File = f
			if fixed {
				target = fixedSize{f}
			}
			if err := Create(target, CreateOptions{Size: 1 << 20, Preallocation: p}); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(t.TempDir(), "disk.qcow2")
			saveImage(t, f, path)
			qemuMustAgree(t, path)
			if out := testenv.Run(t, "qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0 0 1M", path); strings.Contains(out, "failed") {
				t.Errorf("fixed %v, %v: the new disk is not empty: %s", fixed, p, out)
			}
		}
	}
}

// fixedSize is a container that cannot change its size, like a block device.
type fixedSize struct{ *storage.Memory }

func (f fixedSize) Truncate(size int64) error {
	if old, err := f.Size(); err != nil || size != old {
		return fmt.Errorf("truncate to %d: %w", size, errors.ErrUnsupported)
	}
	return nil
}

func TestCreateRefuses(t *testing.T) {
	for _, tc := range []struct {
		args string // for qemu-img create -o
		size string
		o    CreateOptions
		want string
	}{
		{"compat=0.10,lazy_refcounts=on", "1M", CreateOptions{Version: 2, LazyRefcounts: true}, "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)"},
		{"compat=0.10,refcount_bits=8", "1M", CreateOptions{Version: 2, RefcountBits: 8}, "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)"},
		{"compat=0.10,data_file=x", "1M", CreateOptions{Version: 2, DataFileName: "x"}, "External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)"},
		{"compat=0.10,compression_type=zstd", "1M", CreateOptions{Version: 2, CompressionType: "zstd"}, "Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or greater)"},
		{"compat=0.10,extended_l2=on", "1M", CreateOptions{Version: 2, ExtendedL2: true}, "only supported with compatibility level 1.1 and above (use version=v3 or greater)"},
		{"compat=5", "1M", CreateOptions{Version: 5}, "Parameter 'version' does not accept value '5'"},
		{"refcount_bits=3", "1M", CreateOptions{RefcountBits: 3}, "Refcount width must be a power of two and may not exceed 64 bits"},
		{"refcount_bits=128", "1M", CreateOptions{RefcountBits: 128}, "Refcount width must be a power of two and may not exceed 64 bits"},
		{"cluster_size=1000", "1M", CreateOptions{ClusterSize: 1000}, "Cluster size must be a power of two between 512 and 2048k"},
		{"cluster_size=4M", "1M", CreateOptions{ClusterSize: 4 << 20}, "Cluster size must be a power of two between 512 and 2048k"},
		{"cluster_size=8k,extended_l2=on", "1M", CreateOptions{ClusterSize: 8192, ExtendedL2: true}, "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"},
		{"data_file_raw=on", "1M", CreateOptions{DataFileRaw: true}, "data-file-raw requires data-file"},
		{"data_file=x,data_file_raw=on,backing_file=b,backing_fmt=raw", "1M", CreateOptions{DataFileName: "x", DataFileRaw: true, BackingFile: "b", BackingFormat: "raw"}, "Backing file and data-file-raw cannot be used at the same time"},
		{"preallocation=metadata,backing_file=b,backing_fmt=raw", "1M", CreateOptions{Preallocation: block.PreallocMetadata, BackingFile: "b", BackingFormat: "raw"}, "Backing file and preallocation can only be used at the same time if extended_l2 is on"},
		{"compression_type=lz", "1M", CreateOptions{CompressionType: "lz"}, "Parameter 'compression-type' does not accept value 'lz'"},
		{"cluster_size=512", "1T", CreateOptions{ClusterSize: 512, Size: 1 << 40}, problemTooLarge},
		{"", "3P", CreateOptions{Size: 3 << 50}, problemTooLarge},
		{"preallocation=metadata", "2P", CreateOptions{Size: 2 << 50, Preallocation: block.PreallocMetadata}, problemTooLarge},
		{"", "-1", CreateOptions{Size: -1}, problemTooLarge},
		{"backing_file=b", "1M", CreateOptions{BackingFile: "b"}, "Backing file specified without backing format"},
		{"", "", CreateOptions{BackingFormat: "raw"}, "Backing format cannot be used without backing file"},
		{"", "", CreateOptions{BackingFile: "b", BackingFormat: "sixteen-bytes-16"}, "Parameter 'backing-fmt' does not accept value 'sixteen-bytes-16'"},
		{"", "", CreateOptions{DataFileName: "x", Preallocation: block.PreallocFull}, "preallocation=full needs the data file"},
		{"", "", CreateOptions{BackingFile: strings.Repeat("b", 450), BackingFormat: "raw", ClusterSize: 512}, "found 586 bytes, expected at most 512"},
	} {
		if tc.o.Size == 0 {
			tc.o.Size = 1 << 20
		}
		f := storage.NewMemory("disk.qcow2")
		err := Create(f, tc.o)
		if err == nil || !strings.HasPrefix(err.Error(), "disk.qcow2: ") || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%+v: got %v, want %s", tc.o, err, tc.want)
		}
		if size, err := f.Size(); err != nil || size != 0 {
			t.Errorf("%+v: refused, but wrote %d bytes (%v)", tc.o, size, err)
		}
		if tc.args == "" || strings.Contains(tc.want, "too large") && tc.args == "preallocation=metadata" {
			continue // no such command, or hours of it
		}
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "b"), make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		args := strings.ReplaceAll(tc.args, "backing_file=b", "backing_file="+filepath.Join(dir, "b"))
		args = strings.ReplaceAll(args, "data_file=x", "data_file="+filepath.Join(dir, "x"))
		code, _, errs := qemu(t, "qemu-img", "create", "-f", "qcow2", "-o", args, filepath.Join(dir, "disk"), tc.size)
		if code == 0 || !strings.Contains(errs, tc.want) {
			t.Errorf("qemu-img create -o %s says %q, want %q", tc.args, errs, tc.want)
		}
	}
}

// The tables of a large disk are streamed: seconds and bounded memory whatever the size.
func TestCreateLargePreallocated(t *testing.T) {
	withoutRace(t)
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	start := time.Now()
	createFile(t, path, CreateOptions{Size: 1 << 40, Preallocation: block.PreallocMetadata})
	info := qemuInfo(t, path)
	if info["virtual-size"] != float64(1<<40) {
		t.Errorf("virtual size %v", info["virtual-size"])
	}
	t.Logf("1 TiB with preallocation=metadata in %v", time.Since(start))
}

// The header is written last, between two barriers, so that a crash leaves no image or a whole one.
func TestCreateOrder(t *testing.T) {
	r := &orderRecorder{Memory: storage.NewMemory("disk")}
	if err := Create(r, CreateOptions{Size: 1 << 20, Preallocation: block.PreallocMetadata}); err != nil {
		t.Fatal(err)
	}
	want := []string{"sync", "write 0", "sync"}
	if n := len(r.log); n < len(want) || strings.Join(r.log[n-3:], ",") != strings.Join(want, ",") {
		t.Errorf("ends with %q, want %q", r.log[max(0, len(r.log)-4):], want)
	}
	for _, op := range r.log[:len(r.log)-3] {
		if op == "write 0" {
			t.Errorf("the header is written early: %q", r.log)
		}
	}
	// Over an image, the old header goes durably before anything else is written.
	r.log = nil
	if err := Create(r, CreateOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	if strings.Join(r.log[:3], ",") != "write 0,sync,truncate 0" {
		t.Errorf("starts with %q", r.log)
	}
}

// orderRecorder notes the order of changes and barriers.
type orderRecorder struct {
	*storage.Memory
	log []string
}

func (r *orderRecorder) WriteAt(p []byte, off int64) (int, error) {
	r.log = append(r.log, fmt.Sprintf("write %d", off))
	return r.Memory.WriteAt(p, off)
}

func (r *orderRecorder) Truncate(size int64) error {
	r.log = append(r.log, fmt.Sprintf("truncate %d", size))
	return r.Memory.Truncate(size)
}

func (r *orderRecorder) Sync() error {
	r.log = append(r.log, "sync")
	return r.Memory.Sync()
}

// A crash at any point of Create leaves the old image, no image, or the new one whole.
func TestCreateCrash(t *testing.T) {
	for _, o := range []CreateOptions{
		{Size: 1 << 20, ClusterSize: 4096},
		{Size: 1 << 20, ClusterSize: 4096, Preallocation: block.PreallocMetadata},
	} {
		lab, err := crashlab.NewLab(crashlab.FileSpec{Name: "disk"})
		if err != nil {
			t.Fatal(err)
		}
		if err := Create(lab.Files()[0], CreateOptions{Size: 64 << 10, ClusterSize: 512, Preallocation: block.PreallocMetadata}); err != nil {
			t.Fatal(err)
		}
		lab.Settle()
		if err := Create(lab.Files()[0], o); err != nil {
			t.Fatal(err)
		}
		states, err := lab.Crashes(crashlab.Model{Tear: 512, Poison: true}, envInt(t, "PLATTER_CRASH_STATES", 150), 1)
		if err != nil {
			t.Fatal(err)
		}
		outcomes := map[string]int{}
		for state := range states {
			f := state.Files()[0]
			h, err := ReadHeader(f)
			if errors.Is(err, ErrNotQcow2) {
				outcomes["none"]++
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if res := mustCheck(t, f, RepairNone); !res.Clean() {
				t.Fatalf("a broken image: %+v", res)
			}
			outcomes[fmt.Sprintf("clusters of %d", h.ClusterSize())]++
		}
		t.Logf("%v", outcomes)
		if outcomes["none"] == 0 || outcomes["clusters of 4096"] == 0 {
			t.Error("one of the outcomes never happened")
		}
	}
}

// Whatever fails, Create says so and leaves no image.
func TestCreateFaults(t *testing.T) {
	for n := 1; ; n++ {
		f := &faulty{Memory: storage.NewMemory("disk"), left: n}
		err := Create(f, CreateOptions{Size: 1 << 20, Preallocation: block.PreallocFull, ClusterSize: 4096})
		if err == nil {
			if n < 8 {
				t.Errorf("only %d changes", n)
			}
			return
		}
		if !strings.Contains(err.Error(), "injected") {
			t.Fatalf("change %d fails: %v", n, err)
		}
		if _, err := ReadHeader(f.Memory); !errors.Is(err, ErrNotQcow2) && f.Memory != nil && n < 8 {
			t.Fatalf("change %d fails, but there is an image: %v", n, err)
		}
	}
}

// TestResizeClearsDataFile: what the last cluster held before it was zeroed by its entry does not come back from the
// external data file when the disk grows with preallocation.
func TestResizeClearsDataFile(t *testing.T) {
	for _, how := range []block.Preallocation{block.PreallocMetadata, block.PreallocFalloc, block.PreallocFull} {
		t.Run(how.String(), func(t *testing.T) {
			f, data := storage.NewMemory("image"), storage.NewMemory("data")
			o := CreateOptions{Size: 1<<20 - 2048, ClusterSize: 4096, DataFileName: "data", DataFile: keepOpen{data}}
			if err := Create(f, o); err != nil {
				t.Fatal(err)
			}
			im, err := Open(keepOpen{f}, Options{DataFile: keepOpen{data}})
			if err != nil {
				t.Fatal(err)
			}
			const off, n = 1<<20 - 4096, 2048
			if _, err := im.WriteAt(bytes.Repeat([]byte{7}, n), off); err != nil {
				t.Fatal(err)
			}
			if err := im.WriteZeroes(off, n, block.MayUnmap); err != nil {
				t.Fatal(err)
			}
			if err := im.Resize(1<<20, how); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 4096)
			if _, err := im.ReadAt(got, off); err != nil || len(bytes.Trim(got, "\x00")) != 0 {
				t.Errorf("zeros became something else: %v", err)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			checkClean(t, f)
		})
	}
}
