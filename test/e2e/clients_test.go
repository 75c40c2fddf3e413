//go:build unix

package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/platter-disk/platter/internal/testenv"
)

// disk names a new disk in a directory of the test's own, and the socket to serve it on.
func disk(t testing.TB) (image, socket string) {
	dir := t.TempDir()
	return filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "socket")
}

// serveNew serves a new disk of the given size.
func serveNew(t testing.TB, size string, args ...string) (s *server, image string) {
	t.Helper()
	image, socket := disk(t)
	return serve(t, append([]string{image, "--create", size, "--socket", socket}, args...)...), image
}

// TestNBDInfo asks a server what it serves, before and after a client wrote.
func TestNBDInfo(t *testing.T) {
	testenv.Need(t, "nbdinfo", "qemu-io", "qemu-img")
	s, image := serveNew(t, "1G")
	if size := testenv.Run(t, "nbdinfo", "--size", s.uri); strings.TrimSpace(size) != "1073741824" {
		t.Errorf("nbdinfo --size printed %q, want 1073741824", size)
	}
	testenv.Run(t, "nbdinfo", "--list", s.uri)
	wantMap(t, s.uri, [][3]int64{{0, 1 << 30, 3}})
	testenv.Run(t, "qemu-io", "-f", "raw", s.uri, "-c", "write -P 1 64k 128k", "-c", "write -z -u 128k 64k", "-c", "flush")
	wantMap(t, s.uri, [][3]int64{{0, 64 << 10, 3}, {64 << 10, 64 << 10, 0}, {128 << 10, 1<<30 - 128<<10, 3}})
	for _, can := range []string{"can_multi_conn", "can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_df", "can_cache"} {
		var info struct{ Exports []map[string]any }
		if err := json.Unmarshal([]byte(testenv.Run(t, "nbdinfo", "--json", s.uri)), &info); err != nil || len(info.Exports) != 1 {
			t.Fatalf("nbdinfo --json: %v, %d exports", err, len(info.Exports))
		}
		if info.Exports[0][can] != true {
			t.Errorf("nbdinfo: %s is %v, want true", can, info.Exports[0][can])
		}
	}
	s.stop(t)
	mustBeClean(t, image)
}

// wantMap compares `nbdinfo --map` with runs of offset, length and type (3: hole and zero, 0: data), where
// neighbours of one type may be reported apart.
func wantMap(t *testing.T, uri string, want [][3]int64) {
	t.Helper()
	var runs []struct{ Offset, Length, Type int64 }
	out := testenv.Run(t, "nbdinfo", "--map", "--json", uri)
	if err := json.Unmarshal([]byte(out), &runs); err != nil {
		t.Fatalf("nbdinfo --map --json: %v\n%s", err, out)
	}
	var got [][3]int64
	for _, r := range runs {
		// A zero cluster that keeps its space is zero without being a hole (type 2): to a reader the same.
		kind := r.Type
		if kind == 2 {
			kind = 3
		}
		if n := len(got); n > 0 && got[n-1][2] == kind {
			got[n-1][1] += r.Length
			continue
		}
		got = append(got, [3]int64{r.Offset, r.Length, kind})
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("nbdinfo --map reports %v, want %v", got, want)
	}
}

// TestNBDCopy copies a sparse file onto a served disk and back.
func TestNBDCopy(t *testing.T) {
	testenv.Need(t, "nbdcopy", "qemu-img")
	s, image := serveNew(t, "256M")
	dir := t.TempDir()
	in, out := filepath.Join(dir, "in.raw"), filepath.Join(dir, "out.raw")
	f, err := os.Create(in)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(256 << 20); err != nil {
		t.Fatal(err)
	}
	piece := make([]byte, 300_001) // no multiple of anything
	for i := range int64(40) {
		for j := range piece {
			piece[j] = byte(j*int(2*i+3) + j>>8)
		}
		if _, err := f.WriteAt(piece, i*6_500_003); err != nil {
			t.Fatal(err)
		}
	}
	testenv.Run(t, "nbdcopy", "--flush", in, s.uri)
	testenv.Run(t, "nbdcopy", s.uri, out)
	testenv.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", in, out)
	testenv.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", in, s.uri)
	s.stop(t)
	mustBeClean(t, image)
	testenv.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", in, image)
	var info struct {
		ActualSize int64 `json:"actual-size"`
	}
	if err := json.Unmarshal([]byte(testenv.Run(t, "qemu-img", "info", "--output=json", image)), &info); err != nil {
		t.Fatal(err)
	}
	if info.ActualSize > 32<<20 {
		t.Errorf("12 MB of data take %d bytes in the image: the copy is not sparse", info.ActualSize)
	}
}

// TestFio writes at random with many requests in flight and verifies every block.
func TestFio(t *testing.T) {
	testenv.Need(t, "fio", "qemu-img")
	for _, tc := range []struct {
		name string
		args []string
	}{
		{"4k depth 32", []string{"--bs=4k", "--iodepth=32", "--rw=randwrite"}},
		{"mixed sizes with fsync", []string{"--bsrange=512-128k", "--iodepth=16", "--rw=randwrite", "--fsync=32"}},
		{"sequential", []string{"--bs=1M", "--iodepth=4", "--rw=write"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, image := serveNew(t, "128M")
			cmd := exec.Command("fio", append([]string{"--name=verify", "--ioengine=nbd", "--uri=" + s.uri, "--size=64M",
				"--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--randseed=7"}, tc.args...)...)
			cmd.Dir = t.TempDir() // fio leaves files where it runs
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%q: %v\n%s", cmd.Args, err, out)
			}
			s.stop(t)
			mustBeClean(t, image)
		})
	}
}

// TestQemuIO writes patterns through the server and reads them from the image, and the other way round.
func TestQemuIO(t *testing.T) {
	testenv.Need(t, "qemu-io", "qemu-img")
	image, socket := disk(t)
	testenv.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", image, "64M")
	qemuIO := func(t *testing.T, format, name string, commands ...string) {
		t.Helper()
		args := []string{"-f", format, name}
		for _, c := range commands {
			args = append(args, "-c", c)
		}
		out := testenv.Run(t, "qemu-io", args...)
		for _, bad := range []string{"failed", "not found", "error"} {
			if strings.Contains(out, bad) {
				t.Errorf("qemu-io %q printed\n%s", commands, out)
			}
		}
	}
	qemuIO(t, "qcow2", image, "write -P 1 0 1M", "write -P 2 1M 1M", "write -c -P 3 8M 64k")

	s := serve(t, image, "--socket", socket)
	// QEMU does not open an image that is served: neither to write it nor, unless told to, to read it.
	if _, stderr, code := output(t, "qemu-io", "-f", "qcow2", image, "-c", "write 0 512"); code == 0 || !strings.Contains(stderr, "lock") {
		t.Errorf("qemu-io wrote an image that is served: exit status %d, %s", code, stderr)
	}
	qemuIO(t, "raw", s.uri,
		"read -P 1 0 1M", "read -P 2 1M 1M", "read -P 3 8M 64k", "read -P 0 2M 6M",
		"write -P 4 512k 1M",           // over two
		"write -P 5 1000 3000",         // in the middle of sectors
		"write -f -P 6 63M 1M",         // to the end, FUA
		"write -z 4M 1M",               // explicit zeros
		"write -z -u 600k 100k",        // over data
		"discard 8M 64k",               // over compressed data
		"aio_write -P 7 16M 1M 1M 1M ", // several in flight
		"aio_write -P 8 20M 64k", "aio_flush", "flush")
	s.stop(t)
	mustBeClean(t, image)
	qemuIO(t, "qcow2", image,
		"read -P 5 1000 3000", "read -P 1 4000 500k", "read -P 4 516k 84k", "read -P 0 600k 100k", "read -P 4 700k 800k",
		"read -P 2 1536k 512k", "read -P 0 2M 14M", "read -P 7 16M 3M", "read -P 8 20M 64k", "read -P 6 63M 1M")
}

// TestStaleSocket starts a server where one was killed, and where one is alive.
func TestStaleSocket(t *testing.T) {
	image, socket := disk(t)
	first := serve(t, image, "--create", "1M", "--socket", socket)
	first.kill(t)
	second := serve(t, image, "--socket", socket)
	other := filepath.Join(t.TempDir(), "other.qcow2")
	stdout, stderr, code := output(t, platter(t), "serve", other, "--create", "1M", "--socket", socket)
	if code != 1 || stdout != "" || !strings.Contains(stderr, socket) || !strings.Contains(stderr, "listens there") {
		t.Errorf("a second server on the socket: exit status %d, stdout %q, stderr %q; want a refusal", code, stdout, stderr)
	}
	if _, err := os.Stat(socket); err != nil {
		t.Errorf("the refused server took the socket of the first away: %v", err)
	}
	_, stderr, code = output(t, platter(t), "serve", image, "--socket", socket+"2")
	if code != 1 || !strings.Contains(stderr, "lock") {
		t.Errorf("a second server of the image: exit status %d, stderr %q; want a refusal because of the lock", code, stderr)
	}
	second.stop(t)
}

// TestActivation passes the socket to the server as systemd does.
func TestActivation(t *testing.T) {
	testenv.Need(t, "nbdinfo", "sh")
	image, socket := disk(t)
	testenv.Run(t, platter(t), "create", "-q", "-f", "qcow2", image, "3M")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"`, "sh", platter(t), "serve", image)
	cmd.ExtraFiles = []*os.File{f} // file descriptor 3
	var stdout, stderr lockedBuffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// The socket is there already: clients wait in its queue until the server accepts.
	uri := "nbd+unix:///?socket=" + socket
	size, _, code := output(t, "nbdinfo", "--size", uri)
	if code != 0 || strings.TrimSpace(size) != "3145728" {
		t.Errorf("nbdinfo --size: exit status %d, %q, want 3145728", code, size)
	}
	cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Errorf("serve ended with %v\n%s", err, &stderr)
	}
	if stdout.String() != "" || !strings.Contains(stderr.String(), uri) {
		t.Errorf("serve printed %q and logged %q, want %s in the log alone", &stdout, &stderr, uri)
	}
	if _, err := os.Stat(socket); err != nil {
		t.Errorf("the server removed a socket that is not its own: %v", err)
	}
}

// TestMakeServe does what the README tells a newcomer to do.
func TestMakeServe(t *testing.T) {
	testenv.Need(t, "make", "bash", "nbdinfo", "qemu-img")
	image, socket := disk(t)
	cmd := exec.Command("make", "--no-print-directory", "serve", "DISK="+image, "SOCKET="+socket)
	cmd.Dir = filepath.Join("..", "..")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C goes to all processes of a terminal's job
	var out lockedBuffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	uri := "nbd+unix:///?socket=" + socket
	for limit := time.Now().Add(patience); !strings.Contains(out.String(), "nbdcopy '"+uri+"'"); {
		select {
		case err := <-ended:
			t.Fatalf("make serve ended: %v\n%s", err, &out)
		case <-time.After(50 * time.Millisecond):
		}
		if time.Now().After(limit) {
			t.Fatalf("make serve printed\n%s", &out)
		}
	}
	if size := testenv.Run(t, "nbdinfo", "--size", uri); strings.TrimSpace(size) != "10737418240" {
		t.Errorf("the disk that make serve made has %s bytes, want 10 GiB", size)
	}
	if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	<-ended
	mustBeClean(t, image)
}
