package cli

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/platter-disk/platter/internal/testenv"
)

// TestSnapshotBothWays: snapshots that one program takes, the other lists, copies, applies and deletes.
func TestSnapshotBothWays(t *testing.T) {
	testenv.Need(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk.qcow2")
	platter := func(args ...string) string {
		t.Helper()
		var out, errs bytes.Buffer
		if status := run(t.Context(), args, &out, &errs); status != 0 {
			t.Fatalf("platter %s: status %d\n%s", strings.Join(args, " "), status, errs.String())
		}
		return out.String()
	}
	qemu := func(args ...string) string { t.Helper(); return testenv.Run(t, "qemu-img", args...) }
	contents := func(tool func(...string) string, args ...string) string {
		t.Helper()
		raw := filepath.Join(dir, "raw")
		os.Remove(raw)
		tool(append(append([]string{"convert", "-O", "raw"}, args...), disk, raw)...)
		b, err := os.ReadFile(raw)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	qemu("create", "-q", "-f", "qcow2", disk, "3M")
	tools := []func(...string) string{platter, qemu}
	var want []string
	for i, script := range []string{"write -P 1 0 2M", "write -P 2 1M 2M", "write -z 64k 128k", "discard 0 512k"} {
		testenv.Run(t, "qemu-io", "-f", "qcow2", "-c", script, disk)
		want = append(want, contents(qemu))
		tools[i%2]("snapshot", "-c", "name"+string(rune('a'+i)), disk)
		qemu("check", "-q", disk)
	}
	if p, q := platter("snapshot", "-l", disk), qemu("snapshot", "-l", disk); p != q {
		t.Errorf("platter lists\n%sqemu-img\n%s", p, q)
	}
	for i, snapshot := range []string{"namea", "2", "snapshot.name=namec", "snapshot.id=4"} {
		for _, tool := range tools {
			if contents(tool, "-l", snapshot) != want[i] {
				t.Errorf("snapshot %s is not what the disk was", snapshot)
			}
		}
	}
	for i, id := range []string{"2", "1", "4", "3"} {
		tools[i%2]("snapshot", "-a", id, disk)
		qemu("check", "-q", disk)
		if contents(qemu) != want[id[0]-'1'] {
			t.Errorf("after snapshot %s was applied, the disk is not what it was", id)
		}
	}
	for i, name := range []string{"namec", "namea", "named", "nameb"} {
		tools[i%2]("snapshot", "-d", name, disk)
		qemu("check", "-q", disk)
	}
	if out := platter("snapshot", disk); out != "" {
		t.Errorf("all snapshots were deleted, and yet there is\n%s", out)
	}
}

// TestSnapshotErrors holds the texts of errors to those of qemu-img.
func TestSnapshotErrors(t *testing.T) {
	dir := t.TempDir()
	disk, narrow, raw := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "narrow.qcow2"), filepath.Join(dir, "disk.raw")
	var out, errs bytes.Buffer
	for _, args := range [][]string{
		{"create", "-q", "-f", "qcow2", disk, "1M"}, {"create", "-q", "-f", "raw", raw, "1M"},
		{"create", "-q", "-f", "qcow2", "-o", "refcount_bits=1,preallocation=metadata", narrow, "1M"},
	} {
		if run(t.Context(), args, &out, &errs) != 0 {
			t.Fatal(errs.String())
		}
	}
	for _, c := range []struct{ args, want string }{
		{"snapshot", "Expecting one image file name"},
		{"snapshot -l -c x " + disk, "Cannot mix '-l', '-a', '-c', '-d'"},
		{"snapshot -a x " + disk, "Could not apply snapshot 'x': Failed to load snapshot: No such file or directory"},
		{"snapshot -d x " + disk, "Could not delete snapshot 'x': snapshot not found"},
		{"snapshot -U -c x " + disk, "Could not open '" + disk + "': force-share=on can only be used with read-only images"},
		{"snapshot -f raw -c x " + raw, "Could not create snapshot 'x': images of format raw have no snapshots"},
		{"snapshot -c x " + narrow, "Could not create snapshot 'x': reference count of cluster"},
		{"convert -l x " + disk + " y", "Failed to load snapshot: Can't find snapshot"},
		{"convert -l x " + raw + " y", "Failed to load snapshot: images of format raw have no snapshots"},
		{"convert -l snapshot.foo=x " + disk + " y", "Invalid parameter 'snapshot.foo'"},
		{"convert -l x " + disk + " " + disk + " y", "No support for concatenating multiple snapshot"},
	} {
		out.Reset()
		errs.Reset()
		if status := run(t.Context(), strings.Fields(c.args), &out, &errs); status != 1 || !strings.HasPrefix(errs.String(), "platter: "+c.want) {
			t.Errorf("platter %s: status %d, %q; want %q", c.args, status, errs.String(), c.want)
		}
	}
}
