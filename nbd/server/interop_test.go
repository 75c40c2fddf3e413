package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/raw"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/internal/nbdtest"
	"github.com/platter-disk/platter/nbd/server"
	"github.com/platter-disk/platter/storage"
)

// fileDisk is a raw disk in a file.
func fileDisk(t testing.TB, size int64) block.Device {
	t.Helper()
	f, err := storage.Open(filepath.Join(t.TempDir(), "disk.raw"), storage.OpenOptions{Create: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	d, err := raw.Open(f, raw.Options{Discard: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// randomFile is a file with data and holes.
func randomFile(t testing.TB, size int) (path string, contents []byte) {
	t.Helper()
	contents = make([]byte, size)
	rng := rand.New(rand.NewPCG(1, 2))
	for off := 0; off < size; off += 256 << 10 {
		if rng.IntN(2) == 0 {
			part := contents[off:min(size, off+256<<10)]
			for i := range part {
				part[i] = byte(rng.Uint32())
			}
		}
	}
	path = filepath.Join(t.TempDir(), "contents")
	if err := os.WriteFile(path, contents, 0o600); err != nil {
		t.Fatal(err)
	}
	return path, contents
}

func holds(t testing.TB, d block.Device, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("the disk holds something else, %v", err)
	}
}

func TestNbdinfo(t *testing.T) {
	testenv.Need(t, "nbdinfo")
	disk := nbdtest.Disk(t, 8<<20)
	for _, off := range []int64{1 << 20, 4 << 20} {
		if _, err := disk.WriteAt(filled(1, 65536), off); err != nil {
			t.Fatal(err)
		}
	}
	s := nbdtest.Serve(t, server.Config{},
		server.Export{Device: disk, Description: "the first"},
		server.Export{Name: "second", Device: nbdtest.Disk(t, 1<<20), ReadOnly: true})

	var info struct {
		Protocol   string
		Structured bool
		Exports    []map[string]any
	}
	if err := json.Unmarshal([]byte(testenv.Run(t, "nbdinfo", "--list", "--json", s.URI(""))), &info); err != nil {
		t.Fatal(err)
	}
	if info.Protocol != "newstyle-fixed" || !info.Structured || len(info.Exports) != 2 {
		t.Fatalf("%+v", info)
	}
	for key, want := range map[string]any{
		"export-name": "", "description": "the first", "export-size": float64(8 << 20), "is_read_only": false, "can_cache": true, "can_df": true, "can_fast_zero": true,
		"can_flush": true, "can_fua": true, "can_multi_conn": true, "can_trim": true, "can_zero": true,
		"block_size_minimum": float64(1), "block_size_preferred": float64(4096), "block_size_maximum": float64(32 << 20),
	} {
		if info.Exports[0][key] != want {
			t.Errorf("%s is %v, want %v", key, info.Exports[0][key], want)
		}
	}
	if got := fmt.Sprint(info.Exports[0]["contexts"]); got != "[base:allocation qemu:allocation-depth]" {
		t.Errorf("contexts %s", got)
	}
	if info.Exports[1]["export-name"] != "second" || info.Exports[1]["is_read_only"] != true {
		t.Errorf("second export: %v", info.Exports[1])
	}
	if got, want := strings.Fields(testenv.Run(t, "nbdinfo", "--map", s.URI(""))), strings.Fields(`
		0 1048576 3 hole,zero
		1048576 65536 0 data
		1114112 3080192 3 hole,zero
		4194304 65536 0 data
		4259840 4128768 3 hole,zero`); !slices.Equal(got, want) {
		t.Errorf("map:\n%v\nwant\n%v", got, want)
	}
	testenv.Run(t, "nbdinfo", "--map=qemu:allocation-depth", s.URI(""))
	if got := strings.TrimSpace(testenv.Run(t, "nbdinfo", "--size", s.URI("second"))); got != "1048576" {
		t.Errorf("size %s", got)
	}
}

func TestNbdcopy(t *testing.T) {
	testenv.Need(t, "nbdcopy")
	path, contents := randomFile(t, 48<<20)
	disk := fileDisk(t, int64(len(contents)))
	s := nbdtest.Serve(t, server.Config{}, server.Export{Device: disk})
	testenv.Run(t, "nbdcopy", "--flush", path, s.URI(""))
	holds(t, disk, contents)
	back := filepath.Join(t.TempDir(), "back")
	testenv.Run(t, "nbdcopy", s.URI(""), back)
	if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, contents) {
		t.Fatalf("the copy back differs, %v", err)
	}
	testenv.Run(t, "nbdcopy", "--connections=4", "--requests=64", "--request-size=65536", "--synchronous", path, s.URI(""))
	holds(t, disk, contents)
}

func TestQemuIO(t *testing.T) {
	testenv.Need(t, "qemu-io")
	disk := nbdtest.Disk(t, 64<<20)
	s := nbdtest.Serve(t, server.Config{}, server.Export{Name: "disk", Device: disk})
	args := []string{"-f", "raw", "-d", "unmap"}
	for _, c := range []string{
		"write -P 1 0 1M", "write -P 2 512 512", "read -P 2 512 512", "read -P 1 1024 64k", "write -f -P 3 1M 128k", "flush",
		"write -z 64k 64k", "read -P 0 64k 64k", "write -z -u 1M 4k", "read -P 0 1M 4k", "read -P 3 1028k 60k", "discard 2M 1M",
		"aio_write -P 7 8M 1M", "aio_write -P 8 9M 1M", "aio_flush", "read -P 7 8M 1M", "read -P 8 9M 1M", "write -P 9 16M 40M", "read -P 9 16M 40M",
	} {
		args = append(args, "-c", c)
	}
	out := testenv.Run(t, "qemu-io", append(args, s.URI("disk"))...)
	if strings.Contains(out, "verification failed") || strings.Contains(out, "error") {
		t.Fatal(out)
	}
	got := make([]byte, 1024)
	if _, err := disk.ReadAt(got, 0); err != nil || !bytes.Equal(got, append(filled(1, 512), filled(2, 512)...)) {
		t.Fatalf("the disk holds something else, %v", err)
	}
}

// TestRemoveFromQemuIO: QEMU's client sees errors when its disk is taken away, and another one of the same server does
// not.
func TestRemoveFromQemuIO(t *testing.T) {
	testenv.Need(t, "qemu-io")
	hot, other := nbdtest.Disk(t, 4<<20), nbdtest.Disk(t, 4<<20)
	s := nbdtest.Serve(t, server.Config{}, server.Export{Name: "hot", Device: hot}, server.Export{Name: "other", Device: other})
	type client struct {
		cmd  *exec.Cmd
		in   io.WriteCloser
		out  bytes.Buffer
		name string
	}
	start := func(name string) *client {
		c := &client{cmd: exec.Command("qemu-io", "-f", "raw", s.URI(name)), name: name}
		c.cmd.Stdout, c.cmd.Stderr = &c.out, &c.out
		in, err := c.cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		c.in = in
		if err := c.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return c
	}
	wrote := func(c *client, d block.Device, value byte) {
		t.Helper()
		fmt.Fprintf(c.in, "write -P %d 0 64k\nflush\n", value)
		got := make([]byte, 64<<10)
		testenv.Until(t, "what "+c.name+" writes", func() bool {
			_, err := d.ReadAt(got, 0)
			return err == nil && bytes.Equal(got, filled(value, len(got)))
		})
	}
	a, b := start("hot"), start("other")
	wrote(a, hot, 1)
	wrote(b, other, 2)
	ctx, cancel := context.WithTimeout(context.Background(), testenv.Patience)
	defer cancel()
	if err := s.RemoveExport(ctx, "hot"); err != nil {
		t.Fatal(err)
	}
	if err := hot.Close(); err != nil {
		t.Error(err)
	}
	fmt.Fprint(a.in, "write -P 3 0 64k\nread 0 64k\n")
	wrote(b, other, 4)
	for _, c := range []*client{a, b} {
		c.in.Close()
		c.cmd.Wait() // qemu-io's status tells of the commands that failed
	}
	if out := a.out.String(); !strings.Contains(out, "write failed") || !strings.Contains(out, "read failed") {
		t.Errorf("the client of the removed export: %s", out)
	}
	if out := b.out.String(); strings.Contains(out, "failed") {
		t.Errorf("the client of the other export: %s", out)
	}
	if out, err := exec.Command("qemu-io", "-f", "raw", s.URI("hot"), "-c", "read 0 512").CombinedOutput(); err == nil {
		t.Errorf("a client got the removed export: %s", out)
	}
}

func TestQemuImg(t *testing.T) {
	testenv.Need(t, "qemu-img")
	path, contents := randomFile(t, 24<<20)
	disk := fileDisk(t, int64(len(contents)))
	s := nbdtest.Serve(t, server.Config{}, server.Export{Device: disk})
	testenv.Run(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", path, s.URI(""))
	holds(t, disk, contents)
	testenv.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", path, s.URI(""))
	qcow2 := filepath.Join(t.TempDir(), "disk.qcow2")
	testenv.Run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-m", "8", "-W", s.URI(""), qcow2)
	testenv.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", path, qcow2)
	var extents []struct{ Zero, Data bool }
	if err := json.Unmarshal([]byte(testenv.Run(t, "qemu-img", "map", "--output=json", "-f", "raw", s.URI(""))), &extents); err != nil || len(extents) < 10 {
		t.Fatalf("map: %v, %v", extents, err)
	}
}

func TestFio(t *testing.T) {
	testenv.Need(t, "fio")
	if out, err := exec.Command("fio", "--enghelp=nbd").CombinedOutput(); err != nil || !bytes.Contains(out, []byte("uri")) {
		testenv.Missing(t, "fio with the nbd engine")
	}
	s := nbdtest.Serve(t, server.Config{}, server.Export{Device: fileDisk(t, 32<<20)})
	for _, c := range [][]string{
		{"--rw=randwrite", "--bsrange=512-128k", "--iodepth=32"},
		{"--rw=randrw", "--bs=4k", "--iodepth=16", "--fsync=32"},
		{"--rw=write", "--bs=1m", "--iodepth=4"},
		{"--rw=randtrimwrite", "--bs=64k", "--iodepth=1"}, // deeper, a trim and a write of one block are under way at once
	} {
		testenv.Run(t, "fio", append([]string{"--name=verify", "--ioengine=nbd", "--uri=" + s.URI(""), "--size=32m", "--verify=crc32c", "--verify_fatal=1", "--randseed=7", "--aux-path=" + t.TempDir()}, c...)...)
	}
	if st := s.Stats(); st.Commands[nbd.CmdWrite].Requests == 0 || st.Commands[nbd.CmdWrite].Errors+st.Commands[nbd.CmdRead].Errors != 0 {
		t.Errorf("%+v", st.Commands)
	}
}

func TestTLSClients(t *testing.T) {
	testenv.Need(t, "nbdinfo", "qemu-io")
	certs := nbdtest.NewCertificates(t)
	s, err := server.New(server.Config{TLS: server.TLSRequired, TLSConfig: certs.ServerConfig(t, true), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	disk := nbdtest.Disk(t, 8<<20)
	if err := s.AddExport(server.Export{Device: disk}); err != nil {
		t.Fatal(err)
	}
	l, err := server.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), testenv.Patience)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Error(err)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	_, port, _ := net.SplitHostPort(l.Addr().String())
	if out := testenv.Run(t, "nbdinfo", "--json", "nbds://localhost:"+port+"/?tls-certificates="+certs.Dir); !strings.Contains(out, `"TLS": true`) {
		t.Errorf("nbdinfo: %s", out)
	}
	out := testenv.Run(t, "qemu-io", "--object", "tls-creds-x509,id=tls0,endpoint=client,dir="+certs.Dir, "-c", "write -P 5 0 2M", "-c", "read -P 5 0 2M", "-c", "flush",
		"--image-opts", "driver=raw,file.driver=nbd,file.server.type=inet,file.server.host=localhost,file.server.port="+port+",file.tls-creds=tls0")
	if strings.Contains(out, "failed") {
		t.Error(out)
	}
	holds(t, disk, filled(5, 2<<20))
	if out, err := exec.Command("nbdinfo", "nbd://localhost:"+port+"/").CombinedOutput(); err == nil {
		t.Errorf("a client without TLS was served: %s", out)
	}
}

// TestSocketActivation starts this test program again the way systemd would.
func TestSocketActivation(t *testing.T) {
	const child = "PLATTER_TEST_ACTIVATION"
	if os.Getenv(child) != "" {
		serveActivated(t)
		return
	}
	testenv.Need(t, "sh")
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" -test.run '^TestSocketActivation$'`, os.Args[0])
	cmd.Env = append(os.Environ(), child+"=1")
	cmd.ExtraFiles = []*os.File{f}
	stop, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	uri := nbd.URI{Network: "unix", Address: l.Addr().String()}.String()
	c, err := nbd.Dial(uri, nbd.ClientOptions{})
	if err != nil {
		t.Error(err)
	} else {
		if n, _ := c.Size(); n != 1<<20 {
			t.Errorf("size %d", n)
		}
		c.Close()
	}
	stop.Close()
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, &out)
	}
}

func serveActivated(t *testing.T) {
	listeners, err := server.ActivationListeners()
	if err != nil || len(listeners) != 1 {
		t.Fatalf("%d listeners, %v", len(listeners), err)
	}
	if again, err := server.ActivationListeners(); err != nil || len(again) != 0 || os.Getenv("LISTEN_FDS") != "" {
		t.Errorf("asked again: %d listeners, %v", len(again), err)
	}
	s, err := server.New(server.Config{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.AddExport(server.Export{Device: nbdtest.Disk(t, 1<<20)}); err != nil {
		t.Fatal(err)
	}
	go func() {
		io.Copy(io.Discard, os.Stdin)
		s.Shutdown(context.Background())
	}()
	if err := s.Serve(context.Background(), listeners[0]); err != nil {
		t.Error(err)
	}
	s.Shutdown(context.Background())
}

func TestActivationIsNotForUs(t *testing.T) {
	for _, c := range []struct{ pid, fds, say string }{
		{"1", "1", ""}, {"", "1", ""}, {fmt.Sprint(os.Getpid()), "", ""}, {fmt.Sprint(os.Getpid()), "many", "LISTEN_FDS"}, {fmt.Sprint(os.Getpid()), "-1", "LISTEN_FDS"},
	} {
		t.Setenv("LISTEN_PID", c.pid)
		t.Setenv("LISTEN_FDS", c.fds)
		l, err := server.ActivationListeners()
		if len(l) != 0 || (err == nil) != (c.say == "") || err != nil && !strings.Contains(err.Error(), c.say) {
			t.Errorf("%+v: %d listeners, %v", c, len(l), err)
		}
	}
}
