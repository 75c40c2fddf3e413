//go:build linux

// Command guestinit is the first and only process of the guests that test crashes: it waits on the second
// serial port for a line that says "start", mounts the ext4 file system on /dev/vda, and changes files there
// until it was told to stop or the disk fails. What it is about to do, and what fsync promised, it reports on the
// same port in the lines of package guestlog.
//
// A machine is saved while it waits, and every guest begins from there.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/platter-disk/platter/test/e2e/guestlog"
)

const (
	port    = "/dev/ttyS1"
	disk    = "/dev/vda"
	root    = "/mnt"
	workers = 4
)

func main() {
	// The kernel has no devices to show before this, the console that it gave us aside.
	err := mount("dev", "/dev", "devtmpfs", "")
	var tty *os.File
	if err == nil {
		tty, err = openPort()
	}
	if err == nil {
		out := &report{w: tty}
		if err = run(tty, out); err != nil {
			out.line("%s %v", guestlog.WordOver, err)
		} else {
			out.line(guestlog.WordEnd)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "guestinit:", err) // the first serial port
	}
	for {
		time.Sleep(time.Hour) // the machine is switched off from outside; the first process must not end
	}
}

// report writes lines, each whole. Safe for concurrent use.
type report struct {
	mu sync.Mutex
	w  io.Writer
}

// line is lost when the port fails: there is nobody left to tell.
func (r *report) line(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintf(r.w, format+"\n", args...)
}

// openPort opens the serial port as a plain pipe of bytes: no echo, no translation.
func openPort() (*os.File, error) {
	f, err := os.OpenFile(port, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err == nil {
		t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
		t.Cflag = unix.CS8 | unix.CREAD | unix.CLOCAL | unix.B115200
		t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
		err = unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", port, err)
	}
	return f, nil
}

func mount(source, target, fstype, options string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, fstype, 0, options); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("mounting %s on %s: %w", source, target, err)
	}
	return nil
}

// run makes the machine ready, waits for the start and works.
func run(in io.Reader, out *report) error {
	if err := loadModules(); err != nil {
		return err
	}
	for range 200 {
		if _, err := os.Stat(disk); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	seed, ops, err := awaitStart(in, out)
	if err != nil {
		return err
	}
	// A short commit interval lets the journal of the file system commit without an fsync as well.
	if err := mount(disk, root, "ext4", "discard,commit=1"); err != nil {
		return err
	}
	failures := make(chan error, workers)
	for i := range workers {
		w := newWorker(i, seed, ops, out)
		go func() { failures <- w.run() }()
	}
	var first error
	for range workers {
		if err := <-failures; err != nil && first == nil {
			first = err
		}
	}
	if first != nil {
		return first
	}
	unix.Sync()
	return unix.Unmount(root, 0)
}

// awaitStart says "ready" until it is told to start. A machine that was restored has lost what it said before, and
// what was sent to it.
func awaitStart(in io.Reader, out *report) (seed uint64, ops int, err error) {
	started := make(chan struct{})
	go func() {
		for {
			out.line(guestlog.WordReady)
			select {
			case <-started:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	defer close(started)
	line, err := bufio.NewReader(in).ReadString('\n')
	if err != nil {
		return 0, 0, err
	}
	return guestlog.ParseStart(strings.TrimSpace(line))
}

// loadModules loads the kernel modules that /modules lists, in that order.
func loadModules() error {
	list, err := os.ReadFile("/modules")
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(list)) {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil {
			return fmt.Errorf("loading %s: %w", name, err)
		}
	}
	return nil
}
