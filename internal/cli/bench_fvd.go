package cli

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/platter-disk/platter/internal/bench"
)

// fvdFlags are the flags of bench --fvd.
type fvdFlags struct {
	wanted  bool
	scale   int
	barrier time.Duration
	plot    string
}

func (v *fvdFlags) register(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.BoolVar(&v.wanted, "fvd", false, "measure what FVD promises: files created in a guest, starts over a far base image")
	fs.IntVar(&v.scale, "scale", 1, "with --fvd: `N` times as much of everything")
	fs.DurationVar(&v.barrier, "barrier", 4*time.Millisecond, "with --fvd: create the files once more with each barrier that much longer; 0: do not")
	fs.StringVar(&v.plot, "plot", "", "with --fvd: draw prefetching under load into `FILE` (SVG)")
	fs.Lookup("output").Usage = "`FORM` of the output: human, json, or with --disciplines and --fvd markdown"
}

// runFVD measures FVD on new images.
func (f *benchFlags) runFVD(cmd *cobra.Command, args []string) error {
	switch f.output.form {
	case "human", "json", "markdown":
	default:
		return fmt.Errorf("--output must be used with human, json or markdown as argument.")
	}
	switch {
	case len(args) > 0:
		return usagef(cmd, "--fvd makes images of its own: no image can be given")
	case f.disciplines.wanted:
		return usagef(cmd, "--fvd and --disciplines are mutually exclusive")
	case f.fvd.scale < 1 || f.fvd.scale > 100:
		return usagef(cmd, "--scale %d: expected 1 to 100", f.fvd.scale)
	case f.fvd.barrier < 0 || f.fvd.barrier > time.Second:
		return usagef(cmd, "--barrier %v: expected 0 to 1s", f.fvd.barrier)
	case f.rounds < 1:
		return usagef(cmd, "--rounds must be at least 1")
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	var report *bench.FVDReport
	err = f.inDir(func(dir string) (err error) {
		b := &bench.FVDBench{Dir: dir, Executable: self, Measures: f.workloads, Rounds: f.rounds, Scale: f.fvd.scale,
			Barrier: f.fvd.barrier, Plot: f.fvd.plot, Notes: cmd.ErrOrStderr()}
		report, err = b.Run(cmd.Context())
		return err
	})
	if err != nil {
		return err
	}
	return f.printReport(cmd, report)
}
