package cli

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/platter-disk/platter/internal/testenv"
)

// TestConvertInterrupted: Ctrl-C removes the half copy when the file is ours, and speaks of it when it is not.
func TestConvertInterrupted(t *testing.T) {
	for _, tt := range []struct {
		name    string
		existed bool
		args    []string
		want    string
	}{
		{"new target", false, nil, "platter: interrupted\n"},
		{"overwritten target", true, nil, "platter: warning: 'out.qcow2' holds an unfinished copy\nplatter: interrupted\n"},
		{"existing target", true, []string{"-n"}, "platter: warning: 'out.qcow2' holds an unfinished copy\nplatter: interrupted\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "in.raw"), bytes.Repeat([]byte("data"), 2<<20), 0o666); err != nil {
				t.Fatal(err)
			}
			if tt.existed {
				if o := runHere(t, dir, "create", "-q", "-f", "qcow2", "out.qcow2", "8M"); o.status != 0 {
					t.Fatal(o.stderr)
				}
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var stderr bytes.Buffer
			cancelAt := &cancelOnWrite{cancel: cancel}
			args := append([]string{"convert", "-p", "-r", "1M", "-f", "raw", "-O", "qcow2"}, tt.args...)
			t.Chdir(dir)
			status := run(ctx, append(args, "in.raw", "out.qcow2"), cancelAt, &stderr)
			if status != statusInterrupted || stderr.String() != tt.want {
				t.Errorf("exit status %d, standard error %q; expected %d and %q", status, stderr.String(), statusInterrupted, tt.want)
			}
			_, err := os.Stat("out.qcow2")
			if exists := err == nil; exists != tt.existed || (err != nil && !errors.Is(err, fs.ErrNotExist)) {
				t.Errorf("afterwards the target: %v; it was there before: %v", err, tt.existed)
			}
		})
	}
}

// cancelOnWrite cancels when progress beyond the start is printed.
type cancelOnWrite struct {
	cancel context.CancelFunc
	seen   strings.Builder
}

func (c *cancelOnWrite) Write(p []byte) (int, error) {
	c.seen.Write(p)
	if s := c.seen.String(); strings.Count(s, "/100%") > 1 {
		c.cancel()
	}
	return len(p), nil
}

// TestConvertNBD copies from and to an NBD server of another make.
func TestConvertNBD(t *testing.T) {
	testenv.Need(t, "qemu-nbd", "qemu-img", "qemu-io")
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	testenv.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", path("src.qcow2"), "16M")
	testenv.Run(t, "qemu-io", "-c", "write -P 7 1M 3M", "-c", "write -P 9 15M 64k", path("src.qcow2"))
	testenv.Run(t, "qemu-img", "create", "-q", "-f", "raw", path("dst.raw"), "16M")
	source := serveNBD(t, path("src.sock"), "-r", "-f", "qcow2", path("src.qcow2"))
	target := serveNBD(t, path("dst.sock"), "-f", "raw", path("dst.raw"))
	for _, args := range [][]string{
		{"info", source},
		{"convert", "-f", "raw", "-O", "qcow2", source, "copy.qcow2"},
		{"compare", "-f", "raw", source, "copy.qcow2"},
		{"convert", "-n", "-O", "raw", "copy.qcow2", target},
		{"compare", "-F", "raw", "copy.qcow2", target},
		{"convert", "-O", "raw", "copy.qcow2", target},
		{"map", "-f", "raw", "--output=json", target},
	} {
		if o := runHere(t, dir, args...); o.status != 0 {
			t.Errorf("%q: exit status %d\n%s%s", args, o.status, o.stdout, o.stderr)
		}
	}
	testenv.Run(t, "qemu-img", "compare", path("src.qcow2"), path("copy.qcow2"))
}

// serveNBD runs qemu-nbd on a Unix socket until the test ends, and returns its URI.
func serveNBD(t *testing.T, socket string, args ...string) string {
	t.Helper()
	testenv.Serve(t, socket, "qemu-nbd", append([]string{"-t", "-k", socket}, args...)...)
	return "nbd+unix:///?socket=" + socket
}

// TestConvertSalvage copies from a server that fails to read.
func TestConvertSalvage(t *testing.T) {
	testenv.Need(t, "nbdkit")
	dir := t.TempDir()
	socket := filepath.Join(dir, "bad.sock")
	testenv.Serve(t, socket, "nbdkit", "-f", "-U", socket, "--filter=error", "data", "data=1*4096", "size=64k",
		"error-pread-rate=100%", "error=EIO")
	uri := "nbd+unix:///?socket=" + socket
	o := runHere(t, dir, "convert", "-f", "raw", "-O", "raw", uri, "out.raw")
	if o.status != statusError || !strings.Contains(o.stderr, "error while reading at byte 0: ") {
		t.Errorf("exit status %d, %s", o.status, o.stderr)
	}
	o = runHere(t, dir, "convert", "--salvage", "-f", "raw", "-O", "raw", uri, "out.raw")
	if o.status != 0 || !strings.Contains(o.stderr, "platter: warning: error while reading offset 512: ") {
		t.Errorf("with --salvage: exit status %d, %.300s", o.status, o.stderr)
	}
	o = runHere(t, dir, "convert", "--salvage", "-q", "-f", "raw", "-O", "raw", uri, "out.raw")
	if o.status != 0 || o.stderr != "" {
		t.Errorf("with --salvage -q: exit status %d, %.300s", o.status, o.stderr)
	}
	o = runHere(t, dir, "compare", "-f", "raw", "-F", "raw", uri, "out.raw")
	if o.status != compareRead || !strings.Contains(o.stderr, "Error while reading offset 0 of "+uri) {
		t.Errorf("compare: exit status %d, %.300s", o.status, o.stderr)
	}
}
