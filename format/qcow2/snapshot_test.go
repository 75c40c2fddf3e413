package qcow2

import (
	"encoding/hex"
	"errors"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/platter-disk/platter/storage"
)

// snapshotVector is the snapshot table entry of the test vector in the qcow2 notes.
const snapshotVector = "0000000000150000000000020001000" + "26b015c4526abc3d80000000000000000" +
	"0000000000000018" + "0000000000000000" + "0000000040000000" + "0000000000000000" + "317332"

func TestDecodeSnapshotVector(t *testing.T) {
	raw, err := hex.DecodeString(snapshotVector)
	if err != nil {
		t.Fatal(err)
	}
	s, n, err := decodeSnapshot(raw)
	if err != nil {
		t.Fatal(err)
	}
	want := Snapshot{
		L1Offset: 0x150000, L1Size: 2, ID: "1", Name: "s2", Seconds: 0x6b015c45, Nanoseconds: 0x26abc3d8,
		DiskSize: 1 << 30, ExtraSize: 24,
	}
	if !reflect.DeepEqual(s, want) || n != len(raw) {
		t.Fatalf("%d bytes: %+v\nwant %+v", n, s, want)
	}
	if got := appendSnapshot(nil, &s); hex.EncodeToString(got) != snapshotVector {
		t.Fatalf("encoded %x", got)
	}
	if s.Date().Unix() != 0x6b015c45 || s.Date().Nanosecond() != 0x26abc3d8 {
		t.Errorf("date %v", s.Date())
	}
	for i := range raw {
		if _, _, err := decodeSnapshot(raw[:i]); !errors.Is(err, errSnapshotTruncated) {
			t.Errorf("%d of %d bytes: %v", i, len(raw), err)
		}
	}
}

func TestSnapshotTableRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		list := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Snapshot {
			return Snapshot{
				L1Offset: rapid.Uint64().Draw(t, "L1"), L1Size: rapid.Uint32().Draw(t, "entries"),
				ID: rapid.StringN(0, 10, 20).Draw(t, "id"), Name: rapid.StringN(0, 30, 60).Draw(t, "name"),
				Seconds: rapid.Uint32().Draw(t, "s"), Nanoseconds: rapid.Uint32().Draw(t, "ns"),
				VMClock: rapid.Uint64().Draw(t, "clock"), VMStateSize: rapid.Uint64().Draw(t, "state"),
				DiskSize: rapid.Uint64().Draw(t, "size"), ICount: rapid.Uint64().Draw(t, "icount"),
				Unknown: rapid.SliceOfN(rapid.Byte(), 0, 20).Draw(t, "unknown"),
			}
		}), 0, 5).Draw(t, "snapshots")
		table, err := encodeSnapshots(list)
		if err != nil {
			t.Fatal(err)
		}
		f := storage.NewMemory("disk")
		if _, err := f.WriteAt(table, 65536); err != nil {
			t.Fatal(err)
		}
		h := &Header{Version: 3, ClusterBits: 16, NbSnapshots: uint32(len(list)), SnapshotsOffset: 65536}
		got, size, err := readSnapshots(f, h)
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != len(list) || size != int64(len(table)) {
			t.Fatalf("%d snapshots in %d bytes, want %d in %d", len(got), size, len(list), len(table))
		}
		for i := range got {
			list[i].ExtraSize = uint32(snapshotKnown + len(list[i].Unknown))
			if len(list[i].Unknown) == 0 {
				list[i].Unknown = nil
			}
			if !reflect.DeepEqual(got[i], list[i]) {
				t.Fatalf("got  %+v\nwant %+v", got[i], list[i])
			}
		}
	})
}

func TestEncodeSnapshotsRefuses(t *testing.T) {
	withoutRace(t)
	for name, list := range map[string][]Snapshot{
		"name":    {{Name: strings.Repeat("n", 65536)}},
		"id":      {{ID: strings.Repeat("n", 65536)}},
		"unknown": {{Unknown: make([]byte, 1001)}},
		"entries": make([]Snapshot, maxSnapshots+1),
		"bytes":   slicesOf(1100, Snapshot{Name: strings.Repeat("n", 65535)}),
	} {
		if _, err := encodeSnapshots(list); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func slicesOf(n int, s Snapshot) []Snapshot {
	list := make([]Snapshot, n)
	for i := range list {
		list[i] = s
	}
	return list
}

func TestReadSnapshotsRefuses(t *testing.T) {
	withoutRace(t)
	for _, tc := range []struct {
		make func(testing.TB) *storage.Memory
		want string
	}{
		{snapshotEdits(at32(72+36, 1025)), "Too much extra metadata in snapshot table entry 1"},
		{manySnapshots, "Snapshot table is too big"},
		{headerEdits(snapshotEdits(), at32(60, 65537)), "Snapshot table too large"},
		{headerEdits(snapshotEdits(), at32(60, 65536), at64(64, 1<<63-4096)), "Snapshot table offset invalid"},
	} {
		f := tc.make(t)
		h, err := readHeader(f, forCheck)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := readSnapshots(f, h); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("got %v, want %s", err, tc.want)
		}
	}
}

func FuzzDecodeSnapshot(f *testing.F) {
	raw, err := hex.DecodeString(snapshotVector)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Fuzz(func(t *testing.T, b []byte) {
		s, n, err := decodeSnapshot(b)
		if err != nil {
			return
		}
		if n > len(b) || s.ExtraSize > maxSnapshotExtra {
			return
		}
		again, _, err := decodeSnapshot(appendSnapshot(nil, &s))
		if err != nil {
			t.Fatal(err)
		}
		again.ExtraSize = s.ExtraSize
		if !reflect.DeepEqual(again, s) {
			t.Fatalf("got  %+v\nwant %+v", again, s)
		}
	})
}

// FuzzReadSnapshots reads tables from an image, whose size bounds the memory that takes.
func FuzzReadSnapshots(f *testing.F) {
	raw, err := hex.DecodeString(snapshotVector)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw, uint32(1))
	f.Add(append(append(raw, 0, 0, 0, 0, 0), raw...), uint32(3))
	f.Fuzz(func(t *testing.T, b []byte, n uint32) {
		m := storage.NewMemory("fuzz")
		if _, err := m.WriteAt(b, 512); err != nil {
			t.Fatal(err)
		}
		h := &Header{Version: 3, ClusterBits: 9, NbSnapshots: n, SnapshotsOffset: 512}
		list, size, err := readSnapshots(m, h)
		if err == nil && (len(list) != int(n) || size > maxSnapshotTableBytes) {
			t.Fatalf("%d of %d snapshots in %d bytes", len(list), n, size)
		}
	})
}
