// Package cli is the program: it parses command lines, calls the packages below and prints. It knows no byte
// of any disk format.
//
// One file holds one command (create.go, info.go …). What several commands share lies beside them:
//
//	open.go          opening images as the flags say (-f, --image-opts, -U, --references, -t)
//	createoptions.go the -o options of the formats
//	size.go          sizes as qemu-img reads and prints them
//	progress.go      progress bars and their other forms
//	errors.go        exit statuses, and errors in the words of qemu-img
//
// Where qemu-img has a command of the same name, its flags, output, exit statuses and error texts are those
// of qemu-img, with platter in place of its name.
package cli

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
)

const (
	groupImages = "images"
	groupUse    = "use"
)

// Main runs the program with its arguments, without the program's name, and returns its exit status: 128 and the
// number of the signal for a command that a signal interrupted, as of a process that the signal killed.
// SIGINT, SIGTERM and SIGHUP cancel the context of the command; a second SIGINT or SIGTERM ends the process at once.
func Main(args []string) int {
	ctx, stop := notifyContext(context.Background())
	defer stop()
	status := run(ctx, args, os.Stdout, os.Stderr)
	var by *interruption
	if status == statusInterrupted && errors.As(context.Cause(ctx), &by) {
		return 128 + int(by.signal)
	}
	return status
}

// interruption is the cause of a context that a signal cancelled.
type interruption struct{ signal syscall.Signal }

func (e *interruption) Error() string { return "interrupted by a signal: " + e.signal.String() }
func (e *interruption) Unwrap() error { return context.Canceled }

// notifyContext returns a context that the first signal cancels. After it SIGINT and SIGTERM do what they do by
// default. SIGHUP does nothing any more: when a terminal closes it may come twice, from the system and from the
// shell. Where it is ignored from the start, as under nohup, it stays so.
func notifyContext(parent context.Context) (ctx context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(parent)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) {
		signal.Notify(signals, syscall.SIGHUP)
	}
	go func() {
		select {
		case s := <-signals:
			signal.Reset(os.Interrupt, syscall.SIGTERM)
			by, _ := s.(syscall.Signal) // the only kind there is
			cancel(&interruption{by})
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		cancel(nil)
	}
}

// run is Main with its surroundings given.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := New()
	root.SetArgs(protectNegativeSize(args))
	root.SetOut(stdout)
	root.SetErr(stderr)
	return report(stderr, root.ExecuteContext(ctx))
}

// New builds the tree of commands.
func New() *cobra.Command {
	root := &cobra.Command{
		Use:   "platter",
		Short: "Create, inspect, copy and serve virtual disks",
		Long: `Platter keeps virtual disks in image files (qcow2, FVD, raw), and serves them to virtual
machines and other NBD clients. It never loses what a guest was told is safe.

Its commands take the flags of qemu-img where qemu-img has the same command, so
scripts move over unchanged.`,
		Example: `  platter create -f qcow2 disk.qcow2 10G      a new, empty disk that grows as it is written
  platter info disk.qcow2                     what kind of disk a file holds
  platter convert -O qcow2 disk.img d.qcow2   the same disk in another format
  platter check disk.qcow2                    is everything in order?
  platter serve disk.qcow2                    use it: prints the address for a guest or client`,
		Version:       version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknownCommand(cmd, args[0])
			}
			return cmd.Help()
		},
	}
	root.Flags().BoolP("version", "V", false, "print the version and exit")
	root.SetVersionTemplate("platter version {{.Version}}\n")
	root.SetFlagErrorFunc(flagError)
	root.AddGroup(
		&cobra.Group{ID: groupImages, Title: "Image files:"},
		&cobra.Group{ID: groupUse, Title: "Disks in use:"},
	)
	add := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add(groupImages,
		newCreateCommand(),
		newInfoCommand(),
		newMapCommand(),
		newMeasureCommand(),
		newCheckCommand(),
		newConvertCommand(),
		newCompareCommand(),
		newCommitCommand(),
		newRebaseCommand(),
		newResizeCommand(),
		newAmendCommand(),
		newSnapshotCommand(),
	)
	add(groupUse,
		newServeCommand(),
		newPrefetchCommand(),
		newIOCommand(),
		newBenchCommand(),
		newCrashlabCommand(),
	)
	return root
}

// version is the module version that the program was built from.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "(devel)"
	}
	return info.Main.Version
}

// protectNegativeSize puts "--" before the last argument of resize when it is a size like -1G, which would
// otherwise be taken for flags.
func protectNegativeSize(args []string) []string {
	if len(args) < 3 || args[0] != "resize" {
		return args
	}
	last := args[len(args)-1]
	if len(last) < 2 || last[0] != '-' || last[1] < '0' || last[1] > '9' || args[len(args)-2] == "--" {
		return args
	}
	out := append([]string{}, args[:len(args)-1]...)
	return append(out, "--", last)
}
