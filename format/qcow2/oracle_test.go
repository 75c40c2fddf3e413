package qcow2

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
)

// saveImage writes the contents of f to a sparse local file for another program to look at.
func saveImage(t testing.TB, f storage.File, path string) {
	t.Helper()
	out, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	if err := out.Truncate(size); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<20)
	err = f.DataExtents(0, size, func(e storage.Extent) bool {
		for e.Data && e.Length > 0 {
			p := buf[:min(e.Length, int64(len(buf)))]
			if err := storage.ReadFull(f, p, e.Offset); err != nil {
				t.Fatal(err)
			}
			if _, err := out.WriteAt(p, e.Offset); err != nil {
				t.Fatal(err)
			}
			e.Offset += int64(len(p))
			e.Length -= int64(len(p))
		}
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
}

// loadImage reads a small image that another program made.
func loadImage(t testing.TB, path string) *storage.Memory {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	m := storage.NewMemory(path)
	const chunk = 4096 // the page of a Memory, which is there or not as a whole
	for off := 0; off < len(data); off += chunk {
		p := data[off:min(off+chunk, len(data))]
		if bytes.Count(p, []byte{0}) == len(p) {
			continue
		}
		if _, err := m.WriteAt(p, int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Truncate(int64(len(data))); err != nil {
		t.Fatal(err)
	}
	return m
}

// qemu runs a program that may fail and returns its exit code, standard output and standard error.
func qemu(t testing.TB, name string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	testenv.Need(t, name)
	cmd := exec.Command(name, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// qemuMustAgree fails t unless qemu-img check finds nothing wrong with the image.
func qemuMustAgree(t testing.TB, path string) {
	t.Helper()
	if code, out, errs := qemu(t, "qemu-img", "check", "-f", "qcow2", path); code != 0 {
		t.Fatalf("qemu-img check: exit %d\n%s%s", code, out, errs)
	}
}

// qemuInfo returns what qemu-img info says.
func qemuInfo(t testing.TB, path string) map[string]any {
	t.Helper()
	code, out, errs := qemu(t, "qemu-img", "info", "-f", "qcow2", "--output=json", path)
	if code != 0 {
		t.Fatalf("qemu-img info: exit %d\n%s", code, errs)
	}
	var info map[string]any
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return info
}

// qemuImages are images that QEMU made and that many tests start from, by name.
type qemuImages struct {
	mu     sync.Mutex
	byName map[string]*storage.Memory
}

var madeByQEMU = qemuImages{byName: make(map[string]*storage.Memory)}

// copyOf returns a copy of the image of that name, which the first call has create make and return the path of.
func (q *qemuImages) copyOf(t testing.TB, name string, create func() string) *storage.Memory {
	t.Helper()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.byName[name] == nil {
		q.byName[name] = loadImage(t, create())
	}
	return copyImage(t, q.byName[name])
}

// qemuCreate makes an image with qemu-img, runs a qemu-io script on it, and returns its path.
func qemuCreate(t testing.TB, options, size string, script ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	args := []string{"create", "-q", "-f", "qcow2"}
	if options != "" {
		args = append(args, "-o", options)
	}
	testenv.Need(t, "qemu-img", "qemu-io")
	testenv.Run(t, "qemu-img", append(args, path, size)...)
	qemuIO(t, path, script...)
	return path
}

func qemuIO(t testing.TB, path string, script ...string) {
	t.Helper()
	if len(script) == 0 {
		return
	}
	args := []string{"-f", "qcow2"}
	for _, line := range script {
		args = append(args, "-c", line)
	}
	if out := testenv.Run(t, "qemu-io", append(args, path)...); strings.Contains(out, "failed") {
		t.Fatalf("qemu-io %q:\n%s", script, out)
	}
}
