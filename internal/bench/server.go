package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/platter-disk/platter/nbd"
)

// startLimit is how long a server may take until it accepts connections.
const startLimit = 30 * time.Second

// Server is a program that serves a qcow2 image on a Unix socket with the NBD protocol.
type Server struct {
	Name    string
	Command func(image, socket string) []string
}

// Platter is `platter serve` of the given executable.
func Platter(executable string, flags ...string) Server {
	return Server{"platter", func(image, socket string) []string {
		return append([]string{executable, "serve", "-f", "qcow2", "--socket", socket, image}, flags...)
	}}
}

// QemuNBD is qemu-nbd, treating discards as Platter does.
func QemuNBD(flags ...string) Server {
	return Server{"qemu-nbd", func(image, socket string) []string {
		return append([]string{"qemu-nbd", "-t", "-e", "16", "-f", "qcow2", "--discard=unmap",
			"-k", socket, image}, flags...)
	}}
}

// process is a server that runs.
type process struct {
	cmd    *exec.Cmd
	uri    string
	socket string
	stderr bytes.Buffer
	done   chan error
}

// start runs a server on an image and returns when it accepts connections.
func (s Server) start(ctx context.Context, dir, image string) (*process, error) {
	p := &process{socket: filepath.Join(dir, s.Name+".sock"), done: make(chan error, 1)}
	p.uri = nbd.URI{Network: "unix", Address: p.socket}.String()
	argv := s.Command(image, p.socket)
	p.cmd = exec.Command(argv[0], argv[1:]...)
	p.cmd.Stdout, p.cmd.Stderr = io.Discard, &p.stderr
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%s: %w", s.Name, err)
	}
	go func() { p.done <- p.cmd.Wait() }()
	limit := time.Now().Add(startLimit)
	for {
		c, err := nbd.Dial(p.uri, nbd.ClientOptions{ReadOnly: true, ReconnectDelay: -1})
		if err == nil {
			return p, c.Close()
		}
		select {
		case ended := <-p.done:
			return nil, fmt.Errorf("%s ended before it served: %v\n%s", s.Name, ended, p.stderr.Bytes())
		case <-ctx.Done():
			err = ctx.Err()
		case <-time.After(20 * time.Millisecond):
			if time.Now().Before(limit) {
				continue
			}
		}
		p.cmd.Process.Kill()
		<-p.done
		return nil, fmt.Errorf("%s: %w\n%s", s.Name, err, p.stderr.Bytes())
	}
}

// stop ends the server and waits until it has closed its image.
func (p *process) stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		p.cmd.Process.Kill()
	}
	select {
	case err := <-p.done:
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			return err
		}
	case <-time.After(startLimit):
		p.cmd.Process.Kill()
		<-p.done
		return fmt.Errorf("%s did not end\n%s", p.cmd.Path, p.stderr.Bytes())
	}
	if err := os.Remove(p.socket); err != nil && !os.IsNotExist(err) {
		return err
	}
	return nil
}
