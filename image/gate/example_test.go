package gate_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/platter-disk/platter/image/gate"
)

// library is a gate that lets images have the base images of one directory, and nothing else.
type library struct{ dir string }

// Allow implements gate.Gate.
func (l library) Allow(r gate.Reference) error {
	if r.Kind == gate.Backing && r.Protocol == gate.FileProtocol {
		// The directory is nobody else's, so that there are no symbolic links in it.
		path, err := filepath.Rel(l.dir, filepath.Clean(r.Name))
		if err == nil && filepath.IsLocal(path) && !strings.ContainsRune(path, filepath.Separator) {
			return nil
		}
	}
	return fmt.Errorf("%v %q of %q is not in %s: %w", r.Kind, r.Name, r.Image, l.dir, gate.ErrRefused)
}

// A gate of one's own. It is given to image.Open in image.Options.
func ExampleGate() {
	var g gate.Gate = library{filepath.FromSlash("/srv/base")}
	for _, name := range []string{"/srv/base/debian.qcow2", "/srv/base/../secret", "/etc/passwd"} {
		err := g.Allow(gate.Reference{Kind: gate.Backing, Image: "disk.qcow2", Protocol: gate.FileProtocol, Name: filepath.FromSlash(name)})
		fmt.Println(name, errors.Is(err, gate.ErrRefused))
	}
	// Output:
	// /srv/base/debian.qcow2 false
	// /srv/base/../secret true
	// /etc/passwd true
}
