//go:build linux

package storage_test

import (
	"bufio"
	"errors"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
)

// TestTruncateWaitsForLock: opening to truncate must not touch a file that somebody has open.
func TestTruncateWaitsForLock(t *testing.T) {
	path := tempImage(t)
	f, err := storage.Open(path, writer)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := storage.Open(path, storage.OpenOptions{Create: true, Truncate: true}); !errors.Is(err, storage.ErrLocked) {
		t.Errorf("error %v, want a lock conflict", err)
	}
	if size, err := f.Size(); size != 1<<20 || err != nil {
		t.Errorf("size %d, %v", size, err)
	}
}

// qemuIO starts a qemu-io that has the image open until the returned function is called.
func qemuIO(t *testing.T, args ...string) (stop func()) {
	cmd := exec.Command("qemu-io", args...)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(stdin, "length\n"); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('M') // "1 MiB", perhaps after a prompt
	if err != nil {
		t.Fatalf("qemu-io %q printed %q: %v", args, line, err)
	}
	return func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("qemu-io %q: %v", args, err)
		}
	}
}

func TestLocksHeldByQEMU(t *testing.T) {
	testenv.Need(t, "qemu-io", "qemu-img")
	for _, test := range []struct {
		name string
		args []string
		open storage.OpenOptions
		want string
	}{
		{"qemu writes, writer", nil, writer, "write"},
		{"qemu writes, reader", nil, reader, "write"},
		{"qemu writes, sharing reader", nil, shared, ""},
		{"qemu reads, writer", []string{"-r"}, writer, "write"},
		{"qemu reads, reader", []string{"-r"}, reader, ""},
		{"qemu shares, writer", []string{"-r", "-U"}, writer, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.qcow2")
			testenv.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
			stop := qemuIO(t, append(test.args, "-f", "qcow2", path)...)
			f, err := storage.Open(path, test.open)
			if err == nil {
				f.Close()
			}
			if test.want == "" && err != nil || test.want != "" && (!errors.Is(err, storage.ErrLocked) || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("error %v, want %q", err, test.want)
			}
			stop()
			f, err = storage.Open(path, test.open)
			if err != nil {
				t.Fatalf("after qemu-io ended: %v", err)
			}
			f.Close()
		})
	}
}

func TestLocksSeenByQEMU(t *testing.T) {
	testenv.Need(t, "qemu-io", "qemu-img")
	for _, test := range []struct {
		name string
		open storage.OpenOptions
		args []string
		want string
	}{
		{"writer, qemu writes", writer, []string{"qemu-io", "-f", "qcow2", "-c", "write 0 512"}, `Failed to get "write" lock`},
		{"writer, qemu reads", writer, []string{"qemu-io", "-r", "-f", "qcow2", "-c", "read 0 512"}, `Failed to get shared "write" lock`},
		{"writer, qemu-img info", writer, []string{"qemu-img", "info"}, `Failed to get shared "write" lock`},
		{"writer, qemu-img info -U", writer, []string{"qemu-img", "info", "-U"}, ""},
		{"writer, qemu writes raw", writer, []string{"qemu-io", "-f", "raw", "-c", "write 900k 512"}, `Failed to get "write" lock`},
		{"reader, qemu writes", reader, []string{"qemu-io", "-f", "qcow2", "-c", "write 0 512"}, `Failed to get "write" lock`},
		{"reader, qemu-img resize", reader, []string{"qemu-img", "resize", "-q"}, `Failed to get`},
		{"reader, qemu reads", reader, []string{"qemu-io", "-r", "-f", "qcow2", "-c", "read 0 512"}, ""},
		{"sharing reader, qemu writes", shared, []string{"qemu-io", "-f", "qcow2", "-c", "write 0 512"}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.qcow2")
			testenv.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
			f, err := storage.Open(path, test.open)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			args := append(test.args[1:len(test.args):len(test.args)], path)
			if test.args[1] == "resize" {
				args = append(args, "2M")
			}
			out, err := exec.Command(test.args[0], args...).CombinedOutput()
			if (err != nil) != (test.want != "") || !strings.Contains(string(out), test.want) {
				t.Errorf("%q: %v\n%s, want %q", test.args, err, out, test.want)
			}
		})
	}
}
