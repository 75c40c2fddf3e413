//go:build unix

package cli

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/raw"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/jobs/prefetch"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/server"
	"github.com/platter-disk/platter/storage"
)

const (
	farSize  = 8 << 20              // bytes of the base image
	farHole  = 1 << 20              // of them, in the middle
	farDelay = 2 * time.Millisecond // of a read
)

// farBase is a base image on an NBD server that takes its time, and what it holds. Each sector is of its own kind, and
// none but those of a hole is zero.
type farBase struct {
	block.Device
	uri    string
	want   []byte
	server *server.Server

	mu      sync.Mutex
	changed sync.Cond // limit or held
	limit   int64     // bytes that are served before reads wait; negative: no limit
	held    int       // reads that wait
	failing bool
	served  []prefetch.Run
}

// newFarBase makes it, listening on the socket dir/base; it lives as long as the test.
func newFarBase(t *testing.T, dir string) *farBase {
	t.Helper()
	testenv.Need(t, "nbdcopy")
	file := storage.NewMemory("base")
	b := &farBase{want: make([]byte, farSize), limit: -1}
	b.changed.L = &b.mu
	for i := 0; i < farSize; i += 16 {
		if i < farSize/2 || i >= farSize/2+farHole {
			binary.LittleEndian.PutUint64(b.want[i:], uint64(i/512)<<8|0xf1)
			binary.LittleEndian.PutUint64(b.want[i+8:], uint64(i)*0x9e3779b97f4a7c15|1)
		}
	}
	for _, part := range [][2]int{{0, farSize / 2}, {farSize/2 + farHole, farSize}} {
		if _, err := file.WriteAt(b.want[part[0]:part[1]], int64(part[0])); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	if b.Device, err = raw.Open(file, raw.Options{ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	b.start(t, filepath.Join(dir, "base"))
	return b
}

func (b *farBase) start(t *testing.T, socket string) {
	t.Helper()
	var err error
	if b.server, err = server.New(server.Config{Logger: slog.New(slog.DiscardHandler)}); err != nil {
		t.Fatal(err)
	}
	if err := b.server.AddExport(server.Export{Device: b, ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	l, err := server.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- b.server.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		b.release()
		ctx, cancel := context.WithTimeout(context.Background(), testenv.Patience)
		defer cancel()
		if err := errors.Join(b.server.Shutdown(ctx), <-ended, b.Close()); err != nil {
			t.Error(err)
		}
	})
	b.uri = nbd.URI{Network: "unix", Address: socket}.String()
}

// TryReadAt implements block.Device: nothing is at hand far away.
func (b *farBase) TryReadAt([]byte, int64) error { return block.ErrWouldBlock }

// ReadAt implements block.Device.
func (b *farBase) ReadAt(p []byte, off int64) (int, error) {
	time.Sleep(farDelay)
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.limit >= 0 && b.limit < int64(len(p)) {
		b.held++
		b.changed.Broadcast()
		b.changed.Wait()
		b.held--
	}
	if b.limit >= 0 {
		b.limit -= int64(len(p))
	}
	if b.failing {
		return 0, syscall.EIO
	}
	b.served = append(b.served, prefetch.Run{Offset: off, Length: int64(len(p))})
	return b.Device.ReadAt(p, off)
}

// hold makes reads wait when n more bytes have been served.
func (b *farBase) hold(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.limit = n
	b.changed.Broadcast()
}

// release lets all reads go on.
func (b *farBase) release() { b.hold(-1) }

// awaitHeld waits until a read waits.
func (b *farBase) awaitHeld() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.held == 0 {
		b.changed.Wait()
	}
}

// fail makes reads fail, or succeed again.
func (b *farBase) fail(failing bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.failing = failing
}

// reads lists what was read of the base so far.
func (b *farBase) reads() (runs []prefetch.Run, total int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, r := range b.served {
		total += r.Length
	}
	return slices.Clone(b.served), total
}

// connected tells whether anybody is.
func (b *farBase) connected() bool { return b.server.Stats().Connections > 0 }

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
	var b *baseStatus
	testenv.Until(t, what, func() bool {
		b = prefetchStatus(t, "--control", control).Base
		return b != nil && b.Prefetch != nil && is(b)
	})
	return b
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
