//go:build unix

package e2e

import (
	"encoding/json"
	"testing"

	"github.com/platter-disk/platter/internal/testenv"
)

// TestBenchAgainst runs `make bench` in small and holds the server to what an operation may cost. Times are
// not looked at.
func TestBenchAgainst(t *testing.T) {
	testenv.Need(t, "qemu-nbd", "strace")
	out := testenv.Run(t, platter(t), "bench", "--against", "qemu-nbd", "--strace", "--rounds", "1", "-n", "300",
		"-w", "read-4k,alloc-flush-4k", "-d", "1", "--dir", t.TempDir(), "--output", "json")
	var results []struct {
		Workload string
		Servers  map[string]struct {
			Operations int
			CPU        *float64 `json:"cpu_us_per_operation"`
			Writes     *float64 `json:"write_calls_per_operation"`
			Syncs      *float64 `json:"fdatasyncs_per_operation"`
			Memory     *int64   `json:"memory_peak_bytes"`
		}
	}
	if err := json.Unmarshal([]byte(out), &results); err != nil || len(results) != 2 {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, r := range results {
		for _, server := range []string{"platter", "qemu-nbd"} {
			s, ok := r.Servers[server]
			if !ok || s.Operations != 300 || s.CPU == nil || s.Memory == nil {
				t.Errorf("%s on %s: %+v", r.Workload, server, s)
			}
		}
	}
	flushed := results[1].Servers
	p, q := flushed["platter"], flushed["qemu-nbd"]
	if p.Syncs == nil || p.Writes == nil || q.Syncs == nil {
		t.Fatalf("system calls were not counted:\n%s", out)
	}
	if *p.Syncs < 1 || *p.Syncs > 1.05 || *p.Writes > 2.2 {
		t.Errorf("an allocating write with a flush takes %.3f fdatasyncs and %.3f write calls, at most 1.05 and 2.2 are allowed", *p.Syncs, *p.Writes)
	}
	if *q.Syncs <= *p.Syncs {
		t.Errorf("qemu-nbd takes %.3f fdatasyncs, which is not more than our %.3f: is it counted right?", *q.Syncs, *p.Syncs)
	}
}
