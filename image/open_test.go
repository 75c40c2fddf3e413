package image_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/image/gate"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
)

// create makes an image; o.Size 0 with a backing file takes its size.
func create(t testing.TB, format, name string, o image.CreateOptions) {
	t.Helper()
	if err := image.Create(t.Context(), format, name, o); err != nil {
		t.Fatal(err)
	}
}

func overlay(t testing.TB, name, backing, format string, size int64) {
	t.Helper()
	create(t, "qcow2", name, image.CreateOptions{
		CreateOptions: qcow2.CreateOptions{Size: size, BackingFile: backing, BackingFormat: format},
		BackingUnseen: size > 0,
	})
}

func sized(size int64) image.CreateOptions {
	return image.CreateOptions{CreateOptions: qcow2.CreateOptions{Size: size}}
}

func open(t testing.TB, name string, o image.Options) *image.Image {
	t.Helper()
	im, err := image.Open(t.Context(), name, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { im.Close() })
	return im
}

// write opens the image, writes n bytes of b at off, and closes it.
func write(t testing.TB, name, format string, b byte, off, n int64) {
	t.Helper()
	im := open(t, name, image.Options{Format: format})
	if _, err := im.WriteAt(bytes.Repeat([]byte{b}, int(n)), off); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
}

func contents(t testing.TB, d block.Device) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	if err := readFull(d, p); err != nil {
		t.Fatal(err)
	}
	return p
}

func readFull(d block.Device, p []byte) error {
	n, err := d.ReadAt(p, 0)
	if n == len(p) {
		return nil
	}
	return fmt.Errorf("read %d of %d bytes: %w", n, len(p), err)
}

func wantError(t *testing.T, what string, err error, want string) {
	t.Helper()
	if want = systemWords(want); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%s: error %v, want %q", what, err, want)
	}
}

// systemWords is as much of an error as the system that the tests run on says in the same words: windows has its own
// for a file that is missing.
func systemWords(want string) string {
	if runtime.GOOS == "windows" {
		want, _, _ = strings.Cut(want, "No such file or directory")
	}
	return want
}

func openError(t *testing.T, name string, o image.Options) error {
	t.Helper()
	im, err := image.Open(t.Context(), name, o)
	if err == nil {
		im.Close()
	}
	return err
}

const mib = 1 << 20

// TestChain builds raw <- qcow2 <- qcow2 with layers of different sizes, and compares with qemu-img.
func TestChain(t *testing.T) {
	for _, sizes := range [][3]int64{{mib, mib, mib}, {mib, 2 * mib, 3 * mib}, {3 * mib, 2 * mib, mib}, {mib + 512, 3 * mib, 2*mib + 512}} {
		t.Run(fmt.Sprint(sizes), func(t *testing.T) {
			t.Chdir(t.TempDir())
			if err := os.Mkdir("dir", 0o700); err != nil {
				t.Fatal(err)
			}
			create(t, "raw", "dir/base.raw", sized(sizes[0]))
			overlay(t, "dir/mid.qcow2", "base.raw", "raw", sizes[1])
			overlay(t, "dir/top.qcow2", "mid.qcow2", "qcow2", sizes[2])
			want := make([]byte, sizes[2])
			for i, layer := range []struct{ name, format string }{{"dir/base.raw", "raw"}, {"dir/mid.qcow2", "qcow2"}, {"dir/top.qcow2", "qcow2"}} {
				for k := range 6 {
					off := int64(k)*150000 + int64(i)*40000
					write(t, layer.name, layer.format, byte(1+i+16*k), off, 60000)
					copy(want[off:], bytes.Repeat([]byte{byte(1 + i + 16*k)}, 60000))
				}
			}
			write(t, "dir/base.raw", "raw", 99, sizes[0]-700, 700)
			if sizes[1] >= sizes[0] {
				copy(want[min(sizes[0]-700, sizes[2]):], bytes.Repeat([]byte{99}, 700))
			}
			im := open(t, "dir/top.qcow2", image.Options{ReadOnly: true})
			if got := contents(t, im); !bytes.Equal(got, want) {
				for i := range got {
					if got[i] != want[i] {
						t.Fatalf("byte %d is %d, want %d", i, got[i], want[i])
					}
				}
			}
			layers := im.Chain()
			if len(layers) != 3 || im.Format() != "qcow2" || im.Name() != "dir/top.qcow2" || im.Qcow2() == nil {
				t.Fatalf("%+v", layers)
			}
			for i, want := range []image.Layer{
				{Name: "dir/top.qcow2", Format: "qcow2", Size: sizes[2], ReadOnly: true, BackingFile: "mid.qcow2", BackingFormat: "qcow2", FullBacking: "dir/mid.qcow2"},
				{Name: "dir/mid.qcow2", Format: "qcow2", Size: sizes[1], ReadOnly: true, BackingFile: "base.raw", BackingFormat: "raw", FullBacking: "dir/base.raw"},
				{Name: "dir/base.raw", Format: "raw", Size: sizes[0], ReadOnly: true},
			} {
				if layers[i].FileSize < 1 {
					t.Errorf("layer %d: file size %d", i, layers[i].FileSize)
				}
				layers[i].FileSize = 0
				if layers[i] != want {
					t.Errorf("layer %d: %+v, want %+v", i, layers[i], want)
				}
			}
			testenv.Need(t, "qemu-img")
			if err := os.WriteFile("flat.raw", want, 0o600); err != nil {
				t.Fatal(err)
			}
			testenv.Run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", "dir/top.qcow2", "flat.raw")
			testenv.Run(t, "qemu-img", "check", "dir/top.qcow2")
		})
	}
}

func TestChainMadeByQEMU(t *testing.T) {
	testenv.Need(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	testenv.Run(t, "qemu-img", "create", "-q", "-f", "raw", "base.raw", "1M")
	testenv.Run(t, "qemu-io", "-f", "raw", "-c", "write -P 1 0 1M", "base.raw")
	testenv.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", `json:{"driver":"raw","offset":4096,"file":{"driver":"file","filename":"base.raw"}}`, "-F", "raw", "mid.qcow2")
	testenv.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", "2M")
	testenv.Run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 3 512k 64k", "top.qcow2")
	want := bytes.Repeat([]byte{1}, mib-4096)
	copy(want[512<<10:], bytes.Repeat([]byte{3}, 64<<10))
	want = append(want, make([]byte, mib+4096)...)
	for _, name := range []string{
		"top.qcow2", "file:top.qcow2", "driver=qcow2,file.filename=top.qcow2", `json:{"file.filename":"top.qcow2"}`,
		`json:{"driver":"qcow2","file":{"driver":"file","filename":"top.qcow2"},"backing":{"driver":"qcow2","file.filename":"mid.qcow2"}}`,
	} {
		im := open(t, name, image.Options{ReadOnly: true, Gate: gate.Any{}})
		if !bytes.Equal(contents(t, im), want) {
			t.Errorf("%s: contents differ", name)
		}
		im.Close()
		if n := len(im.Chain()); n != 3 {
			t.Errorf("%s: %d layers", name, n)
		}
	}
	wantError(t, "json reference through SameDirectory", openError(t, "top.qcow2", image.Options{}), "was refused")
}

func TestOpenLayersAlone(t *testing.T) {
	t.Chdir(t.TempDir())
	create(t, "raw", "base", sized(mib))
	create(t, "raw", "other", sized(mib))
	write(t, "base", "raw", 1, 0, mib)
	write(t, "other", "raw", 2, 0, mib)
	overlay(t, "top", "base", "raw", 0)
	for name, want := range map[string]byte{
		"top": 1,
		"driver=qcow2,file.filename=top,backing.driver=raw,backing.file.filename=other": 2,
		`json:{"driver":"qcow2","backing":null,"file":{"filename":"top"}}`:              0,
	} {
		im := open(t, name, image.Options{})
		if got := contents(t, im)[0]; got != want {
			t.Errorf("%s reads %d, want %d", name, got, want)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
	}
	im := open(t, "top", image.Options{NoBacking: true, ReadOnly: true})
	if got := contents(t, im)[0]; got != 0 || len(im.Chain()) != 1 || im.Chain()[0].BackingFile != "base" {
		t.Errorf("without backing: reads %d, %+v", got, im.Chain())
	}
	if im := open(t, "top", image.Options{Format: "raw", ReadOnly: true, Share: true}); im.Format() != "raw" || im.Qcow2() != nil || im.ProbedRaw() {
		t.Errorf("format raw by demand: %s", im.Format())
	}
	if im := open(t, `json:{"driver":"file","filename":"base"}`, image.Options{ReadOnly: true}); im.Format() != "file" {
		t.Errorf("protocol driver: %s", im.Format())
	}
}

func TestErrors(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	create(t, "raw", "base", sized(mib))
	overlay(t, "lost", "gone", "raw", mib)
	overlay(t, "lost2", "lost", "qcow2", mib)
	overlay(t, "strange", "foo:bar", "raw", mib)
	overlay(t, "other", "base", "raw", mib)
	patchBackingFormat(t, "other", "raw", "vdi")
	if err := os.WriteFile("vmdk", append([]byte("KDMV"), make([]byte, 1000)...), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name string
		o    image.Options
		want string
	}{
		{"none", image.Options{}, "Could not open 'none': Could not open 'none': No such file or directory"},
		{"foo:bar", image.Options{}, "Could not open 'foo:bar': Unknown protocol 'foo'"},
		{"lost", image.Options{}, "Could not open 'lost': Could not open backing file: Could not open 'gone': No such file or directory"},
		{"lost2", image.Options{}, "Could not open 'lost2': Could not open backing file: Could not open backing file: Could not open 'gone': No such file or directory"},
		{"strange", image.Options{Gate: gate.Any{}}, "Could not open backing file: Unknown protocol 'foo'"},
		{"other", image.Options{}, "Unknown driver 'vdi'"},
		{"base", image.Options{Format: "qcow2"}, "Image is not in qcow2 format"},
		{"base", image.Options{Format: "nope"}, "Unknown driver 'nope'"},
		{"vmdk", image.Options{}, `looks like an image in format "vmdk"`},
		{"driver=raw,file.filename=base", image.Options{Format: "qcow2"}, "the name says that the format is raw, the options say qcow2"},
		{"base", image.Options{DataFile: "x"}, "'data-file'"},
		{"base", image.Options{Share: true}, "force-share=on can only be used with read-only images"},
		{"driver=raw,file.filename=base,offset=2M", image.Options{}, "cannot be greater than size"},
		{`json:{"file.filename":"base","backing.file.filename":"x"}`, image.Options{}, "Block format 'raw' does not support the option 'backing'"},
	} {
		err := openError(t, test.name, test.o)
		wantError(t, test.name, err, test.want)
		var named *image.NameError
		if !errors.As(err, &named) || named.Name != test.name {
			t.Errorf("%s: error of type %T", test.name, err)
		}
	}
	if err := openError(t, "none", image.Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("errors.Is: %v", err)
	}
	// What is no file is named once, and said to be none.
	overlay(t, "over", "directory", "raw", mib)
	if err := os.Mkdir("directory", 0o700); err != nil {
		t.Fatal(err)
	}
	const noFile = "Could not open 'directory': want a regular file or a block device, found a directory"
	for name, want := range map[string]string{"directory": noFile, "over": "Could not open 'over': Could not open backing file: " + noFile} {
		err := openError(t, name, image.Options{})
		if err.Error() != want || !errors.Is(err, fs.ErrInvalid) || !errors.Is(err, syscall.EISDIR) || !errors.Is(err, storage.ErrKind) {
			t.Errorf("%s: %v", name, err)
		}
		var named *image.NameError
		if !errors.As(err, &named) || named.Name != name {
			t.Errorf("%s: error about %q", name, named.Name)
		}
	}
	err := image.Create(t.Context(), "qcow2", "directory", sized(mib))
	if !errors.Is(err, syscall.EISDIR) || strings.Count(err.Error(), "Could not") != 1 {
		t.Errorf("creating over a directory: %v", err)
	}
	if err := openError(t, "vmdk", image.Options{}); !errors.Is(err, image.ErrUnsupportedFormat) {
		t.Errorf("errors.Is: %v", err)
	}
	if im := open(t, "vmdk", image.Options{Format: "raw"}); im.ProbedRaw() {
		t.Error("a format that was given counts as guessed")
	}
	// Nothing may stay open, or locked, after an error.
	for _, name := range []string{"lost", "lost2", "other", "base"} {
		f, err := storage.Open(name, storage.OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := image.Open(ctx, "base", image.Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// patchBackingFormat overwrites the name of the backing format in the header with one of the same length.
func patchBackingFormat(t *testing.T, name, from, to string) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	ext := []byte("\xe2\x79\x2a\xca\x00\x00\x00\x03")
	if err := os.WriteFile(name, bytes.Replace(b, append(ext, from...), append(ext, to...), 1), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestCycles(t *testing.T) {
	t.Chdir(t.TempDir())
	overlay(t, "self", "self2", "qcow2", mib)
	overlay(t, "a", "b", "qcow2", mib)
	overlay(t, "b", "c", "qcow2", mib)
	overlay(t, "c", "a", "qcow2", mib)
	overlay(t, "d", "./sub/../d2", "qcow2", mib)
	if err := errors.Join(os.Mkdir("sub", 0o700), os.Link("d", "d2"), os.Symlink("self", "self2")); err != nil {
		t.Skipf("needs links: %v", err)
	}
	for _, name := range []string{"self", "a", "b", "d"} {
		for _, readOnly := range []bool{false, true} {
			err := openError(t, name, image.Options{ReadOnly: readOnly})
			if !errors.Is(err, image.ErrCycle) {
				t.Errorf("%s: %v, want a cycle", name, err)
			}
		}
	}
}

// TestDepth opens the longest chain that is allowed, and one layer more.
func TestDepth(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a thousand files")
	}
	t.Chdir(t.TempDir())
	create(t, "qcow2", "0000", image.CreateOptions{CreateOptions: qcow2.CreateOptions{Size: 1 << 16, ClusterSize: 512}})
	create(t, "qcow2", "0001", image.CreateOptions{CreateOptions: qcow2.CreateOptions{Size: 1 << 16, ClusterSize: 512, BackingFile: "0000", BackingFormat: "qcow2"}})
	template, err := os.ReadFile("0001")
	if err != nil {
		t.Fatal(err)
	}
	for i := 2; i <= image.MaxDepth; i++ {
		b := bytes.Replace(template, []byte("0000"), fmt.Appendf(nil, "%04d", i-1), 1)
		if err := os.WriteFile(fmt.Sprintf("%04d", i), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(t, "0000", "qcow2", 7, 1000, 1)
	im := open(t, fmt.Sprintf("%04d", image.MaxDepth-1), image.Options{ReadOnly: true})
	if n := len(im.Chain()); n != image.MaxDepth {
		t.Errorf("%d layers", n)
	}
	if b := contents(t, im); b[1000] != 7 {
		t.Error("the bottom layer is not reached")
	}
	wantError(t, "one layer more", openError(t, fmt.Sprintf("%04d", image.MaxDepth), image.Options{ReadOnly: true}), "more than 1024 layers")
}

// askGate records what it is asked.
type askGate struct {
	asked []gate.Reference
	no    bool
}

func (g *askGate) Allow(r gate.Reference) error {
	g.asked = append(g.asked, r)
	if g.no {
		return gate.ErrRefused
	}
	return nil
}

func TestGates(t *testing.T) {
	root := t.TempDir()
	in := filepath.Join(root, "in")
	if err := os.Mkdir(in, 0o700); err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(root, "secret")
	create(t, "raw", secret, sized(mib))
	create(t, "raw", filepath.Join(in, "base"), sized(mib))
	if err := os.Symlink(secret, filepath.Join(in, "link")); err != nil {
		t.Skipf("needs symbolic links: %v", err)
	}
	overlay(t, filepath.Join(in, "good"), "base", "raw", 0)
	overlay(t, filepath.Join(in, "over"), "good", "qcow2", mib)
	for name, backing := range map[string]string{
		"dots": "../secret", "absolute": secret, "linked": "link", "json": `json:{"driver":"raw","file.filename":"` + filepath.ToSlash(secret) + `"}`,
		"url": "nbd://localhost:1/x", "unix": "nbd+unix:///?socket=" + secret,
	} {
		overlay(t, filepath.Join(in, name), backing, "raw", mib)
		for _, g := range []gate.Gate{nil, gate.SameDirectory{}, gate.Deny{}} {
			if err := openError(t, filepath.Join(in, name), image.Options{Gate: g}); !errors.Is(err, gate.ErrRefused) {
				t.Errorf("%s through %T: %v, want it refused", name, g, err)
			}
		}
		if err := openError(t, filepath.Join(in, name), image.Options{Gate: gate.Any{}}); errors.Is(err, gate.ErrRefused) {
			t.Errorf("%s through Any: %v", name, err)
		}
		if err := openError(t, filepath.Join(in, name), image.Options{Gate: gate.Deny{}, NoBacking: true}); err != nil {
			t.Errorf("%s without its backing file: %v", name, err)
		}
	}
	if err := openError(t, filepath.Join(in, "over"), image.Options{}); err != nil {
		t.Errorf("a chain in one directory: %v", err)
	}
	if err := openError(t, filepath.Join(in, "base"), image.Options{Gate: gate.Deny{}}); err != nil {
		t.Errorf("an image that stands alone: %v", err)
	}
	g := &askGate{}
	if err := openError(t, filepath.Join(in, "over"), image.Options{Gate: g}); err != nil || len(g.asked) != 2 {
		t.Fatalf("%v, asked %+v", err, g.asked)
	}
	want := gate.Reference{Kind: gate.Backing, Image: filepath.Join(in, "good"), Protocol: gate.FileProtocol, Name: filepath.Join(in, "base")}
	if g.asked[1] != want {
		t.Errorf("asked %+v, want %+v", g.asked[1], want)
	}
	// What the caller names itself passes no gate.
	name := "driver=qcow2,file.filename=" + filepath.Join(in, "dots") + ",backing.driver=raw,backing.file.filename=" + secret
	if err := openError(t, name, image.Options{Gate: gate.Deny{}}); err != nil {
		t.Errorf("explicit backing file: %v", err)
	}
}

func TestDataFile(t *testing.T) {
	dir := t.TempDir()
	data := filepath.Join(dir, "data")
	named, nameless := filepath.Join(dir, "named"), filepath.Join(dir, "nameless")
	o := sized(mib)
	o.DataFileName = data
	create(t, "qcow2", named, o)
	write(t, named, "", 5, 4096, 100)
	if b, err := os.ReadFile(data); err != nil || b[4096] != 5 {
		t.Fatalf("the data file does not hold the data: %v", err)
	}
	if im := open(t, named, image.Options{ReadOnly: true}); im.Chain()[0].DataFile != data {
		t.Errorf("%+v", im.Chain()[0])
	} else {
		im.Close()
	}
	for _, kind := range []gate.Gate{gate.Deny{}, &askGate{no: true}} {
		if err := openError(t, named, image.Options{Gate: kind}); !errors.Is(err, gate.ErrRefused) {
			t.Errorf("refused data file: %v", err)
		}
	}
	f, err := storage.Open(nameless, storage.OpenOptions{Create: true})
	if err != nil {
		t.Fatal(err)
	}
	scratch := storage.NewMemory("scratch")
	if err := errors.Join(qcow2.Create(f, qcow2.CreateOptions{Size: mib, DataFile: scratch}), f.Close()); err != nil {
		t.Fatal(err)
	}
	wantError(t, "no data file", openError(t, nameless, image.Options{}), "'data-file' is required for this image")
	for _, open := range []error{
		openError(t, nameless, image.Options{DataFile: data, Gate: gate.Deny{}}),
		openError(t, "driver=qcow2,file.filename="+nameless+",data-file.filename="+data, image.Options{}),
	} {
		if open != nil {
			t.Error(open)
		}
	}
	if err := openError(t, nameless, image.Options{DataFile: nameless}); !errors.Is(err, image.ErrCycle) {
		t.Errorf("an image that is its own data file: %v", err)
	}
	plain := filepath.Join(dir, "plain")
	create(t, "qcow2", plain, sized(mib))
	wantError(t, "a data file for an image without", openError(t, plain, image.Options{DataFile: data}), "'data-file' can only be set")
	if err := os.Remove(data); err != nil {
		t.Fatal(err)
	}
	wantError(t, "lost data file", openError(t, named, image.Options{}), "Could not open '"+data+"': No such file or directory")
}

// TestProbedRawStaysRaw: a guest cannot turn a disk that was guessed to be raw into another format.
func TestProbedRawStaysRaw(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	create(t, "raw", path, sized(mib))
	header := []byte("QFI\xfb\x00\x00\x00\x03")
	im := open(t, path, image.Options{})
	if !im.ProbedRaw() {
		t.Error("not reported as guessed")
	}
	if _, err := im.WriteAt(header, 0); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("write of a qcow2 header: %v", err)
	}
	if _, err := im.WriteAt([]byte("\xeb\x63"), 0); err != nil {
		t.Errorf("write of a boot sector: %v", err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	im = open(t, path, image.Options{Format: "raw"})
	if _, err := im.WriteAt(header, 0); err != nil {
		t.Errorf("write with the format given: %v", err)
	}
}

// TestForeignAgreesWithProbe: the guard of package raw knows at least what probing finds.
func TestForeignAgreesWithProbe(t *testing.T) {
	for version := byte(2); version < 6; version++ {
		head := append([]byte{'Q', 'F', 'I', 0xfb, 0, 0, 0, version}, make([]byte, 504)...)
		m := storage.NewMemory("m")
		if _, err := m.WriteAt(head, 0); err != nil {
			t.Fatal(err)
		}
		if format, err := image.Probe(m); err != nil || format != "qcow2" {
			t.Errorf("version %d: %q, %v", version, format, err)
		}
	}
}

func TestLocks(t *testing.T) {
	t.Chdir(t.TempDir())
	create(t, "qcow2", "base", sized(mib))
	overlay(t, "one", "base", "qcow2", 0)
	overlay(t, "two", "base", "qcow2", 0)
	one := open(t, "one", image.Options{})
	two := open(t, "two", image.Options{}) // shares the backing file
	if err := openError(t, "base", image.Options{ReadOnly: true}); err != nil {
		t.Errorf("reading a backing file in use: %v", err)
	}
	for name, o := range map[string]image.Options{"base": {}, "one": {}, "two": {ReadOnly: true}} {
		if err := openError(t, name, o); !errors.Is(err, storage.ErrLocked) {
			t.Errorf("%s: %v, want it locked", name, err)
		}
	}
	if err := openError(t, "two", image.Options{ReadOnly: true, Share: true}); err != nil {
		t.Errorf("sharing: %v", err)
	}
	if err := image.Create(t.Context(), "qcow2", "base", sized(mib)); !errors.Is(err, storage.ErrLocked) {
		t.Errorf("creating over an image in use: %v", err)
	}
	if err := errors.Join(one.Close(), two.Close()); err != nil {
		t.Fatal(err)
	}
	base := open(t, "base", image.Options{})
	err := openError(t, "one", image.Options{ReadOnly: true})
	if !errors.Is(err, storage.ErrLocked) {
		t.Errorf("an overlay of a base that is written: %v", err)
	}
	if err := openError(t, "one", image.Options{ReadOnly: true, Share: true}); err != nil {
		t.Errorf("sharing reaches the backing file: %v", err)
	}
	base.Close()
	open(t, "one", image.Options{})
	testenv.Need(t, "qemu-img")
	out, err := exec.Command("qemu-img", "info", "one").CombinedOutput()
	if err == nil || !strings.Contains(string(out), `Failed to get shared "write" lock`) {
		t.Errorf("qemu-img info: %v, %s", err, out)
	}
}

// countingFile counts writes and Syncs.
type countingFile struct {
	storage.File
	writes, syncs *atomic.Int64
}

func (f countingFile) WriteAt(p []byte, off int64) (int, error) {
	f.writes.Add(1)
	return f.File.WriteAt(p, off)
}

func (f countingFile) Sync() error {
	f.syncs.Add(1)
	return f.File.Sync()
}

func TestOptionsReachTheFormats(t *testing.T) {
	t.Chdir(t.TempDir())
	create(t, "qcow2", "disk", sized(mib))
	create(t, "raw", "disk.raw", sized(mib))
	for _, test := range []struct {
		name string
		o    image.Options
		read bool
	}{
		{"disk", image.Options{}, false}, {"disk.raw", image.Options{}, false},
		{"disk", image.Options{Writethrough: true}, false}, {"disk.raw", image.Options{Writethrough: true}, false},
		{"driver=raw,file.filename=disk.raw,cache.writeback=off", image.Options{}, false},
		{"driver=raw,file.filename=disk.raw,read-only=on", image.Options{}, true},
		{"driver=raw,file.filename=disk.raw,read-only=off", image.Options{ReadOnly: true}, true},
		{"driver=qcow2,file.filename=disk,l2-cache-size=64k,refcount-cache-size=64k,discipline=ordered,discard=unmap", image.Options{}, false},
	} {
		var writes, syncs atomic.Int64
		test.o.Wrap = func(f storage.File) storage.File { return countingFile{f, &writes, &syncs} }
		im := open(t, test.name, test.o)
		if im.Limits().ReadOnly != test.read || im.Chain()[0].ReadOnly != test.read {
			t.Errorf("%s: read-only %v, want %v", test.name, im.Limits().ReadOnly, test.read)
		}
		_, err := im.WriteAt(bytes.Repeat([]byte{1}, 4096), 4096)
		if test.read {
			if !errors.Is(err, block.ErrReadOnly) {
				t.Errorf("%s: %v", test.name, err)
			}
			continue
		}
		if err != nil {
			t.Fatalf("%s: %v", test.name, err)
		}
		through := test.o.Writethrough || strings.Contains(test.name, "writeback=off")
		if through && syncs.Load() == 0 {
			t.Errorf("%s: no sync after a write through", test.name)
		}
		if err := im.Flush(); err != nil || writes.Load() == 0 || syncs.Load() == 0 {
			t.Errorf("%s: %v, %d writes and %d syncs were seen", test.name, err, writes.Load(), syncs.Load())
		}
		if im.File() == nil || im.File().Name() == "" {
			t.Error("no file")
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
	}
	wantError(t, "unknown discipline", openError(t, "disk", image.Options{Discipline: "none such"}), "none such")
}

func TestDirect(t *testing.T) {
	dir := t.TempDir()
	disk, base := filepath.Join(dir, "disk"), filepath.Join(dir, "base")
	create(t, "raw", base, sized(mib))
	write(t, base, "raw", 1, 0, mib)
	overlay(t, disk, "base", "raw", 0)
	im, err := image.Open(t.Context(), disk, image.Options{Direct: true})
	if errors.Is(err, errors.ErrUnsupported) {
		testenv.Missing(t, "a temporary directory on a file system with direct I/O")
	}
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{1}, mib)
	for off := int64(777); off < mib-3000; off += 100003 {
		p := bytes.Repeat([]byte{byte(off)}, 3000)
		if _, err := im.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
		copy(want[off:], p)
	}
	if !bytes.Equal(contents(t, im), want) {
		t.Error("contents differ")
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(contents(t, open(t, disk, image.Options{ReadOnly: true})), want) {
		t.Error("contents differ without direct I/O")
	}
	testenv.Need(t, "qemu-img")
	testenv.Run(t, "qemu-img", "check", disk)
}
