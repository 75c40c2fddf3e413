package cli

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/platter-disk/platter/internal/testenv"
)

// slowConvert starts a copy of 4 MiB at a rate, by way of before (sh's words, may be empty), and returns when it is
// under way. target appears in the working directory of the test.
func slowConvert(t *testing.T, before, rate, target string) (cmd *exec.Cmd, stderr *bufio.Reader) {
	t.Helper()
	testenv.Need(t, "sh")
	if err := os.WriteFile("in.raw", bytes.Repeat([]byte("data"), 1<<20), 0o666); err != nil {
		t.Fatal(err)
	}
	cmd = exec.Command("sh", "-c", before+` exec platter convert --progress=json -r "$0" -f raw -O qcow2 in.raw "$1"`, rate, target)
	pipe, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	stderr = bufio.NewReader(pipe)
	if line, err := stderr.ReadString('\n'); err != nil {
		t.Fatalf("the copy did not begin: %q, %v", line, err)
	}
	return cmd, stderr
}

// TestSignals: a signal interrupts a command in good order, and the exit status says which one it was. A terminal
// that closes may send its signal more than once.
func TestSignals(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, tt := range []struct {
		signal syscall.Signal
		times  int
		status int
	}{
		{syscall.SIGINT, 1, 130}, {syscall.SIGTERM, 1, 143}, {syscall.SIGHUP, 1, 129}, {syscall.SIGHUP, 20, 129},
	} {
		cmd, stderr := slowConvert(t, "", "16k", "out.qcow2") // 4 minutes
		for range tt.times {
			if err := cmd.Process.Signal(tt.signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
				t.Fatal(err)
			}
		}
		said, _ := io.ReadAll(stderr)
		_ = cmd.Wait()
		if status := cmd.ProcessState.ExitCode(); status != tt.status || !strings.HasSuffix(string(said), "platter: interrupted\n") {
			t.Errorf("%v: exit status %d (%v), want %d; %q", tt.signal, status, cmd.ProcessState, tt.status, said)
		}
		if _, err := os.Stat("out.qcow2"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v left half a copy: %v", tt.signal, err)
			os.Remove("out.qcow2")
		}
	}
}

// TestIgnoredHangup: what was told to outlive its terminal does.
func TestIgnoredHangup(t *testing.T) {
	t.Chdir(t.TempDir())
	cmd, stderr := slowConvert(t, "trap '' HUP;", "2M", "out.qcow2")
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	said, _ := io.ReadAll(stderr)
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, said)
	}
	if o := runHere(t, ".", "compare", "in.raw", "out.qcow2"); o.status != 0 {
		t.Errorf("the copy is not one: %s%s", o.stdout, o.stderr)
	}
}

// TestServeHangup: the server ends in good order when its terminal closes.
func TestServeHangup(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("windows has no signals")
	}
	dir := t.TempDir()
	image, socket := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "s")
	cmd := exec.Command("platter", "serve", "--create", "1M", "--socket", socket, image)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	if _, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	ended := time.AfterFunc(testenv.Patience, func() { cmd.Process.Kill() })
	defer ended.Stop()
	if err := cmd.Wait(); err != nil {
		t.Errorf("after SIGHUP: %v", err)
	}
	if _, err := os.Stat(socket); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}
