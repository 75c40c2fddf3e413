package cli

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image"
)

// Exit statuses of check.
const (
	checkCorrupt     = 2
	checkLeaks       = 3
	checkUnsupported = 63
)

func newCheckCommand() *cobra.Command {
	var (
		open    openFlags
		output  outputFlag
		repair  string
		cache   string
		discard bool
		quiet   bool
	)
	cmd := &cobra.Command{
		Use:   "check [flags] FILENAME",
		Short: "Look for inconsistencies in an image file",
		Long: `Look for inconsistencies in the tables of an image file: counts that do not match,
entries that point nowhere, clusters with two owners. What is found is printed on
standard error, a summary on standard output. Guest data is not looked at.

With -r, repair what was found: "leaks" gives clusters back that nothing refers to,
which is always safe; "all" repairs everything that can be.

Exit status: 0 nothing is wrong (any more), 1 the check could not be completed, 2 the
image is corrupt, 3 it only wastes space (leaked clusters), 63 the image's format has
nothing to check.`,
		Example: `  platter check disk.qcow2
  platter check --output=json disk.qcow2
  platter check -r leaks disk.qcow2`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			var mode image.Repair
			switch repair {
			case "":
			case image.RepairLeaks.String():
				mode = image.RepairLeaks
			case image.RepairAll.String():
				mode = image.RepairAll
			default:
				return usagef(cmd, "Unknown option value for -r (expecting 'leaks' or 'all'): %s", repair)
			}
			if err := output.check(); err != nil {
				return err
			}
			if len(args) != 1 {
				return usagef(cmd, "Expecting one image file name")
			}
			if _, ok := parseCache(cache); !ok {
				return fmt.Errorf("Invalid source cache option: %s", cache)
			}
			if err := open.check(cmd); err != nil {
				return err
			}
			c := checking{cmd: cmd, name: args[0], quiet: quiet, json: output.json()}
			return c.run(&open, image.CheckOptions{Repair: mode, DiscardJournal: discard, Report: c.finding})
		},
	}
	open.register(cmd, "`FORMAT` of the image; guessed when not given")
	open.registerShare(cmd.Flags())
	output.register(cmd)
	fs := cmd.Flags()
	fs.StringVarP(&repair, "repair", "r", "", "repair `WHAT` is found: leaks or all")
	completeWith(cmd, "repair", "leaks", "all")
	fs.BoolVar(&discard, "discard-journal", false, "with -r all: drop a metadata journal that cannot be replayed;\nmay lose acknowledged writes")
	fs.StringVarP(&cache, "source-cache", "T", "writeback", "cache `MODE` of the image: none, writeback, writethrough,\ndirectsync or unsafe")
	completeWith(cmd, "source-cache", cacheNames...)
	fs.BoolVarP(&quiet, "quiet", "q", false, "print only what is found, no summary")
	return cmd
}

// checking is one run of check.
type checking struct {
	cmd   *cobra.Command
	name  string
	quiet bool
	json  bool
}

func (c *checking) run(open *openFlags, o image.CheckOptions) error {
	g, err := open.gate()
	if err != nil {
		return err
	}
	result, err := image.Check(c.cmd.Context(), c.name, image.Options{
		Format: open.format, NameIsOptions: open.imageOpts, Share: open.forceShare, Gate: g,
	}, o)
	var failure *qcow2.CheckFailure
	switch {
	case errors.Is(err, image.ErrNoChecker):
		return &exitError{checkUnsupported, fmt.Errorf("This image format does not support checks")}
	case errors.As(err, &failure):
		return fmt.Errorf("Check failed: %s", failure.Reason)
	case err != nil:
		return err
	case result.FVD != nil:
		return c.reportFVD(result.FVD)
	}
	return c.reportQcow2(result.Qcow2)
}

func (c *checking) reportQcow2(result *qcow2.CheckResult) error {
	out := c.cmd.OutOrStdout()
	switch {
	case c.json:
		if err := printJSON(out, result); err != nil {
			return err
		}
	case !c.quiet:
		printCheck(out, result)
	}
	if result.CheckErrors > 0 {
		return &exitError{status: statusError, err: fmt.Errorf("Check failed")}
	}
	return checkStatus(result.Corruptions, result.Leaks)
}

// checkStatus ends the program with what is left in an image.
func checkStatus(corruptions, leaks int64) error {
	switch {
	case corruptions > 0:
		return &exitError{status: checkCorrupt}
	case leaks > 0:
		return &exitError{status: checkLeaks}
	}
	return nil
}

// finding prints one inconsistency.
func (c *checking) finding(f qcow2.Finding) {
	prefix := ""
	if f.Named {
		prefix = "platter: "
	}
	fmt.Fprintf(c.cmd.ErrOrStderr(), "%s%s\n", prefix, f.Message)
}

// checkSummary is what the summaries of all formats begin with.
type checkSummary struct {
	unit      string // what can leak
	leakMeans string // and what that means
	rechecked bool   // a repaired image was checked again
	clean     bool

	corruptions, leaks, corruptionsFixed, leaksFixed int64
}

func (s checkSummary) print(out io.Writer) {
	if s.corruptionsFixed+s.leaksFixed > 0 {
		fmt.Fprintf(out, "The following inconsistencies were found and repaired:\n\n    %d leaked %s\n    %d corruptions\n\n",
			s.leaksFixed, s.unit, s.corruptionsFixed)
		if s.rechecked {
			fmt.Fprintln(out, "Double checking the fixed image now...")
		}
	}
	if s.clean {
		fmt.Fprintln(out, "No errors were found on the image.")
	}
	if s.corruptions > 0 {
		fmt.Fprintf(out, "\n%d errors were found on the image.\n"+
			"Data may be corrupted, or further writes to the image may corrupt it.\n", s.corruptions)
	}
	if s.leaks > 0 {
		fmt.Fprintf(out, "\n%d leaked %s were found on the image.\n%s\n", s.leaks, s.unit, s.leakMeans)
	}
}

// printCheck prints the summary for people.
func printCheck(out io.Writer, r *qcow2.CheckResult) {
	checkSummary{
		unit: "clusters", leakMeans: "This means waste of disk space, but no harm to data.", rechecked: true, clean: r.Clean(),
		corruptions: r.Corruptions, leaks: r.Leaks, corruptionsFixed: r.CorruptionsFixed, leaksFixed: r.LeaksFixed,
	}.print(out)
	if r.CheckErrors > 0 {
		fmt.Fprintf(out, "\n%d internal errors have occurred during the check.\n", r.CheckErrors)
	}
	if r.Collisions > 0 {
		fmt.Fprintf(out, "\n%d clusters are used by two owners that must not share one.\n", r.Collisions)
	}
	if r.TotalClusters > 0 && r.AllocatedClusters > 0 {
		fmt.Fprintf(out, "%d/%d = %.2f%% allocated, %.2f%% fragmented, %.2f%% compressed clusters\n",
			r.AllocatedClusters, r.TotalClusters, percent(r.AllocatedClusters, r.TotalClusters),
			percent(r.Fragmented, r.AllocatedClusters), percent(r.Compressed, r.AllocatedClusters))
	}
	if r.ImageEndOffset > 0 {
		fmt.Fprintf(out, "Image end offset: %d\n", r.ImageEndOffset)
	}
}
