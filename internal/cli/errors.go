package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image"
)

// Exit statuses, as of qemu-img.
const (
	statusError       = 1
	statusInterrupted = 128 + int(syscall.SIGINT)
)

// exitError ends the program with a status of its own. Without an error it ends silently: the command has
// said what there was to say.
type exitError struct {
	status int
	err    error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.status)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// usageError says that a command line is wrong, and where to read how it should be.
type usageError struct {
	cmd *cobra.Command
	msg string
}

func (e *usageError) Error() string { return e.msg }

func usagef(cmd *cobra.Command, format string, args ...any) error {
	return &usageError{cmd, fmt.Sprintf(format, args...)}
}

// flagError turns what the flag parser says into the words of qemu-img.
func flagError(cmd *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	var missing *pflag.ValueRequiredError
	var invalid *pflag.InvalidValueError
	switch {
	case errors.As(err, &unknown):
		if s := unknown.GetSpecifiedShortnames(); s != "" {
			return usagef(cmd, "unrecognized option '-%s'", unknown.GetSpecifiedName())
		}
		return usagef(cmd, "unrecognized option '--%s'", unknown.GetSpecifiedName())
	case errors.As(err, &missing):
		if s := missing.GetSpecifiedShortnames(); s != "" {
			return usagef(cmd, "missing argument for option '-%s'", missing.GetSpecifiedName())
		}
		return usagef(cmd, "missing argument for option '--%s'", missing.GetSpecifiedName())
	case errors.As(err, &invalid):
		return usagef(cmd, "invalid value '%s' for option '--%s'", invalid.GetValue(), invalid.GetFlag().Name)
	default:
		return usagef(cmd, "%s", err)
	}
}

func unknownCommand(cmd *cobra.Command, name string) error {
	msg := "Command not found: " + name
	cmd.SuggestionsMinimumDistance = 2
	if s := cmd.SuggestionsFor(name); len(s) > 0 {
		msg += "\nDid you mean " + strings.Join(s, " or ") + "?"
	}
	return usagef(cmd, "%s", msg)
}

// report prints the error that a command ended with, and returns the exit status.
func report(stderr io.Writer, err error) int {
	if err == nil {
		return 0
	}
	status := statusError
	var exit *exitError
	if errors.As(err, &exit) {
		status = exit.status
		if exit.err == nil {
			return status
		}
		err = exit.err
	}
	var usage *usageError
	var size *sizeError
	switch {
	case errors.As(err, &usage):
		fmt.Fprintf(stderr, "platter: %s\nTry '%s --help' for more information\n", usage.msg, usage.cmd.CommandPath())
	case errors.As(err, &size):
		for _, line := range strings.Split(err.Error(), "\n") {
			fmt.Fprintln(stderr, "platter:", line)
		}
	case errors.Is(err, context.Canceled):
		fmt.Fprintln(stderr, "platter: interrupted")
		return statusInterrupted
	default:
		fmt.Fprintln(stderr, "platter:", message(err))
	}
	return status
}

// message is the text of an error, with what the system said spelt as C programs spell it: with a capital.
func message(err error) string {
	s := err.Error()
	var format *qcow2.FormatError
	if errors.As(err, &format) {
		// Whoever wrapped it has named the file already.
		said := format.Error()
		s = strings.Replace(s, said, strings.TrimPrefix(said, format.File+": "), 1)
	}
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return s
	}
	said := errno.Error()
	if i := strings.LastIndex(s, said); i > 0 {
		first, n := utf8.DecodeRuneInString(said)
		s = s[:i] + string(unicode.ToUpper(first)) + said[n:] + s[i+len(said):]
	}
	return s
}

// withoutName takes a file name off the start of an error that is to get it from the caller.
func withoutName(err error, name string) error {
	if rest, ok := strings.CutPrefix(err.Error(), name+": "); ok {
		return &textError{rest, err}
	}
	return err
}

// textError is an error in other words.
type textError struct {
	text string
	err  error
}

func (e *textError) Error() string { return e.text }
func (e *textError) Unwrap() error { return e.err }

// warnUnfinished announces the files that a creation which ended with err left with neither what they held nor an
// image.
func warnUnfinished(cmd *cobra.Command, err error) {
	for left := (*image.UnfinishedError)(nil); errors.As(err, &left); err = left.Err {
		warn(cmd, "'%s' holds an unfinished image", left.Name)
	}
}

// warn prints a warning as qemu-img does.
func warn(cmd *cobra.Command, format string, args ...any) {
	fmt.Fprintf(cmd.ErrOrStderr(), "platter: warning: "+format+"\n", args...)
}
