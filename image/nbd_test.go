package image_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/image/gate"
	"github.com/platter-disk/platter/internal/testenv"
)

// serveQEMU exports a file as it is over a Unix socket until the test ends.
func serveQEMU(t *testing.T, path, socket string) {
	testenv.Need(t, "qemu-nbd")
	testenv.Serve(t, socket, "qemu-nbd", "--persistent", "--shared=8", "--format=raw", "--export-name=x", "--socket="+socket, path)
}

func TestNBD(t *testing.T) {
	dir := t.TempDir()
	disk, base, top, socket := filepath.Join(dir, "disk"), filepath.Join(dir, "base"), filepath.Join(dir, "top"), filepath.Join(dir, "s")
	create(t, "raw", base, sized(mib))
	serveQEMU(t, base, socket)
	uri := "nbd+unix:///x?socket=" + socket

	im := open(t, uri, image.Options{Format: "raw", Discard: true})
	if _, err := im.WriteAt(bytes.Repeat([]byte{6}, 5000), 10000); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	overlay(t, top, uri, "raw", mib)
	want := make([]byte, mib)
	copy(want[10000:], bytes.Repeat([]byte{6}, 5000))
	for _, name := range []string{uri, top, "nbd:unix:" + socket + ":exportname=x", `json:{"driver":"nbd","server":{"type":"unix","path":"` + socket + `"},"export":"x"}`} {
		im := open(t, name, image.Options{ReadOnly: true, Gate: gate.Any{}})
		if !bytes.Equal(contents(t, im), want) {
			t.Errorf("%s: contents differ", name)
		}
		im.Close()
	}
	wantError(t, "through SameDirectory", openError(t, top, image.Options{}), "was refused")
	wantError(t, "no such export", openError(t, "nbd+unix:///none?socket="+socket, image.Options{}), "none")

	// A qcow2 image inside an export: a relative reference means nothing there, and a cycle is found by name.
	create(t, "qcow2", disk, sized(mib))
	socket2 := filepath.Join(dir, "s2")
	inner := "nbd+unix:///x?socket=" + socket2
	serveQEMU(t, disk, socket2)
	im = open(t, inner, image.Options{})
	if im.Format() != "qcow2" {
		t.Errorf("format %s", im.Format())
	}
	im.Close()
	looped, socket3 := filepath.Join(dir, "looped"), filepath.Join(dir, "s3")
	overlay(t, looped, "nbd+unix:///x?socket="+socket3, "qcow2", mib)
	serveQEMU(t, looped, socket3)
	wantError(t, "cycle through NBD", openError(t, "nbd+unix:///x?socket="+socket3, image.Options{Gate: gate.Any{}, ReadOnly: true}), image.ErrCycle.Error())
	relative, socket4 := filepath.Join(dir, "relative"), filepath.Join(dir, "s4")
	overlay(t, relative, "base", "raw", mib)
	serveQEMU(t, relative, socket4)
	wantError(t, "relative reference over NBD", openError(t, "nbd+unix:///x?socket="+socket4, image.Options{Gate: gate.Any{}}), "cannot be resolved")
}

// TestNBDEndsWithContext: a server that says nothing does not keep Open longer than its context lives.
func TestNBDEndsWithContext(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	start := time.Now()
	im, err := image.Open(ctx, "nbd+unix:///x?socket="+socket, image.Options{})
	if err == nil {
		im.Close()
	}
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 29*time.Second { // connecting may take 30 s by default
		t.Errorf("%v after %v", err, time.Since(start))
	}
}
