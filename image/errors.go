package image

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"syscall"
	"unicode"

	"github.com/platter-disk/platter/storage"
)

// NameError is an error of Open, Create or Check together with the name that was asked for, in the words of
// qemu-img, for example
//
//	Could not open 'top.qcow2': Could not open backing file: Could not open 'base.raw': No such file or directory
type NameError struct {
	Verb string // "open", "create" or "check"
	Name string
	Err  error
}

func (e *NameError) Error() string {
	return fmt.Sprintf("Could not %s '%s': %v", e.Verb, printable(e.Name), e.Err)
}

// maxShown is the most in bytes that an error repeats of a name.
const maxShown = 1024

// printable escapes a name that holds control characters, and cuts one that is too long to read: an image
// chooses it, and a terminal shows it.
func printable(name string) string {
	if len(name) > maxShown {
		name = strings.ToValidUTF8(name[:maxShown], "") + "…"
	}
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

// fileError says which file could not be opened, and why, without repeating its name. An error about locks names
// it already.
func fileError(verb, path string, err error) error {
	var lock *storage.LockError
	if errors.As(err, &lock) {
		return &storage.LockError{Path: printable(lock.Path), Permission: lock.Permission, Shared: lock.Shared}
	}
	var pathError *fs.PathError
	if errors.As(err, &pathError) {
		err = pathError.Err
	}
	if errno, ok := err.(syscall.Errno); ok {
		err = systemError{errno}
	}
	return &NameError{Verb: verb, Name: path, Err: err}
}

// wordedError is an error whose words are QEMU's alone, and which wraps one that says of what kind it is.
type wordedError struct {
	text string
	kind error
}

func (e *wordedError) Error() string { return e.text }
func (e *wordedError) Unwrap() error { return e.kind }

// errUnknownFormat is about the name of a format; what is how QEMU calls it at that place.
func errUnknownFormat(what, name string) error {
	return &wordedError{fmt.Sprintf("Unknown %s '%s'", what, printable(name)), ErrUnsupportedFormat}
}

// errShare refuses to write an image that others may be writing.
var errShare = qemuError("force-share=on can only be used with read-only images")

// errOpen puts the name in front of why it could not be opened. QEMU's words name a file twice where the system has
// the last word; what is no file is named once.
func errOpen(name string, err error) error {
	if named, ok := err.(*NameError); ok && named.Name == name && errors.Is(err, storage.ErrKind) {
		return err
	}
	return &NameError{Verb: "open", Name: name, Err: err}
}

// errCaches refuses the size of a cache that only qcow2 has: the L2 cache's, or if that is 0 the refcount cache's.
func errCaches(format string, l2Cache int64) error {
	option := "l2-cache-size"
	if l2Cache == 0 {
		option = "refcount-cache-size"
	}
	return qemuError("Block format '%s' does not support the option '%s'", format, option)
}

// qemuError is fmt.Errorf for messages in QEMU's words, which scripts know; they begin with a capital.
func qemuError(format string, args ...any) error { return fmt.Errorf(format, args...) }
