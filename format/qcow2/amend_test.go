package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
)

func setting(on bool) *bool { return &on }

// TestAmend: what was asked for is in the header, the disk is the same, and stock qemu-img agrees.
func TestAmend(t *testing.T) {
	const size = 1 << 20
	lazyOn, lazyOff := Amendment{LazyRefcounts: setting(true)}, Amendment{LazyRefcounts: setting(false)}
	upgrade := Amendment{Version: 3}
	for _, tc := range []struct {
		name    string
		create  CreateOptions
		amend   []Amendment
		version uint32
		lazy    bool
		raw     bool
	}{
		{"lazy on", CreateOptions{}, []Amendment{lazyOn}, 3, true, false},
		{"lazy on and off", CreateOptions{LazyRefcounts: true}, []Amendment{lazyOff}, 3, false, false},
		{"upgrade", CreateOptions{Version: 2}, []Amendment{upgrade}, 3, false, false},
		{"upgrade tiny", CreateOptions{Version: 2, ClusterSize: 512}, []Amendment{upgrade}, 3, false, false},
		{"upgrade and lazy", CreateOptions{Version: 2}, []Amendment{{Version: 3, LazyRefcounts: setting(true)}}, 3, true, false},
		{"upgrade with backing", CreateOptions{Version: 2, BackingFile: "base", BackingFormat: "raw"}, []Amendment{upgrade, lazyOn}, 3, true, false},
		{"nothing new", CreateOptions{RefcountBits: 8}, []Amendment{{Version: 3, RefcountBits: 8, LazyRefcounts: setting(false)}}, 3, false, false},
		{"as it was", CreateOptions{Version: 2}, []Amendment{{Version: 2, LazyRefcounts: setting(false)}}, 2, false, false},
		{"raw data off", CreateOptions{DataFileName: "data", DataFileRaw: true}, []Amendment{{DataFileRaw: setting(false)}}, 3, false, false},
		{"raw data stays", CreateOptions{DataFileName: "data", DataFileRaw: true}, []Amendment{{DataFileRaw: setting(true)}, lazyOn}, 3, true, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f, data := storage.NewMemory("image"), storage.NewMemory("data")
			tc.create.Size = size
			o := Options{}
			if tc.create.DataFileName != "" {
				tc.create.DataFile, o.DataFile = keepOpen{data}, keepOpen{data}
			}
			if tc.create.BackingFile != "" {
				tc.create.BackingSize, o.Backing = size, newBacking(1, size)
			}
			if err := Create(f, tc.create); err != nil {
				t.Fatal(err)
			}
			im, err := Open(keepOpen{f}, o)
			if err != nil {
				t.Fatal(err)
			}
			p := bytes.Repeat([]byte{5}, 100<<10)
			if _, err := im.WriteAt(p, 3000); err != nil {
				t.Fatal(err)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			before, err := ReadHeader(f)
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range tc.amend {
				if err := Amend(f, a); err != nil {
					t.Fatal(err)
				}
			}
			h, err := ReadHeader(f)
			if err != nil {
				t.Fatal(err)
			}
			if h.Version != tc.version || h.Compatible&CompatLazyRefcounts != 0 != tc.lazy || h.Autoclear&AutoclearRawData != 0 != tc.raw {
				t.Errorf("version %d, compatible %#x, autoclear %#x", h.Version, h.Compatible, h.Autoclear)
			}
			if h.BackingFile != before.BackingFile || h.BackingFormat != before.BackingFormat || h.DataFile != before.DataFile || h.L1Offset != before.L1Offset {
				t.Errorf("something else changed: %+v, before %+v", h, before)
			}
			if im, err = Open(keepOpen{f}, o); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(p))
			if _, err := im.ReadAt(got, 3000); err != nil || !bytes.Equal(got, p) {
				t.Errorf("the disk changed (%v)", err)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			checkClean(t, f)
			testenv.Need(t, "qemu-img")
			path := filepath.Join(t.TempDir(), "image.qcow2")
			saveImage(t, f, path)
			if o.DataFile == nil && o.Backing == nil {
				qemuMustAgree(t, path)
			}
			info := testenv.Run(t, "qemu-img", "info", "-U", "--output=json", "json:"+`{"driver":"qcow2","file":{"driver":"file","filename":"`+path+`"},"backing":null,"data-file":{"driver":"null-co"}}`)
			for text, want := range map[string]bool{
				`"compat": "1.1"`: tc.version == 3, `"compat": "0.10"`: tc.version == 2,
				`"lazy-refcounts": true`: tc.lazy, `"data-file-raw": true`: tc.raw,
			} {
				if strings.Contains(info, text) != want {
					t.Errorf("qemu-img info shows %s: %v, want %v\n%s", text, !want, want, info)
				}
			}
		})
	}
}

// TestAmendRecovers: an image that was not closed is made whole first.
func TestAmendRecovers(t *testing.T) {
	for _, how := range []string{Lazy, Journal} {
		f := storage.NewMemory("image")
		if err := Create(f, CreateOptions{Size: 1 << 20, ClusterSize: 4096}); err != nil {
			t.Fatal(err)
		}
		im, err := Open(keepOpen{f}, Options{Discipline: how, JournalSize: 1})
		if err != nil {
			t.Fatal(err)
		}
		p := bytes.Repeat([]byte{5}, 64<<10)
		if _, err := im.WriteAt(p, 4096); err != nil {
			t.Fatal(err)
		}
		if err := im.Flush(); err != nil {
			t.Fatal(err)
		}
		crashed := copyImage(t, f)
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		if err := Amend(crashed, Amendment{LazyRefcounts: setting(how != Lazy)}); err != nil {
			t.Fatal(err)
		}
		checkClean(t, crashed)
		h, err := ReadHeader(crashed)
		if err != nil || h.Incompatible != 0 || h.Compatible&CompatLazyRefcounts != 0 != (how != Lazy) {
			t.Errorf("%s: incompatible features %#x, compatible %#x, %v", how, h.Incompatible, h.Compatible, err)
		}
	}
}

func TestAmendRefuses(t *testing.T) {
	for _, tc := range []struct {
		create      CreateOptions
		a           Amendment
		want        string
		unsupported bool
	}{
		{CreateOptions{}, Amendment{Version: 2}, "cannot go back", true},
		{CreateOptions{}, Amendment{Version: 4}, "want 2 or 3", false},
		{CreateOptions{}, Amendment{RefcountBits: 8}, "the image has 16", true},
		{CreateOptions{}, Amendment{DataFileRaw: setting(true)}, "data-file-raw cannot be set on existing images", false},
		{CreateOptions{Version: 2}, Amendment{LazyRefcounts: setting(true)}, "compatibility level 1.1 and above", false},
	} {
		f := storage.NewMemory("image")
		tc.create.Size = 1 << 20
		if err := Create(f, tc.create); err != nil {
			t.Fatal(err)
		}
		before := copyImage(t, f)
		err := Amend(f, tc.a)
		if err == nil || !strings.Contains(err.Error(), tc.want) || errors.Is(err, errors.ErrUnsupported) != tc.unsupported {
			t.Errorf("%+v: %v, want %q", tc.a, err, tc.want)
		}
		p, q := make([]byte, fileSize(t, f)), make([]byte, fileSize(t, before))
		if err := errors.Join(storage.ReadFull(f, p, 0), storage.ReadFull(before, q, 0)); err != nil || !bytes.Equal(p, q) {
			t.Errorf("%+v: the image changed (%v)", tc.a, err)
		}
	}
}

// TestAmendSnapshots: entries of snapshots that are too short for version 3 keep an image at version 2.
func TestAmendSnapshots(t *testing.T) {
	f := storage.NewMemory("image")
	im := filled(t, f, CreateOptions{Size: 8 << 20, ClusterSize: 4096, Version: 2}, Options{})
	if _, err := im.CreateSnapshot("s", SnapshotOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	long := copyImage(t, f)
	if err := Amend(long, Amendment{Version: 3}); err != nil {
		t.Error(err)
	}
	checkClean(t, long)
	h, err := ReadHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	list, _, err := readSnapshots(f, h)
	if err != nil {
		t.Fatal(err)
	}
	short := appendSnapshot(nil, &list[0])
	short = append(short[:snapshotFixedSize], short[snapshotFixedSize+snapshotKnown:]...)
	copy(short[36:40], make([]byte, 4)) // no extra data
	if _, err := f.WriteAt(short, int64(h.SnapshotsOffset)); err != nil {
		t.Fatal(err)
	}
	if err := Amend(f, Amendment{Version: 3}); !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(fmt.Sprint(err), "extra data") {
		t.Errorf("%v, want one about extra data", err)
	}
}

// amendSubject is an image that is closed to be amended, and opened again.
type amendSubject struct {
	*Image
	open func() (*Image, error)
	file storage.File
}

func (s *amendSubject) WriteZeroes(off, length int64, unmap bool) error {
	return s.Image.WriteZeroes(off, length, block.MayUnmap)
}

func (s *amendSubject) Check() error { return nil }

func (s *amendSubject) amend(a Amendment) error {
	if err := s.Close(); err != nil {
		return err
	}
	if err := Amend(s.file, a); err != nil {
		return err
	}
	im, err := s.open()
	s.Image = im
	return err
}

// TestAmendCrash: at every instant, torn writes of the header included, an image is of one version or the other with
// the same disk and backing file, and of the new one once Amend has returned.
func TestAmendCrash(t *testing.T) {
	const size = 16 << 10
	for _, c := range []struct {
		cluster int64
		name    string
	}{{512, "base"}, {1024, strings.Repeat("n", 500)}, {2048, strings.Repeat("n", 1000)}, {8192, "base"}, {8192, strings.Repeat("n", 1000)}} {
		t.Run(fmt.Sprintf("%d-%d", c.cluster, len(c.name)), func(t *testing.T) {
			base := newBacking(1, size)
			open := func(f storage.File) (*Image, error) {
				return Open(keepOpen{f}, Options{Backing: base, Reserve: 2})
			}
			sc := crashlab.Scenario{
				Name:  t.Name(),
				Files: []crashlab.FileSpec{{Name: "image"}},
				Prepare: func(files []storage.File) error {
					return Create(files[0], CreateOptions{
						Size: size, ClusterSize: c.cluster, Version: 2, BackingFile: c.name, BackingFormat: "raw", BackingSize: size,
					})
				},
				Open: func(files []storage.File) (crashlab.Subject, error) {
					again := func() (*Image, error) { return open(files[0]) }
					im, err := again()
					return &amendSubject{im, again, files[0]}, err
				},
				Work: func(g *crashlab.Guest) error {
					s := g.Subject().(*amendSubject)
					if err := g.Write(1024, 512); err != nil {
						return err
					}
					if err := g.FlushWith("upgrade", func() error { return s.amend(Amendment{Version: 3}) }); err != nil {
						return err
					}
					if err := g.FlushWith("set lazy", func() error { return s.amend(Amendment{LazyRefcounts: setting(true)}) }); err != nil {
						return err
					}
					return g.Write(8192, 512)
				},
				Judge: func(s crashlab.Subject, at crashlab.Moment) error {
					h := s.(*amendSubject).Header()
					lowest, lazy := uint32(2), false
					for _, m := range at.Marks() {
						if strings.HasPrefix(m.Text, "answered: upgrade") {
							lowest = 3
						}
						lazy = lazy || strings.HasPrefix(m.Text, "answered: set lazy")
					}
					if h.Version < lowest || h.Version > 3 || lazy && h.Compatible&CompatLazyRefcounts == 0 || h.BackingFile != c.name || h.BackingFormat != "raw" {
						return fmt.Errorf("version %d (want %d to 3), compatible features %#x, backing file %q (%q)",
							h.Version, lowest, h.Compatible, h.BackingFile, h.BackingFormat)
					}
					return nil
				},
			}
			exploreCrashes(t, sc)
		})
	}
}
