//go:build unix

package cli

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestExportIsSpared: an NBD export that is read is not made into an image, however it is spelled.
func TestExportIsSpared(t *testing.T) {
	t.Chdir(t.TempDir())
	want := bytes.Repeat([]byte("what a user keeps here\n"), 1<<16)
	want = want[:1<<20]
	if err := os.WriteFile("disk", want, 0o666); err != nil {
		t.Fatal(err)
	}
	socket, err := filepath.Abs("sock")
	if err != nil {
		t.Fatal(err)
	}
	r := startServe(t, "-f", "raw", "--socket", socket, "disk")
	for _, args := range [][]string{
		{"convert", "-f", "raw", "-O", "qcow2", r.uri, "nbd+unix:///?socket=sock"},
		{"convert", "-f", "raw", "-O", "qcow2", r.uri, "nbd+unix:///?socket=./%73ock"},
		{"convert", "-f", "raw", "-O", "qcow2", r.uri, "nbd:unix:" + socket},
		{"convert", "-f", "raw", "-O", "qcow2", "nbd:unix:sock", r.uri},
		{"convert", "-f", "raw", "-n", "--target-image-opts", r.uri, "driver=raw,file.driver=nbd,file.path=sock"},
		{"create", "-f", "qcow2", "-b", r.uri, "-F", "raw", "nbd+unix:///?socket=sock"},
	} {
		o := runInPlace(t, args...)
		if o.status != 1 || !strings.Contains(o.stderr, "is a file of the source") && !strings.Contains(o.stderr, "same filename as the backing file") {
			t.Errorf("%q: %+v", args, o)
		}
	}
	r.end(t)
	if got, err := os.ReadFile("disk"); err != nil || !bytes.Equal(got, want) {
		t.Errorf("what the export held is changed; %v", err)
	}
}

// TestRecordingKeepsLinks: a profile that is named by a link is replaced where it lies.
func TestRecordingKeepsLinks(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.WriteFile("p", []byte("platter prefetch profile 1\n"), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("p", "link"); err != nil {
		t.Skipf("links cannot be made: %v", err)
	}
	r, err := newRecording("link", "disk", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	r.Touch(0, 4096)
	if err := r.save(); err != nil {
		t.Fatal(err)
	}
	if to, err := os.Readlink("link"); err != nil || to != "p" {
		t.Errorf("the link leads to %q, %v", to, err)
	}
	if got, err := os.ReadFile("p"); err != nil || string(got) != "platter prefetch profile 1\n0 16384\n" {
		t.Errorf("the profile is %q, %v", got, err)
	}
}

// TestRecordingReplacesProfilesOnly: also when the file comes after the recording began.
func TestRecordingReplacesProfilesOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "p")
	r, err := newRecording(path, "disk", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	r.Touch(0, 4096)
	if err := r.save(); err != nil {
		t.Fatal(err)
	}
	r.Touch(1<<19, 4096)
	if err := r.save(); err != nil {
		t.Fatalf("replacing its own profile: %v", err)
	}
	if err := os.WriteFile(path, []byte("what a user keeps here\n"), 0o666); err != nil {
		t.Fatal(err)
	}
	r.Touch(1<<18, 4096)
	if err := r.save(); err == nil || !strings.Contains(err.Error(), "A file that is no profile is not replaced") {
		t.Errorf("saved over another file: %v", err)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "what a user keeps here\n" {
		t.Errorf("the file now holds %q, %v", got, err)
	}
}
