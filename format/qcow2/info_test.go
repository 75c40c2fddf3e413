package qcow2

import (
	"encoding/json"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
)

func TestReadInfoAgreesWithQEMU(t *testing.T) {
	testenv.Need(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	for _, tc := range []struct {
		options string
		bitmaps bool
		damage  []edit
	}{
		{options: "cluster_size=65536"},
		{options: "compat=0.10,cluster_size=512"},
		{options: "compression_type=zstd,lazy_refcounts=on,refcount_bits=1"},
		{options: "extended_l2=on,cluster_size=2M,refcount_bits=64"},
		{options: "backing_fmt=raw,backing_file=" + filepath.Join(dir, "base")},
		{options: "data_file=" + filepath.Join(dir, "data") + ",data_file_raw=on"},
		{options: "data_file=" + filepath.Join(dir, "data2")},
		{options: "cluster_size=4096", bitmaps: true},
		{options: "cluster_size=65536", damage: []edit{at64(72, 3)}},
		{options: "cluster_size=65536", damage: []edit{at64(24, 1<<20+100)}},
	} {
		t.Run(tc.options, func(t *testing.T) {
			testenv.Run(t, "qemu-img", "create", "-q", "-f", "raw", filepath.Join(dir, "base"), "1M")
			path := qemuCreate(t, tc.options, "1M")
			if tc.bitmaps {
				testenv.Run(t, "qemu-img", "bitmap", "--add", "-g", "512", path, "fine")
				testenv.Run(t, "qemu-img", "bitmap", "--add", "--disable", path, "off")
				testenv.Run(t, "qemu-img", "snapshot", "-c", "tag", path)
			}
			f := loadImage(t, path)
			apply(t, f, tc.damage...)
			saveImage(t, f, path)
			compareInfos(t, f, qemuInfo(t, path))
		})
	}
}

func compareInfos(t *testing.T, f storage.File, theirs map[string]any) {
	t.Helper()
	info, err := ReadInfo(f)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(info.Specific)
	if err != nil {
		t.Fatal(err)
	}
	var ours any
	if err := json.Unmarshal(raw, &ours); err != nil {
		t.Fatal(err)
	}
	if data := theirs["format-specific"].(map[string]any)["data"]; !reflect.DeepEqual(ours, data) {
		t.Errorf("ours   %v\ntheirs %v", ours, data)
	}
	text := func(v any) string {
		s, _ := v.(string)
		return s
	}
	if float64(info.VirtualSize) != theirs["virtual-size"] || float64(info.ClusterSize) != theirs["cluster-size"] ||
		info.Dirty != theirs["dirty-flag"] || info.BackingFile != text(theirs["backing-filename"]) ||
		info.BackingFormat != text(theirs["backing-filename-format"]) {
		t.Errorf("ours %+v\ntheirs %v", info, theirs)
	}
	list, _ := theirs["snapshots"].([]any)
	if len(list) != len(info.Snapshots) {
		t.Fatalf("%d snapshots, QEMU sees %d", len(info.Snapshots), len(list))
	}
	for i, s := range info.Snapshots {
		want := list[i].(map[string]any)
		got := map[string]any{
			"id": s.ID, "name": s.Name, "vm-state-size": float64(s.VMStateSize), "date-sec": float64(s.Seconds), "date-nsec": float64(s.Nanoseconds),
			"vm-clock-sec": float64(s.VMClock / 1e9), "vm-clock-nsec": float64(s.VMClock % 1e9), "icount": float64(s.ICount),
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("ours   %v\ntheirs %v", got, want)
		}
	}
}

func TestReadInfoRefuses(t *testing.T) {
	for name, f := range map[string]storage.File{
		"header":    headerEdits(plainDamage(), at32(0, 0))(t),
		"snapshots": snapshotEdits(at32(36, 4000))(t),
		"bitmaps":   headerEdits(plainDamage(), at64(88, 1), atExtensions(bitmapsExt(1, 0, 24, 20*4096)))(t),
	} {
		if _, err := ReadInfo(f); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	encrypted := headerEdits(plainDamage(), at32(32, 1))(t)
	if info, err := ReadInfo(encrypted); err != nil || !info.Encrypted {
		t.Errorf("encrypted: %+v, %v", info, err)
	}
}
