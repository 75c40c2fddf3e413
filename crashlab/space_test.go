package crashlab

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/platter-disk/platter/storage"
)

// script drives a lab one event at a time, so that operations can be in flight together.
type script struct {
	lab      *Lab
	inFlight []*op
	fill     byte
}

func (s *script) begin(file int, kind Kind, off, length int64) {
	l := s.lab
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.files[file]
	o := l.begin(c, kind, off, length, l.sites.intern(Site{}))
	switch kind {
	case KindWrite:
		s.fill++
		c.write(o, bytes.Repeat([]byte{s.fill}, int(length)))
	case KindPunch:
		if off < c.size {
			c.zero(o, off, min(length, c.size-off))
		}
	case KindTruncate:
		if off < c.size {
			c.zero(o, off, c.size-off)
		}
		c.resize(o, off)
	}
	s.inFlight = append(s.inFlight, o)
}

func (s *script) end(i int) {
	s.lab.mu.Lock()
	defer s.lab.mu.Unlock()
	s.lab.finish(s.inFlight[i])
	s.inFlight = slices.Delete(s.inFlight, i, i+1)
}

// image is a file's contents as a comparable value.
func image(f storage.File) string {
	size, err := f.Size()
	if err != nil {
		panic(err)
	}
	p := make([]byte, size)
	if _, err := f.ReadAt(p, 0); err != nil && err != io.EOF {
		panic(err)
	}
	return string(p)
}

// short abbreviates contents made of runs of equal bytes.
func short(p string) string {
	var b strings.Builder
	for i := 0; i < len(p); {
		n := 1
		for i+n < len(p) && p[i+n] == p[i] {
			n++
		}
		fmt.Fprintf(&b, "%dx%02x ", n, p[i])
		i += n
	}
	return b.String()
}

// maxScriptUnits bounds the files of a script.
const maxScriptUnits = 5

// piece is something a crash keeps or loses whole: one unit of one operation, or the size it left.
type piece struct {
	size bool
	at   int64 // unit number, or the size
	data string
}

// bruteForce returns every image of a file that a crash may leave anywhere in a history, by the definition:
// at each event, all orders of all subsets of the pieces after the last completed barrier.
func bruteForce(l *Lab, file int, tear int64) map[string]bool {
	out := make(map[string]bool)
	for upTo := range l.events {
		crashAfter(l, file, tear, upTo, out)
	}
	return out
}

func crashAfter(l *Lab, file int, tear int64, upTo int, out map[string]bool) {
	covered := func(o *op) bool {
		for _, e := range l.events[:upTo+1] {
			if e.op != nil && e.ends && e.op.kind == KindSync && e.op.file == file && o.end < e.op.begin {
				return true
			}
		}
		return false
	}
	durable := make(map[int64]string)
	size := l.files[file].initialSize
	memory := make([]byte, maxScriptUnits*tear)
	if _, err := l.history().at(file).ReadAt(memory, 0); err != nil && err != io.EOF {
		panic(err)
	}
	for u := range int64(len(memory)) / tear {
		durable[u] = string(memory[u*tear : (u+1)*tear])
	}
	var loose []piece
	for _, e := range l.events[:upTo+1] {
		o := e.op
		if o == nil || e.ends || o.file != file {
			continue
		}
		units := make(map[int64]bool)
		for _, c := range o.changes {
			copy(memory[c.sector*storage.SectorSize:], c.data[:])
			units[c.sector*storage.SectorSize/tear] = true
		}
		var pieces []piece
		for _, u := range slices.Sorted(maps.Keys(units)) {
			pieces = append(pieces, piece{at: u, data: string(memory[u*tear : (u+1)*tear])})
		}
		if o.newSize != o.oldSize {
			pieces = append(pieces, piece{size: true, at: o.newSize})
		}
		for _, p := range pieces {
			if !covered(o) {
				loose = append(loose, p)
				continue
			}
			// What began earlier in the same place has been overwritten in memory before the barrier.
			loose = slices.DeleteFunc(loose, func(q piece) bool { return q.size == p.size && (p.size || q.at == p.at) })
			if p.size {
				size = p.at
			} else {
				durable[p.at] = p.data
			}
		}
	}
	used := make([]bool, len(loose))
	type situation struct {
		used string
		img  string
	}
	been := make(map[situation]bool) // two orders that led to the same place go on in the same way
	var permute func(units map[int64]string, size int64)
	permute = func(units map[int64]string, size int64) {
		img := make([]byte, maxScriptUnits*tear)
		for u, d := range units {
			copy(img[u*tear:], d)
		}
		at := situation{fmt.Sprint(used, size), string(img)}
		if been[at] {
			return
		}
		been[at] = true
		out[string(img[:size])] = true
		for i, p := range loose {
			if used[i] {
				continue
			}
			used[i] = true
			if p.size {
				permute(units, p.at)
			} else {
				next := maps.Clone(units)
				next[p.at] = p.data
				permute(next, size)
			}
			used[i] = false
		}
	}
	permute(durable, size)
}

func TestStatesEqualBruteForce(t *testing.T) {
	for _, tear := range []int64{512, 4096} {
		t.Run(fmt.Sprint(tear), func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) { checkAgainstBruteForce(t, tear) })
		})
	}
}

func checkAgainstBruteForce(t *rapid.T, tear int64) {
	l, err := NewLab(FileSpec{Name: "f"})
	if err != nil {
		t.Fatal(err)
	}
	s := &script{lab: l}
	half := tear / 2
	off := rapid.Int64Range(0, 5)
	s.begin(0, KindWrite, 0, off.Draw(t, "initial")*half+1)
	s.end(0)
	l.Settle()
	loose := 0 // an upper bound of the pieces in doubt: brute force is factorial
	begin := func(kind Kind, off, length int64) {
		s.begin(0, kind, off, length)
		o := l.ops[len(l.ops)-1]
		if len(o.changes) > 0 {
			loose += int(o.changes[len(o.changes)-1].sector*storage.SectorSize/tear - o.changes[0].sector*storage.SectorSize/tear + 1)
		}
		if o.newSize != o.oldSize {
			loose++
		}
	}
	for range rapid.IntRange(1, 9).Draw(t, "events") {
		switch k := rapid.IntRange(0, 9).Draw(t, "kind"); {
		case k < 4 && loose < 4:
			n := rapid.Int64Range(1, 3).Draw(t, "halves")
			begin(KindWrite, off.Draw(t, "off")*half, n*half)
		case k == 4 && loose < 5:
			begin(KindPunch, off.Draw(t, "off")*half, 2*half)
		case k == 5 && loose < 4:
			begin(KindTruncate, off.Draw(t, "off")*half, 0)
		case k == 6:
			begin(KindSync, 0, 0)
		default:
			if len(s.inFlight) > 0 {
				i := rapid.IntRange(0, len(s.inFlight)-1).Draw(t, "which")
				if s.inFlight[i].kind == KindSync && len(s.inFlight) == 1 {
					loose = 0
				}
				s.end(i)
			}
		}
	}
	want := bruteForce(l, 0, tear)
	want[image(l.history().at(0))] = true
	got := make(map[string]bool)
	states := 0
	cov := l.history().crashes(Model{Tear: tear}, 1<<30, 1, l.sites, func(st *State) bool {
		states++
		got[image(st.Files()[0])] = true
		return true
	})
	for img := range got {
		if !want[img] {
			t.Errorf("impossible state %s", short(img))
		}
	}
	for img := range want {
		if !got[img] {
			t.Errorf("missing state %s", short(img))
		}
	}
	n, exact := cov.possible.Exact()
	if !exact || int(n) != states || cov.explored != states || cov.points != cov.exhaustive {
		t.Errorf("coverage %+v: want %d states, all of them", cov, states)
	}
	if states > len(want) {
		t.Errorf("%d states emitted, %d are different", states, len(want))
	}
}

// at returns a file of the history as it was at the start.
func (h *history) at(file int) storage.File {
	c := h.files[file]
	l := &Lab{sites: newSiteTable(), files: []*content{newContent(c.spec, 0, c.initial.fork(), c.initialSize)}}
	return l.Files()[0]
}
