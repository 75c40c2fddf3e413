package image_test

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/internal/testenv"
)

func TestCreate(t *testing.T) {
	t.Chdir(t.TempDir())
	create(t, "raw", "base.raw", sized(mib+512))
	for _, test := range []struct {
		name, format string
		o            image.CreateOptions
		size         int64
	}{
		{"plain.qcow2", "qcow2", sized(mib), mib},
		{"odd.qcow2", "qcow2", sized(1000), 1024},
		{"odd.raw", "raw", sized(1000), 1024},
		{"empty.raw", "raw", sized(0), 0},
		{"full.raw", "raw", image.CreateOptions{CreateOptions: qcow2.CreateOptions{Size: mib, Preallocation: block.PreallocFull}, NoCoW: true}, mib},
		{"over.qcow2", "qcow2", image.CreateOptions{CreateOptions: qcow2.CreateOptions{Size: -1, BackingFile: "base.raw", BackingFormat: "raw"}}, mib + 512},
		{"over0.qcow2", "qcow2", image.CreateOptions{CreateOptions: qcow2.CreateOptions{BackingFile: "base.raw", BackingFormat: "raw"}}, mib + 512},
		{"larger.qcow2", "qcow2", image.CreateOptions{CreateOptions: qcow2.CreateOptions{Size: 3 * mib, BackingFile: "base.raw", BackingFormat: "raw"}}, 3 * mib},
		{"unseen.qcow2", "qcow2", image.CreateOptions{CreateOptions: qcow2.CreateOptions{Size: mib, BackingFile: "none", BackingFormat: "raw"}, BackingUnseen: true}, mib},
		{"v2.qcow2", "qcow2", image.CreateOptions{CreateOptions: qcow2.CreateOptions{Size: mib, Version: 2, ClusterSize: 512}}, mib},
	} {
		resolved, err := image.ResolveCreate(t.Context(), test.format, test.name, test.o)
		if err != nil || (resolved.Size+511)/512*512 != test.size {
			t.Errorf("%s: resolved size %d, %v, want %d", test.name, resolved.Size, err, test.size)
		}
		if _, err := os.Stat(test.name); err == nil {
			t.Errorf("%s: ResolveCreate made a file", test.name)
		}
		create(t, test.format, test.name, test.o)
		im := open(t, test.name, image.Options{ReadOnly: true, NoBacking: true})
		if im.Size() != test.size || im.Format() != test.format {
			t.Errorf("%s: %s of %d bytes, want %d", test.name, im.Format(), im.Size(), test.size)
		}
		im.Close()
	}
	create(t, "raw", "plain.qcow2", sized(4096)) // over an existing file
	if info, err := os.Stat("plain.qcow2"); err != nil || info.Size() != 4096 {
		t.Errorf("%v, %v", info, err)
	}
	testenv.Need(t, "qemu-img")
	var got struct {
		Size    int64  `json:"virtual-size"`
		Backing string `json:"full-backing-filename"`
		Format  string `json:"backing-filename-format"`
	}
	if err := json.Unmarshal([]byte(testenv.Run(t, "qemu-img", "info", "--output=json", "larger.qcow2")), &got); err != nil {
		t.Fatal(err)
	}
	if got.Size != 3*mib || got.Backing != "base.raw" || got.Format != "raw" {
		t.Errorf("qemu-img sees %+v", got)
	}
}

func TestCreateErrors(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	create(t, "qcow2", "base", sized(mib))
	create(t, "qcow2", "middle", image.CreateOptions{CreateOptions: qcow2.CreateOptions{Size: mib, BackingFile: "base", BackingFormat: "qcow2"}})
	backed := func(size int64, file, format string) image.CreateOptions {
		return image.CreateOptions{CreateOptions: qcow2.CreateOptions{Size: size, BackingFile: file, BackingFormat: format}}
	}
	unseen := backed(-1, "base", "qcow2")
	unseen.BackingUnseen = true
	formatless := backed(mib, "base", "")
	formatless.BackingUnseen = true
	badCluster := sized(mib)
	badCluster.ClusterSize = 1000
	badData := sized(mib)
	badData.DataFileName = "no/data"
	sameData := sized(mib)
	sameData.DataFileName = "new"
	overBase := backed(-1, "middle", "qcow2")
	overBase.DataFileName = "file:base"
	for _, test := range []struct {
		name, format string
		o            image.CreateOptions
		want         string
	}{
		{"new", "nope", sized(mib), "Unknown file format 'nope'"},
		{"new", "qcow2", sized(-1), "Image creation needs a size parameter"},
		{"new", "raw", sized(-1), "Image creation needs a size parameter"},
		{"new", "raw", backed(mib, "base", "qcow2"), "Backing file not supported for file format 'raw'"},
		{"new", "qcow2", backed(-1, "none", "qcow2"), "Could not open 'none': No such file or directory\nCould not open backing image."},
		{"new", "qcow2", backed(mib, "none", "raw"), "Could not open backing image."},
		{"new", "qcow2", backed(-1, "base", "nope"), "Unknown driver 'nope'"},
		{"new", "qcow2", backed(-1, "base", ""), "Backing file specified without backing format\nDetected format of qcow2."},
		{"new", "qcow2", formatless, "Backing file specified without backing format"},
		{"new", "qcow2", unseen, "Image creation needs a size parameter"},
		{"new", "qcow2", backed(-1, "foo:x", "raw"), "Unknown protocol 'foo'"},
		{"base", "qcow2", backed(-1, "base", "qcow2"), "Trying to create an image with the same filename as the backing file"},
		{"./base", "qcow2", backed(-1, filepath.Join(dir, "base"), "qcow2"), "Trying to create an image with the same filename as the backing file"},
		{"base", "qcow2", backed(-1, "middle", "qcow2"), "Trying to create 'base', which is a file of the backing chain"},
		{"new", "qcow2", overBase, "Trying to create 'base', which is a file of the backing chain"},
		{"no/new", "qcow2", sized(mib), "Could not create 'no/new': No such file or directory"},
		{dir, "qcow2", sized(mib), "found a directory"},
		{"foo:x", "qcow2", sized(mib), "Unknown protocol 'foo'"},
		{"nbd://localhost:1/x", "raw", sized(mib), "refused"},
		{"nbd://localhost/x", "fvd", sized(mib), "Protocol driver 'nbd' does not support image creation"},
		{"new", "qcow2", badCluster, "luster"},
		{"new", "qcow2", badData, "Could not create 'no/data'"},
		{"new", "qcow2", sameData, "is the image itself"},
		{"new", "raw", image.CreateOptions{CreateOptions: qcow2.CreateOptions{Size: mib, Preallocation: block.PreallocMetadata}}, "Unsupported preallocation mode"},
		{"new", "raw", sized(1<<63 - 1), "9223372036854775807"},
	} {
		err := image.Create(t.Context(), test.format, test.name, test.o)
		if err == nil || !strings.Contains(err.Error(), systemWords(test.want)) {
			t.Errorf("%s %s %+v:\n\t%v, want %q", test.format, test.name, test.o.CreateOptions, err, test.want)
		}
		if _, err := os.Stat("new"); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("%s %+v: a file is left", test.format, test.o.CreateOptions)
		}
	}
	if im := open(t, "base", image.Options{ReadOnly: true}); im.Size() != mib {
		t.Error("a refused create changed an existing image")
	}
}
