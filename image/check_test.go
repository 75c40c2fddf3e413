package image_test

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/image/gate"
	"github.com/platter-disk/platter/storage"
)

// leakyQcow2 makes a qcow2 image with a leaked cluster.
func leakyQcow2(t *testing.T, path string) {
	t.Helper()
	create(t, "qcow2", path, sized(mib))
	patch(t, path, 0x20012, 0, 1)
	if err := os.Truncate(path, 0xa0000); err != nil {
		t.Fatal(err)
	}
}

// leakyFVD makes an FVD image in which the first chunk is not named any more.
func leakyFVD(t *testing.T, path, data string) {
	t.Helper()
	create(t, "fvd", path, fvdOptions(4*mib, "", "", data, fvd.CreateOptions{Compact: true}))
	write(t, path, "", 'x', 0, 4*mib)
	f := openFile(t, path)
	h, err := fvd.ReadHeader(f)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	patch(t, path, int64(h.TableOffset), 0xff, 0xff, 0xff, 0xff) // EMPTY
}

// Check finds and repairs in every format that has tables, under any name, with what the format keeps elsewhere.
func TestCheck(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	leakyQcow2(t, at("a.qcow2"))
	leakyQcow2(t, at("b.qcow2"))
	leakyFVD(t, at("a.fvd"), "")
	leakyFVD(t, at("data.fvd"), "data.raw")
	for _, test := range []struct {
		name   string
		o      image.Options
		format string
		leaks  int64
	}{
		{at("a.qcow2"), image.Options{}, "qcow2", 1},
		{"driver=qcow2,file.filename=" + at("b.qcow2"), image.Options{}, "qcow2", 1},
		{at("a.fvd"), image.Options{Format: "fvd"}, "fvd", 1},
		{at("data.fvd"), image.Options{}, "fvd", 1},
	} {
		counts := func(r *image.CheckResult) (leaks, fixed int64) {
			if r.Format != test.format || (r.Qcow2 != nil) != (test.format == "qcow2") || (r.FVD != nil) != (test.format == "fvd") {
				t.Errorf("%s: result %+v", test.name, r)
			}
			if r.FVD != nil {
				return r.FVD.Leaks, r.FVD.LeaksFixed
			}
			if r.Qcow2.Filename != test.name {
				t.Errorf("the result is called %s", r.Qcow2.Filename)
			}
			return r.Qcow2.Leaks, r.Qcow2.LeaksFixed
		}
		var writes, syncs atomic.Int64
		test.o.Wrap = func(f storage.File) storage.File { return countingFile{f, &writes, &syncs} }
		var found []qcow2.Finding
		report := func(f qcow2.Finding) { found = append(found, f) }
		result, err := image.Check(t.Context(), test.name, test.o, image.CheckOptions{Report: report})
		if err != nil {
			t.Fatal(err)
		}
		leaks, _ := counts(result)
		if result.Clean() || result.Damaged() != 0 || leaks != test.leaks || writes.Load() != 0 {
			t.Errorf("%s: %d leaks, clean %v, %d writes", test.name, leaks, result.Clean(), writes.Load())
		}
		if test.format == "qcow2" && (len(found) != 1 || found[0].Kind != qcow2.FindingLeak) {
			t.Errorf("%s: findings %v", test.name, found)
		}
		if text, err := json.Marshal(result); err != nil || !strings.Contains(string(text), `"format":"`+test.format+`","`+test.format+`":{`) {
			t.Errorf("%s, %v", text, err)
		}
		result, err = image.Check(t.Context(), test.name, test.o, image.CheckOptions{Repair: image.RepairLeaks})
		if err != nil {
			t.Fatal(err)
		}
		if leaks, fixed := counts(result); leaks != 0 || fixed != test.leaks || !result.Clean() {
			t.Errorf("%s: after the repair %d leaks, %d fixed", test.name, leaks, fixed)
		}
		result, err = image.Check(t.Context(), test.name, test.o, image.CheckOptions{Repair: image.RepairAll})
		if err != nil || !result.Clean() {
			t.Errorf("%s: checked again: %v", test.name, err)
		}
	}
}

// Damaged counts what is corrupt, in any format, and no more once it is repaired.
func TestCheckDamaged(t *testing.T) {
	t.Chdir(t.TempDir())
	create(t, "qcow2", "disk.qcow2", sized(mib))
	patch(t, "disk.qcow2", 0x20006, 0, 0) // a cluster in use counts as free
	create(t, "fvd", "disk.fvd", fvdOptions(4*mib, "", "", "", fvd.CreateOptions{Compact: true}))
	write(t, "disk.fvd", "", 'x', 0, 4*mib)
	f := openFile(t, "disk.fvd")
	h, err := fvd.ReadHeader(f)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	patch(t, "disk.fvd", int64(h.TableOffset), 0, 0, 0xff, 0) // the first chunk lies far past the end
	for _, name := range []string{"disk.qcow2", "disk.fvd"} {
		for i, repair := range []image.Repair{image.RepairNone, image.RepairAll, image.RepairNone} {
			result, err := image.Check(t.Context(), name, image.Options{}, image.CheckOptions{Repair: repair})
			if err != nil {
				t.Fatal(err)
			}
			if want := i == 0; want != (result.Damaged() > 0) || result.Clean() == want {
				t.Errorf("%s, repair %s: %d places are damaged, clean %v", name, repair, result.Damaged(), result.Clean())
			}
		}
	}
}

func TestCheckErrors(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	create(t, "qcow2", "good.qcow2", sized(mib))
	create(t, "qcow2", "locked.qcow2", sized(mib))
	create(t, "raw", "raw", sized(mib))
	create(t, "fvd", "good.fvd", fvdOptions(mib, "", "", "", fvd.CreateOptions{Compact: true}))
	create(t, "fvd", "data.fvd", fvdOptions(mib, "", "", "data", fvd.CreateOptions{}))
	create(t, "qcow2", "header.qcow2", sized(mib))
	patch(t, "header.qcow2", 4, 0, 0, 0, 9)
	leakyQcow2(t, "failing.qcow2")
	patch(t, "failing.qcow2", 60, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0x23, 0x45) // a snapshot table that is not aligned
	holder := openFile(t, "locked.qcow2")
	defer holder.Close()
	ended, cancel := context.WithCancel(t.Context())
	cancel()

	invalid := func(err error) bool { return image.IsInvalid(err) }
	is := func(target error) func(error) bool { return func(err error) bool { return errors.Is(err, target) } }
	for _, test := range []struct {
		name string
		ctx  context.Context
		o    image.Options
		co   image.CheckOptions
		is   func(error) bool
		want string
	}{
		{name: "none", is: is(fs.ErrNotExist), want: "Could not open 'none': Could not open 'none': No such file or directory"},
		{name: "raw", is: is(image.ErrNoChecker), want: "Could not check 'raw': raw: the image format has nothing to check"},
		{name: "raw", is: is(errors.ErrUnsupported)},
		{name: "raw", o: image.Options{Format: "qcow2"}, is: invalid, want: "Could not open 'raw': "},
		{name: "raw", o: image.Options{Format: "vdi"}, is: is(image.ErrUnsupportedFormat), want: "Unknown driver 'vdi'"},
		{name: "driver=fvd,file.filename=good.fvd", o: image.Options{Format: "qcow2"}, want: "the name says that the format is fvd"},
		{name: "header.qcow2", is: invalid, want: "Could not open 'header.qcow2': "},
		{name: "raw", o: image.Options{Format: "fvd"}, is: invalid, want: "Could not check 'raw': "},
		{name: "failing.qcow2", is: func(err error) bool { return errors.As(err, new(*qcow2.CheckFailure)) }, want: "Could not check 'failing.qcow2': "},
		{name: "locked.qcow2", is: is(storage.ErrLocked)},
		{name: "good.qcow2", ctx: ended, is: is(context.Canceled)},
		{name: "good.fvd", ctx: ended, is: is(context.Canceled)},
		{name: "good.qcow2", o: image.Options{ReadOnly: true}, co: image.CheckOptions{Repair: image.RepairAll}, is: is(block.ErrReadOnly)},
		{name: "good.fvd", o: image.Options{ReadOnly: true, Share: true}, co: image.CheckOptions{Repair: image.RepairAll}, want: "force-share=on"},
		{name: "good.fvd", co: image.CheckOptions{Repair: image.RepairAll, DiscardJournal: true}, is: is(errors.ErrUnsupported), want: "qcow2"},
		{name: "good.qcow2", co: image.CheckOptions{Memory: 1}, is: is(qcow2.ErrCheckMemory)},
		{name: "good.fvd", co: image.CheckOptions{Memory: 1}, is: is(fvd.ErrMaxMetadata)},
		{name: "good.fvd", o: image.Options{MaxMetadata: 1}, is: is(fvd.ErrMaxMetadata)},
		{name: "data.fvd", o: image.Options{Gate: gate.Deny{}}, is: is(gate.ErrRefused)},
	} {
		if test.ctx == nil {
			test.ctx = t.Context()
		}
		result, err := image.Check(test.ctx, test.name, test.o, test.co)
		var named *image.NameError
		if !errors.As(err, &named) || named.Name != test.name || result != nil || test.is != nil && !test.is(err) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s, %+v, %+v: %v, want %q", test.name, test.o, test.co, err, test.want)
		}
	}
	// What somebody is writing may be looked at, and nothing that was opened stays so.
	if _, err := image.Check(t.Context(), "locked.qcow2", image.Options{Share: true}, image.CheckOptions{}); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"good.qcow2", "good.fvd", "data.fvd", "data", "failing.qcow2", "raw"} {
		if err := openFile(t, name).Close(); err != nil {
			t.Error(err)
		}
	}
}

// endsAt is a file with which a context ends: at its n-th read.
type endsAt struct {
	storage.File
	n   *atomic.Int64
	end context.CancelFunc
}

func (f endsAt) ReadAt(p []byte, off int64) (int, error) {
	if f.n.Add(-1) == 0 {
		f.end()
	}
	return f.File.ReadAt(p, off)
}

// A check that has begun ends with its context.
func TestCheckEndsWithContext(t *testing.T) {
	dir := t.TempDir()
	for _, format := range []string{"qcow2", "fvd"} {
		path := filepath.Join(dir, format)
		o := fvdOptions(mib, "", "", "", fvd.CreateOptions{Compact: true})
		create(t, format, path, o)
		for n := int64(1); n <= 2; n++ { // probing, the header
			ctx, cancel := context.WithCancel(t.Context())
			var left atomic.Int64
			left.Store(n)
			wrap := func(f storage.File) storage.File { return endsAt{f, &left, cancel} }
			_, err := image.Check(ctx, path, image.Options{Wrap: wrap}, image.CheckOptions{})
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%s, ended with read %d: %v", format, n, err)
			}
			cancel()
		}
	}
}
