package bench

import (
	"bytes"
	"encoding/json"
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
)

// TestEngine runs every workload on scratch images and compares what is counted with what has to be.
func TestEngine(t *testing.T) {
	for _, w := range Workloads() {
		t.Run(w.Name, func(t *testing.T) {
			scratch := &Scratch{Dir: t.TempDir(), Fill: 8 << 20}
			for _, depth := range []int{1, 8} {
				o := Options{Depth: depth, Operations: 40, Seed: 3}
				name, err := scratch.Make(t.Context(), w, o)
				if err != nil {
					t.Fatal(err)
				}
				e, err := OpenImage(t.Context(), name, image.Options{Format: "qcow2"})
				if err != nil {
					t.Fatal(err)
				}
				r, err := Run(t.Context(), e, w, o, e.Meter())
				if err != nil {
					t.Fatal(err)
				}
				if err := e.Close(); err != nil {
					t.Fatal(err)
				}
				if r.Operations != 40 || r.Seconds <= 0 || *r.CPU <= 0 {
					t.Errorf("depth %d: %+v", depth, r)
				}
				writes, written, syncs := *r.WriteCalls, *r.BytesWritten, *r.Syncs
				switch {
				case !w.Writes && (writes != 0 || syncs != 0):
					t.Errorf("depth %d: reading wrote %d times and synced %d times", depth, writes, syncs)
				case w.Writes && (writes == 0 || written < int64(40*w.Block)):
					t.Errorf("depth %d: %d writes of %d bytes, want at least the %d bytes of the guest", depth, writes, written, 40*w.Block)
				case w.Writes && syncs == 0:
					t.Errorf("depth %d: a run that writes ends with a flush, but nothing was synced", depth)
				case w.Flush && depth == 1 && syncs < 40:
					t.Errorf("40 flushes one after the other took %d fdatasyncs", syncs)
				}
				if err := scratch.Remove(name); err != nil {
					t.Error(err)
				}
			}
			if left, _ := filepath.Glob(filepath.Join(scratch.Dir, "*")); len(left) != 0 {
				t.Errorf("scratch images are left: %v", left)
			}
		})
	}
}

// withoutSync spares the test the time of the barriers; they are counted above it.
type withoutSync struct{ storage.File }

func (withoutSync) Sync() error { return nil }

// TestTargets holds the engine to what an operation may cost. None of these numbers depends on the machine.
func TestTargets(t *testing.T) {
	const none = 0.02 // a test is not alone in its process: the runtime allocates a little now and then
	for _, tc := range []struct {
		workload                   string
		writes, syncs, allocations float64 // most an operation; negative: not held to anything
	}{
		{"read-4k", 0, 0, none},
		{"overwrite-4k", 1.001, 0.001, none},
		{"alloc-flush-4k", 2.2, 1.05, -1},
		{"seq-read-1m", 0, 0, none},
	} {
		t.Run(tc.workload, func(t *testing.T) {
			w, err := Select([]string{tc.workload})
			if err != nil {
				t.Fatal(err)
			}
			scratch := &Scratch{Dir: t.TempDir(), Fill: 16 << 20}
			o := Options{Depth: 1, Operations: 2000, Seed: 1}
			name, err := scratch.Make(t.Context(), w[0], o)
			if err != nil {
				t.Fatal(err)
			}
			e, err := OpenImage(t.Context(), name, image.Options{Format: "qcow2",
				Wrap: func(f storage.File) storage.File { return withoutSync{f} }})
			if err != nil {
				t.Fatal(err)
			}
			defer e.Close()
			r, err := Run(t.Context(), e, w[0], o, e.Meter())
			if err != nil {
				t.Fatal(err)
			}
			j := r.report()
			if *j.WriteCallsPerOp > tc.writes || *j.SyncsPerOp > tc.syncs {
				t.Errorf("%.3f write calls and %.3f fdatasyncs an operation, at most %.3f and %.3f are allowed",
					*j.WriteCallsPerOp, *j.SyncsPerOp, tc.writes, tc.syncs)
			}
			if !raceEnabled && tc.allocations >= 0 && *j.AllocationsPerOp > tc.allocations {
				t.Errorf("%.3f heap allocations an operation, at most %.3f are allowed", *j.AllocationsPerOp, tc.allocations)
			}
		})
	}
}

func TestSelect(t *testing.T) {
	all, err := Select(nil)
	if err != nil || len(all) != len(Workloads()) {
		t.Errorf("no name selects %d workloads, error %v", len(all), err)
	}
	if _, err := Select([]string{"read-4k", "nonsense"}); err == nil || !strings.Contains(err.Error(), "read-4k, overwrite-4k") {
		t.Errorf("an unknown workload: error %v, want the names there are", err)
	}
}

func TestCounter(t *testing.T) {
	var n counts
	f := counter{storage.NewMemory("disk"), &n}
	step := func(what string, err error, want [numCounts]int64) {
		t.Helper()
		if err != nil && !errors.Is(err, errors.ErrUnsupported) {
			t.Fatalf("%s: %v", what, err)
		}
		if got := n.read(); got != want {
			t.Errorf("after %s the counts are %v, want %v", what, got, want)
		}
	}
	_, err := f.WriteAt(make([]byte, 1000), 5)
	step("a write", err, [numCounts]int64{1, 1000, 0, 0})
	step("a sync", f.Sync(), [numCounts]int64{1, 1000, 1, 0})
	step("truncating", f.Truncate(1<<20), [numCounts]int64{1, 1000, 1, 1})
	step("punching", f.PunchHole(0, 4096), [numCounts]int64{1, 1000, 1, 2})
	step("zeroing", f.ZeroRange(0, 4096), [numCounts]int64{1, 1000, 1, 3})
	step("allocating", f.Allocate(0, 4096), [numCounts]int64{1, 1000, 1, 4})
	_, err = f.ReadAt(make([]byte, 10), 0)
	step("a read", err, [numCounts]int64{1, 1000, 1, 4})
}

func TestParseStrace(t *testing.T) {
	log := `100 pwrite64(7, ""..., 4096, 65536) = 4096
100 pwritev(7, [{iov_base=""..., iov_len=512}, {iov_base=""..., iov_len=512}], 2, 0) = 1024
101 pwrite64(7, ""..., 4096, 0 <unfinished ...>
100 fdatasync(7 <unfinished ...>
101 <... pwrite64 resumed>)             = 4096
100 <... fdatasync resumed>)            = 0
100 fallocate(7, FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE, 0, 65536) = 0
100 pwrite64(7, ""..., 4096, 65536) = -1 ENOSPC (No space left on device)
101 --- SIGURG {si_signo=SIGURG, si_code=SI_TKILL, si_pid=100, si_uid=0} ---
101 fsync(8)                          = 0
101 +++ exited with 0 +++
`
	c, err := parseStrace(strings.NewReader(log))
	if err != nil {
		t.Fatal(err)
	}
	if *c.WriteCalls != 4 || *c.BytesWritten != 4096+1024+4096 || *c.Syncs != 2 || *c.OtherChanges != 1 {
		t.Errorf("%d writes of %d bytes, %d syncs, %d other changes; want 4 of 9216, 2, 1",
			*c.WriteCalls, *c.BytesWritten, *c.Syncs, *c.OtherChanges)
	}
	if _, err := parseStrace(strings.NewReader("7 io_uring_enter(5, 1, 0, 0, NULL, 8) = 1\n")); err == nil {
		t.Error("writes that go through io_uring were counted")
	}
}

// TestProcessMeters measures a program of which it is known what it does.
func TestProcessMeters(t *testing.T) {
	testenv.Need(t, "dd", "strace")
	cmd := exec.Command("dd", "of="+filepath.Join(t.TempDir(), "out"), "bs=1k", "oflag=dsync", "status=none")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	p, err := ProcessMeter(cmd.Process.Pid)
	if errors.Is(err, errors.ErrUnsupported) {
		testenv.Missing(t, "Linux")
	}
	if err != nil {
		t.Fatal(err)
	}
	s := StraceMeter(cmd.Process.Pid)
	if err := errors.Join(p.Start(), s.Start()); err != nil {
		t.Fatal(err)
	}
	costs, serr := s.Stop()
	cost, perr := p.Stop()
	if err := errors.Join(serr, perr); err != nil {
		t.Fatal(err)
	}
	if *cost.CPU > time.Minute || *cost.MemoryPeak < 100<<10 || *cost.MemoryPeak > 1<<30 {
		t.Errorf("dd took %v of CPU time and %d bytes of memory", *cost.CPU, *cost.MemoryPeak)
	}
	if *costs.WriteCalls != 0 || *costs.Syncs != 0 {
		t.Errorf("an idle dd: %d writes, %d syncs", *costs.WriteCalls, *costs.Syncs)
	}
	if _, err := ProcessMeter(1 << 30); err == nil {
		t.Error("a process that does not exist can be measured")
	}
	if err := StraceMeter(1 << 30).Start(); err == nil {
		t.Error("a process that does not exist can be traced")
	}
}

func TestReports(t *testing.T) {
	n := func(v int64) *int64 { return &v }
	cpu := 30 * time.Millisecond
	a := Result{Workload: "alloc-4k", Depth: 1, Operations: 1000, Seconds: 2,
		Cost: Cost{CPU: &cpu, WriteCalls: n(2200), BytesWritten: n(5_000_000), Syncs: n(1000), MemoryPeak: n(32 << 20)}}
	b := a
	b.Seconds, b.Syncs = 4, n(2000)

	var human bytes.Buffer
	if err := WriteTable(&human, []Result{a}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"alloc-4k", "30.00", "2.200", "1.000", " - "} {
		if !strings.Contains(human.String(), want) {
			t.Errorf("the table has no %q:\n%s", want, &human)
		}
	}
	var m map[string]any
	text, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &m); err != nil {
		t.Fatal(err)
	}
	if _, ok := m["allocations_per_operation"]; ok || m["fdatasyncs_per_operation"] != 1.0 || m["cpu_us_per_operation"] != 30.0 {
		t.Errorf("JSON: %s", text)
	}
	v := &Versus{Servers: []Server{{Name: "x"}, {Name: "y"}}, Trace: true}
	var md bytes.Buffer
	err = v.WriteMarkdown(&md, []VersusResult{{Workload: "alloc-4k", Title: "some writes", Depth: 1,
		Servers: map[string]Result{"x": a, "y": b}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"| some writes | 1 | 500 | 250 | 2.00 | 30.00 | 30.00 | 1.00 | 32 | 32 | 1.00 |",
		"| some writes | 1 | 2.200 | 2.200 | 1.00 | 5000 | 5000 | 1.00 | 1.000 | 2.000 | 0.50 |",
	} {
		if !strings.Contains(md.String(), want) {
			t.Errorf("the tables have no line %q:\n%s", want, &md)
		}
	}
}

func TestRounds(t *testing.T) {
	n := func(v int64) *int64 { return &v }
	d := func(v time.Duration) *time.Duration { return &v }
	sum := Result{}.plus(Result{Operations: 10, Seconds: 1, Cost: Cost{CPU: d(5), MemoryPeak: n(7)}}).
		plus(Result{Operations: 20, Seconds: 2, Cost: Cost{CPU: d(6), MemoryPeak: n(3)}})
	if sum.Operations != 30 || sum.Seconds != 3 || *sum.CPU != 11 || *sum.MemoryPeak != 7 {
		t.Errorf("two rounds add up to %+v", sum)
	}
	sum = sum.withCounts(Result{Operations: 3, Cost: Cost{WriteCalls: n(6), BytesWritten: n(300), Syncs: n(3), OtherChanges: n(0)}})
	if *sum.WriteCalls != 60 || *sum.BytesWritten != 3000 || *sum.Syncs != 30 || *sum.OtherChanges != 0 {
		t.Errorf("the counts of a traced run are scaled to %d, %d, %d, %d", *sum.WriteCalls, *sum.BytesWritten, *sum.Syncs, *sum.OtherChanges)
	}
}
