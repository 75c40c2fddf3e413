//go:build unix

package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/platter-disk/platter/internal/testenv"
)

// guestInit is the first process of the guest. It reports on the serial console in lines that begin with
// "guest:" and switches the machine off; a step that fails switches it off without the last line.
const guestInit = `#!/bin/sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
fail() { echo "guest: failed: $*"; poweroff -f; sleep 60; }
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
echo "guest: booted"
grep -q probe /proc/cmdline && poweroff -f
for m in $(cat /modules); do insmod $m || fail insmod $m; done
for i in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/vda ] && break; sleep 1; done
/host/mke2fs -q -t ext4 /dev/vda || fail mke2fs
mkdir -p /mnt
mount -t ext4 -o discard /dev/vda /mnt || fail mount
tar -x -f /tree.tar -C /mnt || fail tar
find /mnt -type f -exec sync {} + || fail fsync
rm -r /mnt/doomed || fail rm
dd if=/dev/zero of=/mnt/zeros bs=1M count=8 conv=fsync 2>/dev/null || fail dd
rm /mnt/zeros
sync
umount /mnt || fail umount
echo 3 > /proc/sys/vm/drop_caches
mount -t ext4 -o ro /dev/vda /mnt || fail mount again
cd /mnt
echo "guest: tree $(find tree -type f | sort | xargs sha256sum | sha256sum | cut -d' ' -f1)"
cd /
umount /mnt || fail umount again
echo "guest: done"
poweroff -f
`

// guestTree builds the archive that the guest unpacks and returns it with the checksum that the guest must
// report. What lies in doomed/ is deleted again, so that the disk sees discards of written blocks.
func guestTree(t testing.TB) (archive []byte, sum string) {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	rng := rand.New(rand.NewPCG(1, 2))
	var lines []string
	for i := range 600 {
		dir := "tree"
		if i%4 == 3 {
			dir = "doomed"
		}
		name := fmt.Sprintf("%s/d%02d/file%03d", dir, i%17, i)
		data := make([]byte, 1<<(rng.IntN(9)+8)+rng.IntN(512)) // 256 B to 64 KiB
		if i%50 == 0 {
			data = make([]byte, 2<<20)
		}
		for j := range data {
			data[j] = byte(rng.Uint32())
		}
		h := &tar.Header{Name: name, Mode: 0o644, Size: int64(len(data)), Typeflag: tar.TypeReg, Format: tar.FormatUSTAR}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
		if dir == "tree" {
			lines = append(lines, fmt.Sprintf("%s  %x\n", name, sha256.Sum256(data)))
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	slices.Sort(lines)
	h := sha256.New()
	for _, line := range lines {
		name, digest, _ := strings.Cut(strings.TrimSpace(line), "  ")
		fmt.Fprintf(h, "%s  %s\n", digest, name)
	}
	return buf.Bytes(), fmt.Sprintf("%x", h.Sum(nil))
}

// guestInitramfs packs what the guest runs.
func guestInitramfs(t testing.TB, k kernel, archive []byte) []byte {
	t.Helper()
	var c cpio
	c.program(t, "busybox", "/bin/busybox")
	for _, applet := range []string{"sh", "mount", "umount", "cat", "grep", "insmod", "sleep", "mkdir", "tar", "find",
		"rm", "dd", "sync", "sort", "xargs", "sha256sum", "cut", "poweroff"} {
		c.link("/bin/"+applet, "/bin/busybox")
	}
	c.program(t, "mke2fs", "/host/mke2fs") // not on PATH: busybox has an applet of that name
	for _, dir := range []string{"proc", "sys", "dev", "etc"} {
		c.dir(dir)
	}
	c.file("etc/mtab", 0o644, nil)
	modules := k.addModules(t, &c, "virtio_pci", "virtio_blk", "ext4")
	c.file("modules", 0o644, []byte(strings.Join(modules, "\n")))
	c.file("tree.tar", 0o644, archive)
	c.file("init", 0o755, []byte(guestInit))
	return c.bytes()
}

// TestGuest lets a Linux guest make an ext4 file system on a served disk, fill it, sync it and read it back.
func TestGuest(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		testenv.Missing(t, "an amd64 machine (the guest runs the host's programs)")
	}
	testenv.Need(t, "qemu-system-x86_64", "qemu-img", "nbdcopy", "e2fsck")
	t.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	k := findKernel(t)
	archive, want := guestTree(t)
	dir := t.TempDir()
	initrd := filepath.Join(dir, "initramfs")
	if err := os.WriteFile(initrd, guestInitramfs(t, k, archive), 0o600); err != nil {
		t.Fatal(err)
	}
	accel := accelerator(t, k, initrd)

	for _, tc := range []struct {
		name   string
		create []string // options of platter create; none lets serve create the disk
	}{
		{"default", nil},
		{"small clusters and subclusters", []string{"-o", "cluster_size=16k,extended_l2=on,refcount_bits=1"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			disk, socket := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "socket")
			args := []string{disk, "--socket", socket}
			if tc.create == nil {
				args = append(args, "--create", "1G")
			} else {
				testenv.Run(t, platter(t), slices.Concat([]string{"create", "-q", "-f", "qcow2"}, tc.create, []string{disk, "1G"})...)
			}
			s := serve(t, args...)
			console, err := boot(t, patience, k, initrd, "", slices.Concat(accel, []string{
				"-drive", "file=" + s.uri + ",format=raw,if=virtio,cache=none,discard=unmap"})...)
			if err != nil {
				t.Fatalf("%v\nconsole:\n%s", err, console)
			}
			if m := regexp.MustCompile(`guest: tree ([0-9a-f]{64})`).FindStringSubmatch(console); m == nil || m[1] != want {
				t.Errorf("the guest read back %q, want checksum %s; its console:\n%s", m, want, console)
			}
			if !strings.Contains(console, "guest: done") {
				t.Errorf("the guest did not finish; its console:\n%s", console)
			}
			raw := filepath.Join(dir, "copy.raw")
			testenv.Run(t, "nbdcopy", s.uri, raw)
			s.stop(t)
			if _, err := os.Stat(socket); !os.IsNotExist(err) {
				t.Errorf("the socket is still there after the server ended: %v", err)
			}
			mustBeClean(t, disk)
			testenv.Run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", disk, raw)
			testenv.Run(t, "e2fsck", "-f", "-n", raw)
		})
	}
}

// guestCommandLine is what the kernel is told. On a machine that is busy, a timer that is emulated can miss the test
// of timers early in the kernel's life; the answer to that would be a panic.
const guestCommandLine = "console=ttyS0 panic=-1 quiet no_timer_check"

// bootLimit is how long a machine may take with KVM to reach its first process before the test turns to
// emulation: inside some virtual machines KVM is offered but runs a stock kernel at a crawl.
const bootLimit = 15 * time.Second

// The ways to run a guest, as options of qemu-system-x86_64.
var (
	withKVM   = []string{"-accel", "kvm", "-cpu", "host"}
	emulation = []string{"-accel", "tcg", "-cpu", "max"}
)

// offersKVM tells whether KVM may run a stock kernel here. Where the processor has no support for it that this
// machine may use, KVM can be there all the same (pvm): it then runs kernels that were made for it, and others at a
// crawl until they come to an instruction that it does not know.
func offersKVM(t *testing.T) bool {
	t.Helper()
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Logf("the guest runs in emulation: %v", err)
		return false
	}
	f.Close()
	for _, module := range []string{"kvm_intel", "kvm_amd"} {
		if _, err := os.Stat("/sys/module/" + module); err == nil {
			return true
		}
	}
	t.Log("the guest runs in emulation: this KVM has no hardware under it")
	return false
}

// accelerator returns the options of qemu-system-x86_64 that run a guest on this machine: KVM where a guest
// starts with it, else emulation.
func accelerator(t *testing.T, k kernel, initrd string) []string {
	t.Helper()
	if !offersKVM(t) {
		return emulation
	}
	if console, err := boot(t, bootLimit, k, initrd, "probe", withKVM...); !strings.Contains(console, "guest: booted") {
		t.Logf("the guest runs in emulation: with KVM it did not start (%v)", err)
		return emulation
	}
	return withKVM
}

// boot runs a guest until it switches itself off, or for at most limit, and returns its serial console.
func boot(t *testing.T, limit time.Duration, k kernel, initrd, append string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	args = slices.Concat([]string{
		"-nodefaults", "-display", "none", "-no-reboot", "-m", "384", "-serial", "stdio",
		"-kernel", k.image, "-initrd", initrd, "-append", guestCommandLine + " " + append,
	}, args)
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	var console, stderr lockedBuffer
	cmd.Stdout, cmd.Stderr = &console, &stderr
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Run(); err != nil {
		return console.String(), fmt.Errorf("qemu-system-x86_64 %q: %w\n%s", args, err, &stderr)
	}
	return console.String(), nil
}
