package server_test

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/platter-disk/platter/nbd/server"
)

// TestListenerRemovesOnlyItsSocket: what somebody else put in the place of the socket stays.
func TestListenerRemovesOnlyItsSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	listen := func() net.Listener {
		t.Helper()
		l, err := server.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	first := listen()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	second := listen()
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("the second server's socket is gone: %v", err)
	}
	c.Close()
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the second server's socket is left: %v", err)
	}
	third := listen()
	if err := second.Close(); err == nil {
		t.Error("closed twice without an error")
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("closing the second one again removed the third one's socket: %v", err)
	}
	if err := third.Close(); err != nil {
		t.Fatal(err)
	}
}
