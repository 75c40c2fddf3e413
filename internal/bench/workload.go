package bench

import (
	"fmt"
	"slices"
	"strings"
)

// Space is what lies under a range of a disk.
type Space uint8

const (
	OwnData   Space = iota // data stored in the image itself
	NoData                 // nothing: a write allocates
	BelowData              // data in a backing file: a write allocates and may have to copy up
)

// Workload is a kind of requests.
type Workload struct {
	Name  string
	Title string

	Writes     bool
	Block      int  // bytes of a request
	Sequential bool // in ascending order, else at random
	Flush      bool // a flush after every write, counted as part of the operation
	Operations int  // how many are run unless told otherwise

	on Space
}

// Workloads returns every workload, in the order of the reports.
func Workloads() []Workload {
	const k, m = 1 << 10, 1 << 20
	return []Workload{
		{Name: "read-4k", Title: "4 KiB random read of allocated data", Block: 4 * k, Operations: 200_000, on: OwnData},
		{Name: "overwrite-4k", Title: "4 KiB random overwrite of allocated data", Writes: true, Block: 4 * k, Operations: 100_000, on: OwnData},
		{Name: "alloc-4k", Title: "4 KiB random allocating write", Writes: true, Block: 4 * k, Operations: 10_000, on: NoData},
		{Name: "alloc-flush-4k", Title: "4 KiB random allocating write, flush after each", Writes: true, Block: 4 * k, Flush: true, Operations: 3_000, on: NoData},
		{Name: "seq-read-1m", Title: "1 MiB sequential read", Block: m, Sequential: true, Operations: 2_000, on: OwnData},
		{Name: "seq-write-1m", Title: "1 MiB sequential allocating write", Writes: true, Block: m, Sequential: true, Operations: 500, on: NoData},
		{Name: "overlay-4k", Title: "4 KiB random write into an overlay, data below", Writes: true, Block: 4 * k, Operations: 5_000, on: BelowData},
		{Name: "overlay-flush-4k", Title: "4 KiB random write into an overlay, flush after each", Writes: true, Block: 4 * k, Flush: true, Operations: 2_000, on: BelowData},
	}
}

// Select returns the named workloads; all of them for no name.
func Select(names []string) ([]Workload, error) {
	all := Workloads()
	if len(names) == 0 {
		return all, nil
	}
	var selected []Workload
	for _, name := range names {
		i := slices.IndexFunc(all, func(w Workload) bool { return w.Name == name })
		if i < 0 {
			return nil, fmt.Errorf("there is no workload %q; there are %s", name, strings.Join(Names(), ", "))
		}
		selected = append(selected, all[i])
	}
	return selected, nil
}

// Names returns the names of the workloads.
func Names() []string {
	var names []string
	for _, w := range Workloads() {
		names = append(names, w.Name)
	}
	return names
}
