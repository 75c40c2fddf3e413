package storage_test

import (
	"errors"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/platter-disk/platter/storage"
)

var (
	writer = storage.OpenOptions{}
	reader = storage.OpenOptions{ReadOnly: true}
	shared = storage.OpenOptions{ReadOnly: true, Share: true}
	noLock = storage.OpenOptions{NoLock: true}
)

func tempImage(t *testing.T) string {
	path := filepath.Join(t.TempDir(), "disk.raw")
	f, err := storage.Open(path, storage.OpenOptions{Create: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLocksBetweenOpens(t *testing.T) {
	for _, test := range []struct {
		name          string
		first, second storage.OpenOptions
		want          string // in the error; empty: no conflict
	}{
		{"two writers", writer, writer, `Failed to get "write" lock`},
		{"reader, then writer", reader, writer, `Failed to get "write" lock`},
		{"writer, then reader", writer, reader, `Failed to get shared "write" lock`},
		{"two readers", reader, reader, ""},
		{"writer, then sharing reader", writer, shared, ""},
		{"sharing reader, then writer", shared, writer, ""},
		{"writer, then one without locks", writer, noLock, ""},
		{"one without locks, then writer", noLock, writer, ""},
	} {
		if test.want != "" && runtime.GOOS != "linux" { // where one lock says less
			test.want = " lock"
		}
		t.Run(test.name, func(t *testing.T) {
			path := tempImage(t)
			first, err := storage.Open(path, test.first)
			if err != nil {
				t.Fatal(err)
			}
			second, err := storage.Open(path, test.second)
			if err == nil {
				second.Close()
			}
			if test.want == "" && err != nil {
				t.Errorf("error %v, want none", err)
			}
			if test.want != "" && (!errors.Is(err, storage.ErrLocked) || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), path)) {
				t.Errorf("error %v, want %q", err, test.want)
			}
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			again, err := storage.Open(path, test.second)
			if err != nil {
				t.Fatalf("after the first was closed: %v", err)
			}
			again.Close()
		})
	}
}
