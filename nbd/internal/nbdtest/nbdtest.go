// Package nbdtest has what the tests of nbd and nbd/server share: disks to serve, servers that end with the
// test, and certificates.
package nbdtest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/raw"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/server"
	"github.com/platter-disk/platter/storage"
)

// Disk returns a raw disk in memory that is closed with the test.
func Disk(t testing.TB, size int64) block.Device {
	t.Helper()
	m := storage.NewMemory("memory")
	if err := m.Truncate(size); err != nil {
		t.Fatal(err)
	}
	d, err := raw.Open(m, raw.Options{Discard: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// Hooks is a Device whose calls can be replaced. A hook that is nil leaves the call to Device.
type Hooks struct {
	block.Device
	OnTryRead func(p []byte, off int64) error
	OnRead    func(p []byte, off int64) (int, error)
	OnWrite   func(p []byte, off int64) (int, error)
	OnFlush   func() error
	OnZero    func(off, length int64, flags block.ZeroFlags) error
	OnDiscard func(off, length int64) error
	OnExtents func(off, length int64, fn func(block.Extent) bool) error
}

// TryReadAt implements block.Device.
func (h *Hooks) TryReadAt(p []byte, off int64) error {
	if h.OnTryRead != nil {
		return h.OnTryRead(p, off)
	}
	if h.OnRead != nil {
		return block.ErrWouldBlock
	}
	return h.Device.TryReadAt(p, off)
}

// ReadAt implements block.Device.
func (h *Hooks) ReadAt(p []byte, off int64) (int, error) {
	if h.OnRead != nil {
		return h.OnRead(p, off)
	}
	return h.Device.ReadAt(p, off)
}

// WriteAt implements block.Device.
func (h *Hooks) WriteAt(p []byte, off int64) (int, error) {
	if h.OnWrite != nil {
		return h.OnWrite(p, off)
	}
	return h.Device.WriteAt(p, off)
}

// Flush implements block.Device.
func (h *Hooks) Flush() error {
	if h.OnFlush != nil {
		return h.OnFlush()
	}
	return h.Device.Flush()
}

// WriteZeroes implements block.Device.
func (h *Hooks) WriteZeroes(off, length int64, flags block.ZeroFlags) error {
	if h.OnZero != nil {
		return h.OnZero(off, length, flags)
	}
	return h.Device.WriteZeroes(off, length, flags)
}

// Discard implements block.Device.
func (h *Hooks) Discard(off, length int64) error {
	if h.OnDiscard != nil {
		return h.OnDiscard(off, length)
	}
	return h.Device.Discard(off, length)
}

// Extents implements block.Device.
func (h *Hooks) Extents(off, length int64, fn func(block.Extent) bool) error {
	if h.OnExtents != nil {
		return h.OnExtents(off, length, fn)
	}
	return h.Device.Extents(off, length, fn)
}

// Served is a server that ends with the test.
type Served struct {
	*server.Server
	Socket string // its path
	t      testing.TB
	ended  chan error
}

// URI is the URI of an export of the server.
func (s *Served) URI(export string) string {
	return nbd.URI{Network: "unix", Address: s.Socket, Export: export}.String()
}

// Stop shuts the server down, and fails the test when that does not end well.
func (s *Served) Stop() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testenv.Patience)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil {
		s.t.Errorf("shutdown: %v", err)
	}
	if err, ok := <-s.ended; ok {
		if err != nil && !errors.Is(err, server.ErrShutdown) { // which it says if it had not begun
			s.t.Errorf("serve: %v", err)
		}
		close(s.ended)
	}
}

// Serve serves exports on a Unix socket. Without a logger in cfg nothing is logged.
func Serve(t testing.TB, cfg server.Config, exports ...server.Export) *Served {
	t.Helper()
	return ServeAt(t, filepath.Join(shortDir(t), "nbd.sock"), cfg, exports...)
}

// ServeAt is Serve with the path of the socket.
func ServeAt(t testing.TB, socket string, cfg server.Config, exports ...server.Export) *Served {
	t.Helper()
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	s, err := server.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range exports {
		if err := s.AddExport(e); err != nil {
			t.Fatal(err)
		}
	}
	l, err := server.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	served := &Served{Server: s, Socket: socket, t: t, ended: make(chan error, 1)}
	go func() { served.ended <- s.Serve(context.Background(), l) }()
	t.Cleanup(served.Stop)
	return served
}

// shortDir is a temporary directory whose path leaves room for a socket's name.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// Certificates is a directory with a certificate authority, a server's and a client's certificate, under the
// names that NBD programs expect: ca-cert.pem, server-cert.pem, server-key.pem, client-cert.pem, client-key.pem.
type Certificates struct {
	Dir  string
	Pool *x509.CertPool
}

// NewCertificates makes certificates for the host "localhost".
func NewCertificates(t testing.TB) *Certificates {
	t.Helper()
	c := &Certificates{Dir: t.TempDir(), Pool: x509.NewCertPool()}
	authority := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	authorityKey := c.write(t, "ca", authority, authority, nil)
	cert, err := x509.ParseCertificate(c.der(t, "ca"))
	if err != nil {
		t.Fatal(err)
	}
	c.Pool.AddCert(cert)
	for i, name := range []string{"server", "client"} {
		c.write(t, name, &x509.Certificate{
			SerialNumber: big.NewInt(int64(2 + i)), Subject: pkix.Name{CommonName: name}, DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}, authority, authorityKey)
	}
	return c
}

func (c *Certificates) write(t testing.TB, name string, template, parent *x509.Certificate, signer *ecdsa.PrivateKey) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if signer == nil {
		signer = key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	keyDER, keyErr := x509.MarshalPKCS8PrivateKey(key)
	err = errors.Join(err, keyErr,
		os.WriteFile(filepath.Join(c.Dir, name+"-cert.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600),
		os.WriteFile(filepath.Join(c.Dir, name+"-key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (c *Certificates) der(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(c.Dir, name+"-cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	p, _ := pem.Decode(b)
	return p.Bytes
}

// Pair is the certificate and key of "server" or "client".
func (c *Certificates) Pair(t testing.TB, name string) tls.Certificate {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(filepath.Join(c.Dir, name+"-cert.pem"), filepath.Join(c.Dir, name+"-key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	return pair
}

// ServerConfig is the TLS configuration of a server that wants client certificates from the same authority
// when verify is set.
func (c *Certificates) ServerConfig(t testing.TB, verify bool) *tls.Config {
	t.Helper()
	config := &tls.Config{Certificates: []tls.Certificate{c.Pair(t, "server")}, MinVersion: tls.VersionTLS12}
	if verify {
		config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, c.Pool
	}
	return config
}

// ClientConfig is the TLS configuration of a client that trusts the authority and shows the client's certificate.
func (c *Certificates) ClientConfig(t testing.TB) *tls.Config {
	t.Helper()
	return &tls.Config{Certificates: []tls.Certificate{c.Pair(t, "client")}, RootCAs: c.Pool, MinVersion: tls.VersionTLS12}
}
