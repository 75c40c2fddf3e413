//go:build unix

package cli

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/jobs/prefetch"
	"github.com/platter-disk/platter/nbd"
)

const (
	farSize = 8 << 20   // bytes of the base image
	farHole = 1 << 20   // of them, in the middle
	farRate = 512 << 20 // bits a second
	farWait = time.Minute
)

// farBase is a base image behind an nbdkit that is as slow as a network, and what it holds. Each sector is of its
// own kind, and none but those of a hole is zero.
type farBase struct {
	uri  string
	want []byte
	fail string // while a file of that name exists, reads fail
	log  string // of every request
}

// newFarBase makes it; its nbdkit lives as long as the test.
func newFarBase(t *testing.T, dir string) *farBase {
	t.Helper()
	testenv.Need(t, "nbdkit", "nbdcopy")
	b := &farBase{want: make([]byte, farSize), fail: filepath.Join(dir, "fail"), log: filepath.Join(dir, "base.log")}
	for i := 0; i < farSize; i += 16 {
		if i < farSize/2 || i >= farSize/2+farHole {
			binary.LittleEndian.PutUint64(b.want[i:], uint64(i/512)<<8|0xf1)
			binary.LittleEndian.PutUint64(b.want[i+8:], uint64(i)*0x9e3779b97f4a7c15|1)
		}
	}
	file := filepath.Join(dir, "base.raw")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, part := range [][2]int{{0, farSize / 2}, {farSize/2 + farHole, farSize}} {
		if _, err := f.WriteAt(b.want[part[0]:part[1]], int64(part[0])); err != nil {
			t.Fatal(err)
		}
	}
	b.start(t, dir, file)
	return b
}

func (b *farBase) start(t *testing.T, dir, file string) {
	t.Helper()
	socket := filepath.Join(dir, "base")
	cmd := exec.Command("nbdkit", "-f", "--exit-with-parent", "-U", socket, "--filter=log", "--filter=error", "--filter=delay", "--filter=rate",
		"file", file, "logfile="+b.log, "error-pread=EIO", "error-pread-rate=100%", "error-file="+b.fail,
		"delay-read=2ms", fmt.Sprint("rate=", farRate), "burstiness=0.05")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
	})
	for start := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			break
		}
		select {
		case <-ended:
			t.Fatalf("nbdkit ended: %s", &stderr)
		default:
		}
		if time.Since(start) > farWait {
			t.Fatal("nbdkit does not answer")
		}
	}
	b.uri = nbd.URI{Network: "unix", Address: socket}.String()
}

var logRead = regexp.MustCompile(`\bRead id=\d+ offset=0x([0-9a-f]+) count=0x([0-9a-f]+)`)

// reads lists what was read of the base so far.
func (b *farBase) reads(t *testing.T) (runs []prefetch.Run, total int64) {
	t.Helper()
	f, err := os.Open(b.log)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if m := logRead.FindStringSubmatch(s.Text()); m != nil {
			off, _ := strconv.ParseInt(m[1], 16, 64)
			n, _ := strconv.ParseInt(m[2], 16, 64)
			runs, total = append(runs, prefetch.Run{Offset: off, Length: n}), total+n
		}
	}
	return runs, total
}

// overlay makes an image over the base.
func (b *farBase) overlay(t *testing.T, format, image string, options ...string) {
	t.Helper()
	args := []string{"create", "-q", "-f", format, "-b", b.uri, "-F", "raw"}
	for _, o := range options {
		args = append(args, "-o", o)
	}
	platterHere(t, append(args, image)...)
}

// runInPlace runs a command in this process, in whatever directory that is.
func runInPlace(t *testing.T, args ...string) outcome {
	t.Helper()
	var stdout, stderr bytes.Buffer
	status := run(t.Context(), args, &stdout, &stderr)
	return outcome{stdout.String(), stderr.String(), status}
}

// platterHere runs a command that must succeed and returns what it prints.
func platterHere(t *testing.T, args ...string) string {
	t.Helper()
	o := runInPlace(t, args...)
	if o.status != 0 {
		t.Fatalf("platter %s: status %d\n%s", strings.Join(args, " "), o.status, o.stderr)
	}
	return o.stdout
}

// prefetchStatus asks a control socket, or an image, with the command.
func prefetchStatus(t *testing.T, args ...string) exportStatus {
	t.Helper()
	var reply exportsReply
	out := platterHere(t, append([]string{"prefetch", "--output", "json"}, args...)...)
	if err := json.Unmarshal([]byte(out), &reply); err != nil || len(reply.Exports) != 1 {
		t.Fatalf("%v: %v in %s", args, err, out)
	}
	return reply.Exports[0]
}

// until waits for a state of the server's only export.
func until(t *testing.T, control, what string, is func(b *baseStatus) bool) *baseStatus {
	t.Helper()
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		b := prefetchStatus(t, "--control", control).Base
		if b != nil && b.Prefetch != nil && is(b) {
			return b
		}
		if time.Since(start) > farWait {
			t.Fatalf("waiting for %s: %+v", what, b)
		}
	}
}

// readAll copies a disk with nbdcopy.
func readAll(t *testing.T, uri string) []byte {
	t.Helper()
	file := filepath.Join(t.TempDir(), "copy")
	testenv.Run(t, "nbdcopy", uri, file)
	p, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func sameBytes(t *testing.T, when string, got, want []byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s: %d bytes, want %d", when, len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("%s: byte %d is %#x, want %#x", when, i, got[i], want[i])
		}
	}
}

// write writes through the server and into what is wanted.
func write(t *testing.T, uri string, want []byte, offsets ...int64) {
	t.Helper()
	c, err := nbd.Dial(uri, nbd.ClientOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, off := range offsets {
		p := bytes.Repeat([]byte{byte(off>>12) | 1, 0xaa}, 700)
		if _, err := c.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
		copy(want[off:], p)
	}
	if err := c.Sync(); err != nil {
		t.Fatal(err)
	}
}

// process is a platter serve in a process of its own, which can be killed.
func process(t *testing.T, args ...string) (uri string, cmd *exec.Cmd) {
	t.Helper()
	cmd = exec.Command("platter", append([]string{"serve"}, args...)...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if uri, err = bufio.NewReader(out).ReadString('\n'); err != nil {
		_ = cmd.Wait()
		t.Fatalf("platter serve: %v\n%s", err, &stderr)
	}
	return strings.TrimSpace(uri), cmd
}

// connected tells whether anybody is.
func (b *farBase) connected(t *testing.T) bool {
	t.Helper()
	p, err := os.ReadFile(b.log)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Count(p, []byte(" Connect ")) > bytes.Count(p, []byte(" Disconnect "))
}
