package crashlab

import (
	"bytes"
	"errors"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/platter-disk/platter/storage"
)

// tb is what the helpers need of testing.T and rapid.T.
type tb interface {
	Helper()
	Fatal(args ...any)
}

func newLab(t tb, specs ...FileSpec) (*Lab, []storage.File) {
	t.Helper()
	l, err := NewLab(specs...)
	if err != nil {
		t.Fatal(err)
	}
	return l, l.Files()
}

func must(t tb, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func put(t testing.TB, f storage.File, off int64, length int, b byte) {
	t.Helper()
	if n, err := f.WriteAt(bytes.Repeat([]byte{b}, length), off); err != nil || n != length {
		t.Fatalf("write: %d, %v", n, err)
	}
}

func TestTreeIsAMapWithSnapshots(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		type pair struct {
			tree  sectorTree
			model map[int64]*sector
		}
		copyOf := func(m map[int64]*sector) map[int64]*sector {
			n := make(map[int64]*sector)
			for k, v := range m {
				n[k] = v
			}
			return n
		}
		trees := []pair{{model: map[int64]*sector{}}}
		key := rapid.OneOf(rapid.Int64Range(0, 200), rapid.SampledFrom([]int64{1 << 12, 1<<30 + 5, maxFileSize / 512}))
		t.Repeat(map[string]func(*rapid.T){
			"set": func(t *rapid.T) {
				p := &trees[rapid.IntRange(0, len(trees)-1).Draw(t, "tree")]
				k := key.Draw(t, "key")
				s := new(sector)
				p.tree.set(k, s)
				p.model[k] = s
			},
			"remove": func(t *rapid.T) {
				p := &trees[rapid.IntRange(0, len(trees)-1).Draw(t, "tree")]
				k := key.Draw(t, "key")
				p.tree.set(k, nil)
				delete(p.model, k)
			},
			"snapshot": func(t *rapid.T) {
				p := &trees[rapid.IntRange(0, len(trees)-1).Draw(t, "tree")]
				trees = append(trees, pair{p.tree.snapshot(), copyOf(p.model)})
			},
			"": func(t *rapid.T) {
				k := key.Draw(t, "key")
				for i := range trees {
					p := &trees[i]
					if p.tree.get(k) != p.model[k] {
						t.Fatalf("tree %d: wrong sector %d", i, k)
					}
					want := int64(-1)
					for j := range p.model {
						if j >= k && (want < 0 || j < want) {
							want = j
						}
					}
					at, s := p.tree.next(k)
					if (s == nil) != (want < 0) || s != nil && (at != want || s != p.model[at]) {
						t.Fatalf("tree %d: next of %d is %d: want %d", i, k, at, want)
					}
				}
			},
		})
	})
}

// TestFileIsAFile compares a lab's file with a slice of bytes.
func TestFileIsAFile(t *testing.T) {
	for _, fixed := range []bool{false, true} {
		name := map[bool]string{false: "growing", true: "fixed"}[fixed]
		t.Run(name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				const size = 8 * 512
				l, err := NewLab(FileSpec{Name: "f", Size: size, Fixed: fixed})
				if err != nil {
					t.Fatal(err)
				}
				f := l.Files()[0]
				model := make([]byte, size)
				if fixed {
					model = bytes.Repeat([]byte{Poison}, size)
				}
				grow := func(end int64) bool {
					if end > int64(len(model)) && fixed {
						return false
					}
					model = append(model, make([]byte, max(end-int64(len(model)), 0))...)
					return true
				}
				draw := func(t *rapid.T) (off, length int64) {
					return rapid.Int64Range(0, 10*512).Draw(t, "off"), rapid.Int64Range(0, 3*512).Draw(t, "length")
				}
				supported := func(t *rapid.T, err error, ok bool) {
					if ok && err != nil || !ok && !errors.Is(err, errors.ErrUnsupported) {
						t.Fatalf("error %v", err)
					}
				}
				t.Repeat(map[string]func(*rapid.T){
					"write": func(t *rapid.T) {
						off, length := draw(t)
						p := bytes.Repeat([]byte{byte(off + length + 1)}, int(length))
						n, err := f.WriteAt(p, off)
						fits := length
						if fixed {
							fits = min(max(size-off, 0), length)
						}
						if int64(n) != fits || (err == nil) != (fits == length) || err != nil && !errors.Is(err, io.ErrShortWrite) {
							t.Fatalf("write: %d, %v", n, err)
						}
						if n > 0 {
							grow(off + int64(n))
							copy(model[off:], p[:n])
						}
					},
					"truncate": func(t *rapid.T) {
						n, _ := draw(t)
						err := f.Truncate(n)
						supported(t, err, !fixed || n == size)
						if err == nil {
							model = model[:min(n, int64(len(model)))]
							grow(n)
						}
					},
					"punch": func(t *rapid.T) {
						off, length := draw(t)
						supported(t, f.PunchHole(off, length), true)
						off = min(off, int64(len(model)))
						clear(model[off:min(off+length, int64(len(model)))])
					},
					"zero": func(t *rapid.T) {
						off, length := draw(t)
						ok := grow(off + length)
						supported(t, f.ZeroRange(off, length), ok)
						if ok {
							clear(model[off : off+length])
						}
					},
					"allocate": func(t *rapid.T) {
						off, length := draw(t)
						supported(t, f.Allocate(off, length), grow(off+length))
					},
					"extents": func(t *rapid.T) {
						off, length := draw(t)
						at := off
						err := f.DataExtents(off, length, func(e storage.Extent) bool {
							if e.Offset != at || e.Length <= 0 {
								t.Fatalf("extent %+v at %d", e, at)
							}
							at += e.Length
							if !e.Data && !allBytes(model[e.Offset:at], 0) {
								t.Fatalf("extent %+v is not a hole", e)
							}
							return true
						})
						if want := max(min(off+length, int64(len(model))), off); err != nil || at != want {
							t.Fatalf("extents end at %d: want %d: %v", at, want, err)
						}
					},
					"": func(t *rapid.T) {
						if n, err := f.Size(); err != nil || n != int64(len(model)) {
							t.Fatalf("size %d, %v: want %d", n, err, len(model))
						}
						off, length := draw(t)
						p := make([]byte, length)
						n, err := f.TryReadAt(p, off)
						want := model[min(off, int64(len(model))):min(off+length, int64(len(model)))]
						if !bytes.Equal(p[:n], want) || (err == io.EOF) != (n < len(p) || off >= int64(len(model))) {
							t.Fatalf("read of %d at %d: %d, %v: want %d", length, off, n, err, len(want))
						}
					},
				})
			})
		})
	}
}

func TestFileRefusals(t *testing.T) {
	l, files := newLab(t, FileSpec{Name: "a"}, FileSpec{Name: "b", Size: 512, Fixed: true})
	f := files[0]
	again := l.Files()[0]
	p := make([]byte, 1)
	for name, err := range map[string]error{
		"negative offset":  errOf(f.WriteAt(p, -1)),
		"overflow":         errOf(f.WriteAt(p, math.MaxInt64)),
		"negative size":    f.Truncate(-1),
		"negative length":  f.ZeroRange(0, -1),
		"length overflows": f.Allocate(1, math.MaxInt64),
		"negative read":    errOf(f.ReadAt(p, -1)),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	must(t, f.Close())
	if _, err := f.WriteAt(p, 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("write after close: %v", err)
	}
	put(t, again, 0, 1, 1)
	l.PowerOff()
	for name, err := range map[string]error{
		"write": errOf(again.WriteAt(p, 0)), "read": errOf(again.ReadAt(p, 0)), "sync": again.Sync(),
		"extents": again.DataExtents(0, 1, func(storage.Extent) bool { return true }),
	} {
		if !errors.Is(err, ErrPowerOff) {
			t.Errorf("%s without power: %v", name, err)
		}
	}
	for _, s := range []FileSpec{{Size: -1}, {Size: maxFixedSize + 1, Fixed: true}, {Size: maxFileSize + 1}} {
		if _, err := NewLab(s); err == nil {
			t.Errorf("%+v: no error", s)
		}
	}
}

func errOf(_ int, err error) error { return err }

// states returns the different images of all files, one after the other, that a crash may leave.
func states(t *testing.T, l *Lab, m Model) []string {
	t.Helper()
	seq, err := l.Crashes(m, 1<<20, 1)
	must(t, err)
	seen := make(map[string]bool)
	for st := range seq {
		var b strings.Builder
		for i, f := range st.Files() {
			if i > 0 {
				b.WriteString("| ")
			}
			b.WriteString(short(image(f)))
		}
		seen[strings.TrimSpace(b.String())] = true
	}
	var out []string
	for s := range seen {
		out = append(out, s)
	}
	slices.Sort(out)
	return out
}

func TestStates(t *testing.T) {
	for _, test := range []struct {
		name  string
		model Model
		spec  []FileSpec
		run   func(t *testing.T, l *Lab, f []storage.File)
		want  []string
	}{{
		name: "growth that did or did not reach the disk", model: Model{Tear: 512},
		run: func(t *testing.T, _ *Lab, f []storage.File) { put(t, f[0], 0, 512, 1) },
		want: []string{
			"",
			"512x00",
			"512x01",
		},
	}, {
		name: "growth with poison", model: Model{Tear: 512, Poison: true},
		run: func(t *testing.T, _ *Lab, f []storage.File) { put(t, f[0], 0, 512, 1) },
		want: []string{
			"",
			"512x01",
			"512xdb",
		},
	}, {
		name: "growth by truncation is never poison", model: Model{Tear: 512, Poison: true},
		run: func(t *testing.T, _ *Lab, f []storage.File) {
			must(t, f[0].Truncate(512), f[0].Sync())
			put(t, f[0], 0, 512, 1)
		},
		want: []string{
			"",
			"512x00",
			"512x01",
		},
	}, {
		name: "zapped", model: Model{Tear: 512, Zap: true},
		spec: []FileSpec{{Size: 512}},
		run:  func(t *testing.T, _ *Lab, f []storage.File) { put(t, f[0], 0, 100, 1) },
		want: []string{
			"100x01 412x00",
			"512x00",
			"512xdb",
		},
	}, {
		name: "torn at 4096", model: Model{Tear: 4096},
		spec: []FileSpec{{Size: 8192}},
		run:  func(t *testing.T, _ *Lab, f []storage.File) { put(t, f[0], 0, 8192, 1) },
		want: []string{
			"4096x00 4096x01",
			"4096x01 4096x00",
			"8192x00",
			"8192x01",
		},
	}, {
		name: "a barrier is a file's own", model: Model{Tear: 512},
		spec: []FileSpec{{Size: 512}, {Size: 512}},
		run: func(t *testing.T, l *Lab, f []storage.File) {
			put(t, f[0], 0, 512, 1)
			put(t, f[1], 0, 512, 2)
			must(t, f[1].Sync())
			l.Settle()
			put(t, f[0], 0, 512, 3)
			put(t, f[1], 0, 512, 4)
			must(t, f[0].Sync())
			put(t, f[0], 0, 512, 5)
		},
		want: []string{
			"512x01 | 512x02",
			"512x01 | 512x04",
			"512x03 | 512x02",
			"512x03 | 512x04",
			"512x05 | 512x02",
			"512x05 | 512x04",
		},
	}, {
		name: "an untouched block device is poison", model: Model{Tear: 512},
		spec: []FileSpec{{Size: 1024, Fixed: true}},
		run:  func(t *testing.T, _ *Lab, f []storage.File) { must(t, f[0].ZeroRange(512, 512)) },
		want: []string{
			"1024xdb",
			"512xdb 512x00",
		},
	}, {
		name: "a hole is a write of zeros", model: Model{Tear: 512},
		run: func(t *testing.T, l *Lab, f []storage.File) {
			put(t, f[0], 0, 1024, 1)
			l.Settle()
			must(t, f[0].PunchHole(0, 4096))
		},
		want: []string{
			"1024x00",
			"1024x01",
			"512x00 512x01",
			"512x01 512x00",
		},
	}, {
		name: "a truncation drops, and may come late", model: Model{Tear: 512},
		run: func(t *testing.T, l *Lab, f []storage.File) {
			put(t, f[0], 0, 1024, 1)
			l.Settle()
			must(t, f[0].Truncate(100))
		},
		want: []string{
			"1024x01",
			"100x01",
			"100x01 412x00 512x01",
			"100x01 924x00",
			"512x01 512x00",
		},
	}, {
		name: "allocation changes the size alone", model: Model{Tear: 512, Poison: true},
		run: func(t *testing.T, _ *Lab, f []storage.File) { must(t, f[0].Allocate(0, 512)) },
		want: []string{
			"",
			"512x00",
		},
	}} {
		t.Run(test.name, func(t *testing.T) {
			if test.spec == nil {
				test.spec = []FileSpec{{}}
			}
			l, files := newLab(t, test.spec...)
			test.run(t, l, files)
			slices.Sort(test.want)
			if got := states(t, l, test.model); !slices.Equal(got, test.want) {
				t.Errorf("states\n %s\nwant\n %s", strings.Join(got, "\n "), strings.Join(test.want, "\n "))
			}
		})
	}
}

// TestSyncCoversWhatHadReturned has a write in flight while a barrier completes.
func TestSyncCoversWhatHadReturned(t *testing.T) {
	l, _ := newLab(t, FileSpec{Size: 1024})
	s := &script{lab: l}
	s.begin(0, KindWrite, 0, 512)
	s.begin(0, KindWrite, 512, 512)
	s.end(0)
	s.begin(0, KindSync, 0, 0)
	s.end(0) // the second write
	s.end(0) // the sync, which began before the second write returned
	l.Note("promise", true)
	seq, err := l.Crashes(Model{Tear: 512}, 100, 1)
	must(t, err)
	var last []string
	for st := range seq {
		if st.space.at.promise != nil {
			last = append(last, short(image(st.Files()[0])))
		}
	}
	if want := []string{"512x01 512x00 ", "512x01 512x02 "}; !slices.Equal(last, want) {
		t.Errorf("after the barrier %q: want %q", last, want)
	}
}

func TestCrashesRejectsModel(t *testing.T) {
	l, _ := newLab(t, FileSpec{})
	if _, err := l.Crashes(Model{Tear: 1000}, 1, 1); err == nil {
		t.Error("a tear of 1000 bytes was accepted")
	}
}

// TestSampling looks at a history with far more states than the budget.
func TestSampling(t *testing.T) {
	l, files := newLab(t, FileSpec{Size: 5 * 4096})
	for i := range 40 {
		put(t, files[0], int64(i%5)*4096, 4096, byte(i+1))
	}
	run := func(budget int) (prints []string, cov coverage) {
		cov = l.history().crashes(Model{Tear: 512}, budget, 9, l.sites, func(st *State) bool {
			prints = append(prints, image(st.Files()[0]))
			return true
		})
		return prints, cov
	}
	first, cov := run(500)
	if cov.explored != len(first) || len(first) > 500 || len(first) < 400 {
		t.Errorf("%d states of a budget of 500, coverage %+v", len(first), cov)
	}
	if n, exact := cov.possible.Exact(); exact {
		t.Errorf("possible: %d", n)
	}
	if second, _ := run(500); !slices.Equal(first, second) {
		t.Error("the same seed gave other states")
	}
	unique := slices.Clone(first)
	slices.Sort(unique)
	if len(slices.Compact(unique)) != len(first) {
		t.Error("a state was emitted twice")
	}
	if !slices.Contains(first, image(files[0])) {
		t.Error("the state in which everything survived is missing")
	}
	if few, _ := run(10); len(few) > 10 || len(few) < 5 {
		t.Errorf("%d states of a budget of 10", len(few))
	}
}

// TestRandomCrashes looks for the shapes that few states of a long history must have, and orders them by marks.
func TestRandomCrashes(t *testing.T) {
	l, files := newLab(t, FileSpec{Size: 4096})
	var marks []int
	for i := range 50 {
		put(t, files[0], int64(i)*4096, 4096, byte(i+1)) // grows the file
		if i%10 == 9 {
			must(t, files[0].Sync())
			marks = append(marks, l.Note("synced", true))
		}
	}
	run := func(n int, seed uint64) (states []*State) {
		seq, err := l.RandomCrashes(Model{Tear: 512}, n, seed)
		must(t, err)
		for st := range seq {
			states = append(states, st)
		}
		return states
	}
	states := run(200, 3)
	if len(states) != 200 {
		t.Fatalf("%d states, want 200", len(states))
	}
	torn, all, cut := 0, 0, 0
	again := run(200, 3)
	for i, st := range states {
		if i > 0 && st.Event() < states[i-1].Event() {
			t.Errorf("state %d is of event %d, after one of event %d", i, st.Event(), states[i-1].Event())
		}
		f := st.Files()[0]
		if image(f) != image(again[i].Files()[0]) {
			t.Errorf("state %d differs when it is drawn again", i)
		}
		size, err := f.Size()
		must(t, err)
		for k, mark := range marks { // what was synced before the mark is there
			buf := make([]byte, 4096)
			off := int64(10*k+9) * 4096
			if mark > st.Event() {
				break
			}
			if _, err := f.ReadAt(buf, off); err != nil || !bytes.Equal(buf, bytes.Repeat([]byte{byte(10*k + 10)}, 4096)) {
				t.Errorf("state %d, of event %d, lost what was durable at event %d: %v", i, st.Event(), mark, err)
			}
		}
		crash := st.Describe()
		if crash.Torn > 0 {
			torn++
		}
		if crash.Lost == 0 && crash.Torn == 0 {
			all++
		}
		if crash.Lost > 0 && size%(10*4096) == 0 {
			cut++
		}
	}
	if torn < 20 || all < 10 || cut < 10 {
		t.Errorf("of 200 states %d have torn operations, %d lost nothing, %d lost the growth of the file: want some of each", torn, all, cut)
	}
	if other := run(200, 4); slices.EqualFunc(states, other, func(a, b *State) bool { return a.Event() == b.Event() }) {
		t.Error("another seed crashed at the same points")
	}
	if _, err := l.RandomCrashes(Model{Tear: 1000}, 1, 1); err == nil {
		t.Error("a tear of 1000 bytes was accepted")
	}
}

func TestRunawayIsStopped(t *testing.T) {
	l, files := newLab(t, FileSpec{})
	l.ops = make([]*op, maxOps)
	if err := files[0].Sync(); !errors.Is(err, ErrRunaway) {
		t.Errorf("operation number %d: %v", maxOps, err)
	}
}

func TestSites(t *testing.T) {
	l, files := newLab(t, FileSpec{})
	for range 3 {
		put(t, files[0], 0, 1, 1)
	}
	must(t, files[0].Sync())
	if s := l.ops[0].site; s.Func != "crashlab.put" || s.File != "crashlab/lab_test.go" || s.Line == 0 {
		t.Errorf("site %+v", s)
	}
	if l.ops[0].site != l.ops[2].site || l.ops[0].site == l.ops[3].site {
		t.Error("sites are not deduplicated")
	}
}
