//go:build unix

package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/platter-disk/platter/image"
)

// The program is run with what is asked for, and its own words are part of the error when it fails.
func TestGrowStorage(t *testing.T) {
	program := filepath.Join(t.TempDir(), "grow")
	write := func(text string) {
		if err := os.WriteFile(program, []byte("#!/bin/sh\n"+text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	write(`echo "$@" > "$0.log"`)
	flag := growFlag{program: program}
	grow := flag.apply(t.Context(), image.Options{}).GrowStorage
	if err := grow("/dev/vg/disk", 1048576); err != nil {
		t.Fatal(err)
	}
	if log, err := os.ReadFile(program + ".log"); err != nil || string(log) != "1048576 /dev/vg/disk\n" {
		t.Errorf("the program was run with %q, %v", log, err)
	}
	write("echo no room left in the group >&2; exit 5")
	if err := grow("/dev/vg/disk", 1); err == nil || !strings.Contains(err.Error(), "no room left in the group") || !strings.Contains(err.Error(), "exit status 5") {
		t.Errorf("the error of a program that fails: %v", err)
	}
	if (&growFlag{}).apply(t.Context(), image.Options{}).GrowStorage != nil {
		t.Error("without the flag something would be run")
	}
}
