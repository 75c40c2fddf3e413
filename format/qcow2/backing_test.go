package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
)

// TestSetBacking changes the reference of images that are in use, again and again, and reads it back.
func TestSetBacking(t *testing.T) {
	names := []string{"base2", strings.Repeat("long", 60), "b", strings.Repeat("x", 330)}
	for _, how := range Disciplines() {
		for _, cluster := range []int64{1024, 4096, 65536} {
			for _, version := range []uint32{2, 3} {
				if version == 2 && (how == Lazy || how == Journal) {
					continue
				}
				t.Run(fmt.Sprintf("%s-%d-v%d", how, cluster, version), func(t *testing.T) {
					cfg := modelConfig{how: how, backing: 256 << 10, create: CreateOptions{
						Size: 256 << 10, Version: version, ClusterSize: cluster, BackingFile: "base", BackingFormat: "raw",
					}}
					w := newWorld(t, t, cfg, 1)
					r := rand.New(rand.NewPCG(3, 4))
					for i, name := range names {
						for range 10 {
							w.step(t, r)
						}
						if err := w.im.SetBacking(name, "raw"); err != nil {
							t.Fatal(err)
						}
						w.verify(t, 0, int64(len(w.want)))
						if i%2 == 0 {
							w.reopen(t)
						}
						h, err := ReadHeader(w.file)
						if err == nil && h.Incompatible&IncompatJournal != 0 {
							h, err = ReadHeader(w.im.file)
						}
						if err != nil || h.BackingFile != name || h.BackingFormat != "raw" {
							t.Fatalf("the reference is %q (%q), want %q: %v", h.BackingFile, h.BackingFormat, name, err)
						}
					}
					if err := w.im.SetBacking("base", "raw"); err != nil {
						t.Fatal(err)
					}
					if err := w.im.Close(); err != nil {
						t.Fatal(err)
					}
					w.judge(t, t)
				})
			}
		}
	}
}

// closing notices that it was closed.
type closing struct {
	block.Device
	closed bool
}

func (c *closing) Close() error {
	c.closed = true
	return c.Device.Close()
}

// TestDetachBacking: what an image holds stays, delayed copies included, and the rest reads as zeros.
func TestDetachBacking(t *testing.T) {
	const size = 64 << 10
	for _, how := range Disciplines() {
		t.Run(how, func(t *testing.T) {
			f := storage.NewMemory("image")
			create := CreateOptions{Size: size, ClusterSize: 4096, BackingFile: "base", BackingFormat: "raw", BackingSize: size}
			if err := Create(f, create); err != nil {
				t.Fatal(err)
			}
			base := newBacking(1, size)
			backing := &closing{Device: base}
			im, err := Open(keepOpen{f}, Options{Discipline: how, Backing: backing})
			if err != nil {
				t.Fatal(err)
			}
			// A part of a cluster is written, the rest of it is to come from the backing file.
			part := bytes.Repeat([]byte{0xee}, 512)
			if _, err := im.WriteAt(part, 8192+512); err != nil {
				t.Fatal(err)
			}
			if err := im.SetBacking("", ""); err != nil {
				t.Fatal(err)
			}
			if !backing.closed {
				t.Error("the backing device is still open")
			}
			want := make([]byte, size)
			copy(want[8192:], base.bytes[8192:12288])
			copy(want[8192+512:], part)
			check := func() {
				t.Helper()
				got := make([]byte, size)
				if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
					t.Fatalf("the detached image reads something else: %v", err)
				}
				err := im.Extents(0, size, func(e block.Extent) bool {
					if e.Zero != (e.Offset != 8192) {
						t.Errorf("extent %+v", e)
					}
					return true
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			check()
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			if im, err = Open(keepOpen{f}, Options{Discipline: how}); err != nil {
				t.Fatal(err)
			}
			check()
			if h := im.Header(); h.BackingFile != "" || h.BackingFormat != "" {
				t.Errorf("the image still names %q (%q)", h.BackingFile, h.BackingFormat)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			wellFormed(t, f)
		})
	}
}

// wellFormed has both checkers look at a closed image.
func wellFormed(t *testing.T, f *storage.Memory) {
	t.Helper()
	res, err := Check(f, CheckOptions{})
	if err != nil || res.Corruptions+res.Leaks+res.CheckErrors > 0 {
		t.Fatalf("check: %+v, %v", res, err)
	}
	testenv.Need(t, "qemu-img")
	dir := t.TempDir()
	saveImage(t, f, filepath.Join(dir, "image.qcow2"))
	if err := os.WriteFile(filepath.Join(dir, "base"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := qemuImg(dir, "check", "-f", "qcow2", "image.qcow2"); err != nil {
		t.Fatalf("qemu-img check: %v\n%s", err, out)
	}
}

// TestSetBackingWhileInUse detaches under readers and writers.
func TestSetBackingWhileInUse(t *testing.T) {
	for _, how := range Disciplines() {
		t.Run(how, func(t *testing.T) { setBackingWhileInUse(t, how) })
	}
}

func setBackingWhileInUse(t *testing.T, how string) {
	const size = 256 << 10
	f := storage.NewMemory("image")
	create := CreateOptions{Size: size, ClusterSize: 4096, BackingFile: "base", BackingFormat: "raw", BackingSize: size}
	if err := Create(f, create); err != nil {
		t.Fatal(err)
	}
	im, err := Open(keepOpen{f}, Options{Backing: newBacking(1, size), Discipline: how})
	if err != nil {
		t.Fatal(err)
	}
	var workers sync.WaitGroup
	stop := make(chan struct{})
	for worker := range 3 {
		workers.Go(func() {
			r := rand.New(rand.NewPCG(uint64(worker), 5))
			p := make([]byte, 6<<10)
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				off := r.Int64N(size - int64(len(p)))
				var err error
				switch i % 4 {
				case 0:
					_, err = im.WriteAt(p, off)
				case 1:
					_, err = im.ReadAt(p, off)
				case 2:
					err = im.Extents(0, size, func(block.Extent) bool { return true })
				case 3:
					err = errors.Join(im.WriteZeroes(off, 4096, 0), im.Discard(off, 4096), im.Flush())
				}
				if err != nil {
					t.Errorf("worker %d, request %d: %v", worker, i, err)
					return
				}
			}
		})
	}
	for i := range 20 {
		if err := im.SetBacking(strings.Repeat("b", 1+i*20), "raw"); err != nil {
			t.Error(err)
		}
	}
	if err := im.SetBacking("", ""); err != nil {
		t.Error(err)
	}
	close(stop)
	workers.Wait()
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	wellFormed(t, f)
}

func TestSetBackingRefuses(t *testing.T) {
	open := func(o CreateOptions, ro bool) *Image {
		f := storage.NewMemory("image")
		if err := Create(f, o); err != nil {
			t.Fatal(err)
		}
		p := Options{ReadOnly: ro, NoBacking: true}
		if o.DataFile != nil {
			p.DataFile = o.DataFile
		}
		im, err := Open(f, p)
		if err != nil {
			t.Fatal(err)
		}
		return im
	}
	small := CreateOptions{Size: 1 << 20, ClusterSize: 512}
	snapshotted := open(CreateOptions{Size: 1 << 20, BackingFile: "base", BackingFormat: "raw"}, false)
	if _, err := snapshotted.CreateSnapshot("s", SnapshotOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := snapshotted.SnapshotDevice("s"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, file, format string
		im                 *Image
		want               string
		is                 error
	}{
		{"name too long", strings.Repeat("a", 1024), "raw", open(CreateOptions{Size: 1 << 20}, false), "at most 1023", nil},
		{"format too long", "a", strings.Repeat("f", 16), open(CreateOptions{Size: 1 << 20}, false), "at most 15", nil},
		{"format missing", "a", "", open(CreateOptions{Size: 1 << 20}, false), "backing format must be specified", nil},
		{"format alone", "", "raw", open(CreateOptions{Size: 1 << 20}, false), "without backing file", nil},
		{"NUL", "a\x00b", "raw", open(CreateOptions{Size: 1 << 20}, false), "NUL", nil},
		{"no room", strings.Repeat("a", 500), "raw", open(small, false), "No space left in the file header", ErrHeaderFull},
		{"read-only", "a", "raw", open(CreateOptions{Size: 1 << 20}, true), "", block.ErrReadOnly},
		{"raw data file", "a", "raw", open(CreateOptions{
			Size: 1 << 20, DataFileName: "d", DataFile: storage.NewMemory("d"), DataFileRaw: true,
		}, false), "data-file-raw", nil},
		{"open snapshot", "", "", snapshotted, "", ErrSnapshotInUse},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := c.im.Header()
			err := c.im.SetBacking(c.file, c.format)
			if err == nil || !strings.Contains(err.Error(), c.want) || c.is != nil && !errors.Is(err, c.is) {
				t.Fatalf("%v, want %q, %v", err, c.want, c.is)
			}
			if h := c.im.Header(); h.BackingFile != before.BackingFile || h.BackingFormat != before.BackingFormat {
				t.Errorf("the reference became %q (%q)", h.BackingFile, h.BackingFormat)
			}
			if c.name != "read-only" {
				if _, err := c.im.WriteAt([]byte("still writable"), 0); err != nil {
					t.Error(err)
				}
			}
			if err := c.im.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// backingSubject is an image whose backing file changes its name.
type backingSubject struct{ *Image }

func (s backingSubject) WriteZeroes(off, length int64, unmap bool) error {
	return s.Image.WriteZeroes(off, length, block.MayUnmap)
}

func (s backingSubject) Check() error { return nil }

// TestSetBackingCrash: at every instant the image names the old file or the new one, the new one for sure once
// SetBacking has returned, and nothing else about it changes.
func TestSetBackingCrash(t *testing.T) {
	const size = 16 << 10
	long := strings.Repeat("n", 300)
	for _, how := range Disciplines() {
		for _, c := range []struct {
			cluster int64
			version uint32
			names   []string
		}{
			{512, 3, []string{"a", "bb", "ccc"}},
			{1024, 3, []string{"a", long + "1", "b"}},
			{2048, 2, []string{long + long, long + long + "1", long, long + long + "2"}},
			{2048, 3, []string{long + long, long + "1", long + long + "2", "b"}},
			{8192, 3, []string{"a", long + long, "b", long + long + "2", "ccc"}},
		} {
			if c.version == 2 && (how == Lazy || how == Journal) {
				continue
			}
			t.Run(fmt.Sprintf("%s-%d-v%d", how, c.cluster, c.version), func(t *testing.T) {
				base := newBacking(1, size)
				sc := crashlab.Scenario{
					Name:  t.Name(),
					Files: []crashlab.FileSpec{{Name: "image"}},
					Prepare: func(files []storage.File) error {
						return Create(files[0], CreateOptions{
							Size: size, ClusterSize: c.cluster, Version: c.version,
							BackingFile: c.names[0], BackingFormat: "raw", BackingSize: size,
						})
					},
					Open: func(files []storage.File) (crashlab.Subject, error) {
						im, err := Open(files[0], Options{Discipline: how, Backing: base, Reserve: 2, JournalSize: 1})
						if err != nil {
							return nil, err
						}
						return backingSubject{im}, nil
					},
					Work: func(g *crashlab.Guest) error {
						im := g.Subject().(backingSubject).Image
						for i, name := range c.names[1:] {
							if err := g.Write(int64(i)*1024, 512); err != nil {
								return err
							}
							if err := g.FlushWith("set "+name, func() error { return im.SetBacking(name, "raw") }); err != nil {
								return err
							}
						}
						return g.Write(8192, 512)
					},
					Judge: func(s crashlab.Subject, at crashlab.Moment) error {
						h := s.(backingSubject).Header()
						allowed := c.names[:1:1]
						for _, m := range at.Marks() {
							text, _, _ := strings.Cut(m.Text, " (request ")
							if name, ok := strings.CutPrefix(text, "guest issues set "); ok {
								allowed = append(allowed, name)
							} else if name, ok := strings.CutPrefix(text, "answered: set "); ok {
								allowed = []string{name}
							}
						}
						for _, name := range allowed {
							if h.BackingFile == name && h.BackingFormat == "raw" {
								return nil
							}
						}
						return fmt.Errorf("the image names %q (%q), want one of %q", h.BackingFile, h.BackingFormat, allowed)
					},
				}
				exploreCrashes(t, sc)
			})
		}
	}
}

// exploreCrashes explores the crash states of a scenario; none may break a promise.
func exploreCrashes(t *testing.T, sc crashlab.Scenario) {
	t.Helper()
	r, err := crashlab.Explore(context.Background(), sc, crashlab.Options{States: fewer(800), Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Violations) > 0 {
		var text bytes.Buffer
		if err := r.WriteText(&text); err != nil {
			t.Fatal(err)
		}
		t.Fatal(text.String())
	}
	t.Logf("explored %d of %s states", r.Explored, r.Possible)
}
