package cli

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/nbd"
)

// running is a `platter serve` in this process.
type running struct {
	uri    string
	cancel func()
	done   chan int // exit status

	mu     sync.Mutex
	stderr bytes.Buffer
}

func (r *running) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stderr.Write(p)
}

func (r *running) said() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stderr.String()
}

// startServe runs serve until it has printed its URI.
func startServe(t *testing.T, args ...string) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{cancel: cancel, done: make(chan int, 1)}
	out, in := io.Pipe()
	go func() {
		r.done <- run(ctx, append([]string{"serve"}, args...), in, r)
		in.Close()
	}()
	t.Cleanup(cancel)
	lines := bufio.NewReader(out)
	line, err := lines.ReadString('\n')
	if err != nil {
		t.Fatalf("serve %q printed no URI: %v\n%s", args, err, r.said())
	}
	r.uri = strings.TrimSpace(line)
	go func() {
		if more, _ := io.ReadAll(lines); len(more) > 0 {
			t.Errorf("serve printed more than its URI: %q", more)
		}
	}()
	return r
}

// end does what a signal does and expects a clean end.
func (r *running) end(t *testing.T) {
	t.Helper()
	r.cancel()
	if status := <-r.done; status != 0 {
		t.Errorf("serve ended with status %d\n%s", status, r.said())
	}
}

func dial(t *testing.T, uri string, o nbd.ClientOptions) *nbd.Client {
	t.Helper()
	c, err := nbd.Dial(uri, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestServe(t *testing.T) {
	dir := t.TempDir()
	image, socket := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "s")
	r := startServe(t, "--create", "3M", "--socket", socket, image)
	if want := (nbd.URI{Network: "unix", Address: socket}).String(); r.uri != want {
		t.Errorf("the URI is %s, want %s", r.uri, want)
	}
	c := dial(t, r.uri, nbd.ClientOptions{})
	data := bytes.Repeat([]byte("platter "), 1000)
	if _, err := c.WriteAt(data, 70_000); err != nil {
		t.Fatal(err)
	}
	// No flush by the client: that the data is there afterwards is the server's doing.
	r.end(t)
	if _, err := os.Stat(socket); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
	r = startServe(t, "--read-only", image)
	got := make([]byte, len(data))
	c = dial(t, r.uri, nbd.ClientOptions{ReadOnly: true})
	if _, err := c.ReadAt(got, 70_000); err != nil || !bytes.Equal(got, data) {
		t.Errorf("what was written is not there after the server was started again: %v", err)
	}
	if c.Export().Flags&nbd.ReadOnly == 0 {
		t.Error("an export served with --read-only says it can be written")
	}
	u, err := nbd.ParseURI(r.uri)
	if err != nil {
		t.Fatal(err)
	}
	private := filepath.Dir(u.Address)
	if info, err := os.Stat(private); err != nil || info.Mode().Perm() != 0o700 && runtime.GOOS != "windows" {
		t.Errorf("without --socket the socket is to be in a directory of its own: %v, %v", info, err)
	}
	r.end(t)
	if _, err := os.Stat(private); !os.IsNotExist(err) {
		t.Errorf("the directory of the socket is still there: %v", err)
	}
}

// afterWrite is an io.Writer that calls itself for what is written.
type afterWrite func()

func (f afterWrite) Write(p []byte) (int, error) {
	f()
	return len(p), nil
}

// TestServeEndsAtOnce: a server that is told to end when it has just said that it is ready ends well, even if it has
// not come to accept connections.
func TestServeEndsAtOnce(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // so that no other goroutine runs before this one waits
	file := func(name string) string { return filepath.Join(t.TempDir(), name) }
	for range 10 {
		ctx, cancel := context.WithCancel(t.Context())
		r := &running{}
		args := []string{"serve", "--create", "1M", "--socket", file("s"), "--listen", "127.0.0.1:0", "--control", file("c"), file("disk.qcow2")}
		if status := run(ctx, args, afterWrite(cancel), r); status != 0 {
			t.Fatalf("exit status %d\n%s", status, r.said())
		}
	}
}

func TestServeSeveral(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a.qcow2"), filepath.Join(dir, "b.raw")
	for _, args := range [][]string{{"create", "-q", "-f", "qcow2", a, "1M"}, {"create", "-q", "-f", "raw", b, "2M"}} {
		if o := runHere(t, dir, args...); o.status != 0 {
			t.Fatal(o.stderr)
		}
	}
	names := func(uri string) string {
		t.Helper()
		exports, err := nbd.List(uri, nbd.ClientOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var s []string
		for _, e := range exports {
			s = append(s, e.Name)
		}
		return strings.Join(s, " ")
	}
	r := startServe(t, "--listen", "127.0.0.1:0", a, b)
	if !strings.HasPrefix(r.uri, "nbd://127.0.0.1:") || !strings.HasSuffix(r.uri, "/a.qcow2") {
		t.Errorf("the URI is %s, want nbd://127.0.0.1:PORT/a.qcow2", r.uri)
	}
	if got := names(r.uri); got != "a.qcow2 b.raw" {
		t.Errorf("the exports are %q", got)
	}
	if !strings.Contains(r.said(), "/b.raw\n") {
		t.Errorf("the URI of the second export is not on standard error:\n%s", r.said())
	}
	first := strings.TrimSuffix(r.uri, "a.qcow2")
	if size, err := dial(t, first, nbd.ClientOptions{}).Size(); err != nil || size != 1<<20 {
		t.Errorf("a client that names no export gets one of %d bytes, want the first: %v", size, err)
	}
	r.end(t)

	socket := filepath.Join(dir, "s")
	r = startServe(t, "--socket", socket, "--listen", "127.0.0.1:0", "--export", "x", "--export", "y z", a, b)
	if want := (nbd.URI{Network: "unix", Address: socket, Export: "x"}).String(); r.uri != want {
		t.Errorf("the URI is %s, want %s", r.uri, want)
	}
	if got := names(r.uri); got != "x y z" {
		t.Errorf("the exports are %q", got)
	}
	for _, want := range []string{"nbd://127.0.0.1:", "/y%20z?socket="} {
		if !strings.Contains(r.said(), want) {
			t.Errorf("%q is not on standard error:\n%s", want, r.said())
		}
	}
	r.end(t)
}

// TestServeControl talks to the control socket.
func TestServeControl(t *testing.T) {
	dir := t.TempDir()
	image, socket, control := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "s"), filepath.Join(dir, "c")
	r := startServe(t, "--create", "1M", "--socket", socket, "--control", control, "--export", "disk", image)
	if info, err := os.Stat(control); err != nil || info.Mode().Perm() != 0o600 && runtime.GOOS != "windows" {
		t.Errorf("the control socket: %v, %v, want mode 0600", info, err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", control)
	}}}
	ask := func(method, path string, status int, reply any) {
		t.Helper()
		req, err := http.NewRequest(method, "http://platter"+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		res, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil || res.StatusCode != status {
			t.Fatalf("%s %s: status %d, want %d; %s %v", method, path, res.StatusCode, status, body, err)
		}
		if reply != nil {
			if err := json.Unmarshal(body, reply); err != nil {
				t.Fatalf("%s %s: %v in %s", method, path, err, body)
			}
		}
	}
	c := dial(t, r.uri, nbd.ClientOptions{})
	if _, err := c.WriteAt(make([]byte, 5000), 0); err != nil {
		t.Fatal(err)
	}
	var st statusReply
	ask("GET", "/status", 200, &st)
	want := exportStatus{Name: "disk", Image: image, Format: "qcow2", Size: 1 << 20}
	if len(st.Exports) != 1 || st.Exports[0] != want {
		t.Errorf("the exports are %+v, want %+v", st.Exports, want)
	}
	if w := st.Commands["write"]; w.Requests != 1 || w.Bytes != 5000 || st.Connections.Open != 1 || st.PID != os.Getpid() {
		t.Errorf("status: %+v", st)
	}
	ask("POST", "/flush", 200, nil)
	ask("POST", "/flush?export=disk", 200, nil)
	var refused struct{ Error string }
	ask("POST", "/flush?export=other", 404, &refused)
	if !strings.Contains(refused.Error, `"other"`) {
		t.Errorf("flushing an export that is not there: %q", refused.Error)
	}
	ask("GET", "/flush", 405, nil)
	ask("GET", "/nothing", 404, nil)
	ask("POST", "/quit", 202, nil)
	if status := <-r.done; status != 0 {
		t.Errorf("after /quit serve ended with status %d\n%s", status, r.said())
	}
	for _, path := range []string{socket, control} {
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", path, err)
		}
	}
}

// certificate makes a certificate, signed by parent or by itself, and writes it and its key as PEM files.
func certificate(t *testing.T, dir, name string, parent *tls.Certificate) (cert tls.Certificate, certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IsCA:        parent == nil, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	signer, signerKey := template, any(key)
	if parent != nil {
		if signer, err = x509.ParseCertificate(parent.Certificate[0]); err != nil {
			t.Fatal(err)
		}
		signerKey = parent.PrivateKey
	}
	der, err := x509.CreateCertificate(rand.Reader, template, signer, key.Public(), signerKey)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(dir, name+".pem"), filepath.Join(dir, name+".key")
	for file, block := range map[string]*pem.Block{
		certFile: {Type: "CERTIFICATE", Bytes: der}, keyFile: {Type: "PRIVATE KEY", Bytes: keyDER}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, certFile, keyFile
}

func TestServeTLS(t *testing.T) {
	dir := t.TempDir()
	ca, caFile, _ := certificate(t, dir, "ca", nil)
	_, serverCert, serverKey := certificate(t, dir, "server", &ca)
	clientCert, _, _ := certificate(t, dir, "client", &ca)
	roots := x509.NewCertPool()
	caCert, err := x509.ParseCertificate(ca.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	roots.AddCert(caCert)
	known := &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{clientCert}}
	unknown := &tls.Config{RootCAs: roots}
	pair := []string{"--tls-certificate", serverCert, "--tls-key", serverKey}
	for i, tc := range []struct {
		name   string
		args   []string
		scheme string
		config *tls.Config // nil: in the clear
		works  bool
	}{
		{"allowed, used", pair, "nbd:", unknown, true},
		{"allowed, not used", pair, "nbd:", nil, true},
		{"required, used", append(pair, "--tls-required"), "nbds:", unknown, true},
		{"required, not used", append(pair, "--tls-required"), "nbds:", nil, false},
		{"client certificate", append(pair, "--tls-required", "--tls-client-ca", caFile), "nbds:", known, true},
		{"no client certificate", append(pair, "--tls-required", "--tls-client-ca", caFile), "nbds:", unknown, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			image := filepath.Join(dir, fmt.Sprintf("%d.qcow2", i))
			r := startServe(t, append([]string{"--create", "1M", "--listen", "127.0.0.1:0", image}, tc.args...)...)
			if !strings.HasPrefix(r.uri, tc.scheme+"//127.0.0.1:") {
				t.Errorf("the URI is %s, want the scheme %s", r.uri, tc.scheme)
			}
			plain := strings.Replace(r.uri, "nbds:", "nbd:", 1)
			c, err := nbd.Dial(plain, nbd.ClientOptions{TLS: tc.config, ReconnectDelay: -1})
			if err == nil {
				_, err = c.ReadAt(make([]byte, 512), 0)
				c.Close()
			}
			if (err == nil) != tc.works {
				t.Errorf("connecting: %v", err)
			}
			r.end(t)
		})
	}
}

// TestServeRefuses is about command lines that cannot work: nothing is printed on standard output.
func TestServeRefuses(t *testing.T) {
	dir := t.TempDir()
	for _, args := range [][]string{{"create", "-q", "-f", "qcow2", "disk.qcow2", "1M"}, {"create", "-q", "-f", "raw", "plain", "1M"}} {
		if o := runHere(t, dir, args...); o.status != 0 {
			t.Fatal(o.stderr)
		}
	}
	if err := os.WriteFile("garbage.pem", []byte("no certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, cert, key := certificate(t, dir, "server", nil)
	for _, tc := range []struct {
		args string
		want string
	}{
		{"", "Expecting one or more image file names"},
		{"absent.qcow2", missing()},
		{"disk.qcow2 disk.qcow2", "lock"},
		{"--export a --export b disk.qcow2", "2 --export for 1 images"},
		{"--export same --export same --format raw disk.qcow2 plain", "same"},
		{"--cache unsafe disk.qcow2", "--cache must be used with"},
		{"--discard maybe disk.qcow2", "--discard must be used with"},
		{"--max-connections 0 disk.qcow2", "--max-connections"},
		{"--max-request 2G disk.qcow2", "--max-request"},
		{"--max-request many disk.qcow2", "Invalid --max-request specified"},
		{"--l2-cache-size -1 disk.qcow2", "Invalid --l2-cache-size specified"},
		{"--create 1G --read-only new.qcow2", "--create and --read-only"},
		{"--create huge new.qcow2", "Invalid image size specified"},
		{"--discipline reckless disk.qcow2", "reckless"},
		{"--tls-required disk.qcow2", "need --tls-certificate"},
		{"--tls-certificate " + cert + " disk.qcow2", "go together"},
		{"--tls-certificate garbage.pem --tls-key " + key + " disk.qcow2", "garbage.pem"},
		{"--tls-certificate " + cert + " --tls-key " + key + " --tls-client-ca garbage.pem disk.qcow2", "no certificate in"},
		{"--tls-certificate " + cert + " --tls-key " + key + " --tls-client-ca absent disk.qcow2", "absent"},
		{"--socket plain disk.qcow2", "not a socket"},
		{"--socket no/such/dir disk.qcow2", "no/such/dir"},
		{"--socket " + strings.Repeat("long/", 30) + "s disk.qcow2", "the path has 151 bytes"},
		{"--listen nowhere disk.qcow2", "nowhere"},
		{"--control plain disk.qcow2", "--control"},
	} {
		t.Run(tc.args, func(t *testing.T) {
			o := runHere(t, dir, append([]string{"serve"}, strings.Fields(tc.args)...)...)
			if o.status != 1 || o.stdout != "" || !strings.Contains(o.stderr, tc.want) {
				t.Errorf("status %d, stdout %q, stderr %q; want status 1 and %q", o.status, o.stdout, o.stderr, tc.want)
			}
		})
	}
	if left, _ := filepath.Glob("new*"); len(left) > 0 {
		t.Errorf("files were made: %v", left)
	}
}

// TestServeTakesOver replaces a socket that nobody listens on and respects one that somebody does.
func TestServeTakesOver(t *testing.T) {
	dir := t.TempDir()
	image, socket := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	o := runHere(t, dir, "serve", "--create", "1M", "--socket", socket, image)
	if o.status != 1 || !strings.Contains(o.stderr, "another process listens there") {
		t.Errorf("a socket in use: status %d, stderr %q", o.status, o.stderr)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	r := startServe(t, "--socket", socket, image)
	dial(t, r.uri, nbd.ClientOptions{ReadOnly: true})
	r.end(t)
}

// TestServeCreateSpares: --create makes what does not exist, and overwrites nothing, by whatever name it is called.
func TestServeCreateSpares(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	data := bytes.Repeat([]byte("platter "), 128<<10)
	if err := os.WriteFile("disk.raw", data, 0o600); err != nil {
		t.Fatal(err)
	}
	below := startServe(t, "--format", "raw", "--socket", filepath.Join(dir, "below"), "disk.raw")
	old := "nbd:unix:" + filepath.Join(dir, "below")
	refused := func(name string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), testenv.Patience) // or it would serve
		defer cancel()
		var stderr bytes.Buffer
		if status := run(ctx, []string{"serve", "--create", "64k", "--format", "qcow2", name}, io.Discard, &stderr); status != 1 {
			t.Errorf("%s: exit status %d, %s", name, status, &stderr)
		}
	}
	refused(old)
	refused(below.uri)
	below.end(t)
	refused("file:disk.raw")
	if got, err := os.ReadFile("disk.raw"); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("the disk has lost what it held: %d bytes, %v", len(got), err)
	}
	options := "driver=qcow2,file.filename=none"
	if o := runHere(t, dir, "serve", "--create", "64k", options); o.status != 1 {
		t.Errorf("exit status %d, %s", o.status, o.stderr)
	}
	if _, err := os.Lstat(options); !os.IsNotExist(err) {
		t.Errorf("a file was made that is called as options are: %v", err)
	}
	startServe(t, "--create", "64k", "file:new.qcow2").end(t)
	if o := runHere(t, dir, "check", "new.qcow2"); o.status != 0 {
		t.Errorf("what was made is no image: %s", o.stderr)
	}
}
