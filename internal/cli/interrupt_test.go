package cli

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/platter-disk/platter/internal/testenv"
)

// countdown is a context that ends after it was asked a number of times: a Ctrl-C at a place that repeats.
type countdown struct {
	context.Context
	left atomic.Int64
}

func (c *countdown) Err() error {
	if c.left.Add(-1) >= 0 {
		return nil
	}
	return context.Canceled
}

// runInterrupted runs a command line that is interrupted when its context was asked n times.
func runInterrupted(t *testing.T, dir string, n int64, args ...string) outcome {
	t.Helper()
	t.Chdir(dir)
	ctx := &countdown{Context: t.Context()}
	ctx.left.Store(n)
	var stdout, stderr bytes.Buffer
	status := run(ctx, args, &stdout, &stderr)
	return outcome{stdout.String(), stderr.String(), status}
}

// TestCreateInterrupted: Ctrl-C at any point of laying a disk out ends the command, and leaves no half image behind
// unannounced.
func TestCreateInterrupted(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "in.raw"), bytes.Repeat([]byte("data"), 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"create -q -f raw -o preallocation=full disk 8M",
		"create -q -f raw -o preallocation=falloc disk 1G",
		"create -q -f qcow2 -o preallocation=metadata disk 8G",
		"create -q -f qcow2 -o preallocation=falloc disk 8M",
		"create -q -f qcow2 -o preallocation=full disk 8M",
		"create -q -f qcow2 -o preallocation=full,data_file=data disk 8M",
		"create -q -f fvd -o preallocation=full disk 8M",
		"create -q -f fvd -o compact_image=on,preallocation=metadata disk 1T",
		"create -q -f fvd -o compact_image=on,preallocation=falloc disk 1G",
		"create -q -f fvd -o compact_image=on,preallocation=full disk 8M",
		"create -q -f fvd -o detect_sparse_hole=64k -b in.raw -F raw disk",
		"convert -f raw -O raw -o preallocation=full in.raw disk",
		"convert -f raw -O qcow2 -o preallocation=full in.raw disk",
	} {
		t.Run(line, func(t *testing.T) {
			if runtime.GOOS == "windows" && strings.Contains(line, "=falloc") {
				t.Skip("space is not reserved on windows")
			}
			args := strings.Fields(line)
			path := filepath.Join(dir, "disk")
			interrupted := 0
			for n := int64(0); ; n += 1 + n/3 {
				o := runInterrupted(t, dir, n, args...)
				if o.status == 0 {
					break
				}
				interrupted++
				if o.status != statusInterrupted || o.stderr != "platter: interrupted\n" {
					t.Fatalf("after %d: exit status %d, standard error %q", n, o.status, o.stderr)
				}
				for _, name := range []string{path, filepath.Join(dir, "data")} {
					if _, err := os.Stat(name); !os.IsNotExist(err) {
						t.Fatalf("after %d: %s is left, %v", n, name, err)
					}
				}
			}
			if interrupted < 3 {
				t.Errorf("it could be interrupted at %d places only", interrupted)
			}
			// What was there before is lost, and that is said.
			if o := runInterrupted(t, dir, 5, args...); o.status == 0 || !strings.Contains(o.stderr, "disk' holds an unfinished ") {
				t.Errorf("over an existing file: exit status %d, standard error %q", o.status, o.stderr)
			}
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			os.Remove(filepath.Join(dir, "data"))
		})
	}
}

// TestResizeInterrupted: the disk keeps its size, the image is in order, and the space is given back.
func TestResizeInterrupted(t *testing.T) {
	testenv.Need(t, "qemu-img")
	dir := t.TempDir()
	for _, create := range []string{"raw", "qcow2", "fvd", "fvd -o compact_image=on,journal_size=1M"} {
		for _, prealloc := range []string{"metadata", "falloc", "full"} {
			if (create == "raw" || create == "fvd") && prealloc == "metadata" {
				continue
			}
			format, _, _ := strings.Cut(create, " ")
			name := prealloc + "." + strings.ReplaceAll(create, " ", "_")
			mustRun(t, dir, append(strings.Fields("create -q -f "+create), name, "1M")...)
			var empty int64
			if used := diskUsage(filepath.Join(dir, name)); used != nil {
				empty = *used
			}
			interrupted := 0
			for n := int64(0); ; n += 1 + n/2 {
				o := runInterrupted(t, dir, n, "resize", "-f", format, "--preallocation="+prealloc, name, "80M")
				if o.status == 0 {
					break
				}
				if interrupted++; o.status != statusInterrupted {
					t.Fatalf("%s after %d: exit status %d, %s", name, n, o.status, o.stderr)
				}
				if info := mustRun(t, dir, "info", "-f", format, name); !strings.Contains(info.stdout, "(1048576 bytes)") {
					t.Fatalf("%s after %d: %s", name, n, info.stdout)
				}
				if used := diskUsage(filepath.Join(dir, name)); used != nil && *used > empty+1<<20 {
					t.Fatalf("%s after %d: the file takes %d bytes", name, n, *used)
				}
				if format != "raw" {
					mustRun(t, dir, "check", "-q", "-f", format, name)
				}
				if format == "qcow2" {
					if o := runQemuImg(t, dir, "check", name); o.status != 0 {
						t.Fatalf("%s after %d: qemu-img check: %s%s", name, n, o.stdout, o.stderr)
					}
				}
			}
			if interrupted < 3 {
				t.Errorf("%s: it could be interrupted at %d places only", name, interrupted)
			}
			if info := mustRun(t, dir, "info", "-f", format, name); !strings.Contains(info.stdout, "80 MiB") {
				t.Errorf("%s: %s", name, info.stdout)
			}
		}
	}
}

// TestLookingInterrupted: so can be what only looks at an image.
func TestLookingInterrupted(t *testing.T) {
	dir := t.TempDir()
	mustRun(t, dir, "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "disk.qcow2", "20G")
	mustRun(t, dir, "create", "-q", "-f", "fvd", "-o", "compact_image=on", "disk.fvd", "20G")
	for line, least := range map[string]int64{
		"check disk.qcow2": 50, "check -r all disk.qcow2": 50, "map disk.qcow2": 5, "map --output=json disk.qcow2": 5, "check disk.fvd": 2,
	} {
		for _, n := range []int64{0, 1, least} {
			if o := runInterrupted(t, dir, n, strings.Fields(line)...); o.status != statusInterrupted || !strings.HasSuffix(o.stderr, "platter: interrupted\n") {
				t.Errorf("%s after %d: exit status %d, standard error %q", line, n, o.status, o.stderr)
			}
		}
		mustRun(t, dir, strings.Fields(line)...)
	}
}
