//go:build unix

package cli

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/image/gate"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/server"
)

// hangingBase is an image behind an NBD server that answers no read while it hangs.
type hangingBase struct {
	block.Device
	uri     string
	hangs   atomic.Bool
	asked   atomic.Int64  // reads that wait
	release chan struct{} // closed with the test
}

// newHangingBase serves an image file, whatever its format.
func newHangingBase(t *testing.T, file string) *hangingBase {
	t.Helper()
	img, err := image.Open(t.Context(), file, image.Options{Format: "raw", ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	b := &hangingBase{Device: img, release: make(chan struct{})}
	s, err := server.New(server.Config{Logger: slog.New(slog.DiscardHandler)})
	if err == nil {
		err = s.AddExport(server.Export{Device: b, ReadOnly: true})
	}
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "base")
	l, err := server.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		close(b.release)
		if err := errors.Join(s.Shutdown(context.Background()), <-served, img.Close()); err != nil {
			t.Error(err)
		}
	})
	b.uri = nbd.URI{Network: "unix", Address: socket}.String()
	return b
}

func (b *hangingBase) ReadAt(p []byte, off int64) (int, error) {
	if b.hangs.Load() {
		b.asked.Add(1)
		<-b.release
	}
	return b.Device.ReadAt(p, off)
}

func (b *hangingBase) TryReadAt(p []byte, off int64) error {
	if b.hangs.Load() {
		return block.ErrWouldBlock
	}
	return b.Device.TryReadAt(p, off)
}

// awaitRead waits until a read hangs.
func (b *hangingBase) awaitRead(t *testing.T) {
	t.Helper()
	testenv.Until(t, "a read of the base image", func() bool { return b.asked.Load() > 0 })
}

// baseFile makes an image of 8 MiB with data everywhere.
func baseFile(t *testing.T, format string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "base")
	platterHere(t, "create", "-q", "-f", format, file, "8M")
	platterHere(t, "io", "-f", format, "-c", "write -P 7 0 8M", file)
	return file
}

// ends expects a status soon.
func ends(t *testing.T, status <-chan int, want int, said func() string) {
	t.Helper()
	select {
	case got := <-status:
		if got != want {
			t.Errorf("status %d, want %d\n%s", got, want, said())
		}
	case <-time.After(testenv.Patience):
		t.Fatalf("it does not end\n%s", said())
	}
}

// overlays are ways in which an image lies over a base image that may hang.
var overlays = []struct{ format, base string }{{"qcow2", "raw"}, {"qcow2", "qcow2"}, {"fvd", "raw"}, {"fvd", "qcow2"}}

// TestCloseWhileBaseHangs: a disk can be closed although reads wait for its base image, however many layers are
// between. One that is slow but alive is not cut off.
func TestCloseWhileBaseHangs(t *testing.T) {
	for _, o := range overlays {
		t.Run(o.format+" over "+o.base, func(t *testing.T) {
			base := newHangingBase(t, baseFile(t, o.base))
			file := filepath.Join(t.TempDir(), "disk")
			platterHere(t, "create", "-q", "-f", o.format, "-b", base.uri, "-F", o.base, file)
			var said bytes.Buffer
			lines := &baseLines{grace: 200 * time.Millisecond, warn: func(m string) { said.WriteString(m) }}
			ctx, opened := lines.opening(t.Context())
			img, err := image.Open(ctx, file, image.Options{Gate: gate.Any{}})
			opened()
			if err != nil {
				t.Fatal(err)
			}
			base.hangs.Store(true)
			read := make(chan error, 1)
			go func() {
				_, err := img.ReadAt(make([]byte, 4096), 4<<20)
				read <- err
			}()
			base.awaitRead(t)
			stop := lines.ending(closedContext())
			closed := make(chan int, 1)
			go func() {
				status := 0
				if img.Close() != nil {
					status = 1
				}
				closed <- status
			}()
			ends(t, closed, 0, said.String)
			stop()
			if err := <-read; err == nil {
				t.Error("a read that waited for the base image did not fail")
			}
			if !strings.Contains(said.String(), base.uri+" has not answered") {
				t.Errorf("the user is told %q", said.String())
			}
		})
	}
}

// closedContext is over.
func closedContext() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// TestServeEndsWhileBaseHangs: so does the server.
func TestServeEndsWhileBaseHangs(t *testing.T) {
	t.Parallel() // it takes baseGrace
	base := newHangingBase(t, baseFile(t, "qcow2"))
	file := filepath.Join(t.TempDir(), "disk")
	platterHere(t, "create", "-q", "-f", "qcow2", "-b", base.uri, "-F", "qcow2", file)
	r := startServe(t, "--prefetch=size=64k,max-read=1M", file) // which does not end before it hangs
	base.hangs.Store(true)
	base.awaitRead(t)
	r.cancel()
	ends(t, r.done, 0, r.said)
	platterHere(t, "check", file)
}

// TestInterruptedWhileBaseHangs: Ctrl-C ends commands that wait for a base image, or for the image itself to open.
func TestInterruptedWhileBaseHangs(t *testing.T) {
	t.Parallel() // it takes baseGrace
	base := newHangingBase(t, baseFile(t, "raw"))
	disk := filepath.Join(t.TempDir(), "disk")
	platterHere(t, "create", "-q", "-f", "fvd", "-b", base.uri, "-F", "raw", disk)
	base.hangs.Store(true)
	for _, args := range [][]string{
		{"serve", "--read-only", base.uri},
		{"serve", "--format", "qcow2", "--read-only", base.uri},
		{"prefetch", disk},
	} {
		t.Run(strings.Join(args[:len(args)-1], " "), func(t *testing.T) {
			base.asked.Store(0)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			done, stderr := make(chan int, 1), &running{}
			go func() { done <- run(ctx, args, io.Discard, stderr) }()
			base.awaitRead(t)
			cancel()
			ends(t, done, statusInterrupted, stderr.said)
		})
	}
}
