// Package testenv states a test's prerequisites: a missing program skips the test and says which one it is,
// except in CI, where nothing may be missing.
package testenv

import (
	"net"
	"os"
	"os/exec"
	"testing"
	"time"
)

// Need skips t, or fails it where the environment variable CI is "true", unless every program is on PATH.
func Need(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			Missing(t, "the program "+p)
		}
	}
}

// Missing skips t, or fails it in CI, because a prerequisite other than a program is absent.
func Missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("missing in CI: %s", what)
	}
	t.Skipf("needs %s", what)
}

// Patience is how long a test waits for what has to happen. It is far longer than that takes on the slowest machine:
// a test that gave up early would fail for nothing.
const Patience = 2 * time.Minute

// Until polls until something is so, ever more slowly, and fails t when Patience is over. It must be called by the
// goroutine of the test.
func Until(t testing.TB, what string, so func() bool) {
	t.Helper()
	end := time.Now().Add(Patience)
	for pause := time.Millisecond; !so(); pause = min(2*pause, 50*time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
		time.Sleep(pause)
	}
}

// Run executes a program that Need has found and returns its standard output; it fails t with everything
// the program printed when it exits other than with 0.
func Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	var stderr head
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out, stderr)
	}
	return string(out)
}

// Serve runs a server that Need has found until the test ends, and returns when it listens on the Unix socket: a
// socket is there before anybody listens on it.
func Serve(t testing.TB, socket, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	Until(t, name+" to listen on "+socket, func() bool {
		c, err := net.Dial("unix", socket)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// head keeps the first 64 KiB of what a program prints on its standard error.
type head []byte

func (b *head) Write(p []byte) (int, error) {
	if room := 64<<10 - len(*b); room > 0 {
		*b = append(*b, p[:min(room, len(p))]...)
	}
	return len(p), nil
}
