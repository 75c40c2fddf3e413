package image_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/internal/testenv"
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

// loopDevice attaches a part of a file to a loop device; length 0: the rest of it.
func loopDevice(t *testing.T, path string, offset, length int64) string {
	t.Helper()
	testenv.Need(t, "losetup")
	if os.Geteuid() != 0 {
		t.Skip("needs root to attach a loop device")
	}
	args := []string{"--find", "--show", "--partscan", "--offset", fmt.Sprint(offset)}
	if length > 0 {
		args = append(args, "--sizelimit", fmt.Sprint(length))
	}
	out, err := exec.Command("losetup", append(args, path)...).Output()
	if err != nil {
		t.Skip("needs a free loop device")
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() { exec.Command("losetup", "--detach", dev).Run() })
	return dev
}

// partition adds partition 1 of a block device, of so many bytes from start on, and returns its node.
func partition(t *testing.T, dev string, start, length int64) string {
	t.Helper()
	f, err := os.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := unix.BlkpgPartition{Start: start, Length: length, Pno: 1}
	arg := unix.BlkpgIoctlArg{Op: unix.BLKPG_ADD_PARTITION, Datalen: int32(unsafe.Sizeof(p)), Data: (*byte)(unsafe.Pointer(&p))}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKPG, uintptr(unsafe.Pointer(&arg))); errno != 0 {
		t.Skipf("partitions cannot be made: %v", errno)
	}
	number, err := os.ReadFile("/sys/class/block/" + filepath.Base(dev) + "/" + filepath.Base(dev) + "p1/dev")
	if err != nil {
		t.Fatal(err)
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(number), "%d:%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	node := filepath.Join(t.TempDir(), "p1")
	if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(unix.Mkdev(major, minor))); err != nil {
		t.Skipf("device nodes cannot be made: %v", err)
	}
	return node
}

// A loop device is the file behind it.
func TestSameFileOfLoopDevices(t *testing.T) {
	t.Chdir(t.TempDir())
	create(t, "raw", "file", sized(1<<20))
	create(t, "raw", "another", sized(1<<20))
	whole := loopDevice(t, "file", 0, 0)
	again := loopDevice(t, "file", 0, 0)
	lower, upper := loopDevice(t, "file", 0, 512<<10), loopDevice(t, "file", 512<<10, 0)
	part := partition(t, whole, 512<<10, 64<<10)
	nested := loopDevice(t, whole, 0, 0)
	other := loopDevice(t, "another", 0, 0)
	for _, test := range []struct {
		a, b          string
		same, overlap bool
	}{
		{whole, "file", true, true},
		{whole, again, true, true},
		{nested, "file", true, true},
		{lower, "file", false, true},
		{upper, "file", false, true},
		{lower, upper, false, false},
		{part, "file", false, true},
		{part, whole, false, true},
		{part, nested, false, true},
		{part, upper, false, true},
		{part, lower, false, false},
		{other, "file", false, false},
		{other, whole, false, false},
		{other, part, false, false},
	} {
		for range 2 {
			if got := image.SameFile(test.a, test.b); got != test.same {
				t.Errorf("%s, %s: one and the same %v, want %v", test.a, test.b, got, test.same)
			}
			img := open(t, test.a, image.Options{Format: "raw", ReadOnly: true, Share: true})
			if got := img.Uses(test.b); got != test.overlap {
				t.Errorf("%s, %s: overlap %v, want %v", test.a, test.b, got, test.overlap)
			}
			test.a, test.b = test.b, test.a
		}
	}
}
