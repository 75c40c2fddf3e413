package crashcases

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/platter-disk/platter/storage"
)

// This file has the files that workloads put between an image and the lab's.

// fillUnique fills a base image with sectors of which no two are alike and none is zero.
func fillUnique(f storage.File, size int64) error {
	p := make([]byte, size)
	r := newRand(99)
	for i := range p {
		p[i] = byte(r.Uint32()) | 1
	}
	_, err := f.WriteAt(p, 0)
	return err
}

// errSealed is the answer of a sealed file to every change.
var errSealed = errors.New("this file must not be written")

// sealed is a file that nobody may change: a base image, or an image that is open for reading. Closing it leaves the
// file open.
type sealed struct{ storage.File }

func (f sealed) refuse(what string) error {
	return fmt.Errorf("%s of %s: %w", what, f.Name(), errSealed)
}

func (f sealed) WriteAt([]byte, int64) (int, error) { return 0, f.refuse("write") }
func (f sealed) Sync() error                        { return f.refuse("sync") }
func (f sealed) Truncate(int64) error               { return f.refuse("truncation") }
func (f sealed) PunchHole(int64, int64) error       { return f.refuse("hole punch") }
func (f sealed) ZeroRange(int64, int64) error       { return f.refuse("zeroing") }
func (f sealed) Allocate(int64, int64) error        { return f.refuse("allocation") }
func (f sealed) Close() error                       { return nil }

// fileEvent is a moment in the use of a file: before a write, or after a sync.
type fileEvent struct {
	write bool
	off   int64 // of the write
}

// hook calls a function once, at the first event that is wanted. The error of the function is the operation's.
type hook struct {
	mu    sync.Mutex
	wants func(fileEvent) bool
	call  func() error
}

func (h *hook) set(wants func(fileEvent) bool, call func() error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.wants, h.call = wants, call
}

func (h *hook) at(e fileEvent) error {
	h.mu.Lock()
	call := h.call
	if call == nil || !h.wants(e) {
		h.mu.Unlock()
		return nil
	}
	h.call = nil
	h.mu.Unlock()
	return call()
}

// hooked is a file with a hook.
type hooked struct {
	storage.File
	hook *hook
}

func (f hooked) WriteAt(p []byte, off int64) (int, error) {
	if err := f.hook.at(fileEvent{true, off}); err != nil {
		return 0, err
	}
	return f.File.WriteAt(p, off)
}

func (f hooked) Sync() error {
	if err := f.File.Sync(); err != nil {
		return err
	}
	return f.hook.at(fileEvent{})
}

const (
	mediumBlock = 4096 // bytes that a ruinous medium writes at a time
	ruin        = 0xDB

	trailerMagicAt, trailerMagicEnd = 496, 500 // bytes of a journal sector with the magic of its trailer
)

// ruinous is a file on a medium that loses the whole 4 KiB blocks that it is writing when the power fails: each write
// to [start, end) ruins its blocks before it fills them (FVD specification, D-08). What tells a journal sector from
// others survives: only its checksum gives it away.
type ruinous struct {
	storage.File
	start, end int64

	mu *sync.Mutex
}

func (f ruinous) WriteAt(p []byte, off int64) (int, error) {
	if off >= f.end || off+int64(len(p)) <= f.start {
		return f.File.WriteAt(p, off)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	from := off / mediumBlock * mediumBlock
	whole := make([]byte, (off+int64(len(p))+mediumBlock-1)/mediumBlock*mediumBlock-from)
	if n, err := f.ReadAt(whole, from); err != nil && !(errors.Is(err, io.EOF) && int64(n) >= off-from) {
		return 0, err
	}
	copy(whole[off-from:], p)
	ruined := make([]byte, len(whole))
	for i := range ruined {
		ruined[i] = ruin
	}
	for at := 0; at < len(whole); at += storage.SectorSize {
		copy(ruined[at+trailerMagicAt:at+trailerMagicEnd], whole[at+trailerMagicAt:])
	}
	for _, b := range [][]byte{ruined, whole} {
		if _, err := f.File.WriteAt(b, from); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// copyOf copies a file into memory.
func copyOf(f storage.File) (*storage.Memory, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	p := make([]byte, size)
	if err := storage.ReadFull(f, p, 0); err != nil {
		return nil, err
	}
	m := storage.NewMemory(f.Name())
	_, err = m.WriteAt(p, 0)
	return m, err
}
