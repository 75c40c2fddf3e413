package server

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strconv"
	"sync"
)

// Listen is net.Listen for "tcp" and "unix". It replaces a Unix socket that no process listens on any more,
// which a server that was killed leaves behind; anything else at that path is an error. Closing the listener removes
// its socket, unless the path leads to something else by then: another server's socket, say.
func Listen(network, address string) (net.Listener, error) {
	if network != "unix" {
		return net.Listen(network, address)
	}
	if err := removeStale(address); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix(network, &net.UnixAddr{Name: address, Net: network})
	if err != nil {
		return nil, err
	}
	made, err := os.Lstat(address)
	if err != nil { // an abstract socket, or somebody removed it already
		return l, nil
	}
	l.SetUnlinkOnClose(false)
	return &unixListener{UnixListener: l, path: address, made: made}, nil
}

// unixListener removes its socket when it is closed.
type unixListener struct {
	*net.UnixListener
	path    string
	made    fs.FileInfo
	removal sync.Once
}

// Close removes the socket first: as long as it is open nothing else has its inode number.
func (l *unixListener) Close() error {
	l.removal.Do(func() {
		if now, err := os.Lstat(l.path); err == nil && os.SameFile(now, l.made) {
			os.Remove(l.path)
		}
	})
	return l.UnixListener.Close()
}

func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) || path != "" && path[0] == '@' {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("listen on %s: the file exists and is not a socket", path)
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		c.Close()
		return fmt.Errorf("listen on %s: another process listens there", path)
	}
	if !errors.Is(err, refused) {
		return fmt.Errorf("listen on %s: the socket exists: %w", path, err)
	}
	return os.Remove(path)
}

// firstActivationFD is where the sockets of socket activation begin (sd_listen_fds(3)).
const firstActivationFD = 3

// ActivationListeners returns the sockets that systemd, or another program with the same convention, passed
// to this process in LISTEN_PID and LISTEN_FDS; none when there are none for this process. It removes the
// variables from the environment, so that it is called once and children do not see them.
func ActivationListeners() ([]net.Listener, error) {
	pid, fds := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS")
	if pid != strconv.Itoa(os.Getpid()) || fds == "" {
		return nil, nil
	}
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		os.Unsetenv(name)
	}
	n, err := strconv.Atoi(fds)
	if err != nil || n < 0 || n > 1024 {
		return nil, fmt.Errorf("socket activation: LISTEN_FDS is %q, expected a number from 0 to 1024", fds)
	}
	var listeners []net.Listener
	for fd := firstActivationFD; fd < firstActivationFD+n; fd++ {
		f := os.NewFile(uintptr(fd), "socket "+strconv.Itoa(fd))
		l, err := net.FileListener(f) // a duplicate, close-on-exec
		f.Close()
		if err != nil {
			for _, l := range listeners {
				l.Close()
			}
			return nil, fmt.Errorf("socket activation: file descriptor %d: %w", fd, err)
		}
		listeners = append(listeners, l)
	}
	return listeners, nil
}
