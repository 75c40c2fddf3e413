package server_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/server"
	"github.com/platter-disk/platter/storage"
)

// host serves disks in this process.
type host struct {
	server *server.Server
	disks  map[string]block.Device // by the names of their exports
	served chan error
	n      int // listeners
}

// newHost serves on each of the listeners. Clients must encrypt if there is a certificate.
func newHost(certificate *tls.Certificate, listeners ...net.Listener) (*host, error) {
	var c server.Config
	if certificate != nil {
		c.TLS = server.TLSRequired
		c.TLSConfig = &tls.Config{Certificates: []tls.Certificate{*certificate}, MinVersion: tls.VersionTLS12}
	}
	s, err := server.New(c)
	if err != nil {
		return nil, err
	}
	h := &host{server: s, disks: map[string]block.Device{}, served: make(chan error, len(listeners)), n: len(listeners)}
	for _, l := range listeners {
		go func() { h.served <- s.Serve(context.Background(), l) }()
	}
	return h, nil
}

// add serves an image under a name, also while clients are being served. One call at a time, of add or remove.
func (h *host) add(ctx context.Context, name, path string) error {
	if crashed, err := notClosed(path); err != nil {
		return err
	} else if crashed {
		slog.Warn("the disk was not closed; its tables are put right, and what was flushed is there", "disk", path)
	}
	disk, err := image.Open(ctx, path, image.Options{Discard: true})
	if err != nil {
		return err
	}
	if err := h.server.AddExport(server.Export{Name: name, Device: disk}); err != nil {
		return errors.Join(err, disk.Close())
	}
	h.disks[name] = disk
	return nil
}

// remove takes a disk away from its clients and leaves its image clean; the others are served on. What the clients have
// begun is answered, for ten seconds at most.
func (h *host) remove(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	err := h.server.RemoveExport(ctx, name)
	if errors.Is(err, server.ErrUnknownExport) {
		return err
	}
	disk := h.disks[name] // nobody uses it any more, even if time ran out
	delete(h.disks, name)
	return errors.Join(err, disk.Close())
}

// close answers what clients have begun, for ten seconds at most, and leaves the images clean.
func (h *host) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err := h.server.Shutdown(ctx)
	for range h.n {
		err = errors.Join(err, <-h.served)
	}
	for _, d := range h.disks {
		err = errors.Join(err, d.Close())
	}
	return err
}

// metrics are the counters of the server, by name.
func (h *host) metrics() map[string]uint64 {
	stats := h.server.Stats()
	m := map[string]uint64{"connections": uint64(stats.Connections)}
	for command, name := range map[nbd.Command]string{nbd.CmdRead: "read", nbd.CmdWrite: "write", nbd.CmdFlush: "flush"} {
		c := stats.Commands[command]
		m[name+"_requests"], m[name+"_bytes"], m[name+"_errors"] = c.Requests, c.Bytes, c.Errors
	}
	return m
}

// notClosed tells whether an image says that it was not closed. The next Open for writing puts it right: it replays the
// journal or rebuilds the counts. A qcow2 image under the default discipline has no such mark, and needs none.
func notClosed(path string) (bool, error) {
	f, err := storage.Open(path, storage.OpenOptions{ReadOnly: true})
	if err != nil {
		return false, err
	}
	defer f.Close()
	format, err := image.Probe(f)
	switch {
	case err != nil:
		return false, err
	case format == "qcow2":
		h, err := qcow2.ReadHeader(f)
		return err == nil && h.Incompatible&(qcow2.IncompatDirty|qcow2.IncompatJournal) != 0, err
	case format == "fvd":
		h, err := fvd.ReadHeader(f)
		return err == nil && !h.CleanShutdown, err
	}
	return false, nil
}

// Two disks on a Unix socket and on TCP with TLS, one of them added and one taken away while the server runs.
func Example() {
	dir, err := os.MkdirTemp("", "platter")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx := context.Background()
	for _, name := range []string{"one.qcow2", "two.qcow2"} {
		var o image.CreateOptions
		o.Size = 64 << 20
		if err := image.Create(ctx, "qcow2", filepath.Join(dir, name), o); err != nil {
			log.Fatal(err)
		}
	}

	local, err := server.Listen("unix", filepath.Join(dir, "s")) // replaces what a server that was killed left there
	if err != nil {
		log.Fatal(err)
	}
	remote, err := server.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	certificate, authorities := exampleCertificate()
	h, err := newHost(&certificate, local, remote)
	if err != nil {
		log.Fatal(err)
	}
	if err := h.add(ctx, "one", filepath.Join(dir, "one.qcow2")); err != nil {
		log.Fatal(err)
	}

	trust := nbd.ClientOptions{TLS: &tls.Config{RootCAs: authorities, ServerName: "localhost"}}
	client, err := nbd.Dial(nbd.URI{Network: "tcp", Address: remote.Addr().String(), Export: "one", TLS: true}.String(), trust)
	if err != nil {
		log.Fatal(err)
	}
	if _, err := client.WriteAt(make([]byte, 4096), 0); err != nil {
		log.Fatal(err)
	}
	if err := client.Sync(); err != nil {
		log.Fatal(err)
	}

	if err := h.add(ctx, "two", filepath.Join(dir, "two.qcow2")); err != nil {
		log.Fatal(err)
	}
	exports, err := nbd.List(nbd.URI{Network: "unix", Address: filepath.Join(dir, "s")}.String(), trust)
	for _, e := range exports {
		fmt.Println(e.Name, e.Size)
	}
	fmt.Println(err)

	fmt.Println(h.remove(ctx, "one"))
	_, err = client.WriteAt(make([]byte, 4096), 0)
	fmt.Println(errors.Is(err, nbd.ErrConnectionLost))
	if err := client.Close(); err != nil {
		log.Fatal(err)
	}
	fmt.Println(h.metrics()["write_bytes"], h.close())
	// Output:
	// one 67108864
	// two 67108864
	// <nil>
	// <nil>
	// true
	// 4096 <nil>
}

// exampleCertificate makes a certificate for localhost that vouches for itself.
func exampleCertificate() (tls.Certificate, *x509.CertPool) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		log.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		log.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		log.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(parsed)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool
}
