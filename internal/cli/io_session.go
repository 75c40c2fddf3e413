package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/platter-disk/platter/block"
)

// maxIOInFlight bounds the aio_ commands that run at a time.
const maxIOInFlight = 64

// ioSession is an image with the commands of `platter io`.
type ioSession struct {
	dev    block.Device
	format string
	failed atomic.Bool // a command failed

	background sync.WaitGroup // the aio_ commands
	slots      chan struct{}

	mu       sync.Mutex // one result is printed at a time
	out, err io.Writer
}

func newIOSession(dev block.Device, format string, out, errw io.Writer) *ioSession {
	return &ioSession{dev: dev, format: format, out: out, err: errw, slots: make(chan struct{}, maxIOInFlight)}
}

// wait returns when every aio_ command has ended.
func (s *ioSession) wait() { s.background.Wait() }

// errQuit ends a session.
var errQuit = errors.New("quit")

// execute carries out one line and reports whether the session goes on. What the disk refused is printed
// where results are, as qemu-io does; what is wrong with the line goes to standard error.
func (s *ioSession) execute(ctx context.Context, line string) bool {
	words := strings.Fields(line)
	if len(words) == 0 || strings.HasPrefix(words[0], "#") {
		return true
	}
	if ctx.Err() != nil {
		return false
	}
	c := findIOCommand(words[0])
	if c == nil {
		s.complain(fmt.Errorf("command %q not found", words[0]))
		return true
	}
	call, err := c.parse(words[1:])
	if err != nil {
		s.complain(err)
		return true
	}
	if !c.background {
		err := c.run(ctx, s, call)
		if errors.Is(err, errQuit) {
			return false
		}
		s.conclude(c, err)
		return true
	}
	select {
	case s.slots <- struct{}{}:
	case <-ctx.Done():
		return false
	}
	s.background.Go(func() {
		defer func() { <-s.slots }()
		s.conclude(c, c.run(ctx, s, call))
	})
	return true
}

// conclude reports a command's error. A command that was called with arguments that mean nothing to it
// returns an argumentError.
func (s *ioSession) conclude(c *ioCommand, err error) {
	var wrong *argumentError
	switch {
	case err == nil:
	case errors.As(err, &wrong):
		s.complain(err)
	case errors.Is(err, errPattern):
		s.failed.Store(true) // it was printed with the result
	default:
		s.failed.Store(true)
		s.print("%s failed: %s\n", c.verb(), message(err))
	}
}

// complain reports a line that could not be carried out.
func (s *ioSession) complain(err error) {
	s.failed.Store(true)
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Fprintln(s.err, err)
}

func (s *ioSession) print(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Fprintf(s.out, format, args...)
}

// argumentError says that a command was called in a way that means nothing.
type argumentError struct{ msg string }

func (e *argumentError) Error() string { return e.msg }

func argumentf(format string, args ...any) error {
	return &argumentError{fmt.Sprintf(format, args...)}
}

// ioCall is a command with its options and arguments.
type ioCall struct {
	options map[byte]string // value, or "" for an option that has none
	args    []string
}

func (c *ioCall) has(option byte) bool {
	_, ok := c.options[option]
	return ok
}

// size reads argument i as a number of bytes.
func (c *ioCall) size(i int) (int64, error) { return ioSizeArgument(c.args[i]) }

func ioSizeArgument(s string) (int64, error) {
	n, err := parseSize(s)
	switch {
	case errors.Is(err, errSizeRange):
		return 0, argumentf("Parsing error: argument too large -- %q", s)
	case err != nil:
		return 0, argumentf("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- %q", s)
	}
	return n, nil
}

// ioCommand is a command of `platter io`.
type ioCommand struct {
	name       string
	alias      string // "" for none
	options    string // letters; those followed by a colon take a value (getopt(3))
	usage      string // options and arguments for people
	summary    string
	details    string // for `help NAME`
	min, max   int    // arguments; max < 0: any number
	background bool   // returns at once, prints when it is done
	run        func(ctx context.Context, s *ioSession, c *ioCall) error
}

// verb is the command's name in messages: aio_read fails as read does.
func (c *ioCommand) verb() string { return strings.TrimPrefix(c.name, "aio_") }

// parse splits words into options and arguments, as getopt(3) does: options may be joined (-zu) and may
// follow arguments, and -- ends them.
func (c *ioCommand) parse(words []string) (*ioCall, error) {
	call := &ioCall{options: map[byte]string{}}
	for i := 0; i < len(words); i++ {
		w := words[i]
		if w == "--" {
			call.args = append(call.args, words[i+1:]...)
			break
		}
		if len(w) < 2 || w[0] != '-' {
			call.args = append(call.args, w)
			continue
		}
		for j := 1; j < len(w); j++ {
			at := strings.IndexByte(c.options, w[j])
			if at < 0 || w[j] == ':' {
				return nil, argumentf("%s: invalid option -- '%c'", c.name, w[j])
			}
			if at+1 == len(c.options) || c.options[at+1] != ':' {
				call.options[w[j]] = ""
				continue
			}
			value := w[j+1:]
			if value == "" {
				if i++; i == len(words) {
					return nil, argumentf("%s: option requires an argument -- '%c'", c.name, w[j])
				}
				value = words[i]
			}
			call.options[w[j]] = value
			break
		}
	}
	n := len(call.args)
	switch {
	case n >= c.min && (n <= c.max || c.max < 0):
		return call, nil
	case c.max < 0:
		return nil, argumentf("bad argument count %d to %s, expected at least %d arguments", n, c.name, c.min)
	case c.min == c.max:
		return nil, argumentf("bad argument count %d to %s, expected %d arguments", n, c.name, c.min)
	default:
		return nil, argumentf("bad argument count %d to %s, expected between %d and %d arguments", n, c.name, c.min, c.max)
	}
}

func findIOCommand(name string) *ioCommand {
	commands := ioCommands()
	i := slices.IndexFunc(commands, func(c *ioCommand) bool { return c.name == name || c.alias != "" && c.alias == name })
	if i < 0 {
		return nil
	}
	return commands[i]
}

// ioHelp lists the commands.
func ioHelp() string {
	var b strings.Builder
	for _, c := range ioCommands() {
		fmt.Fprintf(&b, "  %-60s %s\n", strings.TrimSpace(c.name+" "+c.usage), c.summary)
	}
	return strings.TrimRight(b.String(), "\n")
}
