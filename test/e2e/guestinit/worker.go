//go:build linux

package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/platter-disk/platter/test/e2e/guestlog"
)

// Sizes of what a worker owns. All of it together must fit into a disk of 96 MiB.
const (
	names       = 12        // files that are replaced whole
	maxFile     = 64 << 10  // bytes of one
	fixed       = 2         // files that are changed in place
	fixedSize   = 256 << 10 // bytes of one
	maxChange   = 48 << 10  // bytes of one change in place
	scratchSize = 2 << 20   // bytes at most of a file whose space is given back soon, by a discard
)

// worker changes files of its own, one operation after the other.
type worker struct {
	id      int
	seed    uint64
	ops     int
	rng     *rand.Rand
	out     *report
	gens    map[string]uint64 // by path: the last generation announced
	exists  map[string]bool
	pending map[string]bool // changed since the last promise
	scratch bool            // the scratch file exists
	buf     []byte
}

func newWorker(id int, seed uint64, ops int, out *report) *worker {
	return &worker{
		id: id, seed: seed, ops: ops, out: out, rng: rand.New(rand.NewPCG(seed, uint64(id))),
		gens: map[string]uint64{}, exists: map[string]bool{}, pending: map[string]bool{},
		buf: make([]byte, fixedSize),
	}
}

func (w *worker) name(i int) string      { return fmt.Sprintf("files/%d/%d", w.id, i) }
func (w *worker) fixedName(i int) string { return fmt.Sprintf("fixed/%d-%d", w.id, i) }
func (w *worker) spool(kind string) string {
	return fmt.Sprintf("%s/spool/%d-%s", root, w.id, kind)
}

// run makes the worker's files and changes them; a nil error means that all operations were done.
func (w *worker) run() error {
	for _, dir := range []string{"spool", "fixed", filepath.Dir(w.name(0))} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	for i := range fixed {
		if err := w.replace(w.fixedName(i), fixedSize, true); err != nil {
			return err
		}
	}
	for n := 0; w.ops == 0 || n < w.ops; n++ {
		if err := w.step(); err != nil {
			return err
		}
	}
	return w.sync()
}

// step is one operation drawn at random.
func (w *worker) step() error {
	name, file := w.name(w.rng.IntN(names)), w.fixedName(w.rng.IntN(fixed))
	switch n := w.rng.IntN(100); {
	case n < 40:
		size := int64(guestlog.MinSize + w.rng.IntN(maxFile>>w.rng.IntN(8)))
		return w.replace(name, size, n < 30)
	case n < 72:
		return w.change(file, guestlog.Write)
	case n < 80:
		return w.change(file, guestlog.Punch)
	case n < 90:
		return w.remove(name, n < 88)
	case n < 97:
		return w.rework()
	case n < 99:
		return w.sync()
	default:
		return trim()
	}
}

// will announces the next change of a file.
func (w *worker) will(path string, kind guestlog.Kind, off, length int64) uint64 {
	w.gens[path]++
	w.pending[path] = true
	w.out.line("%s", guestlog.Will(guestlog.Op{Path: path, Gen: w.gens[path], Kind: kind, Offset: off, Length: length}))
	return w.gens[path]
}

// safe promises everything that was done to a file.
func (w *worker) safe(path string) {
	delete(w.pending, path)
	w.out.line("%s", guestlog.Safe(path, w.gens[path]))
}

// replace gives the path to a new file of that size. durable: the new name is synced as well as the contents.
func (w *worker) replace(path string, size int64, durable bool) error {
	p := w.buf[:size]
	gen := w.will(path, guestlog.Replace, 0, size)
	guestlog.Fill(p, w.seed, path, gen, 0)
	aside := w.spool("new")
	f, err := os.OpenFile(aside, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	if _, err = f.Write(p); err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(aside, filepath.Join(root, path))
	}
	w.exists[path] = true
	if err != nil || !durable {
		return err
	}
	return w.syncDir(path)
}

// syncDir makes durable which file has the path, or that none has.
func (w *worker) syncDir(path string) error {
	dir, err := os.Open(filepath.Join(root, filepath.Dir(path)))
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		return err
	}
	w.safe(path)
	return nil
}

// change overwrites or punches a range of a file in place, and syncs it half of the time.
func (w *worker) change(path string, kind guestlog.Kind) error {
	f, err := os.OpenFile(filepath.Join(root, path), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	length := int64(1+w.rng.IntN((maxChange>>w.rng.IntN(6))/guestlog.SectorSize)) * guestlog.SectorSize
	off := w.rng.Int64N((fixedSize-length)/guestlog.SectorSize+1) * guestlog.SectorSize
	if w.rng.IntN(2) == 0 { // whole blocks
		off &^= 4095
		length = (length + 4095) &^ 4095
	}
	gen := w.will(path, kind, off, length)
	if kind == guestlog.Punch {
		err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, length)
	} else {
		p := w.buf[:length]
		guestlog.Fill(p, w.seed, path, gen, off)
		_, err = f.WriteAt(p, off)
	}
	if err != nil || w.rng.IntN(2) == 0 {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	w.safe(path)
	return nil
}

// remove deletes a file, if it is there.
func (w *worker) remove(path string, durable bool) error {
	if !w.exists[path] {
		return nil
	}
	w.will(path, guestlog.Delete, 0, 0)
	if err := os.Remove(filepath.Join(root, path)); err != nil {
		return err
	}
	w.exists[path] = false
	if !durable {
		return nil
	}
	return w.syncDir(path)
}

// rework makes the scratch file, or deletes it. Nobody asks for it; the disk sees its discard.
func (w *worker) rework() error {
	if w.scratch {
		w.scratch = false
		return os.Remove(w.spool("scratch"))
	}
	f, err := os.Create(w.spool("scratch"))
	if err != nil {
		return err
	}
	w.scratch = true
	for n := w.rng.IntN(scratchSize) / len(w.buf); n >= 0 && err == nil; n-- {
		_, err = f.Write(w.buf)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// sync makes everything durable.
func (w *worker) sync() error {
	f, err := os.Open(root)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return err
	}
	for path := range w.pending {
		w.safe(path)
	}
	return nil
}

// fitrim is the argument of the ioctl FITRIM (struct fstrim_range of linux/fs.h).
type fitrim struct{ start, length, minimum uint64 }

// trim discards all space of the file system that is free.
func trim() error {
	const request = 0xc0185879 // FITRIM: _IOWR('X', 121, struct fstrim_range)
	f, err := os.Open(root)
	if err != nil {
		return err
	}
	defer f.Close()
	r := fitrim{length: 1 << 40}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(&r))); errno != 0 {
		return fmt.Errorf("FITRIM: %w", errno)
	}
	return nil
}
