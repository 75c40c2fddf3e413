package cli

import (
	"fmt"
	"io"
	"os/exec"

	"github.com/spf13/cobra"

	"github.com/platter-disk/platter/internal/bench"
)

// disciplineFlags are the flags of bench --disciplines.
type disciplineFlags struct {
	wanted   bool
	recovery []string // sizes
}

// recoverySizes are what --recovery means without sizes.
const recoverySizes = "1G,100G,4T"

func (d *disciplineFlags) register(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.BoolVar(&d.wanted, "disciplines", false, "measure what each discipline of qcow2 metadata costs")
	fs.StringSliceVar(&d.recovery, "recovery", nil, "with --disciplines: crash images with so much of the disk mapped,\nand measure recovery ("+recoverySizes+" when no sizes are given)")
	fs.Lookup("recovery").NoOptDefVal = recoverySizes
}

// runDisciplines measures the disciplines on new images.
func (f *benchFlags) runDisciplines(cmd *cobra.Command, args []string) error {
	switch f.output.form {
	case "human", "json", "markdown":
	default:
		return fmt.Errorf("--output must be used with human, json or markdown as argument.")
	}
	switch {
	case len(args) > 0:
		return usagef(cmd, "--disciplines makes images of its own: no image can be given")
	case f.against != "" && f.against != "qemu-nbd":
		return usagef(cmd, "--against must be used with qemu-nbd as argument")
	case f.operations < 0:
		return usagef(cmd, "--operations must not be negative")
	}
	var sizes []int64
	for _, s := range f.disciplines.recovery {
		n, err := sizeArgument("size of --recovery", s)
		if err != nil {
			return err
		}
		if n < 1<<20 || n > 8<<40 {
			return usagef(cmd, "--recovery %s: expected 1M to 8T", s)
		}
		sizes = append(sizes, n)
	}
	all := bench.Disciplines()
	if f.against != "" {
		for _, program := range []string{"qemu-nbd", "qemu-img", "strace"} {
			if _, err := exec.LookPath(program); err != nil {
				return fmt.Errorf("--against qemu-nbd: %w", err)
			}
		}
		all = append(all, bench.QemuDisciplines()...)
	}
	report := &bench.DisciplineReport{}
	err := f.inDir(func(dir string) (err error) {
		b := &bench.DisciplineBench{Dir: dir, Cases: f.workloads, Operations: f.operations, Notes: cmd.ErrOrStderr()}
		if report.Operations, err = b.Run(cmd.Context(), all); err != nil {
			return err
		}
		for _, size := range sizes {
			results, err := b.Recover(cmd.Context(), size, f.against != "")
			if err != nil {
				return err
			}
			report.Recovery = append(report.Recovery, results...)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return f.printReport(cmd, report)
}

// tables is what a comparison found, for people.
type tables interface {
	Write(out io.Writer) error
	WriteMarkdown(out io.Writer) error
}

// printReport prints it in the form that --output names.
func (f *benchFlags) printReport(cmd *cobra.Command, report tables) error {
	switch out := cmd.OutOrStdout(); f.output.form {
	case "json":
		return printJSON(out, report)
	case "markdown":
		return report.WriteMarkdown(out)
	default:
		return report.Write(out)
	}
}
