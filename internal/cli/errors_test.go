package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"testing"

	"github.com/platter-disk/platter/format/qcow2"
)

func TestReport(t *testing.T) {
	root := New()
	for _, tt := range []struct {
		err    error
		status int
		want   string
	}{
		{nil, 0, ""},
		{errors.New("broken"), 1, "platter: broken\n"},
		{&exitError{status: 3}, 3, ""},
		{&exitError{63, errors.New("nothing to check")}, 63, "platter: nothing to check\n"},
		{fmt.Errorf("x: %w", &sizeError{"image size", errSizeRange}), 1,
			"platter: x: Invalid image size specified. Must be between 0 and 9223372036854775807.\n"},
		{usagef(root, "bad"), 1, "platter: bad\nTry 'platter --help' for more information\n"},
		{fmt.Errorf("reading: %w", context.Canceled), statusInterrupted, "platter: interrupted\n"},
		{&exitError{2, fmt.Errorf("write: %w", &fs.PathError{Op: "write", Path: "a", Err: syscall.ENOSPC})}, 2,
			"platter: write: write a: No space left on device\n"},
		{fmt.Errorf("Could not open 'a': %w", &qcow2.FormatError{File: "a", Problem: "P", Field: "f", Found: "1", Expected: "2"}), 1,
			"platter: Could not open 'a': P (f: found 1, expected 2)\n"},
	} {
		var stderr bytes.Buffer
		if status := report(&stderr, tt.err); status != tt.status || stderr.String() != tt.want {
			t.Errorf("%v: status %d, %q; expected %d, %q", tt.err, status, stderr.String(), tt.status, tt.want)
		}
	}
}

func TestProtectNegativeSize(t *testing.T) {
	for _, tt := range []struct{ in, want []string }{
		{[]string{"resize", "a", "-1G"}, []string{"resize", "a", "--", "-1G"}},
		{[]string{"resize", "--shrink", "a", "-0"}, []string{"resize", "--shrink", "a", "--", "-0"}},
		{[]string{"resize", "a", "--", "-1G"}, []string{"resize", "a", "--", "-1G"}},
		{[]string{"resize", "a", "-q"}, []string{"resize", "a", "-q"}},
		{[]string{"resize", "-1G"}, []string{"resize", "-1G"}},
		{[]string{"convert", "a", "-1G"}, []string{"convert", "a", "-1G"}},
	} {
		if got := protectNegativeSize(tt.in); fmt.Sprint(got) != fmt.Sprint(tt.want) {
			t.Errorf("%q becomes %q, expected %q", tt.in, got, tt.want)
		}
	}
}
