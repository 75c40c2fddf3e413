package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"
	"time"
)

// Cost is what a run took. What could not be measured is nil.
type Cost struct {
	CPU          *time.Duration // of the process that holds the engine, user and system
	Allocations  *int64         // on its heap
	WriteCalls   *int64         // calls that write bytes to the image
	BytesWritten *int64
	Syncs        *int64 // fdatasync and fsync
	OtherChanges *int64 // fallocate, ftruncate
	MemoryPeak   *int64 // bytes resident at most since the process began
}

// Result is a run of a workload.
type Result struct {
	Workload   string
	Depth      int
	Operations int
	Seconds    float64
	Cost
}

// OperationsPerSecond is the speed. It depends on the machine.
func (r Result) OperationsPerSecond() float64 { return float64(r.Operations) / r.Seconds }

// MarshalJSON writes totals, and what an operation cost. Fields that could not be measured are left out.
func (r Result) MarshalJSON() ([]byte, error) { return json.Marshal(r.report()) }

func (r Result) report() resultJSON {
	n := float64(r.Operations)
	per := func(v *int64) *float64 {
		if v == nil {
			return nil
		}
		x := float64(*v) / n
		return &x
	}
	j := resultJSON{
		Workload: r.Workload, Depth: r.Depth, Operations: r.Operations, Seconds: r.Seconds,
		OperationsPerSecond: r.OperationsPerSecond(),
		AllocationsPerOp:    per(r.Allocations),
		WriteCallsPerOp:     per(r.WriteCalls),
		BytesWrittenPerOp:   per(r.BytesWritten),
		SyncsPerOp:          per(r.Syncs),
		OtherChangesPerOp:   per(r.OtherChanges),
		MemoryPeak:          r.MemoryPeak,
	}
	if r.CPU != nil {
		us := float64(r.CPU.Nanoseconds()) / 1e3 / n
		j.CPUMicrosPerOp = &us
	}
	return j
}

// resultJSON is the form of a result for programs.
type resultJSON struct {
	Workload            string   `json:"workload"`
	Depth               int      `json:"depth"`
	Operations          int      `json:"operations"`
	Seconds             float64  `json:"seconds"`
	OperationsPerSecond float64  `json:"operations_per_second"`
	CPUMicrosPerOp      *float64 `json:"cpu_us_per_operation,omitempty"`
	AllocationsPerOp    *float64 `json:"allocations_per_operation,omitempty"`
	WriteCallsPerOp     *float64 `json:"write_calls_per_operation,omitempty"`
	BytesWrittenPerOp   *float64 `json:"bytes_written_per_operation,omitempty"`
	SyncsPerOp          *float64 `json:"fdatasyncs_per_operation,omitempty"`
	OtherChangesPerOp   *float64 `json:"other_changes_per_operation,omitempty"`
	MemoryPeak          *int64   `json:"memory_peak_bytes,omitempty"`
}

// column is a measure in a table.
type column struct {
	title string
	value func(resultJSON) *float64
	form  string
}

func constant(f func(resultJSON) float64) func(resultJSON) *float64 {
	return func(r resultJSON) *float64 { v := f(r); return &v }
}

func operationsColumn() column {
	return column{"operations", constant(func(r resultJSON) float64 { return float64(r.Operations) }), "%.0f"}
}

func speedColumn() column {
	return column{"op/s", constant(func(r resultJSON) float64 { return r.OperationsPerSecond }), "%.0f"}
}

func cpuColumn() column {
	return column{"CPU µs/op", func(r resultJSON) *float64 { return r.CPUMicrosPerOp }, "%.2f"}
}

func allocationsColumn() column {
	return column{"allocs/op", func(r resultJSON) *float64 { return r.AllocationsPerOp }, "%.3f"}
}

func memoryColumn() column {
	return column{"peak MiB", func(r resultJSON) *float64 {
		if r.MemoryPeak == nil {
			return nil
		}
		mib := float64(*r.MemoryPeak) / (1 << 20)
		return &mib
	}, "%.0f"}
}

// changeColumns are what a server does to the image.
func changeColumns() []column {
	return []column{
		{"writes/op", func(r resultJSON) *float64 { return r.WriteCallsPerOp }, "%.3f"},
		{"bytes/op", func(r resultJSON) *float64 { return r.BytesWrittenPerOp }, "%.0f"},
		{"fdatasyncs/op", func(r resultJSON) *float64 { return r.SyncsPerOp }, "%.3f"},
	}
}

// cell prints a value, or a dash for one that is not known.
func cell(form string, v *float64) string {
	if v == nil {
		return "-"
	}
	return fmt.Sprintf(form, *v)
}

// WriteTable prints results for people.
func WriteTable(w io.Writer, results []Result) error {
	columns := append([]column{operationsColumn(), speedColumn(), cpuColumn(), allocationsColumn()}, changeColumns()...)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(t, "workload\tdepth\t")
	for _, c := range columns {
		fmt.Fprintf(t, "%s\t", c.title)
	}
	fmt.Fprintln(t)
	for _, r := range results {
		fmt.Fprintf(t, "%s\t%d\t", r.Workload, r.Depth)
		j := r.report()
		for _, c := range columns {
			fmt.Fprintf(t, "%s\t", cell(c.form, c.value(j)))
		}
		fmt.Fprintln(t)
	}
	return t.Flush()
}
