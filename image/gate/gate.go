// Package gate decides which other files an image may make its reader open.
//
// An image is untrusted input, and it can name other files: a backing file, an external data file. Whoever
// opens such an image would read, or write, whatever the name says (any file of the host that the process may
// open, any server it can reach). The names are therefore opened only through a [Gate] that the caller
// supplies:
//
//	Deny           images that stand alone
//	SameDirectory  images that come as a set of files in one directory
//	Any            images of one's own making; what qemu-img does
//
// A name that the caller of image.Open gives does not pass a gate; only what is found inside an image does.
package gate

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// ErrRefused is wrapped by the errors of the gates of this package.
var ErrRefused = errors.New("the reference was refused")

// Kind says what an image needs the file for.
type Kind uint8

const (
	Backing  Kind = iota // what the image holds no data for is read from it
	DataFile             // the image keeps guest data in it, and writes it when the image is written
)

// String returns "backing file" or "data file".
func (k Kind) String() string {
	if k == DataFile {
		return "data file"
	}
	return "backing file"
}

// FileProtocol is the Reference.Protocol of a path on this machine.
const FileProtocol = "file"

// Reference is a file that an image names.
type Reference struct {
	Kind     Kind
	Image    string // path or URI of the image that refers
	Protocol string // FileProtocol, "nbd", or "json" for a description in JSON that may name several files
	Name     string // what would be opened: a path, resolved against the image's directory where that applies, a URI, or the JSON text
}

func (r Reference) refuse(why string) error {
	return fmt.Errorf("%v %q of %q: %s: %w", r.Kind, r.Name, r.Image, why, ErrRefused)
}

// Gate decides about references. Allow returns nil to allow one. It must be safe for concurrent use.
type Gate interface {
	Allow(ref Reference) error
}

// Any allows every reference.
type Any struct{}

// Allow implements Gate.
func (Any) Allow(Reference) error { return nil }

// Deny allows none.
type Deny struct{}

// Allow implements Gate.
func (Deny) Allow(r Reference) error { return r.refuse("references to other files are not allowed") }

// SameDirectory allows files of this machine that lie in the directory of the image that names them, however
// the name is written, provided that no symbolic link leads out of it. It looks before the file is opened: it
// does not protect against somebody who can change the directory at the same moment.
type SameDirectory struct{}

// Allow implements Gate.
func (SameDirectory) Allow(r Reference) error {
	if r.Protocol != FileProtocol {
		return r.refuse("only files in the image's own directory are allowed")
	}
	// On windows even looking at a path on another machine tells that machine who the user is.
	if v := filepath.VolumeName(r.Name); len(v) > len("C:") && !strings.EqualFold(v, filepath.VolumeName(r.Image)) {
		return r.refuse("it is not on the image's own drive")
	}
	home, err := os.Stat(filepath.Dir(r.Image))
	if err != nil {
		return r.refuse("the image is not in a directory of this machine")
	}
	inside := func(path string) bool {
		dir, err := os.Stat(filepath.Dir(path))
		return err == nil && os.SameFile(home, dir)
	}
	if !inside(r.Name) {
		return r.refuse("it is not in the image's own directory")
	}
	if _, err := os.Lstat(r.Name); errors.Is(err, fs.ErrNotExist) {
		return nil // opening it says so in better words
	}
	target, err := filepath.EvalSymlinks(r.Name)
	if err != nil || !inside(target) {
		return r.refuse("it is a symbolic link out of the image's own directory")
	}
	return nil
}
