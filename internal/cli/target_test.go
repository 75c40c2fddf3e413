package cli

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
)

// mustRun runs a command line that has to succeed.
func mustRun(t *testing.T, dir string, args ...string) outcome {
	t.Helper()
	o := runHere(t, dir, args...)
	if o.status != 0 {
		t.Fatalf("platter %s: exit status %d, %s", strings.Join(args, " "), o.status, o.stderr)
	}
	return o
}

// TestConvertKeepsPreallocation: zeros of the source do not undo what the target was created with.
func TestConvertKeepsPreallocation(t *testing.T) {
	testenv.Need(t, "qemu-img")
	dir := t.TempDir()
	disk := make([]byte, 8<<20)
	copy(disk[3<<20:], bytes.Repeat([]byte("data"), 100<<10))
	if err := os.WriteFile(filepath.Join(dir, "in.raw"), disk, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, options := range []string{
		"preallocation=metadata", "preallocation=falloc", "preallocation=full", "preallocation=falloc,extended_l2=on",
		"preallocation=metadata,data_file=old.data", "preallocation=full,data_file=old.data,data_file_raw=on",
	} {
		t.Run(options, func(t *testing.T) {
			if err := os.WriteFile(filepath.Join(dir, "old.data"), bytes.Repeat([]byte("old"), 1<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			mustRun(t, dir, "convert", "-f", "raw", "-O", "qcow2", "-o", options, "in.raw", "out.qcow2")
			if o := runQemuImg(t, dir, "check", "out.qcow2"); o.status != 0 || !strings.Contains(o.stdout, "128/128 = 100.00% allocated") {
				t.Errorf("qemu-img check: exit status %d\n%s%s", o.status, o.stdout, o.stderr)
			}
			if o := runQemuImg(t, dir, "compare", "-f", "raw", "in.raw", "out.qcow2"); o.status != 0 {
				t.Errorf("qemu-img compare: %s%s", o.stdout, o.stderr)
			}
		})
	}
	for _, format := range []string{"raw", "fvd"} {
		mustRun(t, dir, "convert", "-f", "raw", "-O", format, "-o", "preallocation=falloc", "in.raw", "out."+format)
		mustRun(t, dir, "compare", "-f", "raw", "-F", format, "in.raw", "out."+format)
		if used := diskUsage(filepath.Join(dir, "out."+format)); used == nil || *used < 8<<20 {
			t.Errorf("%s: the file takes less space than what was reserved", format)
		}
	}
}

// TestConvertRefusesBitmaps: they are not dropped behind the back of who asked for them.
func TestConvertRefusesBitmaps(t *testing.T) {
	testenv.Need(t, "qemu-img")
	dir := t.TempDir()
	for _, args := range [][]string{{"create", "-q", "-f", "qcow2", "in.qcow2", "1M"}, {"bitmap", "--add", "in.qcow2", "dirty"}} {
		if o := runQemuImg(t, dir, args...); o.status != 0 {
			t.Fatal(o.stderr)
		}
	}
	o := runHere(t, dir, "convert", "--bitmaps", "-O", "qcow2", "in.qcow2", "out.qcow2")
	if o.status != 1 || !strings.Contains(o.stderr, "copying the persistent bitmaps of 'in.qcow2' is not supported yet") {
		t.Errorf("exit status %d, %s", o.status, o.stderr)
	}
	if _, err := os.Stat(filepath.Join(dir, "out.qcow2")); !os.IsNotExist(err) {
		t.Errorf("a target was made: %v", err)
	}
	mustRun(t, dir, "convert", "-O", "qcow2", "in.qcow2", "out.qcow2")
}

// TestCreateInExport: an export that exists is formatted, if it is large enough.
func TestCreateInExport(t *testing.T) {
	testenv.Need(t, "nbdkit", "qemu-img")
	dir := t.TempDir()
	serve := func(name string, args ...string) string {
		socket := filepath.Join(dir, name)
		testenv.Serve(t, socket, "nbdkit", append([]string{"-f", "-U", socket}, args...)...)
		return "nbd+unix:///?socket=" + socket
	}
	large, exact, tiny := serve("large", "memory", "8M"), serve("exact", "memory", "2M"), serve("tiny", "memory", "64k")
	if err := os.WriteFile(filepath.Join(dir, "in.raw"), bytes.Repeat([]byte("abcd"), 1<<19), 0o600); err != nil {
		t.Fatal(err)
	}
	identical := func(what, format, uri string) {
		t.Helper()
		if o := runQemuImg(t, dir, "compare", "-f", "raw", "-F", format, "in.raw", uri); o.status != 0 {
			t.Errorf("%s: qemu-img compare: %s%s", what, o.stdout, o.stderr)
		}
	}
	mustRun(t, dir, "create", "-f", "qcow2", large, "1G")
	if o := mustRun(t, dir, "info", large); !strings.Contains(o.stdout, "file format: qcow2\nvirtual size: 1 GiB") {
		t.Errorf("info of what was created:\n%s", o.stdout)
	}
	for _, options := range [][]string{nil, {"-c"}, {"-o", "preallocation=full"}} {
		mustRun(t, dir, append(append([]string{"convert", "-f", "raw", "-O", "qcow2"}, options...), "in.raw", large)...)
		identical(strings.Join(options, " "), "qcow2", large)
		if o := runQemuImg(t, dir, "check", large); o.status != 0 {
			t.Errorf("%v: qemu-img check: %s%s", options, o.stdout, o.stderr)
		}
	}
	mustRun(t, dir, "create", "-f", "raw", exact, "2M")
	mustRun(t, dir, "convert", "-f", "raw", "-O", "raw", "in.raw", exact)
	identical("raw", "raw", exact)
	for _, format := range []string{"qcow2", "raw"} {
		o := runHere(t, dir, "create", "-f", format, tiny, "1G")
		if o.status != 1 || !strings.Contains(o.stderr, "No space left on device") || strings.Contains(o.stderr, "unfinished") {
			t.Errorf("%s in an export that is too small: exit status %d, %s", format, o.status, o.stderr)
		}
	}
	if o := runHere(t, dir, "create", "-f", "fvd", large, "1M"); o.status != 1 || !strings.Contains(o.stderr, "does not support image creation") {
		t.Errorf("fvd: exit status %d, %s", o.status, o.stderr)
	}
}

// TestWordsOfQEMU: what scripts look for is said as qemu-img says it.
func TestWordsOfQEMU(t *testing.T) {
	testenv.Need(t, "qemu-img")
	ours, theirs := t.TempDir(), t.TempDir()
	for _, dir := range []string{ours, theirs} {
		for _, args := range [][]string{
			{"create", "-q", "-f", "qcow2", "free.qcow2", "1M"},
			{"create", "-q", "-f", "qcow2", "used.qcow2", "1M"},
			{"create", "-q", "-f", "qcow2", "-b", "used.qcow2", "-F", "qcow2", "over.qcow2"},
			{"create", "-q", "-f", "qcow2", "-b", "over.qcow2", "-F", "qcow2", "over2.qcow2"},
			{"create", "-q", "-f", "qcow2", "-u", "-b", "gone", "-F", "raw", "lost.qcow2", "1M"},
			{"create", "-q", "-f", "qcow2", "-o", "compat=0.10", "old.qcow2", "1M"},
			{"create", "-q", "-f", "raw", "free.raw", "1M"},
		} {
			if o := runQemuImg(t, dir, args...); o.status != 0 {
				t.Fatalf("%s", o.stderr)
			}
		}
		holder, err := storage.Open(filepath.Join(dir, "used.qcow2"), storage.OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer holder.Close()
	}
	for _, line := range []string{
		// locks
		"info used.qcow2", "check used.qcow2", "map used.qcow2", "snapshot -l used.qcow2", "convert used.qcow2 out.raw",
		"compare used.qcow2 free.qcow2", "resize used.qcow2 2M", "amend -o lazy_refcounts=on used.qcow2",
		"create -f qcow2 used.qcow2 1M", "convert -O qcow2 free.raw used.qcow2", "convert -n -O qcow2 free.raw used.qcow2",
		"map over.qcow2", "map over2.qcow2",
		// names
		"info nope", "convert nope out.raw", "map lost.qcow2", "info -f foo free.qcow2", "convert -f foo free.qcow2 out.raw",
		"create -f foo new 1M", "create -f qcow2 -b free.qcow2 -F foo new 1M",
		`map json:{"driver":"foo","file":{"filename":"free.qcow2"}}`,
		"info --image-opts driver=foo,file.filename=free.qcow2",
		// preallocation and compression
		"create -f raw -o preallocation=metadata new 1M", "convert -O raw -o preallocation=metadata free.qcow2 new",
		"resize -f raw --preallocation=metadata free.raw 2M",
		"convert -c -O qcow2 -o preallocation=metadata free.raw new", "convert -c -O qcow2 -o preallocation=off free.raw new.qcow2",
		// bitmaps
		"convert --bitmaps -O qcow2 free.qcow2 new.qcow2", "convert --bitmaps --skip-broken-bitmaps -O qcow2 free.qcow2 new.qcow2",
		"convert --bitmaps -f raw -O qcow2 free.raw new.qcow2", "convert --bitmaps -O raw free.qcow2 new.raw",
		"convert --bitmaps -O qcow2 old.qcow2 new.qcow2", "convert --bitmaps -O qcow2 free.qcow2 free.qcow2 new.qcow2",
		"convert --bitmaps -O qcow2 -o compat=0.10 free.qcow2 another.qcow2",
	} {
		t.Run(line, func(t *testing.T) {
			args := strings.Fields(line)
			compareOutcomes(t, runQemuImg(t, theirs, args...), runHere(t, ours, args...))
		})
	}
}
