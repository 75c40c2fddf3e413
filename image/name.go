package image

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/platter-disk/platter/image/gate"
	"github.com/platter-disk/platter/internal/hostpath"
)

// node says how to open an image: what a name means once it is parsed.
type node struct {
	format string    // "" to find out by looking
	shown  string    // what Image.Format says; "" for the format
	at     *location // where its bytes are

	backing   *node // instead of what the image says; nil to ask the image
	noBacking bool  // read without the backing file that the image names
	dataFile  *location

	readOnly      bool
	share         bool // may be written by others meanwhile
	discard       *bool
	writethrough  bool
	direct        bool
	l2Cache       int64
	refcountCache int64
	discipline    string
	offset, size  int64 // of the part of the file that is a raw disk
}

// location says where a sequence of bytes is: a file, or an NBD export.
type location struct {
	path   string // local file or block device
	uri    string // NBD; path is "" then
	noLock bool
	direct bool
}

func (l *location) local() bool { return l.uri == "" }

func (l *location) String() string {
	if l.local() {
		return l.path
	}
	return l.uri
}

func (l *location) protocol() string {
	if l.local() {
		return gate.FileProtocol
	}
	return "nbd"
}

const (
	jsonPrefix   = "json:"
	driverPrefix = "driver="
)

// parseName parses a name that the caller of Open gives.
func parseName(name string, isOptions bool) (*node, error) {
	switch {
	case isOptions || strings.HasPrefix(name, driverPrefix):
		t, err := parseOptionString(name)
		if err != nil {
			return nil, err
		}
		return decodeNode(t)
	case strings.HasPrefix(name, jsonPrefix):
		return parseJSONName(name)
	}
	// A file that exists is what the user means, even if its name looks like a protocol.
	if _, err := os.Lstat(name); err == nil {
		return &node{at: &location{path: name}}, nil
	}
	at, err := parseLocation(name)
	return &node{at: at}, err
}

// parseNew parses the name of an image that is to be made, so that Open finds under it what was made.
func parseNew(name string) (*location, error) {
	switch {
	case strings.HasPrefix(name, driverPrefix):
		return nil, fmt.Errorf("an image is made under a file name or URI, and '%s' would be read as options; a file is called that after ./", printable(name))
	case strings.HasPrefix(name, jsonPrefix):
		return parseLocation(name) // which knows no such protocol
	}
	n, err := parseName(name, false)
	if err != nil {
		return nil, err
	}
	return n.at, nil
}

func parseJSONName(name string) (*node, error) {
	t, err := parseJSON(name[len(jsonPrefix):])
	if err != nil {
		return nil, err
	}
	return decodeNode(t)
}

// parseLocation parses a path or a name with a protocol prefix.
func parseLocation(name string) (*location, error) {
	prefix, rest := cutProtocol(name)
	switch {
	case prefix == "file":
		name = rest
	case strings.HasPrefix(name, "nbd:") && !strings.HasPrefix(name, "nbd://"):
		return parseOldNBD(name)
	case isNBD(name):
		uri, err := checkNBD(name)
		return &location{uri: uri}, err
	case prefix != "":
		return nil, qemuError("Unknown protocol '%s'", printable(prefix))
	}
	if name == "" {
		return nil, qemuError("The 'file' block driver requires a file name")
	}
	if strings.IndexByte(name, 0) >= 0 {
		return nil, fmt.Errorf("file name %q contains a zero byte", name)
	}
	return &location{path: name}, nil
}

// cutProtocol splits a name at its first colon, unless a slash comes before it: "./a:b" is a path.
func cutProtocol(name string) (prefix, rest string) {
	i := strings.IndexAny(name, ":/"+pathSeparators)
	if i <= 0 || name[i] != ':' {
		return "", name
	}
	if runtime.GOOS == "windows" && i == 1 { // a drive
		return "", name
	}
	return name[:i], name[i+1:]
}

// pathSeparators are the characters that end a path component here.
const pathSeparators = string(filepath.Separator)

// relativity is what a relative path in an image is relative to.
type relativity bool

const (
	besideImage          relativity = true // the directory of the image
	fromWorkingDirectory relativity = false
)

// parseReference parses a reference that the image at from holds.
func parseReference(kind gate.Kind, from *location, ref string, relative relativity) (*node, gate.Reference, error) {
	r := gate.Reference{Kind: kind, Image: from.String(), Protocol: "json", Name: ref}
	if kind == gate.Backing && strings.HasPrefix(ref, jsonPrefix) {
		n, err := parseJSONName(ref)
		return n, r, err
	}
	prefix, _ := cutProtocol(ref)
	at, err := parseLocation(ref)
	if err != nil {
		return nil, r, err
	}
	if relative == besideImage && prefix == "" {
		if !from.local() && !hostpath.Fixed(at.path) {
			return nil, r, fmt.Errorf("the relative name %q cannot be resolved, because the image that refers to it is not a file", ref)
		}
		if from.local() {
			at.path = hostpath.Beside(from.path, at.path)
		}
	}
	r.Protocol, r.Name = at.protocol(), at.String()
	return &node{at: at}, r, nil
}

// Drivers of the protocol level: bytes without a format.
const (
	driverFile   = "file"
	driverDevice = "host_device"
	driverNBD    = "nbd"
)

func isProtocolDriver(driver string) bool {
	return driver == driverFile || driver == driverDevice || driver == driverNBD
}

// decodeNode makes a node of options, QEMU's names for them.
func decodeNode(t *tree) (*node, error) {
	driver, err := t.takeString("driver")
	if err != nil {
		return nil, err
	}
	n := &node{format: driver}
	if err := n.decodeGeneric(t); err != nil {
		return nil, err
	}
	if isProtocolDriver(driver) {
		n.format, n.shown = "raw", driver
		n.at, err = decodeLocation(t, driver)
		return n, err
	}
	if driver != "" {
		if err := checkFormat(driver); err != nil {
			return nil, err
		}
	}
	file, err := t.takeGroup("file")
	if err != nil {
		return nil, err
	}
	switch {
	case file == nil && driver == "":
		return nil, qemuError("Must specify either driver or file")
	case file == nil:
		return nil, qemuError(`A block device must be specified for "file"`)
	}
	if n.at, err = decodeFile(file); err != nil {
		return nil, err
	}
	switch driver {
	case formatRaw:
		err = errors.Join(t.takeSize("offset", &n.offset), t.takeSize("size", &n.size))
	case formatFVD:
		err = n.decodeReferences(t)
	default: // also an image whose format is to be found out
		if err = n.decodeQcow2(t); err == nil {
			err = n.decodeReferences(t)
		}
	}
	if err != nil {
		return nil, err
	}
	if rest := t.leftover(); rest != "" {
		return nil, qemuError("Block format '%s' does not support the option '%s'", driver, printable(rest))
	}
	return n, nil
}

// decodeGeneric takes the options that every driver has.
func (n *node) decodeGeneric(t *tree) error {
	discard, err := t.takeOneOf("discard", "unmap", "on", "ignore", "off")
	if err != nil {
		return err
	}
	if discard != "" {
		pass := discard == "unmap" || discard == "on"
		n.discard = &pass
	}
	if _, err := t.takeOneOf("detect-zeroes", "off"); err != nil {
		return err
	}
	if _, err := t.takeString("node-name"); err != nil { // a name for later reference, of which there is none
		return err
	}
	cache, err := t.takeGroup("cache")
	if err != nil {
		return err
	}
	if cache == nil {
		cache = newTree()
	}
	ignored, noFlush, writeback := false, false, true
	err = errors.Join(
		t.takeBool("read-only", &n.readOnly),
		t.takeBool("auto-read-only", &ignored),
		t.takeBool("force-share", &n.share),
		cache.takeBool("writeback", &writeback),
		cache.takeBool("direct", &n.direct),
		cache.takeBool("no-flush", &noFlush),
	)
	n.writethrough = !writeback
	if err == nil && noFlush {
		err = errors.New("cache.no-flush=on would lose data and is not supported")
	}
	if rest := cache.leftover(); err == nil && rest != "" {
		err = fmt.Errorf("option %.100q is not known", "cache."+rest)
	}
	return err
}

// decodeQcow2 takes the options that only qcow2 has.
func (n *node) decodeQcow2(t *tree) (err error) {
	lazy, passRequests := false, false
	var total int64
	err = errors.Join(
		t.takeSize("l2-cache-size", &n.l2Cache),
		t.takeSize("refcount-cache-size", &n.refcountCache),
		t.takeSize("cache-size", &total),
		// A permission to postpone writing reference counts, which need not be used.
		t.takeBool("lazy-refcounts", &lazy),
	)
	if err != nil {
		return err
	}
	if total != 0 {
		if n.l2Cache+n.refcountCache > total {
			return fmt.Errorf("cache-size %d is less than l2-cache-size %d and refcount-cache-size %d together", total, n.l2Cache, n.refcountCache)
		}
		if n.l2Cache == 0 {
			n.l2Cache = total - n.refcountCache
		}
	}
	if t.has("pass-discard-request") {
		if err := t.takeBool("pass-discard-request", &passRequests); err != nil {
			return err
		}
		n.discard = &passRequests
	}
	return nil
}

// decodeReferences takes the options of formats with metadata and files of their own.
func (n *node) decodeReferences(t *tree) (err error) {
	if n.discipline, err = t.takeString("discipline"); err != nil {
		return err
	}
	if b := t.take("backing"); b != nil {
		switch {
		case b.null, b.children == nil && b.value == "":
			n.noBacking = true
		case b.children == nil:
			return fmt.Errorf("option %q: found %s, expected an object or null", "backing", b)
		default:
			if n.backing, err = decodeNode(b); err != nil {
				return fmt.Errorf("backing: %w", err)
			}
		}
	}
	data, err := t.takeGroup("data-file")
	if err != nil || data == nil {
		return err
	}
	if n.dataFile, err = decodeFile(data); err != nil {
		return fmt.Errorf("data-file: %w", err)
	}
	return nil
}

// decodeFile makes a location of the options of a file child.
func decodeFile(t *tree) (*location, error) {
	driver, err := t.takeString("driver")
	if err != nil {
		return nil, err
	}
	if driver != "" && !isProtocolDriver(driver) {
		return nil, qemuError("Unknown driver '%s': a file is one of %s, %s and %s", printable(driver), driverFile, driverDevice, driverNBD)
	}
	var generic node // only its cache.direct counts: the rest is for the node above to say
	if err := generic.decodeGeneric(t); err != nil {
		return nil, err
	}
	l, err := decodeLocation(t, driver)
	if err == nil {
		l.direct = generic.direct
	}
	return l, err
}

// decodeLocation makes a location of the options of a protocol driver; "" is that of the file name.
func decodeLocation(t *tree, driver string) (l *location, err error) {
	if driver == driverNBD {
		l, err = decodeNBD(t)
	} else {
		l, err = decodeFileName(t, driver)
	}
	if err != nil {
		return nil, err
	}
	if rest := t.leftover(); rest != "" {
		return nil, qemuError("Block protocol '%s' doesn't support the option '%s'", l.protocol(), printable(rest))
	}
	return l, nil
}

func decodeFileName(t *tree, driver string) (*location, error) {
	name, err := t.takeString("filename")
	if err != nil {
		return nil, err
	}
	locking, err := t.takeOneOf("locking", "on", "off", "auto")
	if err != nil {
		return nil, err
	}
	if _, err := t.takeOneOf("aio", "threads", "native", "io_uring"); err != nil { // how, not what
		return nil, err
	}
	var l *location
	if driver == "" {
		l, err = parseLocation(name)
	} else if name == "" {
		err = qemuError("The '%s' block driver requires a file name", driver)
	} else {
		l = &location{path: strings.TrimPrefix(name, "file:")}
	}
	if err != nil {
		return nil, err
	}
	l.noLock = locking == "off"
	return l, nil
}
