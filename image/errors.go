package image

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"syscall"
	"unicode"
)

// NameError is an error of Open or Create together with the name that was asked for, in the words of
// qemu-img, for example
//
//	Could not open 'top.qcow2': Could not open backing file of 'top.qcow2': Could not open 'base.raw': No such file or directory
type NameError struct {
	Verb string // "open", "create" or "check"
	Name string
	Err  error
}

func (e *NameError) Error() string {
	return fmt.Sprintf("Could not %s '%s': %v", e.Verb, printable(e.Name), e.Err)
}

// printable escapes a name that holds control characters: an image chooses it, and a terminal shows it.
func printable(name string) string {
	if strings.IndexFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }) < 0 {
		return name
	}
	quoted := strconv.Quote(name)
	return quoted[1 : len(quoted)-1]
}

// Unwrap returns the reason.
func (e *NameError) Unwrap() error { return e.Err }

// systemError shows an error of the operating system as strerror does, with a capital.
type systemError struct{ err syscall.Errno }

func (e systemError) Error() string {
	s := e.err.Error()
	return strings.ToUpper(s[:1]) + s[1:]
}

func (e systemError) Unwrap() error { return e.err }

// fileError says which file could not be opened, and why, without repeating its name.
func fileError(verb, path string, err error) error {
	var pathError *fs.PathError
	if errors.As(err, &pathError) {
		err = pathError.Err
	}
	if errno, ok := err.(syscall.Errno); ok {
		err = systemError{errno}
	}
	return &NameError{Verb: verb, Name: path, Err: err}
}

// qemuError is fmt.Errorf for messages in QEMU's words, which scripts know; they begin with a capital.
func qemuError(format string, args ...any) error { return fmt.Errorf(format, args...) }
