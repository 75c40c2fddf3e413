// Package guestlog is what a guest that writes files, and the test that crashes its disk, have to agree on: what
// the files contain, in which lines the guest reports what it does, and what may be in the files after a crash.
//
//	will files/0/3 7 replace 0 12345     announced before the seventh change of the file begins
//	safe files/0/3 7                     promised: an fsync, of the file or its directory, has returned
//
// Everything in a file follows from the workload's seed, its path and the number of the change, so that the
// judge can tell from the contents which change they belong to, and foreign bytes from its own. After a crash a
// file may be what the last promise covered, or what any change announced later makes of it; each sector
// on its own where a change is made in place.
package guestlog

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
)

// Log collects what a guest reported. It is not safe for concurrent use.
type Log struct {
	seed     uint64
	files    map[string]*history
	promises int
}

// history is what was reported of a file.
type history struct {
	ops  []Op // ops[i] has generation i+1
	safe []promise
}

// promise says that everything up to a generation is durable; order is its place among all promises.
type promise struct {
	gen   uint64
	order int
}

// NewLog returns the log of a workload that has not begun.
func NewLog(seed uint64) *Log { return &Log{seed: seed, files: map[string]*history{}} }

// Add takes the next line of the guest's report, WordOver and WordEnd excepted.
func (l *Log) Add(line string) error {
	if line == WordReady {
		return nil // it overlapped with the start
	}
	o, safe, err := parseLine(line)
	if err != nil {
		return err
	}
	h := l.files[o.Path]
	if h == nil {
		h = &history{}
		l.files[o.Path] = h
	}
	switch n := uint64(len(h.ops)); {
	case safe && o.Gen > n:
		return fmt.Errorf("guestlog: %q promises generation %d, and %d were announced", line, o.Gen, n)
	case safe:
		h.safe = append(h.safe, promise{o.Gen, l.promises})
		l.promises++
	case o.Gen != n+1:
		return fmt.Errorf("guestlog: %q announces generation %d after %d", line, o.Gen, n)
	case (o.Kind == Write || o.Kind == Punch) && o.Offset+o.Length > h.size():
		return fmt.Errorf("guestlog: %q goes past the %d bytes of the file", line, h.size())
	default:
		h.ops = append(h.ops, o)
	}
	return nil
}

// size is the length of the file when everything that was announced is done.
func (h *history) size() int64 {
	for _, o := range slices.Backward(h.ops) {
		switch o.Kind {
		case Replace:
			return o.Length
		case Delete:
			return 0
		}
	}
	return 0
}

// Promises is the number of promises so far.
func (l *Log) Promises() int { return l.promises }

// promised is the last generation that the first n promises cover; 0: none.
func (h *history) promised(n int) (gen uint64) {
	for _, p := range h.safe {
		if p.order < n {
			gen = max(gen, p.gen)
		}
	}
	return gen
}

// maxFindings bounds what Judge reports.
const maxFindings = 10

// Judge compares the files below the directories top of a file system after a crash with what the guest
// reported. The first promises of them were made before the crash; operations that were announced may have
// happened or not. It returns nil, or an error that lists up to ten files and what is wrong with them.
func (l *Log) Judge(root fs.FS, promises int, top ...string) error {
	var findings []error
	find := func(path, format string, args ...any) {
		if len(findings) < maxFindings {
			findings = append(findings, fmt.Errorf("%s %s", path, fmt.Sprintf(format, args...)))
		}
	}
	found := map[string]bool{}
	for _, dir := range top {
		err := fs.WalkDir(root, dir, func(path string, d fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist) && path == dir:
				return nil // what must be in it will be missed below
			case err != nil:
				return err
			case !d.IsDir():
				found[path] = true
			}
			return nil
		})
		if err != nil {
			find(dir, "cannot be read: %v", err)
		}
	}
	for _, path := range slices.Sorted(maps.Keys(l.files)) {
		h := l.files[path]
		gen := h.promised(promises)
		if !found[path] {
			if !h.mayBeAbsent(gen) {
				find(path, "does not exist; generation %d of %d is durable", gen, len(h.ops))
			}
			continue
		}
		delete(found, path)
		data, err := fs.ReadFile(root, path)
		if err != nil {
			find(path, "cannot be read: %v", err)
			continue
		}
		if what := l.judgeFile(h, path, gen, data); what != "" {
			find(path, "%s; generation %d of %d is durable", what, gen, len(h.ops))
		}
	}
	for _, path := range slices.Sorted(maps.Keys(found)) {
		find(path, "was never written by the guest")
	}
	return errors.Join(findings...)
}

// mayBeAbsent tells whether the file may be missing when gen is durable.
func (h *history) mayBeAbsent(gen uint64) bool {
	if gen == 0 {
		return true
	}
	for _, o := range h.ops[gen-1:] {
		if o.Kind == Delete {
			return true
		}
	}
	return false
}

// judgeFile says what is wrong with the contents of a file of which gen is durable; "" for nothing.
func (l *Log) judgeFile(h *history, path string, gen uint64, data []byte) string {
	// The file came into being with one of the replacements: the last durable one, or a later one.
	what := fmt.Sprintf("has %d bytes, which no change that may show makes", len(data))
	for i := len(h.ops) - 1; i >= 0; i-- {
		o := h.ops[i]
		if o.Kind == Delete && o.Gen <= gen {
			break
		}
		if o.Kind != Replace {
			continue
		}
		if o.Length == int64(len(data)) {
			if what = l.judgeSectors(h, path, o, gen, data); what == "" {
				return ""
			}
		}
		if o.Gen <= gen {
			break
		}
	}
	return what
}

// judgeSectors says what is wrong with a file that the replacement made and later operations changed in place.
func (l *Log) judgeSectors(h *history, path string, made Op, gen uint64, data []byte) string {
	k := key(l.seed, path)
	want := make([]byte, SectorSize)
	for off := 0; off < len(data); off += SectorSize {
		got := data[off:min(off+SectorSize, len(data))]
		zero := len(bytes.Trim(got, "\x00")) == 0
		has, ours := generation(got)
		if len(got) < headerSize {
			has, ours = made.Gen, true // nothing is written in place there
		}
		if !ours && !zero {
			return fmt.Sprintf("holds foreign bytes at %d: % x…", off, got[:min(16, len(got))])
		}
		allowed := h.allowed(made, gen, int64(off))
		if zero && !ours {
			if !slices.Contains(allowed, 0) {
				return fmt.Sprintf("holds zeros at %d; allowed are the generations %d", off, allowed)
			}
			continue
		}
		fillSector(want[:len(got)], k, has, uint64(off)/SectorSize)
		if !bytes.Equal(got, want[:len(got)]) {
			return fmt.Sprintf("holds something at %d that claims to be generation %d and is not", off, has)
		}
		if !slices.Contains(allowed, has) {
			return fmt.Sprintf("holds generation %d at %d; allowed are %d (0: zeros)", has, off, allowed)
		}
	}
	return ""
}

// allowed lists the generations that the sector at off may show in the file that made brought into being,
// when gen is durable; 0 stands for zeros.
func (h *history) allowed(made Op, gen uint64, off int64) []uint64 {
	values := []uint64{made.Gen}
	for _, o := range h.ops[made.Gen:] {
		if o.Kind == Replace || o.Kind == Delete {
			break
		}
		if off < o.Offset || off >= o.Offset+o.Length {
			continue
		}
		v := o.Gen
		if o.Kind == Punch {
			v = 0
		}
		if o.Gen <= gen {
			values = values[:0] // durably overwritten
		}
		values = append(values, v)
	}
	return values
}
