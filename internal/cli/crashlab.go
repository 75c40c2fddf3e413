package cli

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/internal/crashcases"
)

// statusViolations is the exit status of crashlab when a promise did not hold.
const statusViolations = 2

func newCrashlabCommand() *cobra.Command {
	var (
		list   bool
		output string
		c      crashcases.Case
		opts   crashlab.Options
	)
	cmd := &cobra.Command{
		Use:   "crashlab --format FORMAT --discipline NAME --workload NAME [flags]",
		Short: "Explore what a power cut can leave of an image",
		Long: `Run a workload on an image in memory, build what the disk may hold after a power cut
at each point of it, reopen every one of these states, and judge: does it open, is
the checker satisfied, is everything there that the guest was told is safe, and
does the disk still work?

--list names the formats, disciplines, workloads and mutants. A mutant is a known
wrong order of updates; the lab is to catch it.

Exit status: 0 every promise held, 2 a violation was found.`,
		Example: `  platter crashlab --list
  platter crashlab --format qcow2 --discipline ordered --workload overlay --states 100000 --seed 7
  platter crashlab --format qcow2 --discipline journal --workload churn --mutant journal-no-wal
  platter crashlab --format qcow2 --discipline lazy --workload mixed --output html > report.html
  platter crashlab --format fvd --discipline buffered --workload copy-on-read`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if list {
				return listCases(cmd.OutOrStdout())
			}
			if !slices.Contains([]string{"human", "json", "html"}, output) {
				return usagef(cmd, "--output must be human, json or html, not %q", output)
			}
			c.Seed = opts.Seed
			sc, models, err := crashcases.Scenario(c)
			if err != nil {
				return usagef(cmd, "%v (--list names what there is)", err)
			}
			opts.Models = models
			r, err := crashlab.Explore(cmd.Context(), sc, opts)
			if err != nil {
				return err
			}
			if err := writeReport(cmd.OutOrStdout(), r, output); err != nil {
				return err
			}
			if len(r.Violations) > 0 {
				return &exitError{status: statusViolations}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVar(&list, "list", false, "name formats, disciplines, workloads and mutants")
	f.StringVar(&c.Format, "format", "qcow2", "format of the image")
	f.StringVar(&c.Discipline, "discipline", "", "metadata discipline, of fvd its journal mode (default: the format's, see --list)")
	f.StringVar(&c.Workload, "workload", "mixed", "what the guest does")
	f.StringVar(&c.Mutant, "mutant", "", "a wrong order to switch on")
	f.IntVar(&opts.States, "states", 20000, "crash states of the workload to explore, about")
	f.Uint64Var(&opts.Seed, "seed", 1, "seed of the workload and of the choice of states")
	f.IntVar(&opts.Violations, "violations", 1, "end after this many violations")
	f.StringVar(&output, "output", "human", "human, json or html")
	return cmd
}

func writeReport(w io.Writer, r *crashlab.Report, output string) error {
	switch output {
	case "json":
		return r.WriteJSON(w)
	case "html":
		return r.WriteHTML(w)
	}
	return r.WriteText(w)
}

func listCases(w io.Writer) error {
	for _, f := range crashcases.Formats() {
		fmt.Fprintf(w, "format %s\n", f.Name)
		fmt.Fprintf(w, "  disciplines: %s (default %s)\n  workloads:\n", strings.Join(f.Disciplines, ", "), f.Default)
		for _, l := range f.Workloads {
			only := ""
			if len(l.Disciplines) > 0 && len(l.Disciplines) < len(f.Disciplines) {
				only = fmt.Sprintf(" (%s)", strings.Join(l.Disciplines, ", "))
			}
			fmt.Fprintf(w, "    %-14s %s%s\n", l.Name, l.Description, only)
		}
		fmt.Fprintln(w, "  mutants (workload that catches it; disciplines):")
		for _, m := range f.Mutants {
			about := ""
			if m.Description != "" {
				about = "; " + m.Description
			}
			if _, err := fmt.Fprintf(w, "    %-30s %s; %s%s\n", m.Name, m.Workload, strings.Join(m.Disciplines, ", "), about); err != nil {
				return err
			}
		}
	}
	return nil
}
