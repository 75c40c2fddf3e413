package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// guestFS is an ext4 file system on an NBD export, mounted on this machine without a virtual machine and without
// the kernel's NBD client: nbdfuse shows the export as a file, a loop device makes a disk of that. A flush of the
// file system arrives at the server as a flush.
type guestFS struct {
	root string // where it is mounted

	fuse    string // where nbdfuse is
	cmd     *exec.Cmd
	stderr  bytes.Buffer
	done    chan error
	loop    string
	mounted bool
}

// guestPrograms are what newGuestFS runs.
func guestPrograms() []string {
	return []string{"nbdfuse", "losetup", "mkfs.ext4", "mount", "umount", "sync"}
}

// newGuestFS makes a file system on an export and mounts it below dir. It needs the rights of root.
func newGuestFS(ctx context.Context, dir, uri string) (g *guestFS, err error) {
	g = &guestFS{root: filepath.Join(dir, "guest"), fuse: filepath.Join(dir, "fuse"), done: make(chan error, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(err, g.close())
		}
	}()
	for _, d := range []string{g.root, g.fuse} {
		if err := os.Mkdir(d, 0o777); err != nil {
			return g, err
		}
	}
	disk := filepath.Join(g.fuse, "disk")
	cmd := exec.Command("nbdfuse", disk, uri)
	cmd.Stderr = &g.stderr
	if err := cmd.Start(); err != nil {
		return g, err
	}
	g.cmd = cmd
	go func() { g.done <- cmd.Wait() }()
	if err := g.awaitDisk(ctx, disk); err != nil {
		return g, err
	}
	out, err := program(ctx, "losetup", "--find", "--show", "--direct-io=on", disk)
	if err != nil {
		return g, err
	}
	g.loop = strings.TrimSpace(out)
	// What mkfs leaves to be done in the background would be part of what is measured.
	if _, err := program(ctx, "mkfs.ext4", "-q", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=0", g.loop); err != nil {
		return g, err
	}
	if _, err := program(ctx, "mount", "-t", "ext4", "-o", "noatime,noinit_itable", g.loop, g.root); err != nil {
		return g, err
	}
	g.mounted = true
	return g, nil
}

// awaitDisk waits until nbdfuse shows the export.
func (g *guestFS) awaitDisk(ctx context.Context, disk string) error {
	limit := time.Now().Add(startLimit)
	for {
		if _, err := os.Stat(disk); err == nil {
			return nil
		}
		select {
		case err := <-g.done:
			g.cmd = nil
			return fmt.Errorf("nbdfuse ended before it showed the disk: %v\n%s", err, g.stderr.Bytes())
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(limit) {
			return fmt.Errorf("nbdfuse does not show the disk\n%s", g.stderr.Bytes())
		}
	}
}

// close takes everything down again, whatever of it is there.
func (g *guestFS) close() error {
	ctx := context.Background() // also after the caller's has ended
	var errs []error
	run := func(name string, args ...string) {
		_, err := program(ctx, name, args...)
		errs = append(errs, err)
	}
	if g.mounted {
		run("umount", g.root)
	}
	if g.loop != "" {
		run("losetup", "--detach", g.loop)
	}
	if g.cmd != nil {
		run("umount", g.fuse)
		select {
		case <-g.done:
		case <-time.After(startLimit):
			errs = append(errs, g.cmd.Process.Kill())
			<-g.done
		}
	}
	for _, d := range []string{g.root, g.fuse} {
		if err := os.Remove(d); err != nil && !os.IsNotExist(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// program runs a program to its end and returns what it printed.
func program(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, stderr.Bytes())
	}
	return string(out), nil
}

// require tells which of the programs is not installed.
func require(programs ...string) error {
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			return err
		}
	}
	return nil
}
