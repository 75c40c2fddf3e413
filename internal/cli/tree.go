package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// printTree prints a value for people the way qemu-img prints the format specific part of info: the names and
// order of its JSON form, a line each, indented, with spaces for the dashes in names.
func printTree(out io.Writer, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	open, err := d.Token()
	if err != nil {
		return err
	}
	if open != json.Delim('{') {
		return fmt.Errorf("format specific information is %v, expected an object", open)
	}
	return printTreeMembers(out, d, true, 1)
}

// printTreeMembers prints what is left of an object or a list whose opening bracket was read.
func printTreeMembers(out io.Writer, d *json.Decoder, object bool, depth int) error {
	indent := strings.Repeat("    ", depth)
	for i := 0; d.More(); i++ {
		name := fmt.Sprintf("[%d]", i)
		if object {
			key, err := d.Token()
			if err != nil {
				return err
			}
			name = strings.ReplaceAll(fmt.Sprint(key), "-", " ")
		}
		value, err := d.Token()
		if err != nil {
			return err
		}
		if delim, ok := value.(json.Delim); ok {
			fmt.Fprintf(out, "%s%s:\n", indent, name)
			if err := printTreeMembers(out, d, delim == '{', depth+1); err != nil {
				return err
			}
			continue
		}
		fmt.Fprintf(out, "%s%s: %v\n", indent, name, value)
	}
	_, err := d.Token()
	return err
}
