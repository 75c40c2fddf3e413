package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/platter-disk/platter/image"
)

func newIOCommand() *cobra.Command {
	var (
		open     openFlags
		commands []string
		script   string
		readOnly bool
		cache    string
		discard  string
		metadata metadataFlags
		grow     growFlag
	)
	cmd := &cobra.Command{
		Use:   "io [flags] IMAGE",
		Short: "Read and write a disk by hand or by script",
		Long: `Read and write a disk with commands like those of qemu-io: given with -c, each in its
own flag, or read from a script, one on a line. Without either they are read from
standard input. Empty lines and lines that begin with # are skipped.

` + ioHelp() + `

Offsets and lengths are in bytes, or have a suffix k, M, G, T, P or E (powers of 1024),
or are hexadecimal after 0x. The exit status is 1 if any command failed; the commands
after it are carried out nevertheless.`,
		Example: `  platter io -c "write -P 0x5a 0 64k" -c flush -c "read -P 0x5a 0 64k" disk.qcow2
  platter io --read-only --script checks.txt disk.qcow2
  platter io -c "help write" disk.qcow2`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if err := open.check(cmd); err != nil {
				return err
			}
			if len(args) != 1 {
				return usagef(cmd, "Expecting one image file name")
			}
			if len(commands) > 0 && script != "" {
				return usagef(cmd, "-c and --script are mutually exclusive")
			}
			mode, ok := parseCache(cache)
			if !ok {
				return fmt.Errorf("Invalid cache option: %s", cache)
			}
			if discard != "unmap" && discard != "ignore" {
				return usagef(cmd, "--discard must be used with unmap or ignore as argument")
			}
			o := metadata.apply(image.Options{ReadOnly: readOnly, Discard: discard == "unmap"})
			img, err := open.open(cmd.Context(), args[0], mode.apply(grow.apply(cmd.Context(), o)))
			if err != nil {
				return err
			}
			s := newIOSession(img, img.Format(), cmd.OutOrStdout(), cmd.ErrOrStderr())
			defer func() {
				s.wait()
				if cerr := img.Close(); cerr != nil {
					err = errors.Join(err, fmt.Errorf("closing '%s': %w", args[0], cerr))
				}
				if err == nil && s.failed.Load() {
					err = &exitError{status: statusError}
				}
			}()
			if !readOnly {
				warnProbedRaw(cmd, img)
			}
			if len(commands) > 0 {
				for _, line := range commands {
					if !s.execute(cmd.Context(), line) {
						break
					}
				}
				return cmd.Context().Err()
			}
			return runIOScript(cmd, s, script)
		},
	}
	open.register(cmd, "format of the image; guessed when not given")
	fs := cmd.Flags()
	open.registerShare(fs)
	fs.StringArrayVarP(&commands, "cmd", "c", nil, "carry out `COMMAND`; may be repeated")
	fs.StringVar(&script, "script", "", "read the commands from `FILE`, - for standard input")
	fs.BoolVarP(&readOnly, "read-only", "r", false, "refuse every change")
	fs.StringVarP(&cache, "cache", "t", "writeback", "`MODE` is none, writeback, writethrough, directsync or unsafe")
	completeWith(cmd, "cache", cacheNames...)
	fs.StringVarP(&discard, "discard", "d", "unmap", "what to do with space that is discarded: `MODE` is unmap or ignore")
	completeWith(cmd, "discard", "unmap", "ignore")
	metadata.register(cmd)
	grow.register(fs)
	return cmd
}

// maxIOLine bounds a line of a script, in bytes.
const maxIOLine = 64 << 10

// runIOScript carries out the commands in a file, or on standard input for "" and "-".
func runIOScript(cmd *cobra.Command, s *ioSession, script string) error {
	in := cmd.InOrStdin()
	if script != "" && script != "-" {
		f, err := os.Open(script)
		if err != nil {
			return fmt.Errorf("script: %w", err)
		}
		defer f.Close()
		in = f
	}
	prompt := func() {}
	if f, ok := in.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		prompt = func() { fmt.Fprint(cmd.OutOrStdout(), "platter io> ") }
	}
	return s.readCommands(cmd.Context(), in, prompt)
}

// readCommands carries out the lines of r until it ends, a command says so or ctx ends.
func (s *ioSession) readCommands(ctx context.Context, r io.Reader, prompt func()) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, 4096), maxIOLine)
	for prompt(); lines.Scan(); prompt() {
		if !s.execute(ctx, lines.Text()) {
			break
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("script: %w", err)
	}
	return ctx.Err()
}
