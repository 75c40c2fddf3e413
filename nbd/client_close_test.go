package nbd_test

import (
	"io"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/internal/nbdtest"
	"github.com/platter-disk/platter/nbd/server"
)

// wire lies between clients and a server, and may stop passing on what clients send.
type wire struct {
	cut  atomic.Bool
	done chan struct{} // closed with the test
}

// newWire returns a wire and the path of the socket that leads to it.
func newWire(t *testing.T, to string) (*wire, string) {
	t.Helper()
	w := &wire{done: make(chan struct{})}
	socket := filepath.Join(t.TempDir(), "w")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("unix", to)
			if err != nil {
				near.Close()
				continue
			}
			all.Go(func() { io.Copy(near, far); near.Close() })
			all.Go(func() { w.pass(far, near); far.Close() })
		}
	})
	t.Cleanup(func() {
		close(w.done)
		l.Close()
		all.Wait()
	})
	return w, socket
}

// pass passes on what a client sends.
func (w *wire) pass(far, near net.Conn) {
	b := make([]byte, 32<<10)
	for {
		if w.cut.Load() {
			<-w.done
			return
		}
		n, err := near.Read(b)
		if _, werr := far.Write(b[:n]); err != nil || werr != nil {
			return
		}
	}
}

// TestClientCloseIsQuick: a server that takes nothing any more costs Close the time of one goodbye, however many
// connections there are, encrypted or not.
func TestClientCloseIsQuick(t *testing.T) {
	certificates := nbdtest.NewCertificates(t)
	cfg := server.Config{TLS: server.TLSAllowed, TLSConfig: certificates.ServerConfig(t, false)}
	for name, o := range map[string]nbd.ClientOptions{
		"plain": {Connections: 32},
		"TLS":   {Connections: 32, TLS: certificates.ClientConfig(t)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			served := nbdtest.Serve(t, cfg, server.Export{Device: nbdtest.Disk(t, 64<<20)})
			w, socket := newWire(t, served.Socket)
			c := dial(t, nbd.URI{Network: "unix", Address: socket}.String(), o)
			if c.Connections() != o.Connections {
				t.Fatalf("%d connections", c.Connections())
			}
			w.cut.Store(true)
			var writes sync.WaitGroup
			for i := range int64(2 * o.Connections) {
				writes.Go(func() { c.WriteAt(make([]byte, 1<<20), i<<20) })
			}
			testenv.Until(t, "writes that wait", func() bool { return c.Silent() > 200*time.Millisecond })
			start := time.Now()
			c.Close()
			writes.Wait()
			if took := time.Since(start); took > time.Duration(o.Connections)*time.Second/2 { // a goodbye takes up to 1 s
				t.Errorf("closing took %v", took)
			}
		})
	}
}
