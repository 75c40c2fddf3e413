package bench

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// FVDBench measures what FVD promises: files created in a guest, and machines that start from a base image that
// is far away. Each measure is one run in which all that is compared takes turns.
type FVDBench struct {
	Dir        string        // where the images go; use the file system that is to be measured
	Executable string        // the program platter
	Measures   []string      // of FVDMeasures; none: all
	Rounds     int           // how often everything that is compared has its turn
	Scale      int           // multiplies files, trace and clones; 1 takes minutes
	Barrier    time.Duration // a second run of the files adds that to each barrier; 0: no second run
	Plot       string        // file for the plot of prefetching under load, SVG; "": none
	Notes      io.Writer     // progress
}

// FVDReport is everything that was measured; what was not asked for is nil.
type FVDReport struct {
	Files  *FilesReport  `json:"files,omitempty"`
	Boot   *BootReport   `json:"boot,omitempty"`
	Load   *LoadReport   `json:"load,omitempty"`
	Clones *ClonesReport `json:"clones,omitempty"`
}

// FVDMeasures returns the names of what FVDBench measures.
func FVDMeasures() []string { return []string{"files", "boot", "load", "clones"} }

// Run measures.
func (b *FVDBench) Run(ctx context.Context) (*FVDReport, error) {
	for _, name := range b.Measures {
		if !slices.Contains(FVDMeasures(), name) {
			return nil, fmt.Errorf("there is no measure %q; there are %s", name, strings.Join(FVDMeasures(), ", "))
		}
	}
	wanted := func(name string) bool { return len(b.Measures) == 0 || slices.Contains(b.Measures, name) }
	r := &FVDReport{}
	var err error
	if wanted("files") {
		if r.Files, err = b.files(ctx); err != nil {
			return nil, fmt.Errorf("files: %w", err)
		}
	}
	if wanted("boot") {
		if r.Boot, err = b.boot(ctx); err != nil {
			return nil, fmt.Errorf("boot: %w", err)
		}
	}
	if wanted("load") {
		if r.Load, err = b.load(ctx); err != nil {
			return nil, fmt.Errorf("load: %w", err)
		}
	}
	if wanted("clones") {
		if r.Clones, err = b.clones(ctx); err != nil {
			return nil, fmt.Errorf("clones: %w", err)
		}
	}
	return r, nil
}
