//go:build unix

package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/test/e2e/guestlog"
)

// saved is a machine that was booted once, with the disk of a template, and put into a file while its first
// process (command guestinit) waited for the word to start. It has not looked at more of its disk than what all
// disks made from the same template have in common, so every guest can begin there, in a fraction of the
// time that booting takes.
type saved struct {
	args  []string // of qemu-system-x86_64: everything but the disk and what the serial ports are connected to
	state string   // file with what the machine is
}

// saveOnce saves the machine the first time a test needs it; buildDir holds it.
var saveOnce struct {
	sync.Mutex
	machine *saved
}

// savedMachine returns the saved machine, whose guests see disks that begin as the raw file template.
func savedMachine(t *testing.T, template string) *saved {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		testenv.Missing(t, "an amd64 machine (the guest runs the host's programs)")
	}
	testenv.Need(t, "qemu-system-x86_64", "go", "cat")
	saveOnce.Lock()
	defer saveOnce.Unlock()
	if saveOnce.machine != nil {
		return saveOnce.machine
	}
	k := findKernel(t)
	initrd := filepath.Join(buildDir, "initramfs")
	if err := os.WriteFile(initrd, workInitramfs(t, k), 0o600); err != nil {
		t.Fatal(err)
	}
	_, socket := disk(t)
	s := serve(t, template, "--format", "raw", "--socket", socket)
	boot := func(accel []string, limit time.Duration) bool {
		m := &saved{
			args: slices.Concat([]string{
				"-nodefaults", "-display", "none", "-no-reboot", "-m", "256",
				"-kernel", k.image, "-initrd", initrd, "-append", guestCommandLine,
			}, accel),
			state: filepath.Join(buildDir, "machine"),
		}
		begun := time.Now()
		if !m.save(t, s.uri, limit) {
			return false
		}
		t.Logf("the machine was booted and saved in %.1f s (%s)", time.Since(begun).Seconds(), accel[1])
		saveOnce.machine = m
		return true
	}
	if !(offersKVM(t) && boot(withKVM, bootLimit)) && !boot(emulation, patience) {
		t.Fatal("the guest did not come to its first process")
	}
	s.stop(t)
	return saveOnce.machine
}

// save boots the machine and saves it when its guest is ready; false when it is not within the limit.
func (m *saved) save(t *testing.T, uri string, limit time.Duration) bool {
	t.Helper()
	monitor := filepath.Join(buildDir, "monitor")
	g := m.start(t, uri, "-qmp", "unix:"+monitor+",server=on,wait=off")
	defer g.off(t)
	select {
	case line := <-g.lines:
		if line != guestlog.WordReady {
			t.Logf("the guest says %q, want %q\n%s", line, guestlog.WordReady, g.console())
			return false
		}
	case <-time.After(limit):
		t.Logf("the guest is not ready after %v\n%s", limit, g.console())
		return false
	}
	if err := migrate(monitor, m.state); err != nil {
		t.Fatal(err)
	}
	return true
}

// workInitramfs packs command guestinit and the modules it loads.
func workInitramfs(t *testing.T, k kernel) []byte {
	t.Helper()
	exe := filepath.Join(buildDir, "guestinit")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", exe, "github.com/platter-disk/platter/test/e2e/guestinit")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	var c cpio
	for _, dir := range []string{"dev", "mnt"} {
		c.dir(dir)
	}
	modules := k.addModules(t, &c, "virtio_pci", "virtio_blk", "ext4")
	c.file("modules", 0o644, []byte(strings.Join(modules, "\n")))
	c.file("init", 0o755, readFile(t, exe))
	return c.bytes()
}

// restore starts a guest at the point where the machine was saved, on the disk with the URI.
func (m *saved) restore(t *testing.T, uri string) *guest {
	t.Helper()
	return m.start(t, uri, "-incoming", "exec:cat '"+m.state+"'")
}

// start starts a machine.
func (m *saved) start(t *testing.T, uri string, args ...string) *guest {
	t.Helper()
	console, err := os.CreateTemp(buildDir, "console-") // QEMU reads commas in the name of a test's own directory as its own
	if err != nil {
		t.Fatal(err)
	}
	console.Close()
	g := &guest{lines: make(chan string, 1<<16), log: console.Name(), done: make(chan struct{})}
	g.cmd = exec.Command("qemu-system-x86_64", slices.Concat(m.args, []string{
		"-serial", "file:" + g.log, "-serial", "stdio",
		"-drive", "file=" + uri + ",format=raw,if=virtio,cache=none,discard=unmap",
	}, args)...)
	g.cmd.Stderr = &g.stderr
	if g.in, err = g.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := g.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(g.done)
		defer close(g.lines)
		sc := bufio.NewScanner(out)
		for sc.Scan() {
			g.lines <- sc.Text()
		}
		g.cmd.Wait() // its exit status says nothing: it is killed when it has served
	}()
	t.Cleanup(func() { g.off(t) })
	return g
}

// guest is a running machine.
type guest struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	lines  chan string // from its second serial port; closed when the machine is off
	log    string      // file with what came out of the first one
	stderr lockedBuffer
	done   chan struct{} // closed when the machine is off
}

// next waits for the next line that the guest prints.
func (g *guest) next(t *testing.T) string {
	t.Helper()
	select {
	case line, ok := <-g.lines:
		if !ok {
			t.Fatalf("the machine went off\n%s", g.console())
		}
		return line
	case <-time.After(patience):
		t.Fatalf("the guest is silent\n%s", g.console())
	}
	return ""
}

// begin tells the guest to start, once it says that it runs: what is sent earlier may be lost.
func (g *guest) begin(t *testing.T, seed uint64, ops int) {
	t.Helper()
	line := g.next(t)
	if strings.HasSuffix(guestlog.WordReady, line) && line != guestlog.WordReady {
		line = g.next(t) // the machine was saved in the middle of a word
	}
	if line != guestlog.WordReady {
		t.Fatalf("the guest says %q, want %q\n%s", line, guestlog.WordReady, g.console())
	}
	if _, err := fmt.Fprintln(g.in, guestlog.Start(seed, ops)); err != nil {
		t.Fatalf("the machine takes no input: %v\n%s", err, g.console())
	}
}

// console is what the kernel printed, and QEMU.
func (g *guest) console() string {
	kernel, err := os.ReadFile(g.log)
	if err != nil {
		kernel = []byte(err.Error())
	}
	return fmt.Sprintf("console:\n%s\nqemu-system-x86_64:\n%s", kernel, &g.stderr)
}

// off switches the machine off.
func (g *guest) off(t *testing.T) {
	g.cmd.Process.Kill()
	for range g.lines { // so that its reader gets to the end
	}
	select {
	case <-g.done:
	case <-time.After(patience):
		t.Error("qemu-system-x86_64 was killed and did not end")
	}
}

// migrate writes the running machine that listens on a monitor socket to a file (QMP, the QEMU Machine Protocol).
func migrate(monitor, state string) error {
	c, err := net.Dial("unix", monitor)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	in, out := json.NewDecoder(c), json.NewEncoder(c)
	type reply struct {
		Return json.RawMessage
		Error  *struct{ Desc string }
	}
	execute := func(command string, arguments any) (json.RawMessage, error) {
		message := map[string]any{"execute": command}
		if arguments != nil {
			message["arguments"] = arguments
		}
		if err := out.Encode(message); err != nil {
			return nil, err
		}
		for { // events and the greeting may come first
			var r reply
			if err := in.Decode(&r); err != nil {
				return nil, err
			}
			if r.Error != nil {
				return nil, fmt.Errorf("QMP command %s: %s", command, r.Error.Desc)
			}
			if r.Return != nil {
				return r.Return, nil
			}
		}
	}
	for _, c := range []struct {
		name      string
		arguments any
	}{
		{"qmp_capabilities", nil},
		{"migrate-set-parameters", map[string]any{"max-bandwidth": 1 << 32}},
		{"migrate", map[string]any{"uri": "exec:cat > '" + state + "'"}},
	} {
		if _, err := execute(c.name, c.arguments); err != nil {
			return err
		}
	}
	for {
		answer, err := execute("query-migrate", nil)
		if err != nil {
			return err
		}
		var info struct {
			Status string
			Error  string `json:"error-desc"`
		}
		if err := json.Unmarshal(answer, &info); err != nil {
			return err
		}
		switch info.Status {
		case "completed":
			return nil
		case "failed", "cancelled":
			return errors.New("saving the machine " + info.Status + ": " + info.Error)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
