package cli

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/platter-disk/platter/format/fvd"
)

// TestAmendKnowsAllSettings: what the format can change is what the command offers.
func TestAmendKnowsAllSettings(t *testing.T) {
	specs, _ := amendSpecs("fvd")
	names := []string{amendSize}
	for _, s := range specs {
		if s.help == "" {
			t.Errorf("%s: not explained", s.name)
		}
	}
	names = append(names, fvd.SettingNames()...)
	slices.SortFunc(specs, func(a, b optionSpec) int { return strings.Compare(a.name, b.name) })
	slices.Sort(names)
	if !slices.EqualFunc(specs, names, func(s optionSpec, name string) bool { return s.name == name }) {
		t.Errorf("offered: %+v\nknown: %v", specs, names)
	}
}

// TestCreateShowsDefaults: of the options that are not given, create tells those that mean something to the image.
func TestCreateShowsDefaults(t *testing.T) {
	dir := t.TempDir()
	if o := mustRun(t, dir, "create", "-f", "fvd", "disk", "1M"); strings.Contains(o.stdout, "chunk_size") {
		t.Errorf("without a table: %s", o.stdout)
	}
	if o := mustRun(t, dir, "create", "-f", "fvd", "-o", "compact_image=on", "disk", "1M"); !strings.Contains(o.stdout, " chunk_size=1048576 ") {
		t.Errorf("with a table: %s", o.stdout)
	}
	o := runHere(t, dir, "create", "-f", "fvd", "-o", "compact_image=on,journal_buf_size=1M", "disk", "1M")
	if want := "journal_buf_size is 1048576, want at most 65536"; o.status != statusError || !strings.Contains(o.stderr, want) {
		t.Errorf("exit status %d, %s", o.status, o.stderr)
	}
}

// TestAmendRefusedChangesNothing: where one of several changes is refused none is made.
func TestAmendRefusedChangesNothing(t *testing.T) {
	dir := t.TempDir()
	mustRun(t, dir, "create", "-q", "-f", "raw", "base", "10M")
	for _, test := range []struct{ create, amend, want string }{
		{"-f qcow2", "size=+1G", "new size of the disk, not what is added to it: +1G"},
		{"-f qcow2", "lazy_refcounts=on,size=+1G", "platter resize"},
		{"-f qcow2", "lazy_refcounts=on,size=-1G", "expects a non-negative number"},
		{"-f qcow2", "lazy_refcounts=on,size=1M", "platter resize --shrink"},
		{"-f qcow2", "size=1M", "platter resize --shrink"},
		{"-f qcow2", "lazy_refcounts=on,size=20000001", "multiple of 512"},
		{"-f qcow2", "lazy_refcounts=on,size=4E", "too large"},
		{"-f qcow2", "lazy_refcounts=on,refcount_bits=8,size=1G", "refcount_bits"},
		{"-f qcow2 -o compat=0.10", "compat=1.1,size=1M", "platter resize --shrink"},
		{"-f fvd", "size=+1G", "not what is added"},
		{"-f fvd", "copy_on_read=on,size=1M", "shrinking from 10485760 to 1048576 bytes"},
		{"-f fvd", "copy_on_read=on,size=20000001", "multiple of 512"},
		{"-f fvd", "copy_on_read=maybe,size=1G", "copy_on_read"},
		{"-f fvd -o compact_image=on,journal_size=8k", "copy_on_read=on,size=1T", "needs a journal of"},
		{"-f fvd -b base -F raw", "base_img=elsewhere,size=1M", "shrinking"},
	} {
		args := append(strings.Fields("create -q "+test.create), "disk")
		if !strings.Contains(test.create, "-b") {
			args = append(args, "10M")
		}
		mustRun(t, dir, args...)
		before, err := os.ReadFile(filepath.Join(dir, "disk"))
		if err != nil {
			t.Fatal(err)
		}
		if o := runHere(t, dir, "amend", "-o", test.amend, "disk"); o.status != statusError || !strings.Contains(o.stderr, test.want) {
			t.Errorf("%s of %s: exit status %d, %s", test.amend, test.create, o.status, o.stderr)
		}
		after, err := os.ReadFile(filepath.Join(dir, "disk"))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(before, after) {
			t.Errorf("%s of %s: the image was changed", test.amend, test.create)
		}
	}
}

// TestAmendSettingsAndSize: both are changed, also where one is possible only after the other.
func TestAmendSettingsAndSize(t *testing.T) {
	dir := t.TempDir()
	mustRun(t, dir, "create", "-q", "-f", "raw", "base", "10M")
	mustRun(t, dir, "create", "-q", "-f", "raw", "copy", "10M")
	for _, test := range []struct{ create, amend, want string }{
		{"-f qcow2", "lazy_refcounts=on,size=20M", "lazy refcounts: true"},
		{"-f qcow2 -o compat=0.10", "compat=1.1,size=20M", "compat: 1.1"},
		{"-f fvd -b base -F raw", "copy_on_read=on,size=20M", "copy on read: true"},
		{"-f fvd -b base -F raw", "base_img=copy,size=20M", "backing file: copy"},
	} {
		args := append(strings.Fields("create -q "+test.create), "disk")
		if !strings.Contains(test.create, "-b") {
			args = append(args, "10M")
		}
		mustRun(t, dir, args...)
		if strings.Contains(test.amend, "copy,") {
			if err := os.Rename(filepath.Join(dir, "base"), filepath.Join(dir, "gone")); err != nil {
				t.Fatal(err)
			}
		}
		mustRun(t, dir, "amend", "-q", "-o", test.amend, "disk")
		if info := mustRun(t, dir, "info", "disk"); !strings.Contains(info.stdout, test.want) || !strings.Contains(info.stdout, "20 MiB") {
			t.Errorf("%s of %s:\n%s", test.amend, test.create, info.stdout)
		}
	}
}
