package crashlab

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
	"testing"

	"github.com/platter-disk/platter/storage"
)

func TestFaultText(t *testing.T) {
	for text, want := range map[string]Fault{
		"write:5:EIO":          {Kind: KindWrite, N: 5, Err: syscall.EIO},
		"write:5+:ENOSPC":      {Kind: KindWrite, N: 5, Onward: true, Err: syscall.ENOSPC},
		"sync:*:EIO":           {Kind: KindSync, Err: syscall.EIO},
		"write:7:short=512":    {Kind: KindWrite, N: 7, Short: 512},
		"read:1:short=0":       {Kind: KindRead, N: 1},
		"punch:1:EOPNOTSUPP":   {Kind: KindPunch, N: 1, Err: syscall.EOPNOTSUPP},
		"truncate:2:errno=200": {Kind: KindTruncate, N: 2, Err: 200},
	} {
		got, err := ParseFault(text)
		if err != nil || got != want {
			t.Errorf("%q is %+v, %v: want %+v", text, got, err, want)
		}
		if got.String() != text {
			t.Errorf("%q came back as %q", text, got)
		}
	}
	for text, want := range map[string]string{
		"":                  "want KIND:N:ACTION",
		"write:1":           "want KIND:N:ACTION",
		"write:1:EIO:x":     "want KIND:N:ACTION",
		"scribble:1:EIO":    `operation "scribble"`,
		"write:0:EIO":       "want a number from 1",
		"write:x:EIO":       "want a number from 1",
		"write:+:EIO":       "want a number from 1",
		"write:1:EWHAT":     `action is "EWHAT"`,
		"write:1:short=-1":  "want a number of bytes",
		"sync:1:short=1":    "short is for read and write",
		"write:1:errno=0":   "want a number from 1",
		"write:1:errno=abc": "want a number from 1",
	} {
		if _, err := ParseFault(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v: want %q", text, err, want)
		}
	}
}

func FuzzFault(f *testing.F) {
	for _, s := range []string{"write:5+:EIO", "sync:*:errno=7", "read:1:short=3"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		fault, err := ParseFault(text)
		if err != nil {
			return
		}
		back, err := ParseFault(fault.String())
		if err != nil || back != fault {
			t.Errorf("%q is %+v, which came back as %+v: %v", text, fault, back, err)
		}
	})
}

// operations does one operation of each kind on a file that holds "hello".
func operations(f storage.File) map[Kind]error {
	var p [5]byte
	_, readErr := f.ReadAt(p[:], 0)
	_, writeErr := f.WriteAt(p[:], 0)
	return map[Kind]error{
		KindRead: readErr, KindWrite: writeErr, KindSync: f.Sync(), KindTruncate: f.Truncate(5),
		KindPunch: f.PunchHole(0, 0), KindZero: f.ZeroRange(0, 0), KindAllocate: f.Allocate(0, 0),
		KindExtents: f.DataExtents(0, 5, func(storage.Extent) bool { return true }),
	}
}

func hello(t *testing.T) storage.File {
	t.Helper()
	_, files := newLab(t, FileSpec{Name: "f"})
	_, err := files[0].WriteAt([]byte("hello"), 0)
	must(t, err)
	return files[0]
}

func TestInjector(t *testing.T) {
	for kind := range numKinds {
		in := NewInjector(Fault{Kind: kind, N: 2, Err: syscall.EIO})
		f := in.Wrap(hello(t))
		for round := 1; round <= 3; round++ {
			for k, err := range operations(f) {
				if fails := errors.Is(err, syscall.EIO); fails != (k == kind && round == 2) {
					t.Errorf("fault in the second %s: round %d, %s: %v", kind, round, k, err)
				}
			}
		}
		if in.Hits() != 1 {
			t.Errorf("%s: %d hits", kind, in.Hits())
		}
	}
	onward := NewInjector(Fault{Kind: KindSync, N: 2, Onward: true, Err: syscall.EIO})
	f := onward.Wrap(hello(t))
	if f.Sync() != nil || f.Sync() == nil || f.Sync() == nil {
		t.Error("2+: want the second and the third to fail")
	}
	if onward.stop(); f.Sync() != nil {
		t.Error("a stopped injector fails")
	}
	unsupported := NewInjector(Fault{Kind: KindPunch, Err: syscall.EOPNOTSUPP})
	if err := unsupported.Wrap(hello(t)).PunchHole(0, 1); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("EOPNOTSUPP: %v", err)
	}
}

func TestShortTransfers(t *testing.T) {
	f := NewInjector(Fault{Kind: KindWrite, N: 1, Short: 2}, Fault{Kind: KindRead, N: 2, Short: 3}).Wrap(hello(t))
	if n, err := f.WriteAt([]byte("HELLO"), 0); n != 2 || !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("short write: %d, %v", n, err)
	}
	var p [5]byte
	if n, err := f.TryReadAt(p[:], 0); n != 5 || err != nil || string(p[:]) != "HEllo" {
		t.Errorf("read: %d, %v, %q", n, err, p)
	}
	if _, err := f.TryReadAt(p[:], 0); !errors.Is(err, storage.ErrWouldBlock) {
		t.Errorf("try of a read that has to fail: %v", err)
	}
	if n, err := f.ReadAt(p[:], 0); n != 3 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("short read: %d, %v", n, err)
	}
}

func TestForEachFault(t *testing.T) {
	var runs []string
	work := func(in *Injector) error { // three writes and a sync; stops at the first error
		f := in.Wrap(hello(t))
		runs = append(runs, in.faults[0].String())
		for range 3 {
			if _, err := f.WriteAt([]byte("x"), 0); err != nil {
				return nil
			}
		}
		_ = f.Sync()
		return nil
	}
	faults := []Fault{{Kind: KindWrite, Err: syscall.EIO}, {Kind: KindSync, Err: syscall.EIO}}
	must(t, ForEachFault(faults, 100, work))
	want := "[write:1:EIO write:2:EIO write:3:EIO write:4:EIO sync:1:EIO sync:2:EIO]"
	if fmt.Sprint(runs) != want {
		t.Errorf("runs %s: want %s", runs, want)
	}
	err := ForEachFault(faults, 2, func(in *Injector) error {
		if in.faults[0].N == 2 {
			return errors.New("lost")
		}
		return work(in)
	})
	if err == nil || err.Error() != "with fault write:2:EIO: lost" {
		t.Errorf("error %v", err)
	}
}

func TestCounter(t *testing.T) {
	c := NewCounter(hello(t), true)
	var p [5]byte
	for range 3 {
		_, err := c.WriteAt(p[:], 0)
		must(t, err)
	}
	_, err := c.TryReadAt(p[:], 0)
	must(t, err, c.Sync(), c.ZeroRange(0, 100))
	for k, want := range map[Kind]Tally{
		KindWrite: {3, 15}, KindRead: {1, 5}, KindSync: {1, 0}, KindZero: {1, 100}, KindPunch: {}, numKinds: {},
	} {
		if got := c.Count(k); got != want {
			t.Errorf("%s: %+v: want %+v", k, got, want)
		}
	}
	sites := c.Sites()
	if len(sites) != 4 || sites[0].Ops != 3 || sites[0].Kind != KindWrite || sites[0].Site.Func != "crashlab.TestCounter" {
		t.Errorf("sites %+v", sites)
	}
	c.Reset()
	if c.Count(KindWrite) != (Tally{}) || len(c.Sites()) != 0 {
		t.Error("Reset forgot nothing")
	}
	plain := NewCounter(hello(t), false)
	for k, err := range operations(plain) {
		must(t, err)
		if plain.Count(k).Ops != 1 {
			t.Errorf("%s: %+v", k, plain.Count(k))
		}
	}
	if plain.Sites() != nil {
		t.Error("sites without asking")
	}
	if n := testing.AllocsPerRun(100, func() { plain.add(KindSync, 0) }); n != 0 {
		t.Errorf("%v allocations to count an operation", n)
	}
}

func TestKindText(t *testing.T) {
	for k := range numKinds {
		if back, err := ParseKind(k.String()); err != nil || back != k {
			t.Errorf("%s: %v, %v", k, back, err)
		}
	}
	if s := Kind(200).String(); s != "Kind(200)" {
		t.Error(s)
	}
}
