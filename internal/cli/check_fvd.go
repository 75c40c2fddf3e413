package cli

import (
	"fmt"
	"io"

	"github.com/platter-disk/platter/format/fvd"
)

// fvdReport is the JSON form of check of an FVD image; the names that qemu-img has too mean the same.
type fvdReport struct {
	Filename    string `json:"filename"`
	Format      string `json:"format"`
	CheckErrors int64  `json:"check-errors"`
	*fvd.CheckResult
}

func (c *checking) reportFVD(result *fvd.CheckResult) error {
	out := c.cmd.OutOrStdout()
	if c.json {
		if err := printJSON(out, fvdReport{Filename: c.name, Format: "fvd", CheckResult: result}); err != nil {
			return err
		}
	} else {
		for _, f := range result.Findings {
			fmt.Fprintln(c.cmd.ErrOrStderr(), findingLine(f))
		}
		if !c.quiet {
			printFVDCheck(out, result)
		}
	}
	return checkStatus(result.Corruptions, result.Leaks)
}

func findingLine(f fvd.Finding) string {
	state := ""
	if f.Fixed {
		state = " (repaired)"
	}
	return fmt.Sprintf("%s: %s%s", f.Kind, f.Text, state)
}

// printFVDCheck prints the summary for people.
func printFVDCheck(out io.Writer, r *fvd.CheckResult) {
	checkSummary{
		unit: "chunks", leakMeans: "They are used again when the image is next written.", clean: r.Clean(),
		corruptions: r.Corruptions, leaks: r.Leaks, corruptionsFixed: r.CorruptionsFixed, leaksFixed: r.LeaksFixed,
	}.print(out)
	if r.TotalChunks > 0 {
		fmt.Fprintf(out, "%d/%d = %.2f%% of the chunks allocated\n", r.AllocatedChunks, r.TotalChunks, percent(r.AllocatedChunks, r.TotalChunks))
	}
	if r.TotalBlocks > 0 {
		fmt.Fprintf(out, "%d/%d = %.2f%% of the blocks have left the base image\n", r.LocalBlocks, r.TotalBlocks, percent(r.LocalBlocks, r.TotalBlocks))
	}
	fmt.Fprintf(out, "Image end offset: %d\n", r.ImageEnd)
}

func percent(part, whole int64) float64 { return float64(part) * 100 / float64(whole) }
