package guestlog

import (
	"io/fs"
	"strings"
	"testing"
	"testing/fstest"
)

const testSeed = 7

// whole is what a file of that size and generation contains.
func whole(path string, gen uint64, size int) []byte {
	p := make([]byte, size)
	Fill(p, testSeed, path, gen, 0)
	return p
}

// patch returns p with n bytes at off replaced by those of another generation; 0: by zeros.
func patch(p []byte, path string, gen uint64, off, n int) []byte {
	p = append([]byte(nil), p...)
	if gen == 0 {
		clear(p[off : off+n])
	} else {
		Fill(p[off:off+n], testSeed, path, gen, int64(off))
	}
	return p
}

func logOf(t *testing.T, lines ...string) *Log {
	t.Helper()
	l := NewLog(testSeed)
	for _, line := range lines {
		if err := l.Add(line); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

func TestJudge(t *testing.T) {
	const a, b = "files/0/1", "fixed/0-0"
	replaced := []string{
		Will(Op{Path: a, Gen: 1, Kind: Replace, Length: 1000}), Safe(a, 1), // promise 1
		Will(Op{Path: a, Gen: 2, Kind: Replace, Length: 600}), Safe(a, 2), // promise 2
		Will(Op{Path: a, Gen: 3, Kind: Delete}),
		Will(Op{Path: a, Gen: 4, Kind: Replace, Length: 2048}),
		Safe(a, 3), // promise 3
	}
	inPlace := []string{
		Will(Op{Path: b, Gen: 1, Kind: Replace, Length: 4096}), Safe(b, 1),
		Will(Op{Path: b, Gen: 2, Kind: Write, Offset: 512, Length: 1024}), Safe(b, 2),
		Will(Op{Path: b, Gen: 3, Kind: Punch, Offset: 1024, Length: 1024}),
		Will(Op{Path: b, Gen: 4, Kind: Write, Offset: 1024, Length: 512}), Safe(b, 4),
	}
	b1 := whole(b, 1, 4096)
	b2 := patch(b1, b, 2, 512, 1024)
	b3 := patch(b2, b, 0, 1024, 1024)
	b4 := patch(b3, b, 4, 1024, 512)
	swapped := append(append(append([]byte(nil), b1[:1024]...), b1[1536:2048]...), b1[1536:]...)
	flipped := append([]byte(nil), b1...)
	flipped[700] ^= 1

	for _, tc := range []struct {
		name     string
		lines    []string
		promises int
		path     string
		data     []byte // nil: the file is missing
		want     string // part of what is found; "": nothing
	}{
		{"newest", replaced, 2, a, whole(a, 2, 600), ""},
		{"a later replacement", replaced, 2, a, whole(a, 4, 2048), ""},
		{"deleted later", replaced, 2, a, nil, ""},
		{"older than promised", replaced, 2, a, whole(a, 1, 1000), "has 1000 bytes"},
		{"nothing promised, nothing there", replaced, 0, a, nil, ""},
		{"nothing promised, first there", replaced, 0, a, whole(a, 1, 1000), ""},
		{"lost", replaced[:4], 2, a, nil, "does not exist"},
		{"deleted for good", replaced, 3, a, whole(a, 2, 600), "has 600 bytes"},
		{"deleted, then new", replaced, 3, a, whole(a, 4, 2048), ""},
		{"cut short", replaced, 2, a, whole(a, 2, 512), "has 512 bytes"},
		{"empty", replaced, 2, a, []byte{}, "has 0 bytes"},
		{"half zeros", replaced, 2, a, patch(whole(a, 4, 2048), a, 0, 1024, 1024), "zeros at 1024"},
		{"mixed", replaced, 2, a, patch(whole(a, 4, 2048), a, 2, 0, 512), "generation 2 at 0"},
		{"of another file", replaced, 2, a, whole(b, 2, 600), "claims to be generation 2"},
		{"foreign", replaced, 2, a, []byte(strings.Repeat("x", 600)), "foreign"},
		{"somebody's file", replaced, 2, "files/0/9", whole(a, 2, 600), "files/0/9 was never written"},

		{"in place: durable", inPlace, 2, b, b2, ""},
		{"in place: older", inPlace, 2, b, b1, "generation 1 at 512"},
		{"in place: nothing but the first", inPlace, 1, b, b1, ""},
		{"in place: newer in part", inPlace, 2, b, patch(b2, b, 0, 1536, 512), ""},
		{"in place: punched, write lost", inPlace, 2, b, b3, ""},
		{"in place: write there, punch lost", inPlace, 2, b, patch(b2, b, 4, 1024, 512), ""},
		{"in place: all", inPlace, 3, b, b4, ""},
		{"in place: zeros where something was promised", inPlace, 3, b, b3, "zeros at 1024"},
		{"in place: the punched comes back", inPlace, 3, b, patch(b4, b, 1, 1536, 512), "generation 1 at 1536"},
		{"in place: zeros that nobody wrote", inPlace, 2, b, patch(b2, b, 0, 0, 512), "zeros at 0"},
		{"in place: a sector elsewhere", inPlace, 1, b, swapped, "claims to be"},
		{"in place: a bit flipped", inPlace, 1, b, flipped, "claims to be"},
		{"in place: a write that was never announced", inPlace, 3, b, patch(b4, b, 5, 0, 512), "generation 5 at 0"},
		{"in place: a write outside of its range", inPlace, 3, b, patch(b4, b, 4, 0, 512), "generation 4 at 0"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root := fstest.MapFS{"files": {Mode: fs.ModeDir}}
			if tc.data != nil {
				root[tc.path] = &fstest.MapFile{Data: tc.data}
			}
			if tc.path == "files/0/9" {
				root[a] = &fstest.MapFile{Data: whole(a, 2, 600)}
			}
			err := logOf(t, tc.lines...).Judge(root, tc.promises, "files", "fixed")
			switch {
			case tc.want == "" && err != nil:
				t.Error(err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("found %v, want %q", err, tc.want)
			}
		})
	}
}

func TestLogRefuses(t *testing.T) {
	for _, tc := range []struct {
		lines []string
		want  string
	}{
		{[]string{"safe a 1"}, "promises generation 1, and 0"},
		{[]string{"will a 2 replace 0 100"}, "announces generation 2 after 0"},
		{[]string{"will a 1 replace 0 1024", "will a 2 write 512 1024"}, "past the 1024 bytes"},
		{[]string{"will a 1 replace 0 1024", "will a 2 delete 0 0", "will a 3 punch 0 512"}, "past the 0 bytes"},
		{[]string{"will a 1 replace 0 31"}, "too short"},
		{[]string{"will a 1 write 0 100"}, "whole sectors"},
		{[]string{"will a 1 write 0 0"}, "whole sectors"},
		{[]string{"will a 1 write -512 512"}, "bad range"},
		{[]string{"will a 1 replace 0 99999999999"}, "bad range"},
		{[]string{"will a 1 grow 0 512"}, "unknown operation"},
		{[]string{"will a 0 delete 0 0"}, "bad generation"},
		{[]string{"will a 1 delete 0"}, "neither"},
		{[]string{"did a 1"}, "neither"},
		{[]string{"over"}, "too few words"},
		{[]string{""}, "too few words"},
	} {
		l := NewLog(testSeed)
		var err error
		for _, line := range tc.lines {
			if err != nil {
				t.Errorf("%q: %v before the last line", tc.lines, err)
			}
			err = l.Add(line)
		}
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%q: %v, want %q", tc.lines, err, tc.want)
		}
	}
	if err := NewLog(testSeed).Add(WordReady); err != nil {
		t.Errorf("a guest that is ready: %v", err)
	}
}

func TestStart(t *testing.T) {
	if seed, ops, err := ParseStart(Start(1<<63, 9)); seed != 1<<63 || ops != 9 || err != nil {
		t.Errorf("%d %d %v", seed, ops, err)
	}
	for _, line := range []string{"", "start", "start 1", "start 1 -1", "start x 1", "tart 1 1"} {
		if _, _, err := ParseStart(line); err == nil {
			t.Errorf("%q was accepted", line)
		}
	}
}

// FuzzLog: whatever a guest prints, the log takes it or refuses it, and files are judged.
func FuzzLog(f *testing.F) {
	f.Add("will a 1 replace 0 1000\nsafe a 1\nwill a 2 punch 512 512", []byte("x"))
	f.Add("will a 1 replace 0 512\nwill a 2 delete 0 0", whole("a", 1, 512))
	f.Fuzz(func(t *testing.T, lines string, data []byte) {
		l := NewLog(testSeed)
		for line := range strings.Lines(lines) {
			if err := l.Add(strings.TrimSpace(line)); err != nil {
				break
			}
		}
		root := fstest.MapFS{"top/a b": {Data: data}}
		if err := l.Judge(root, l.Promises(), "top"); err == nil {
			t.Error("a file that no line can name passes")
		}
	})
}
