package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/nbd"
)

// randomDisk makes a qcow2 image in the working directory of the test, and returns its contents.
func randomDisk(t *testing.T, name string, size int) []byte {
	t.Helper()
	contents := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(contents)
	if err := os.WriteFile("contents.raw", contents, 0o600); err != nil {
		t.Fatal(err)
	}
	if o := runHere(t, ".", "convert", "-f", "raw", "-O", "qcow2", "contents.raw", name); o.status != 0 {
		t.Fatal(o.stderr)
	}
	return contents
}

// TestServeActivatedByClient: a client that starts the server itself has standard output for its own use.
func TestServeActivatedByClient(t *testing.T) {
	testenv.Need(t, "nbdcopy", "nbdinfo")
	t.Chdir(t.TempDir())
	want := randomDisk(t, "disk.qcow2", 3<<20)
	if got := testenv.Run(t, "nbdcopy", "--", "[", "platter", "serve", "--read-only", "disk.qcow2", "]", "-"); got != string(want) {
		t.Errorf("nbdcopy writes %d bytes, want the %d of the disk; it begins with %.60q", len(got), len(want), got)
	}
	out := testenv.Run(t, "nbdinfo", "--json", "--", "[", "platter", "serve", "disk.qcow2", "]")
	var info struct {
		Exports []struct {
			Size int64 `json:"export-size"`
		}
	}
	if err := json.Unmarshal([]byte(out), &info); err != nil || len(info.Exports) != 1 || info.Exports[0].Size != 3<<20 {
		t.Errorf("nbdinfo: %v in %s", err, out)
	}
}

// TestServeActivated passes a socket as systemd does.
func TestServeActivated(t *testing.T) {
	testenv.Need(t, "sh")
	t.Chdir(t.TempDir())
	l, err := net.Listen("unix", "s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	passed, err := l.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer passed.Close()
	ctx, cancel := context.WithTimeout(t.Context(), testenv.Patience)
	defer cancel()
	command := func(args ...string) (cmd *exec.Cmd, stdout, stderr *bytes.Buffer) {
		cmd = exec.CommandContext(ctx, "sh", append([]string{"-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec platter serve --create 1M "$@"`, "sh"}, args...)...)
		cmd.ExtraFiles = []*os.File{passed}
		stdout, stderr = new(bytes.Buffer), new(bytes.Buffer)
		cmd.Stdout, cmd.Stderr = stdout, stderr
		return cmd, stdout, stderr
	}

	for _, flags := range [][]string{{"--socket", "other"}, {"--listen", "127.0.0.1:0"}} {
		cmd, stdout, stderr := command(append(flags, "new.qcow2")...)
		_ = cmd.Run()
		if status := cmd.ProcessState.ExitCode(); status != statusError || stdout.Len() > 0 || !strings.Contains(stderr.String(), flags[0]+" cannot be used") {
			t.Errorf("%q: exit status %d, standard output %q, standard error %q", flags, status, stdout, stderr)
		}
		for _, name := range []string{"new.qcow2", "other"} {
			if _, err := os.Stat(name); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%q: %s was made: %v", flags, name, err)
			}
		}
	}

	cmd, stdout, stderr := command("disk.qcow2")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	uri := nbd.URI{Network: "unix", Address: "s"}.String()
	for range 2 { // it stays when a client leaves
		c := dial(t, uri, nbd.ClientOptions{})
		if size, err := c.Size(); err != nil || size != 1<<20 {
			t.Errorf("size %d, %v", size, err)
		}
		c.Close()
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, stderr)
	}
	if stdout.Len() > 0 || !strings.Contains(stderr.String(), "nbd+unix:///?socket=") {
		t.Errorf("standard output %q, standard error %q; want the URI on the latter alone", stdout, stderr)
	}
}

// TestServeExitWhenIdle: the server ends with its last client, and not before one came.
func TestServeExitWhenIdle(t *testing.T) {
	dir := t.TempDir()
	r := startServe(t, "--exit-when-idle", "--create", "1M", "--socket", filepath.Join(dir, "s"), filepath.Join(dir, "disk.qcow2"))
	if _, err := nbd.List(r.uri, nbd.ClientOptions{}); err != nil {
		t.Fatal(err)
	}
	a, b := dial(t, r.uri, nbd.ClientOptions{}), dial(t, r.uri, nbd.ClientOptions{})
	a.Close()
	if _, err := b.WriteAt(make([]byte, 512), 0); err != nil {
		t.Errorf("after another client left: %v", err)
	}
	b.Close()
	select {
	case status := <-r.done:
		if status != 0 {
			t.Errorf("exit status %d\n%s", status, r.said())
		}
	case <-time.After(testenv.Patience):
		t.Errorf("the server stays\n%s", r.said())
	}
}

// TestServeOutlivesNoClient: a client that started the server and was killed leaves no server behind.
func TestServeOutlivesNoClient(t *testing.T) {
	testenv.Need(t, "nbdcopy", "sh")
	t.Chdir(t.TempDir())
	randomDisk(t, "disk.qcow2", 8<<20)
	cmd := exec.Command("nbdcopy", "--", "[", "sh", "-c", "echo $$ >pid; exec platter serve --exit-when-idle --control c disk.qcow2", "]", "-")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := stdout.Read(make([]byte, 512)); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("pid")
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	defer func() {
		if p, err := os.FindProcess(pid); t.Failed() && err == nil {
			p.Kill()
		}
	}()
	testenv.Until(t, "the server to end", func() bool {
		_, err := os.Stat("c")
		return errors.Is(err, fs.ErrNotExist)
	})
}
