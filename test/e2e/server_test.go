//go:build unix

package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience bounds every wait for another process. It never decides whether a test passes on a slow machine:
// what it interrupts hangs.
const patience = 5 * time.Minute

// buildDir holds the program under test; TestMain removes it.
var buildDir string

func TestMain(m *testing.M) {
	code := func() int {
		dir, err := os.MkdirTemp("", "platter-e2e-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		buildDir = dir
		return m.Run()
	}()
	os.Exit(code)
}

var build = sync.OnceValues(func() (string, error) {
	if path := os.Getenv("PLATTER_BINARY"); path != "" {
		return path, nil
	}
	path := filepath.Join(buildDir, "platter")
	cmd := exec.Command("go", "build", "-o", path, "github.com/platter-disk/platter/cmd/platter")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
})

// platter returns the path of the program under test, which is built once.
func platter(t testing.TB) string {
	t.Helper()
	path, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// lockedBuffer collects what a process prints while a test may look at it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// server is a running `platter serve`.
type server struct {
	uri    string // what it printed when it was ready
	cmd    *exec.Cmd
	stderr *lockedBuffer
	done   chan struct{} // closed when the process has ended and err is set
	err    error
}

// serve starts `platter serve args…` and waits for its URI. The process does not outlive the test.
func serve(t testing.TB, args ...string) *server {
	t.Helper()
	s := &server{stderr: &lockedBuffer{}, done: make(chan struct{})}
	s.cmd = exec.Command(platter(t), append([]string{"serve"}, args...)...)
	s.cmd.Stderr = s.stderr
	s.cmd.WaitDelay = 10 * time.Second // a child of the server that keeps stderr open must not hang the test
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := make(chan string, 16)
	go func() {
		sc := bufio.NewScanner(out)
		for sc.Scan() {
			select {
			case lines <- sc.Text():
			default: // more than it should print; the test looks at the first line only
			}
		}
		s.err = s.cmd.Wait()
		close(s.done)
	}()
	t.Cleanup(func() {
		s.cmd.Process.Kill()
		<-s.done
		if t.Failed() {
			t.Logf("serve %q printed on stderr:\n%s", args, s.stderr)
		}
	})
	select {
	case s.uri = <-lines:
	case <-s.done:
		t.Fatalf("serve %q ended before it was ready: %v\n%s", args, s.err, s.stderr)
	case <-time.After(patience):
		t.Fatalf("serve %q printed no URI\n%s", args, s.stderr)
	}
	return s
}

// stop ends the server with SIGTERM, as an init system does, and expects a clean exit.
func (s *server) stop(t testing.TB) {
	t.Helper()
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatalf("SIGTERM: %v", err)
	}
	s.wait(t)
	if s.err != nil {
		t.Fatalf("serve ended with %v after SIGTERM, want exit status 0\n%s", s.err, s.stderr)
	}
}

// kill ends the server with SIGKILL: what it had in memory is lost.
func (s *server) kill(t testing.TB) {
	t.Helper()
	if err := s.cmd.Process.Kill(); err != nil {
		t.Fatalf("SIGKILL: %v", err)
	}
	s.wait(t)
}

func (s *server) wait(t testing.TB) {
	t.Helper()
	select {
	case <-s.done:
	case <-time.After(patience):
		t.Fatalf("serve did not end\n%s", s.stderr)
	}
}

// output runs a program and returns its standard output, its standard error and its exit status.
func output(t testing.TB, name string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	cmd := exec.Command(name, args...)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", name, err)
	}
	return o.String(), e.String(), cmd.ProcessState.ExitCode()
}

// mustBeClean expects that neither our checker nor QEMU's finds anything in a qcow2 image.
func mustBeClean(t testing.TB, image string) {
	t.Helper()
	for _, checker := range []string{platter(t), "qemu-img"} {
		stdout, stderr, code := output(t, checker, "check", "-f", "qcow2", image)
		if code != 0 || !strings.Contains(stdout, "No errors were found on the image.") {
			t.Errorf("%s check: exit status %d\n%s%s", filepath.Base(checker), code, stdout, stderr)
		}
	}
}
