package image_test

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/platter-disk/platter/image"
)

func TestSameFileOfDevices(t *testing.T) {
	t.Chdir(t.TempDir())
	for name, minor := range map[string]uint32{"a": 200, "b": 200, "c": 201} {
		if err := unix.Mknod(name, unix.S_IFBLK|0o600, int(unix.Mkdev(7, minor))); err != nil {
			t.Skipf("device nodes cannot be made: %v", err)
		}
	}
	if !image.SameFile("a", "b") {
		t.Error("two nodes of one device count as different")
	}
	if image.SameFile("a", "c") {
		t.Error("two devices count as one")
	}
}
