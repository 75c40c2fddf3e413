package bench

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/jobs/prefetch"
)

// TestClonesReadWhatTheyTouch: machines that start over one base image read what they touch and little more, and
// a second start reads nothing that the first one kept.
func TestClonesReadWhatTheyTouch(t *testing.T) {
	testenv.Need(t, "nbdkit")
	var traces []*bootTrace
	var touched int64
	for i := range 3 {
		traces = append(traces, newBootTrace(bootDisk, 3<<20, uint64(i)))
		touched += traces[i].touched
	}
	b := &FVDBench{Dir: t.TempDir(), Notes: io.Discard}
	run, err := b.clonesRun(t.Context(), traces, traceUnit)
	if err != nil {
		t.Fatal(err)
	}
	// What is read faster than it can be kept is fetched again by the second start.
	if run.First < touched || float64(run.First+run.Second) > 1.05*float64(touched) || run.Second > touched/10 {
		t.Errorf("%d bytes were read from the base image, and %d again; %d were touched", run.First, run.Second, touched)
	}
	if left, _ := os.ReadDir(b.Dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestPrefetchedStart starts a machine, starts it again from the same clone, and from a new one that is prefetched
// in the order of the first start. The guest notices wrong contents.
func TestPrefetchedStart(t *testing.T) {
	testenv.Need(t, "nbdkit")
	dir := t.TempDir()
	base, err := startFarBase(t.Context(), dir, bootDisk, link{Rate: 500 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := base.stop(); err != nil {
			t.Error(err)
		}
	})
	s := &starter{trace: newBootTrace(bootDisk, 4<<20, 7), base: base, name: filepath.Join(dir, "clone")}
	var read []int64
	for _, w := range []bootWay{{how: "first"}, {how: "second", again: true}, {how: "prefetched", fetch: true, profile: true}} {
		_, n, err := s.start(t.Context(), w)
		if err != nil {
			t.Fatalf("%s: %v", w.how, err)
		}
		read = append(read, n)
	}
	var recorded int64
	for _, run := range s.profile {
		recorded += run.Length
	}
	touched := s.trace.touched
	if recorded < touched || read[0] < touched || read[1] > touched/10 || read[2] < touched {
		t.Errorf("the profile has %d bytes; %v bytes were read from the base image by the starts, which touch %d", recorded, read, touched)
	}
}

// TestLoad: a guest works while its disk is prefetched, and the plot shows both.
func TestLoad(t *testing.T) {
	testenv.Need(t, "nbdkit")
	b := &FVDBench{Dir: t.TempDir(), Plot: filepath.Join(t.TempDir(), "plot.svg"), Notes: io.Discard}
	for _, w := range []guestWork{ownWork(), baseWork()} {
		err := b.onLoadedClone(t.Context(), link{}, w, &prefetch.Options{}, func(c *clone) error {
			moved, err := w.run(t.Context(), c, 100*time.Millisecond, nil)
			if s := c.prefetcher.Status(); moved < int64(w.size) || moved%int64(w.size) != 0 || s.Error != "" {
				t.Errorf("%s: %d bytes moved; prefetching: %+v", w.title, moved, s)
			}
			return err
		})
		if err != nil {
			t.Fatalf("%s: %v", w.title, err)
		}
	}
	if err := b.plotLoad(t.Context(), link{Rate: 20_000_000}, 100*time.Millisecond, 300*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	drawn, err := os.ReadFile(b.Plot)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{">guest<", ">prefetching<", "<polyline", "over a link of 20 MB/s"} {
		if !bytes.Contains(drawn, []byte(want)) {
			t.Errorf("no %q in the plot\n%s", want, drawn)
		}
	}
}

// TestGuestNotices: a disk with wrong contents fails the trace.
func TestGuestNotices(t *testing.T) {
	trace := newBootTrace(128<<20, 64<<10, 1)
	g := newGuest(trace.disk)
	if _, err := g.boot(t.Context(), zeroDisk{}, trace, false); err == nil || !strings.Contains(err.Error(), "the disk holds 0x0 at") {
		t.Errorf("error %v", err)
	}
}

type zeroDisk struct{}

func (zeroDisk) ReadAt(p []byte, _ int64) (int, error)  { clear(p); return len(p), nil }
func (zeroDisk) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

func TestBootTrace(t *testing.T) {
	const touch = 20 << 20
	a, b := newBootTrace(bootDisk, touch, 5), newBootTrace(bootDisk, touch, 5)
	if !slices.Equal(a.requests, b.requests) {
		t.Error("the same seed gives different traces")
	}
	if c := newBootTrace(bootDisk, touch, 6); slices.Equal(a.requests, c.requests) {
		t.Error("another seed gives the same trace")
	}
	if a.touched < touch || a.touched > touch+2<<20 || a.read < a.touched || a.written == 0 {
		t.Errorf("touched %d, read %d, wrote %d", a.touched, a.read, a.written)
	}
	small, large := 0, 0
	for _, r := range a.requests {
		if r.off < 0 || r.n < traceUnit || r.n > readMax || r.off+r.n > bootDisk || r.off%traceUnit != 0 || r.n%traceUnit != 0 {
			t.Fatalf("request %+v", r)
		}
		switch {
		case !r.write && r.n == traceUnit:
			small++
		case !r.write && r.n == readMax:
			large++
		}
	}
	if n := len(a.requests); small < n/10 || large < n/50 {
		t.Errorf("%d small and %d large reads among %d requests", small, large, n)
	}
}

// TestTraceNeeds counts blocks of the base image.
func TestTraceNeeds(t *testing.T) {
	const k = 1 << 10
	trace := &bootTrace{disk: 100 * k, requests: []bootRequest{
		{off: 0, n: 4 * k}, {off: 8 * k, n: 4 * k}, {off: 12 * k, n: 8 * k}, // blocks 0, 0, 0 and 1 of 16 KiB
		{off: 32 * k, n: 20 * k, write: true}, {off: 36 * k, n: 4 * k}, // block 2 as a whole, 3 in part
		{off: 96 * k, n: 4 * k}, // what there is of block 6
	}}
	for block, want := range map[int64]int64{16 * k: 3*16*k + 4*k, 4 * k: 5 * 4 * k, 1 << 20: 100 * k} {
		if got := trace.needs(block); got != want {
			t.Errorf("blocks of %d: %d bytes, want %d", block, got, want)
		}
	}
}

// TestFarBaseLog reads a log that grows in the middle of its lines.
func TestFarBaseLog(t *testing.T) {
	name := filepath.Join(t.TempDir(), "log")
	w, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	log, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	b := &farBase{log: log}
	for _, c := range []struct {
		text string
		want int64
	}{
		{"2026-01-02 03:04:05.000006 Ready thread_model=3\n", 0},
		{"2026-01-02 03:04:05.000006 connection=2 Read id=1 offset=0x10000 count=0x1000 ...\n2026-01-02 03:04:05.000006 connection=2 Read id=2 off", 4096},
		{"set=0x0 count=0x20 ...\n2026-01-02 03:04:05.000006 connection=2 ...Read id=1 return=0\n", 32},
		{"2026-01-02 03:04:05.000006 connection=2 Write id=3 offset=0x0 count=0x1000 ...\n", 0},
	} {
		if _, err := io.WriteString(w, c.text); err != nil {
			t.Fatal(err)
		}
		if got, err := b.bytesRead(); got != c.want || err != nil {
			t.Errorf("after %q: %d bytes, %v; want %d", c.text, got, err, c.want)
		}
	}
}

// TestFileWork does the workload in a plain directory.
func TestFileWork(t *testing.T) {
	root := t.TempDir()
	w, err := newFileWork(root, 30, 1)
	if err != nil {
		t.Fatal(err)
	}
	files := func() (n int) {
		names, err := filepath.Glob(filepath.Join(root, "*", "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			if s, err := os.Stat(name); err != nil || s.Size() < fileSmallest {
				t.Errorf("%s: %v, %v", name, s, err)
			}
		}
		return len(names)
	}
	if took, err := w.creation(t.Context()); err != nil || took <= 0 || files() != fileWarm+30 {
		t.Errorf("creation: %v, %v, %d files", took, err, files())
	}
	if _, err := w.transactions(t.Context()); err != nil || files() != len(w.live) || w.made == fileWarm+30 {
		t.Errorf("transactions: %v, %d files, %d expected, %d ever", err, files(), len(w.live), w.made)
	}
	if err := w.deletion(t.Context()); err != nil || files() != 0 {
		t.Errorf("deletion: %v, %d files", err, files())
	}
}

// TestGuestFS creates files in a file system on an export. Nothing of it is left afterwards.
func TestGuestFS(t *testing.T) {
	testenv.Need(t, append(guestPrograms(), "nbdkit", "strace")...)
	if os.Geteuid() != 0 {
		t.Skip("mounting a file system needs the rights of root")
	}
	for _, device := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(device); err != nil {
			t.Skip(err)
		}
	}
	i := slices.IndexFunc(filesCases(""), func(c filesCase) bool { return c.create == nil })
	memory := filesCases("")[i]
	b := &FVDBench{Dir: t.TempDir(), Scale: 1, Notes: io.Discard}
	err := b.onGuest(t.Context(), memory, 0, 5, 1, func(p *process, w *fileWork) error {
		_, err := w.creation(t.Context())
		if _, berr := w.batches(t.Context()); err != nil || berr != nil {
			return errors.Join(err, berr)
		}
		mounts, err := os.ReadFile("/proc/self/mounts")
		if err != nil {
			return err
		}
		if !strings.Contains(string(mounts), w.root+" ext4") {
			t.Errorf("%s is not an ext4 file system", w.root)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if left, _ := os.ReadDir(b.Dir); err != nil || len(left) != 0 || strings.Contains(string(mounts), b.Dir) {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestSlowBarriers: a server whose barriers are held up is the process that was started, and serves.
func TestSlowBarriers(t *testing.T) {
	testenv.Need(t, "qemu-nbd", "strace")
	dir := t.TempDir()
	name := filepath.Join(dir, "disk")
	if err := createQcow2(t.Context(), name); err != nil {
		t.Fatal(err)
	}
	const barrier = 40e6 // ns
	p, err := slowBarriers(filesCases("")[0].server, barrier).start(t.Context(), dir, name)
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.Readlink("/proc/" + strconv.Itoa(p.cmd.Process.Pid) + "/exe")
	if err != nil || filepath.Base(program) != "qemu-nbd" {
		t.Errorf("the process is %s, %v", program, err)
	}
	d, err := DialDisk(p.uri, DialOptions{})
	if err != nil {
		t.Fatal(err)
	}
	took, err := timed(t.Context(), 1, func() error {
		_, err := d.WriteAt(make([]byte, 4096), 0)
		return errors.Join(err, d.Flush())
	})
	if err != nil || took < barrier {
		t.Errorf("a write and a flush took %v, expected at least %v; %v", took, barrier, err)
	}
	if err := errors.Join(d.Close(), p.stop()); err != nil {
		t.Error(err)
	}
}

func TestPlot(t *testing.T) {
	p := &plot{title: "a < b", x: "seconds", y: "MB/s", end: 40, caption: "a pause", bands: []band{{-1, 10}, {30, 50}},
		series: []series{{name: "one", color: "red", points: []point{{0, 1}, {10, 7.5}, {11, -1}, {12, 0}, {99, 3}}}, {name: "none"}}}
	var b bytes.Buffer
	if err := p.write(&b); err != nil {
		t.Fatal(err)
	}
	shapes := map[string]int{}
	for d := xml.NewDecoder(bytes.NewReader(b.Bytes())); ; {
		token, err := d.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatalf("not well-formed: %v\n%s", err, &b)
		}
		if e, ok := token.(xml.StartElement); ok {
			shapes[e.Name.Local]++
		}
	}
	// Two pieces of one line; the background, two bands and a mark of theirs in the legend.
	if shapes["polyline"] != 2 || shapes["rect"] != 4 || shapes["svg"] != 1 {
		t.Errorf("shapes %v\n%s", shapes, &b)
	}
	for _, c := range []struct{ length, want float64 }{{0, 1}, {1, 0.1}, {20, 2}, {64, 10}, {99, 10}, {100, 10}, {101, 20}, {0.07, 0.01}} {
		if got := tick(c.length); got < c.want*0.999 || got > c.want*1.001 {
			t.Errorf("tick(%v) = %v, want %v", c.length, got, c.want)
		}
	}
}

func TestFVDReport(t *testing.T) {
	// The machine is twice as fast in the second pair, and the guest loses a half in each.
	run := LoadRun{Work: "w", How: "all", Without: []float64{2e6, 4e6}, With: []float64{1e6, 2e6}}
	run.compare()
	if run.Lost < 0.499 || run.Lost > 0.501 || run.Error > 0.001 {
		t.Errorf("lost %v ± %v, want a half", run.Lost, run.Error)
	}
	other := LoadRun{Without: []float64{1, 1, 1, 1}, With: []float64{0.5, 2, 0.5, 2}}
	other.compare()
	if other.Lost < -0.001 || other.Lost > 0.001 || other.Error < 0.3 || other.Error > 0.5 {
		t.Errorf("lost %v ± %v, want nothing, with an error of 0.4", other.Lost, other.Error)
	}
	r := &FVDReport{
		Files:  &FilesReport{Storage: 0.5, Results: []FilesResult{{Disk: "a", Created: 100, Ratio: 1, Syncs: 2}, {Disk: "a", Barrier: 4, Created: 10, Ratio: 1}}},
		Boot:   &BootReport{Link: farLink(), Requests: 5, Touched: 1e6, Runs: []BootRun{{How: "the base image alone", Seconds: []float64{1, 3}, Base: []int64{1e6, 2e6}, Ratio: 1}}},
		Load:   &LoadReport{Link: farLink(), Runs: []LoadRun{run}},
		Clones: &ClonesReport{Clones: 20, Touched: 2e6, Runs: []ClonesRun{{Block: 4096, First: 2e6, Ratio: 1}}},
	}
	var b bytes.Buffer
	if err := r.WriteMarkdown(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"| a | 100 | 1.00 | 0 | 0 | 0.00 | 2.00 |", "each fdatasync 4 ms longer", "| the base image alone | 1.0, 3.0 | 1.00 | 1.0, 2.0 |",
		"| w | all | 3.0 | 1.5 | 50.0 ± 0.0 % |", "| 4 KiB | 0.0 | 2.0 | 1.000 | 0.0 |", "over a link of 5ms and 20.0 MB/s",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, &b)
		}
	}
	if _, err := (&FVDBench{Measures: []string{"nonsense"}}).Run(t.Context()); err == nil || !strings.Contains(err.Error(), `"nonsense"`) {
		t.Errorf("error %v", err)
	}
}
