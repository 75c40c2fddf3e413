package qcow2

import (
	"bytes"
	"testing"

	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/storage"
)

// TestEmptyDataFileLeaksNothing: an image with an external data file is emptied under the journal; a crash at any
// moment leaves no cluster counted that nothing refers to.
func TestEmptyDataFileLeaksNothing(t *testing.T) {
	lab, err := crashlab.NewLab(crashlab.FileSpec{Name: "image"}, crashlab.FileSpec{Name: "data"})
	if err != nil {
		t.Fatal(err)
	}
	files := lab.Files()
	if err := Create(files[0], CreateOptions{Size: 1 << 20, ClusterSize: 4096, DataFileName: "data", DataFile: files[1]}); err != nil {
		t.Fatal(err)
	}
	open := func(files []storage.File) *Image {
		im, err := Open(keepOpen{files[0]}, Options{Discipline: Journal, JournalSize: 1, DataFile: keepOpen{files[1]}, JournalCommitInterval: -1})
		if err != nil {
			t.Fatal(err)
		}
		return im
	}
	im := open(files)
	if _, err := im.WriteAt(bytes.Repeat([]byte{1}, 20000), 4096); err != nil {
		t.Fatal(err)
	}
	if err := im.Flush(); err != nil {
		t.Fatal(err)
	}
	lab.Settle()
	if err := im.Empty(); err != nil {
		t.Fatal(err)
	}
	states, err := lab.Crashes(crashlab.Model{Tear: 512}, 300, 1)
	if err != nil {
		t.Fatal(err)
	}
	for state := range states {
		files := state.Files()
		if err := open(files).Close(); err != nil {
			t.Fatal(err)
		}
		found := ""
		res, err := Check(files[0], CheckOptions{Report: func(f Finding) { found += f.Message + "\n" }})
		if err != nil || !res.Clean() {
			t.Fatalf("a crash at %d: %v, %+v\n%s%v", state.Event(), err, res, found, state.Describe())
		}
	}
}
