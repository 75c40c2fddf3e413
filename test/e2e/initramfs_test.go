//go:build unix

package e2e

import (
	"bytes"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/platter-disk/platter/internal/testenv"
)

// cpio writes an archive in the "newc" format, which the Linux kernel unpacks as its first root file system
// (Documentation/driver-api/early-userspace/buffer-format.rst of the kernel).
type cpio struct {
	buf   bytes.Buffer
	inode int
	dirs  map[string]bool
}

const (
	modeDir  = 0o040000
	modeFile = 0o100000
	modeLink = 0o120000
)

func (c *cpio) entry(name string, mode int, data []byte) {
	c.inode++
	// magic, inode, mode, uid, gid, links, mtime, size, dev major/minor, rdev major/minor, name size, check
	fmt.Fprintf(&c.buf, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		c.inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
	c.buf.WriteString(name + "\x00")
	c.pad()
	c.buf.Write(data)
	c.pad()
}

func (c *cpio) pad() {
	for c.buf.Len()%4 != 0 {
		c.buf.WriteByte(0)
	}
}

// dir adds a directory and those above it, each once.
func (c *cpio) dir(name string) {
	if name == "." || c.dirs[name] {
		return
	}
	c.dir(path.Dir(name))
	if c.dirs == nil {
		c.dirs = map[string]bool{}
	}
	c.dirs[name] = true
	c.entry(name, modeDir|0o755, nil)
}

func (c *cpio) file(name string, perm int, data []byte) {
	name = strings.TrimPrefix(name, "/")
	c.dir(path.Dir(name))
	c.entry(name, modeFile|perm, data)
}

func (c *cpio) link(name, target string) {
	name = strings.TrimPrefix(name, "/")
	c.dir(path.Dir(name))
	c.entry(name, modeLink|0o777, []byte(target))
}

func (c *cpio) bytes() []byte {
	c.entry("TRAILER!!!", 0, nil)
	return c.buf.Bytes()
}

// program adds an executable of the host as dest, and the shared libraries it needs under the paths they have
// here.
func (c *cpio) program(t testing.TB, name, dest string) {
	t.Helper()
	testenv.Need(t, name, "ldd")
	full, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	c.file(dest, 0o755, readFile(t, full))
	exe, err := elf.Open(full)
	if err != nil {
		t.Fatal(err)
	}
	libs, err := exe.ImportedLibraries()
	exe.Close()
	if err != nil {
		t.Fatal(err)
	}
	if len(libs) == 0 {
		return // static
	}
	for line := range strings.Lines(testenv.Run(t, "ldd", full)) {
		for _, word := range strings.Fields(line) {
			if strings.HasPrefix(word, "/") {
				c.file(word, 0o755, readFile(t, word))
			}
		}
	}
}

// kernel is an installed Linux kernel that this user may read.
type kernel struct {
	image   string // /boot/vmlinuz-VERSION
	modules string // /lib/modules/VERSION
}

// findKernel returns an installed kernel with its modules.
func findKernel(t testing.TB) kernel {
	t.Helper()
	images, err := filepath.Glob("/boot/vmlinuz-*")
	if err != nil {
		t.Fatal(err)
	}
	for _, image := range images {
		k := kernel{image, "/lib/modules/" + strings.TrimPrefix(filepath.Base(image), "vmlinuz-")}
		f, err := os.Open(image)
		if err != nil {
			continue
		}
		f.Close()
		if _, err := os.Stat(k.modules + "/modules.dep"); err == nil {
			return k
		}
	}
	testenv.Missing(t, "a kernel to boot, /boot/vmlinuz-* and its /lib/modules (Debian: linux-image-cloud-amd64)")
	return kernel{}
}

// addModules adds the named kernel modules and what they depend on to the archive and returns their paths in
// the order in which they have to be loaded. Those built into the kernel need no loading.
func (k kernel) addModules(t testing.TB, c *cpio, names ...string) []string {
	t.Helper()
	deps := map[string][]string{} // path -> paths to load before it, the last one first
	byName := map[string]string{}
	for line := range strings.Lines(string(readFile(t, k.modules+"/modules.dep"))) {
		file, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		deps[file] = strings.Fields(rest)
		base, _, _ := strings.Cut(path.Base(file), ".ko")
		byName[base] = file
	}
	builtin := map[string]bool{}
	for line := range strings.Lines(string(readFile(t, k.modules+"/modules.builtin"))) {
		builtin[strings.TrimSuffix(path.Base(strings.TrimSpace(line)), ".ko")] = true
	}
	var order []string
	seen := map[string]bool{}
	add := func(file string) {
		if seen[file] {
			return
		}
		seen[file] = true
		full := path.Join(k.modules, file)
		data, plain := readFile(t, full), full
		if strings.HasSuffix(full, ".xz") {
			plain = strings.TrimSuffix(full, ".xz")
			testenv.Need(t, "xz")
			data = []byte(testenv.Run(t, "xz", "-dc", full))
		}
		c.file(plain, 0o644, data)
		order = append(order, plain)
	}
	for _, name := range names {
		if builtin[name] {
			continue
		}
		file, ok := byName[name]
		if !ok {
			testenv.Missing(t, fmt.Sprintf("the kernel module %s in %s", name, k.modules))
		}
		before := deps[file]
		for i := len(before) - 1; i >= 0; i-- {
			add(before[i])
		}
		add(file)
	}
	return order
}

func readFile(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return data
}
