//go:build unix

package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/nbd"
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
	write("sleep 600 & exit 0") // keeps the output
	began := time.Now()
	if err := grow("/dev/vg/disk", 1); err != nil || time.Since(began) > 5*time.Minute {
		t.Errorf("a program that leaves another running: %v after %v", err, time.Since(began))
	}
	write("echo no room left in the group >&2; exit 5")
	if err := grow("/dev/vg/disk", 1); err == nil || !strings.Contains(err.Error(), "no room left in the group") || !strings.Contains(err.Error(), "exit status 5") {
		t.Errorf("the error of a program that fails: %v", err)
	}
	if (&growFlag{}).apply(t.Context(), image.Options{}).GrowStorage != nil {
		t.Error("without the flag something would be run")
	}
}

// TestServeEndsWhileStorageGrows: a server that is told to end lets the program finish that a request waits for. To
// kill it half-way might harm the volume.
func TestServeEndsWhileStorageGrows(t *testing.T) {
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	mustRun(t, dir, "create", "-q", "-f", "fvd", "-o", "compact_image=on,storage_grow_unit=1M", "disk.fvd", "64M")
	if err := os.WriteFile(file("grow"), []byte("#!/bin/sh\n"+`cd "${0%/*}"; touch began; while ! [ -e enough ]; do sleep 0.01; done; touch ended`), 0o700); err != nil {
		t.Fatal(err)
	}
	// An export does not become larger.
	below := startServe(t, "--format", "raw", "--socket", file("below"), file("disk.fvd"))
	r := startServe(t, "--grow-storage", file("grow"), "--socket", file("s"), below.uri)
	c := dial(t, r.uri, nbd.ClientOptions{})
	written := make(chan error, 1)
	go func() {
		_, err := c.WriteAt(make([]byte, 32<<20), 0)
		written <- err
	}()
	wait := func(name string) {
		testenv.Until(t, name, func() bool {
			_, err := os.Stat(file(name))
			return err == nil
		})
	}
	wait("began")
	r.cancel()
	time.Sleep(50 * time.Millisecond) // in which the program would be killed
	if err := os.WriteFile(file("enough"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	wait("ended")
	<-written // it may fail: the export is as small as before
	if status := <-r.done; status != 0 {
		t.Errorf("exit status %d, %s", status, r.said())
	}
	below.end(t)
}
