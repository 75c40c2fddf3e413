package nbd_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/internal/nbdtest"
	"github.com/platter-disk/platter/storage"
)

// start runs a server program that listens on a Unix socket, whose path replaces SOCKET in args, and
// returns the path when the program listens. The program ends with the test.
func start(t testing.TB, program string, args ...string) string {
	t.Helper()
	testenv.Need(t, program)
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	for i, a := range args {
		args[i] = strings.ReplaceAll(a, "SOCKET", socket)
	}
	cmd := exec.Command(program, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s: %s", program, &stderr)
		}
	})
	for deadline := time.Now().Add(testenv.Patience); ; time.Sleep(5 * time.Millisecond) {
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			return socket
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s %q does not listen: %s", program, args, &stderr)
		}
	}
}

func nbdkit(t testing.TB, args ...string) string {
	t.Helper()
	return nbd.URI{Network: "unix", Address: start(t, "nbdkit", append([]string{"-f", "--exit-with-parent", "-U", "SOCKET"}, args...)...)}.String()
}

// exercise writes, zeroes and reads through a client, and compares with what must be there.
func exercise(t *testing.T, c *nbd.Client) {
	t.Helper()
	size, _ := c.Size()
	model := make([]byte, size)
	type step struct {
		op       string
		off, len int64
	}
	for i, s := range []step{
		{"write", 0, 4096}, {"write", 100, 1}, {"write", 1000, 70_000}, {"write", size - 5000, 5000}, {"zero", 3000, 10_000}, {"punch", 20_000, 40_000},
		{"write", 20_001, 3}, {"punch", size - 4096, 4096}, {"write", 65_536, 200_000},
	} {
		p := pattern(uint64(i)<<20, int(s.len))
		var err error
		switch s.op {
		case "write":
			_, err = c.WriteAt(p, s.off)
		case "zero":
			clear(p)
			err = c.ZeroRange(s.off, s.len)
		case "punch":
			clear(p)
			err = c.PunchHole(s.off, s.len)
		}
		if errors.Is(err, errors.ErrUnsupported) {
			_, err = c.WriteAt(p, s.off)
		}
		if err != nil {
			t.Fatalf("step %d %+v: %v", i, s, err)
		}
		copy(model[s.off:], p)
	}
	if err := c.Sync(); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		t.Fatal(err)
	}
	got := make([]byte, size+10)
	if n, err := c.ReadAt(got, 0); err != io.EOF || int64(n) != size || !bytes.Equal(got[:n], model) {
		t.Fatalf("read back %d: %v, or wrong data", n, err)
	}
	if _, err := c.ReadAt(got[:777], 12345); err != nil || !bytes.Equal(got[:777], model[12345:][:777]) {
		t.Fatalf("unaligned read: %v, or wrong data", err)
	}
	checkExtents(t, c, model, 0, size)
	checkExtents(t, c, model, 1001, 60_003)
}

// TestClientWithNbdkit: servers of many kinds, by way of nbdkit's filters.
func TestClientWithNbdkit(t *testing.T) {
	for name, c := range map[string]struct {
		args    []string
		replies nbd.ReplyMode
	}{
		"structured":          {[]string{"memory", "size=1M"}, nbd.StructuredReplies},
		"simple":              {[]string{"--no-sr", "memory", "size=1M"}, nbd.SimpleReplies},
		"no extents":          {[]string{"--filter=noextents", "memory", "size=1M"}, nbd.StructuredReplies},
		"no zeroing":          {[]string{"--filter=nozero", "memory", "size=1M", "zeromode=none"}, nbd.StructuredReplies},
		"emulated zeroing":    {[]string{"--filter=nozero", "memory", "size=1M", "zeromode=emulate"}, nbd.StructuredReplies},
		"blocks of 512":       {[]string{"--filter=blocksize-policy", "memory", "size=1M", "blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=64K", "blocksize-error-policy=error"}, nbd.StructuredReplies},
		"blocks of 64K":       {[]string{"--filter=blocksize-policy", "memory", "size=1M", "blocksize-minimum=64K", "blocksize-preferred=64K", "blocksize-maximum=128K", "blocksize-error-policy=error"}, nbd.StructuredReplies},
		"durable writes":      {[]string{"--filter=fua", "memory", "size=1M", "fuamode=force"}, nbd.StructuredReplies},
		"slow and disorderly": {[]string{"--filter=delay", "memory", "size=1M", "delay-read=3ms"}, nbd.StructuredReplies},
	} {
		t.Run(name, func(t *testing.T) {
			client := dial(t, nbdkit(t, c.args...), nbd.ClientOptions{Connections: 2})
			if got := client.Export().Replies; got != c.replies {
				t.Errorf("replies are %d, want %d", got, c.replies)
			}
			exercise(t, client)
		})
	}
}

func TestClientReadsNbdkitPattern(t *testing.T) {
	const size = 40 << 20 // more than one request may have
	client := dial(t, nbdkit(t, "pattern", fmt.Sprint("size=", size)), nbd.ClientOptions{ReadOnly: true})
	p := make([]byte, size)
	if _, err := client.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	for off := 0; off < size; off += 8 { // each 8 bytes hold their offset
		if got := uint64(p[off])<<56 | uint64(p[off+1])<<48 | uint64(p[off+2])<<40 | uint64(p[off+3])<<32 | uint64(p[off+4])<<24 | uint64(p[off+5])<<16 | uint64(p[off+6])<<8 | uint64(p[off+7]); got != uint64(off) {
			t.Fatalf("at %d: %d", off, got)
		}
	}
}

func TestClientReadsNbdkitHoles(t *testing.T) {
	client := dial(t, nbdkit(t, "sparse-random", "size=1G", "seed=7"), nbd.ClientOptions{ReadOnly: true})
	var data, holes int
	at := int64(0)
	err := client.DataExtents(0, 1<<30, func(e storage.Extent) bool {
		if e.Offset != at {
			t.Fatalf("extent %+v after %d", e, at)
		}
		at += e.Length
		if e.Data {
			data++
		} else {
			holes++
			p := make([]byte, min(e.Length, 64<<10))
			if _, err := client.ReadAt(p, e.Offset); err != nil || !bytes.Equal(p, make([]byte, len(p))) {
				t.Fatalf("hole at %d does not read as zeros, %v", e.Offset, err)
			}
		}
		return holes < 200
	})
	if err != nil || data == 0 || holes == 0 {
		t.Fatalf("%d data, %d holes, %v", data, holes, err)
	}
}

func TestClientNbdkitErrors(t *testing.T) {
	client := dial(t, nbdkit(t, "--filter=error", "memory", "size=1M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%", "error-extents=EIO", "error-extents-rate=100%"), nbd.ClientOptions{})
	if _, err := client.WriteAt([]byte{1}, 0); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write: %v", err)
	}
	if err := client.DataExtents(0, 1<<20, discardExtents); !errors.Is(err, syscall.EIO) {
		t.Errorf("extents: %v", err)
	}
	if _, err := client.ReadAt(make([]byte, 10), 0); err != nil {
		t.Errorf("read on the same connection: %v", err)
	}
	if _, err := nbd.Dial(nbdkit(t, "-r", "memory", "size=1M"), nbd.ClientOptions{}); !errors.Is(err, nbd.ErrReadOnly) {
		t.Errorf("read-only export: %v", err)
	}
}

// TestClientOverlapsRequests: requests on one connection are under way together.
func TestClientOverlapsRequests(t *testing.T) {
	client := dial(t, nbdkit(t, "--filter=delay", "memory", "size=1M", "delay-read=2"), nbd.ClientOptions{ReadOnly: true})
	const reads = 32 // nbdkit serves 16 at a time
	begin := time.Now()
	var wg sync.WaitGroup
	for i := range int64(reads) {
		wg.Go(func() {
			if _, err := client.ReadAt(make([]byte, 512), i*512); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if took := time.Since(begin); took > reads*time.Second {
		t.Errorf("%d reads of 2 s each took %v", reads, took)
	}
}

func TestClientWithQemuNBD(t *testing.T) {
	testenv.Need(t, "qemu-img", "qemu-nbd")
	for _, format := range []string{"raw", "qcow2"} {
		t.Run(format, func(t *testing.T) {
			image := filepath.Join(t.TempDir(), "disk")
			testenv.Run(t, "qemu-img", "create", "-q", "-f", format, image, "1M")
			socket := start(t, "qemu-nbd", "-t", "-e", "4", "-f", format, "-x", "the disk", "-D", "about it", "--discard=unmap", "-k", "SOCKET", image)
			uri := nbd.URI{Network: "unix", Address: socket, Export: "the disk"}.String()
			c := dial(t, uri, nbd.ClientOptions{Connections: 3})
			if x := c.Export(); x.Name != "the disk" || x.Description != "about it" || x.Replies != nbd.StructuredReplies {
				t.Errorf("%+v", x)
			}
			exercise(t, c)
			list, err := nbd.List(uri, nbd.ClientOptions{})
			if err != nil || len(list) != 1 || list[0].Description != "about it" || list[0].Size != 1<<20 {
				t.Errorf("list: %+v, %v", list, err)
			}
		})
	}
}

func TestClientTLSWithQemuNBD(t *testing.T) {
	testenv.Need(t, "qemu-img", "qemu-nbd")
	certs := nbdtest.NewCertificates(t)
	image := filepath.Join(t.TempDir(), "disk")
	testenv.Run(t, "qemu-img", "create", "-q", "-f", "raw", image, "1M")
	socket := start(t, "qemu-nbd", "-t", "-f", "raw", "-k", "SOCKET", "--object", "tls-creds-x509,id=tls0,endpoint=server,verify-peer=on,dir="+certs.Dir, "--tls-creds", "tls0", image)
	c := dial(t, nbd.URI{Network: "unix", Address: socket, TLS: true, TLSCertificates: certs.Dir}.String(), nbd.ClientOptions{})
	if !c.Export().TLS {
		t.Error("the connection is not encrypted")
	}
	exercise(t, c)
}
