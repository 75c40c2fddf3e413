package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
)

const (
	// maxNameLength bounds the length in bytes of a name that is parsed. What an image stores is far shorter.
	maxNameLength = 64 << 10

	// maxTreeDepth bounds how deep options may nest, and with that an explicit backing chain.
	maxTreeDepth = 64
)

// tree is a set of options. A node is a value, or null, or has children: {"file": {"filename": "x"}} and
// "file.filename=x" are the same tree. Whoever understands an option takes it out; what is left over at the
// end was not understood.
type tree struct {
	children map[string]*tree // nil for a value
	value    string
	null     bool
}

func newTree() *tree { return &tree{children: map[string]*tree{}} }

// insert adds a value under a dotted name.
func (t *tree) insert(name string, leaf *tree) error {
	parts := strings.Split(name, ".")
	if len(parts) > maxTreeDepth {
		return fmt.Errorf("option %.40q…: nested %d deep, at most %d are allowed", name, len(parts), maxTreeDepth)
	}
	for i, part := range parts {
		if part == "" {
			return fmt.Errorf("option %.100q: a part of the name is empty", name)
		}
		child, exists := t.children[part]
		last := i == len(parts)-1
		switch {
		case last && exists:
			return fmt.Errorf("option %.100q is given twice", name)
		case last:
			child = leaf
		case !exists:
			child = newTree()
		case child.children == nil:
			return fmt.Errorf("option %.100q: %.100q is both a value and a group", name, strings.Join(parts[:i+1], "."))
		}
		t.children[part] = child
		t = child
	}
	return nil
}

// parseOptionString parses key=value pairs separated by commas; two commas stand for one in a value.
func parseOptionString(s string) (*tree, error) {
	if len(s) > maxNameLength {
		return nil, fmt.Errorf("options of %d bytes, at most %d are allowed", len(s), maxNameLength)
	}
	t := newTree()
	for len(s) > 0 {
		var pair strings.Builder
		for {
			i := strings.IndexByte(s, ',')
			if i < 0 {
				pair.WriteString(s)
				s = ""
				break
			}
			pair.WriteString(s[:i])
			s = s[i+1:]
			if !strings.HasPrefix(s, ",") {
				break
			}
			pair.WriteByte(',')
			s = s[1:]
		}
		key, value, found := strings.Cut(pair.String(), "=")
		if !found {
			return nil, fmt.Errorf("option %.100q: expected name=value", key)
		}
		if err := t.insert(key, &tree{value: value}); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// parseJSON parses the text behind "json:". Arrays are not used by any option and are refused.
func parseJSON(s string) (*tree, error) {
	fail := func(err error) (*tree, error) {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, qemuError("Could not parse the JSON options: %w", err)
	}
	if len(s) > maxNameLength {
		return fail(fmt.Errorf("%d bytes, at most %d are allowed", len(s), maxNameLength))
	}
	d := json.NewDecoder(strings.NewReader(s))
	d.UseNumber()
	token, err := d.Token()
	if err != nil {
		return fail(err)
	}
	if token != json.Delim('{') {
		return fail(fmt.Errorf("found %v, expected an object", token))
	}
	t := newTree()
	if err := parseObject(d, t, "", 1); err != nil {
		return fail(err)
	}
	if _, err := d.Token(); err != io.EOF {
		return fail(errors.New("something follows the object"))
	}
	return t, nil
}

// parseObject reads the rest of an object whose brace was read, and inserts its values under prefix.
func parseObject(d *json.Decoder, t *tree, prefix string, depth int) error {
	if depth > maxTreeDepth {
		return fmt.Errorf("objects nest more than %d deep", maxTreeDepth)
	}
	for empty := true; ; empty = false {
		key, err := d.Token()
		if err != nil {
			return err
		}
		if key == json.Delim('}') {
			if empty && prefix != "" {
				return t.insert(strings.TrimSuffix(prefix, "."), newTree())
			}
			return nil
		}
		name := prefix + key.(string) // the decoder accepts nothing else
		value, err := d.Token()
		if err != nil {
			return err
		}
		leaf := &tree{}
		switch v := value.(type) {
		case string:
			leaf.value = v
		case json.Number:
			leaf.value = v.String()
		case bool:
			leaf.value = map[bool]string{true: "on", false: "off"}[v]
		case nil:
			leaf.null = true
		case json.Delim:
			if v != '{' {
				return fmt.Errorf("option %.100q is an array", name)
			}
			if err := parseObject(d, t, name+".", depth+1); err != nil {
				return err
			}
			continue
		}
		if err := t.insert(name, leaf); err != nil {
			return err
		}
	}
}

// has tells whether there is an option of that name.
func (t *tree) has(key string) bool { return t.children[key] != nil }

// take removes an option; nil if there is none.
func (t *tree) take(key string) *tree {
	child := t.children[key]
	delete(t.children, key)
	return child
}

// takeGroup removes a group of options; nil if there is none.
func (t *tree) takeGroup(key string) (*tree, error) {
	child := t.take(key)
	if child != nil && child.children == nil {
		return nil, fmt.Errorf("option %.100q: found %s, expected an object", key, child)
	}
	return child, nil
}

// String is what error messages show of an option.
func (t *tree) String() string {
	switch {
	case t.children != nil:
		return "an object"
	case t.null:
		return "null"
	}
	return fmt.Sprintf("%.100q", t.value)
}

// takeString removes a value; "" if there is none.
func (t *tree) takeString(key string) (string, error) {
	child := t.take(key)
	if child == nil {
		return "", nil
	}
	if child.children != nil || child.null {
		return "", fmt.Errorf("option %.100q: found %s, expected a string", key, child)
	}
	return child.value, nil
}

// takeBool removes an on/off value into dst, which stays as it is if there is none.
func (t *tree) takeBool(key string, dst *bool) error {
	if !t.has(key) {
		return nil
	}
	s, err := t.takeString(key)
	if err != nil {
		return err
	}
	switch s {
	case "on", "true", "yes", "y":
		*dst = true
	case "off", "false", "no", "n":
		*dst = false
	default:
		return qemuError("Parameter '%s' expects 'on' or 'off', found %.100q", key, s)
	}
	return nil
}

// takeOneOf removes a value that must be one of want; "" if there is none.
func (t *tree) takeOneOf(key string, want ...string) (string, error) {
	if !t.has(key) {
		return "", nil
	}
	s, err := t.takeString(key)
	if err == nil && !slices.Contains(want, s) {
		err = fmt.Errorf("option %.100q: found %.100q, expected one of %s", key, s, strings.Join(want, ", "))
	}
	return s, err
}

// takeSize removes a number of bytes into dst, which stays as it is if there is none.
func (t *tree) takeSize(key string, dst *int64) error {
	if !t.has(key) {
		return nil
	}
	s, err := t.takeString(key)
	if err != nil {
		return err
	}
	n, ok := parseSize(s)
	if !ok {
		return qemuError("Parameter '%s' expects a non-negative number below 2^63 with an optional suffix k, M, G, T, P or E, found %.100q", key, s)
	}
	*dst = n
	return nil
}

// parseSize parses a decimal number with a suffix for a power of 1024.
func parseSize(s string) (int64, bool) {
	shift := 0
	if s != "" {
		if i := strings.IndexByte("bkmgtpe", s[len(s)-1]|0x20); i >= 0 {
			shift, s = 10*i, s[:len(s)-1]
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64>>shift || s[0] == '+' {
		return 0, false
	}
	return n << shift, true
}

// leftover names an option that nobody took, the first in order; "" if all were taken.
func (t *tree) leftover() string {
	first := ""
	for key, child := range t.children {
		if child.children != nil {
			rest := child.leftover()
			if rest == "" {
				continue
			}
			key += "." + rest
		}
		if first == "" || key < first {
			first = key
		}
	}
	return first
}
