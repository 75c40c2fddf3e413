package bench

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
)

// maxTraced bounds the operations of a run under strace, which is slow.
const maxTraced = 2000

// Versus measures servers against each other.
type Versus struct {
	Servers []Server // the first is compared with the others
	Rounds  int      // how often each workload is run on each server, in turn
	Trace   bool     // count system calls, in a further run of each, with strace
	Scratch *Scratch
	Notes   io.Writer // progress and what could not be measured
}

// VersusResult is a workload on several servers.
type VersusResult struct {
	Workload string            `json:"workload"`
	Title    string            `json:"title"`
	Depth    int               `json:"depth"`
	Servers  map[string]Result `json:"servers"` // the rounds added up
}

// Run runs the workload on the servers in turn.
func (v *Versus) Run(ctx context.Context, w Workload, o Options) (VersusResult, error) {
	r := VersusResult{Workload: w.Name, Title: w.Title, Depth: o.Depth, Servers: map[string]Result{}}
	for round := range v.Rounds {
		for _, s := range v.Servers {
			o.Seed = uint64(round)
			one, err := v.one(ctx, s, w, o, ProcessMeter)
			if err != nil {
				return r, err
			}
			fmt.Fprintf(v.Notes, "%s, depth %d, round %d, %s: %.0f op/s, %.1f µs CPU/op\n", w.Name, o.Depth, round+1,
				s.Name, one.OperationsPerSecond(), *one.report().CPUMicrosPerOp)
			r.Servers[s.Name] = r.Servers[s.Name].plus(one)
		}
	}
	if !v.Trace || !w.Writes {
		return r, nil
	}
	measured, _ := o.operations(w)
	o.Operations, o.Seed = min(measured, maxTraced), 0
	for _, s := range v.Servers {
		traced, err := v.one(ctx, s, w, o, func(pid int) (Meter, error) { return StraceMeter(pid), nil })
		if err != nil {
			return r, err
		}
		r.Servers[s.Name] = r.Servers[s.Name].withCounts(traced)
	}
	return r, nil
}

// one runs a workload on a server with an image of its own.
func (v *Versus) one(ctx context.Context, s Server, w Workload, o Options, meter func(pid int) (Meter, error)) (r Result, err error) {
	name, err := v.Scratch.Make(ctx, w, o)
	if err != nil {
		return r, err
	}
	defer func() {
		if rerr := v.Scratch.Remove(name); err == nil {
			err = rerr
		}
	}()
	p, err := s.start(ctx, v.Scratch.Dir, name)
	if err != nil {
		return r, err
	}
	defer func() {
		if serr := p.stop(); err == nil {
			err = serr
		}
	}()
	m, err := meter(p.cmd.Process.Pid)
	if err != nil {
		return r, err
	}
	d, err := DialDisk(p.uri, DialOptions{ReadOnly: !w.Writes, Overlay: w.on == BelowData, Unit: scratchUnit})
	if err != nil {
		return r, fmt.Errorf("%s: %w", s.Name, err)
	}
	defer d.Close()
	r, err = Run(ctx, d, w, o, m)
	if err != nil {
		return r, fmt.Errorf("%s: %w", s.Name, err)
	}
	return r, nil
}

// plus adds a round.
func (r Result) plus(o Result) Result {
	if r.Operations == 0 {
		return o
	}
	r.Operations += o.Operations
	r.Seconds += o.Seconds
	cpu := *r.CPU + *o.CPU
	peak := max(*r.MemoryPeak, *o.MemoryPeak)
	r.CPU, r.MemoryPeak = &cpu, &peak
	return r
}

// withCounts takes the counts of another run, scaled to the operations of this one.
func (r Result) withCounts(o Result) Result {
	scale := func(v *int64) *int64 {
		n := int64(float64(*v) * float64(r.Operations) / float64(o.Operations))
		return &n
	}
	r.WriteCalls, r.BytesWritten = scale(o.WriteCalls), scale(o.BytesWritten)
	r.Syncs, r.OtherChanges = scale(o.Syncs), scale(o.OtherChanges)
	return r
}

// WriteMarkdown prints the results as two tables, what the servers cost and what they do to the image: for
// each measure both servers, and the ratio of the first to the second.
func (v *Versus) WriteMarkdown(w io.Writer, results []VersusResult) error {
	if err := v.writeTable(w, results, speedColumn(), cpuColumn(), memoryColumn()); err != nil || !v.Trace {
		return err
	}
	results = slices.DeleteFunc(slices.Clone(results), func(r VersusResult) bool {
		return r.Servers[v.Servers[0].Name].WriteCalls == nil
	})
	if _, err := fmt.Fprintln(w); err != nil {
		return err
	}
	return v.writeTable(w, results, changeColumns()...)
}

func (v *Versus) writeTable(w io.Writer, results []VersusResult, columns ...column) error {
	a, b := v.Servers[0].Name, v.Servers[1].Name
	header, rule := []string{"workload", "depth"}, []string{"---", "---:"}
	for _, c := range columns {
		header = append(header, c.title+", "+a, b, "ratio")
		rule = append(rule, "---:", "---:", "---:")
	}
	rows := [][]string{header, rule}
	for _, r := range results {
		row := []string{r.Title, fmt.Sprint(r.Depth)}
		for _, c := range columns {
			x, y := c.value(r.Servers[a].report()), c.value(r.Servers[b].report())
			ratio := "-"
			if x != nil && y != nil && *y != 0 {
				ratio = fmt.Sprintf("%.2f", *x / *y)
			}
			row = append(row, cell(c.form, x), cell(c.form, y), ratio)
		}
		rows = append(rows, row)
	}
	for _, row := range rows {
		if _, err := fmt.Fprintf(w, "| %s |\n", strings.Join(row, " | ")); err != nil {
			return err
		}
	}
	return nil
}
