package nbd_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/internal/nbdtest"
	"github.com/platter-disk/platter/nbd/server"
	"github.com/platter-disk/platter/storage"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type extent = storage.Extent

func discardExtents(extent) bool { return true }

// pattern is data that tells where it belongs.
func pattern(off uint64, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte((off+uint64(i))*2654435761>>16) | 1
	}
	return p
}

// dial connects, and closes the client with the test.
func dial(t testing.TB, uri string, o nbd.ClientOptions) *nbd.Client {
	t.Helper()
	o.Logger = slog.New(slog.DiscardHandler)
	c, err := nbd.Dial(uri, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// TestClientModel compares random sequences of requests with a byte array.
func TestClientModel(t *testing.T) {
	for _, minimum := range []int{1, 512, 4096} {
		t.Run(fmt.Sprint(minimum), func(t *testing.T) {
			const size = 1 << 20
			disk := nbdtest.Disk(t, size)
			s := nbdtest.Serve(t, server.Config{MaxRequest: 64 << 10}, server.Export{Device: disk, MinBlock: minimum})
			c := dial(t, s.URI(""), nbd.ClientOptions{Connections: 2})
			if c.Connections() != 2 || c.Export().Blocks.Minimum != uint32(minimum) || c.Export().Replies != nbd.ExtendedReplies {
				t.Fatalf("%d connections, %+v", c.Connections(), c.Export())
			}
			model := make([]byte, size)
			rapid.Check(t, func(t *rapid.T) {
				off := rapid.Int64Range(0, size+1000).Draw(t, "offset")
				length := rapid.Int64Range(0, 200_000).Draw(t, "length")
				in := max(0, min(length, size-off)) // of it inside
				switch op := rapid.SampledFrom([]string{"read", "write", "punch", "zero", "extents", "sync"}).Draw(t, "op"); op {
				case "read":
					p := make([]byte, length)
					n, err := c.ReadAt(p, off)
					if int64(n) != in || (err == io.EOF) != (in < length) || err != nil && err != io.EOF {
						t.Fatalf("read %d at %d: %d, %v", length, off, n, err)
					}
					if in > 0 && !bytes.Equal(p[:n], model[off:off+in]) {
						t.Fatalf("read %d at %d: wrong data", length, off)
					}
				case "write":
					p := pattern(uint64(rapid.Uint32().Draw(t, "seed")), int(length))
					n, err := c.WriteAt(p, off)
					if int64(n) != in || errors.Is(err, io.ErrShortWrite) != (in < length) || in == length && err != nil {
						t.Fatalf("write %d at %d: %d, %v", length, off, n, err)
					}
					if in > 0 {
						copy(model[off:off+in], p)
					}
				case "punch", "zero":
					var err error
					if op == "punch" {
						err = c.PunchHole(off, length)
					} else {
						err = c.ZeroRange(off, length)
					}
					if errors.Is(err, io.ErrShortWrite) != (op == "zero" && in < length) || err != nil && !errors.Is(err, io.ErrShortWrite) {
						t.Fatalf("%s %d at %d: %v", op, length, off, err)
					}
					if in > 0 {
						clear(model[off : off+in])
					}
				case "extents":
					checkExtents(t, c, model, off, length)
				case "sync":
					if err := c.Sync(); err != nil {
						t.Fatal(err)
					}
				}
			})
			got := make([]byte, size)
			if _, err := disk.ReadAt(got, 0); err != nil || !bytes.Equal(got, model) {
				t.Fatalf("the disk differs from the model, %v", err)
			}
		})
	}
}

// checkExtents checks that the runs cover the range and what is called a hole reads as zeros.
func checkExtents(t interface{ Fatalf(string, ...any) }, c *nbd.Client, model []byte, off, length int64) {
	at, end := off, max(off, min(off+length, int64(len(model))))
	var last *storage.Extent
	err := c.DataExtents(off, length, func(e storage.Extent) bool {
		if e.Offset != at || e.Length <= 0 || last != nil && last.Data == e.Data {
			t.Fatalf("extent %+v after %d and %+v", e, at, last)
		}
		at += e.Length
		if !e.Data && slices.ContainsFunc(model[e.Offset:min(at, int64(len(model)))], func(b byte) bool { return b != 0 }) {
			t.Fatalf("extent %+v is not zero", e)
		}
		last = &e
		return true
	})
	if err != nil || at != end {
		t.Fatalf("extents of %d at %d end at %d, %v", length, off, at, err)
	}
}

func TestClientExtents(t *testing.T) {
	disk := nbdtest.Disk(t, 16<<30)
	s := nbdtest.Serve(t, server.Config{}, server.Export{Device: disk})
	c := dial(t, s.URI(""), nbd.ClientOptions{})
	for _, off := range []int64{0, 1 << 20, 5 << 30, 16<<30 - 4096} {
		if _, err := c.WriteAt(pattern(0, 4096), off); err != nil {
			t.Fatal(err)
		}
	}
	var got []storage.Extent
	if err := c.DataExtents(0, 16<<30, func(e storage.Extent) bool { got = append(got, e); return true }); err != nil {
		t.Fatal(err)
	}
	want := []storage.Extent{
		{Offset: 0, Length: 4096, Data: true}, {Offset: 4096, Length: 1<<20 - 4096}, {Offset: 1 << 20, Length: 4096, Data: true},
		{Offset: 1<<20 + 4096, Length: 5<<30 - 1<<20 - 4096}, {Offset: 5 << 30, Length: 4096, Data: true},
		{Offset: 5<<30 + 4096, Length: 11<<30 - 8192}, {Offset: 16<<30 - 4096, Length: 4096, Data: true},
	}
	if !slices.Equal(got, want) {
		t.Fatalf("got %+v\nwant %+v", got, want)
	}
	calls := 0
	if err := c.DataExtents(0, 16<<30, func(storage.Extent) bool { calls++; return calls < 2 }); err != nil || calls != 2 {
		t.Fatalf("%d calls after the callback said stop, %v", calls, err)
	}
	if n := s.Stats().Commands[nbd.CmdBlockStatus].Requests; n > 2 {
		t.Errorf("%d block status requests for 16 GiB, want 2 with extended headers", n)
	}
}

// TestClientConcurrency: goroutines with a region each, over one and several connections, inline and by
// workers, see their own bytes.
func TestClientConcurrency(t *testing.T) {
	const region = 1 << 20
	for _, connections := range []int{1, 4} {
		disk := nbdtest.Disk(t, 16*region)
		hooks := &nbdtest.Hooks{Device: disk}
		var reads atomic.Int64
		hooks.OnTryRead = func(p []byte, off int64) error {
			if reads.Add(1)%3 == 0 {
				return block.ErrWouldBlock
			}
			return disk.TryReadAt(p, off)
		}
		s := nbdtest.Serve(t, server.Config{Workers: 4, MaxRequestsPerClient: 6, MaxRequest: 128 << 10, MaxBytesPerClient: 256 << 10}, server.Export{Device: hooks})
		c := dial(t, s.URI(""), nbd.ClientOptions{Connections: connections, RequestTimeout: time.Minute})
		var wg sync.WaitGroup
		for g := range int64(16) {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(g), 1))
				model := make([]byte, region)
				for range 60 {
					off, n := rng.Int64N(region), rng.IntN(200<<10)
					n = min(n, int(region-off))
					if rng.IntN(2) == 0 {
						p := pattern(rng.Uint64(), n)
						copy(model[off:], p)
						if _, err := c.WriteAt(p, g*region+off); err != nil {
							t.Error(err)
							return
						}
					} else {
						p := make([]byte, n)
						if _, err := c.ReadAt(p, g*region+off); err != nil || !bytes.Equal(p, model[off:off+int64(n)]) {
							t.Errorf("goroutine %d: read %d at %d: %v or wrong data", g, n, off, err)
							return
						}
					}
				}
			})
		}
		wg.Wait()
		if err := c.Sync(); err != nil {
			t.Error(err)
		}
	}
}

func TestClientDescribesExport(t *testing.T) {
	s := nbdtest.Serve(t, server.Config{MaxRequest: 1 << 20},
		server.Export{Name: "a", Description: "first", Device: nbdtest.Disk(t, 1<<20), Default: true},
		server.Export{Name: "b/ü", Device: nbdtest.Disk(t, 2<<20), ReadOnly: true, MinBlock: 512, PreferredBlock: 65536})
	c := dial(t, s.URI("b/ü"), nbd.ClientOptions{ReadOnly: true})
	want := nbd.BlockSizes{Minimum: 512, Preferred: 65536, Maximum: 1 << 20}
	if x := c.Export(); x.Name != "b/ü" || x.Size != 2<<20 || x.Blocks != want || x.Flags&nbd.ReadOnly == 0 || x.TLS || len(x.Contexts) != 1 {
		t.Errorf("got %+v", x)
	}
	if c.Name() != s.URI("b/ü") {
		t.Errorf("name %q", c.Name())
	}
	if x := dial(t, s.URI(""), nbd.ClientOptions{}).Export(); x.Name != "a" || x.Description != "first" {
		t.Errorf("the default export is %+v", x)
	}
	list, err := nbd.List(s.URI(""), nbd.ClientOptions{})
	if err != nil || len(list) != 2 || list[0].Name != "a" || list[0].Description != "first" || list[0].Size != 1<<20 || list[1].Name != "b/ü" || list[1].Blocks != want {
		t.Errorf("list: %+v, %v", list, err)
	}
	if _, err := nbd.Dial(s.URI("c"), nbd.ClientOptions{}); err == nil || !strings.Contains(err.Error(), "no such export") {
		t.Errorf("export that does not exist: %v", err)
	}
	if _, err := nbd.Dial(s.URI("b/ü"), nbd.ClientOptions{}); !errors.Is(err, nbd.ErrReadOnly) {
		t.Errorf("read-only export opened for writing: %v", err)
	}
}

func TestClientRefusesItself(t *testing.T) {
	s := nbdtest.Serve(t, server.Config{}, server.Export{Device: nbdtest.Disk(t, 1<<20)})
	ro := dial(t, s.URI(""), nbd.ClientOptions{ReadOnly: true})
	_, err := ro.WriteAt([]byte{1}, 0)
	for _, err := range []error{err, ro.PunchHole(0, 1), ro.ZeroRange(0, 1)} {
		if !errors.Is(err, storage.ErrReadOnly) {
			t.Errorf("a change through a read-only client: %v", err)
		}
	}
	if err := ro.Sync(); err != nil {
		t.Error(err)
	}
	rw := dial(t, s.URI(""), nbd.ClientOptions{})
	for _, err := range []error{rw.Truncate(1), rw.Allocate(0, 1)} {
		if !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("got %v, want unsupported", err)
		}
	}
	if err := rw.Truncate(1 << 20); err != nil {
		t.Errorf("truncate to the same size: %v", err)
	}
	if _, err := rw.TryReadAt(make([]byte, 1), 0); err != storage.ErrWouldBlock {
		t.Errorf("TryReadAt: %v", err)
	}
	_, err = rw.ReadAt(make([]byte, 1), -1)
	for _, err := range []error{err, rw.PunchHole(-1, 1), rw.ZeroRange(0, -1), rw.DataExtents(-1, 1, discardExtents)} {
		if err == nil || !strings.Contains(err.Error(), "negative") {
			t.Errorf("a negative range: %v", err)
		}
	}
	for _, o := range []nbd.ClientOptions{{Connections: -1}, {Connections: 65}, {ConnectTimeout: -1}, {RequestTimeout: -1}} {
		if _, err := nbd.Dial(s.URI(""), o); err == nil {
			t.Errorf("%+v was accepted", o)
		}
		if _, err := nbd.List(s.URI(""), o); err == nil {
			t.Errorf("%+v was accepted", o)
		}
	}
	if _, err := nbd.Dial("nbd+unix:///?socket=/nonexistent/socket", nbd.ClientOptions{}); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("no server: %v", err)
	}
	if _, err := nbd.Dial("nowhere", nbd.ClientOptions{}); err == nil {
		t.Error("a file name was taken for a URI")
	}
}

func TestClientRemoteErrors(t *testing.T) {
	disk := nbdtest.Disk(t, 1<<20)
	hooks := &nbdtest.Hooks{Device: disk}
	hooks.OnRead = func([]byte, int64) (int, error) { return 0, fmt.Errorf("bad sector: %w", syscall.EIO) }
	hooks.OnWrite = func([]byte, int64) (int, error) { return 0, fmt.Errorf("full: %w", syscall.ENOSPC) }
	hooks.OnFlush = func() error { return block.ErrReadOnly }
	hooks.OnExtents = func(int64, int64, func(block.Extent) bool) error { return errors.New("broken table") }
	hooks.OnZero = func(int64, int64, block.ZeroFlags) error { return syscall.ENOSPC }
	s := nbdtest.Serve(t, server.Config{}, server.Export{Device: hooks})
	c := dial(t, s.URI(""), nbd.ClientOptions{})
	_, read := c.ReadAt(make([]byte, 10), 0)
	_, write := c.WriteAt(make([]byte, 10), 0)
	for _, e := range []struct {
		err, is error
		say     string
	}{
		{read, syscall.EIO, "bad sector"}, {write, syscall.ENOSPC, "full"}, {c.Sync(), syscall.EPERM, "read-only"},
		{c.DataExtents(0, 1, discardExtents), syscall.EIO, "broken table"}, {c.PunchHole(0, 10), syscall.ENOSPC, ""},
	} {
		if !errors.Is(e.err, e.is) || errors.Is(e.err, nbd.ErrConnectionLost) || !strings.Contains(e.err.Error(), e.say) {
			t.Errorf("got %v, want %v with %q", e.err, e.is, e.say)
		}
	}
}

// TestClientReconnects: reads survive a server that goes away and comes back, changes do not.
func TestClientReconnects(t *testing.T) {
	disk := nbdtest.Disk(t, 1<<20)
	disk.WriteAt(pattern(0, 4096), 0)
	dir := t.TempDir()
	socket := filepath.Join(dir, "s")
	first := nbdtest.ServeAt(t, socket, server.Config{}, server.Export{Device: disk})
	reader := dial(t, first.URI(""), nbd.ClientOptions{ReadOnly: true, Connections: 2, ReconnectDelay: testenv.Patience})
	writer := dial(t, first.URI(""), nbd.ClientOptions{})
	read := func() error {
		p := make([]byte, 4096)
		_, err := reader.ReadAt(p, 0)
		if err == nil && !bytes.Equal(p, pattern(0, 4096)) {
			err = errors.New("wrong data")
		}
		return err
	}
	if err := read(); err != nil {
		t.Fatal(err)
	}
	first.Stop()

	results := make(chan error, 8)
	for range cap(results) {
		go func() { results <- read() }()
	}
	time.Sleep(100 * time.Millisecond) // while nobody listens
	second := nbdtest.ServeAt(t, socket, server.Config{}, server.Export{Device: disk})
	for range cap(results) {
		if err := <-results; err != nil {
			t.Errorf("read across the restart: %v", err)
		}
	}
	if _, err := writer.WriteAt([]byte{1}, 0); err == nil {
		t.Error("a write went on after the connection was lost")
	}
	if err := writer.Sync(); !errors.Is(err, nbd.ErrConnectionLost) {
		t.Errorf("the failure of the writer is not sticky: %v", err)
	}

	second.Stop()
	nbdtest.ServeAt(t, socket, server.Config{}, server.Export{Device: nbdtest.Disk(t, 2<<20)})
	for range 2 {
		if err := read(); err == nil || !strings.Contains(err.Error(), "not what it was") || errors.Is(err, nbd.ErrConnectionLost) {
			t.Errorf("read after the export changed: %v", err)
		}
	}
}

func TestClientGivesUp(t *testing.T) {
	disk := nbdtest.Disk(t, 1<<20)
	s := nbdtest.Serve(t, server.Config{}, server.Export{Device: disk})
	c := dial(t, s.URI(""), nbd.ClientOptions{ReadOnly: true, ReconnectDelay: 100 * time.Millisecond})
	s.Stop()
	for range 3 {
		start := time.Now()
		if _, err := c.ReadAt(make([]byte, 1), 0); !errors.Is(err, nbd.ErrConnectionLost) || time.Since(start) > 20*time.Second {
			t.Fatalf("read without a server: %v after %v", err, time.Since(start))
		}
	}
	nbdtest.ServeAt(t, s.Socket, server.Config{}, server.Export{Device: disk})
	testenv.Until(t, "a read when the server is back", func() bool { // one attempt a second
		_, err := c.ReadAt(make([]byte, 1), 0)
		return err == nil
	})
}

// TestClientStopsRepeating: a request that ends every connection is not sent for ever.
func TestClientStopsRepeating(t *testing.T) {
	var requests atomic.Int64
	f := fake{size: 1 << 20, serve: func(net.Conn, nbd.ReplyMode, *nbd.Request, []byte) error {
		requests.Add(1)
		return io.EOF
	}}
	c := dial(t, f.start(t), nbd.ClientOptions{ReadOnly: true})
	if _, err := c.ReadAt(make([]byte, 1), 0); !errors.Is(err, io.ErrUnexpectedEOF) || !errors.Is(err, nbd.ErrConnectionLost) {
		t.Fatalf("got %v", err)
	}
	if n := requests.Load(); n < 2 || n > 10 {
		t.Fatalf("the request was sent %d times", n)
	}
}

func TestClientTimeoutAndClose(t *testing.T) {
	release := make(chan struct{})
	hooks := &nbdtest.Hooks{Device: nbdtest.Disk(t, 1<<20)}
	const second = 4096
	begun := make(chan struct{})
	hooks.OnRead = func(p []byte, off int64) (int, error) {
		if off == second {
			close(begun)
		}
		<-release
		return len(p), nil
	}
	s := nbdtest.Serve(t, server.Config{}, server.Export{Device: hooks})
	t.Cleanup(func() { close(release) }) // before the server stops

	c := dial(t, s.URI(""), nbd.ClientOptions{RequestTimeout: 50 * time.Millisecond})
	if _, err := c.ReadAt(make([]byte, 1), 0); !errors.Is(err, nbd.ErrConnectionLost) || !strings.Contains(err.Error(), "did not answer in time") {
		t.Errorf("timeout: %v", err)
	}

	c = dial(t, s.URI(""), nbd.ClientOptions{ReadOnly: true})
	result := make(chan error)
	go func() { _, err := c.ReadAt(make([]byte, 1), second); result <- err }()
	<-begun
	if err := errors.Join(c.Close(), c.Close()); err != nil {
		t.Error(err)
	}
	if err := <-result; !errors.Is(err, nbd.ErrClosed) || errors.Is(err, nbd.ErrConnectionLost) {
		t.Errorf("read during Close: %v", err)
	}
	if _, err := c.ReadAt(make([]byte, 1), 0); !errors.Is(err, nbd.ErrClosed) {
		t.Errorf("read after Close: %v", err)
	}
}

func TestClientTLS(t *testing.T) {
	certs := nbdtest.NewCertificates(t)
	disk := nbdtest.Disk(t, 1<<20)
	disk.WriteAt(pattern(7, 300_000), 0)
	export := server.Export{Device: disk}
	required := nbdtest.Serve(t, server.Config{TLS: server.TLSRequired, TLSConfig: certs.ServerConfig(t, true)}, export)
	allowed := nbdtest.Serve(t, server.Config{TLS: server.TLSAllowed, TLSConfig: certs.ServerConfig(t, false)}, export)
	off := nbdtest.Serve(t, server.Config{}, export)
	secure := func(s *nbdtest.Served, query string) string {
		return strings.Replace(s.URI(""), "nbd+", "nbds+", 1) + query
	}
	try := func(uri string, config *tls.Config) (bool, error) {
		c, err := nbd.Dial(uri, nbd.ClientOptions{TLS: config})
		if err != nil {
			return false, err
		}
		defer c.Close()
		p := make([]byte, 300_000)
		if _, err := c.ReadAt(p, 0); err != nil || !bytes.Equal(p, pattern(7, 300_000)) {
			return false, fmt.Errorf("read: %v or wrong data", err)
		}
		if _, err := c.WriteAt(p, 0); err != nil {
			return false, err
		}
		return c.Export().TLS, c.Sync()
	}
	for name, c := range map[string]struct {
		uri    string
		config *tls.Config
		secure bool
	}{
		"required, directory in the URI": {secure(required, "&tls-certificates="+certs.Dir), nil, true},
		"required, configuration":        {required.URI(""), certs.ClientConfig(t), true},
		"allowed, wanted":                {secure(allowed, "&tls-certificates="+certs.Dir), nil, true},
		"allowed, not wanted":            {allowed.URI(""), nil, false},
		"allowed, server not verified":   {secure(allowed, "&tls-verify-peer=0"), nil, true},
		"allowed, name in the URI":       {secure(allowed, "&tls-hostname=localhost&tls-certificates="+certs.Dir), nil, true},
		"off":                            {off.URI(""), nil, false},
	} {
		if got, err := try(c.uri, c.config); err != nil || got != c.secure {
			t.Errorf("%s: TLS %v, %v", name, got, err)
		}
	}
	for name, c := range map[string]struct {
		uri    string
		config *tls.Config
		say    string
	}{
		"required, not wanted":         {required.URI(""), nil, "requires TLS"},
		"off, wanted":                  {secure(off, "&tls-verify-peer=0"), nil, "cannot be encrypted"},
		"off, configuration":           {off.URI(""), certs.ClientConfig(t), "cannot be encrypted"},
		"unknown authority":            {secure(allowed, ""), nil, "certificate"},
		"wrong name":                   {secure(allowed, "&tls-hostname=example.com&tls-certificates="+certs.Dir), nil, "example.com"},
		"client without a certificate": {required.URI(""), &tls.Config{RootCAs: certs.Pool}, "certificate"},
		"no such directory, no client": {secure(required, "&tls-certificates=/nonexistent"), nil, "certificate"},
	} {
		if _, err := try(c.uri, c.config); err == nil || !strings.Contains(err.Error(), c.say) {
			t.Errorf("%s: got %v, want an error with %q", name, err, c.say)
		}
	}
}
