package image_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/image/gate"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/server"
)

// serveQEMU exports a file as it is over a Unix socket until the test ends.
func serveQEMU(t *testing.T, path, socket string) {
	testenv.Need(t, "qemu-nbd")
	testenv.Serve(t, socket, "qemu-nbd", "--persistent", "--shared=8", "--format=raw", "--export-name=x", "--socket="+socket, path)
}

func TestNBD(t *testing.T) {
	dir := t.TempDir()
	disk, base, top, socket := filepath.Join(dir, "disk"), filepath.Join(dir, "base"), filepath.Join(dir, "top"), filepath.Join(dir, "s")
	create(t, "raw", base, sized(mib))
	serveQEMU(t, base, socket)
	uri := "nbd+unix:///x?socket=" + socket

	im := open(t, uri, image.Options{Format: "raw", Discard: true})
	if _, err := im.WriteAt(bytes.Repeat([]byte{6}, 5000), 10000); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	overlay(t, top, uri, "raw", mib)
	want := make([]byte, mib)
	copy(want[10000:], bytes.Repeat([]byte{6}, 5000))
	for _, name := range []string{uri, top, "nbd:unix:" + socket + ":exportname=x", `json:{"driver":"nbd","server":{"type":"unix","path":"` + socket + `"},"export":"x"}`} {
		im := open(t, name, image.Options{ReadOnly: true, Gate: gate.Any{}})
		if !bytes.Equal(contents(t, im), want) {
			t.Errorf("%s: contents differ", name)
		}
		im.Close()
	}
	wantError(t, "through SameDirectory", openError(t, top, image.Options{}), "was refused")
	wantError(t, "no such export", openError(t, "nbd+unix:///none?socket="+socket, image.Options{}), "none")

	// A qcow2 image inside an export: a relative reference means nothing there, and a cycle is found by name.
	create(t, "qcow2", disk, sized(mib))
	socket2 := filepath.Join(dir, "s2")
	inner := "nbd+unix:///x?socket=" + socket2
	serveQEMU(t, disk, socket2)
	im = open(t, inner, image.Options{})
	if im.Format() != "qcow2" {
		t.Errorf("format %s", im.Format())
	}
	im.Close()
	looped, socket3 := filepath.Join(dir, "looped"), filepath.Join(dir, "s3")
	overlay(t, looped, "nbd+unix:///x?socket="+socket3, "qcow2", mib)
	serveQEMU(t, looped, socket3)
	wantError(t, "cycle through NBD", openError(t, "nbd+unix:///x?socket="+socket3, image.Options{Gate: gate.Any{}, ReadOnly: true}), image.ErrCycle.Error())
	relative, socket4 := filepath.Join(dir, "relative"), filepath.Join(dir, "s4")
	overlay(t, relative, "base", "raw", mib)
	serveQEMU(t, relative, socket4)
	wantError(t, "relative reference over NBD", openError(t, "nbd+unix:///x?socket="+socket4, image.Options{Gate: gate.Any{}}), "cannot be resolved")
}

// stuckDevice is a disk whose reads wait while somebody else holds it.
type stuckDevice struct {
	block.Device
	hold sync.RWMutex
}

func (d *stuckDevice) TryReadAt([]byte, int64) error { return block.ErrWouldBlock }

func (d *stuckDevice) ReadAt(p []byte, off int64) (int, error) {
	d.hold.RLock()
	defer d.hold.RUnlock()
	return d.Device.ReadAt(p, off)
}

// TestNBDOptions: the options for exports reach every connection of a chain, except for what the chain itself decides.
func TestNBDOptions(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	web := httptest.NewTLSServer(nil) // has a certificate
	defer web.Close()
	authorities := x509.NewCertPool()
	authorities.AddCert(web.Certificate())
	quiet := slog.New(slog.DiscardHandler)
	s, err := server.New(server.Config{TLS: server.TLSRequired, TLSConfig: &tls.Config{Certificates: web.TLS.Certificates, MinVersion: tls.VersionTLS12}, Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	l, err := server.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background(), l) }()
	create(t, "raw", "disk", sized(mib))
	device := &stuckDevice{Device: open(t, "disk", image.Options{Format: "raw"})}
	if err := s.AddExport(server.Export{Name: "x", Device: device}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(s.Shutdown(context.Background()), <-served); err != nil {
			t.Error(err)
		}
	}()

	uri := "nbd+unix:///x?socket=" + filepath.Join(dir, "s")
	o := image.Options{Gate: gate.Any{}, NBD: nbd.ClientOptions{
		ReadOnly: true, // not the caller's to say
		TLS:      &tls.Config{RootCAs: authorities, ServerName: "example.com", MinVersion: tls.VersionTLS12}, Connections: 3,
		RequestTimeout: time.Second, ReconnectDelay: -1, Logger: quiet,
	}}
	backed, data, fvdData := sized(-1), sized(mib), fvdOptions(mib, "", "", "local", fvd.CreateOptions{})
	backed.BackingFile, backed.BackingFormat, backed.Gate, backed.NBD = uri, "raw", gate.Any{}, o.NBD
	data.DataFileName, data.NBD = uri, o.NBD
	create(t, "raw", uri, image.CreateOptions{CreateOptions: qcow2.CreateOptions{Size: mib}, NBD: o.NBD})
	create(t, "qcow2", "over", backed)
	create(t, "fvd", "over.fvd", backed)
	create(t, "qcow2", "data", data)
	create(t, "fvd", "data.fvd", fvdData)
	f := openFile(t, "data.fvd")
	if err := errors.Join(fvd.Amend(f, []fvd.Setting{{Name: "data_file", Value: uri}}), f.Close()); err != nil {
		t.Fatal(err)
	}

	for _, test := range []struct {
		name, format string
		writes       bool // to the export
	}{{uri, "raw", true}, {"over", "", false}, {"over.fvd", "", false}, {"data", "", true}, {"data.fvd", "", true}} {
		var clients []*nbd.Client
		ctx := nbd.Watch(t.Context(), func(c *nbd.Client) { clients = append(clients, c) })
		o.Format = test.format
		im, err := image.Open(ctx, test.name, o)
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		if len(clients) != 1 || clients[0].Connections() != 3 || !clients[0].Export().TLS || clients[0].ReadOnly() == test.writes {
			t.Errorf("%s: %d clients, %d connections, read-only %v", test.name, len(clients), clients[0].Connections(), clients[0].ReadOnly())
		}
		if _, err := im.WriteAt(make([]byte, 512), 0); err != nil {
			t.Errorf("%s: %v", test.name, err)
		}
		if err := im.Flush(); err != nil {
			t.Errorf("%s: %v", test.name, err)
		}
		if test.name != "over" {
			if err := im.Close(); err != nil {
				t.Errorf("%s: %v", test.name, err)
			}
			continue
		}
		device.hold.Lock()
		if _, err := im.ReadAt(make([]byte, 512), mib/2); err == nil || !strings.Contains(err.Error(), "did not answer in time") {
			t.Errorf("read from a server that does not answer: %v", err)
		}
		device.hold.Unlock()
		im.Close() // its connections are lost
	}

	clients := 0
	_, err = image.Check(nbd.Watch(t.Context(), func(*nbd.Client) { clients++ }), "data.fvd", o, image.CheckOptions{})
	if err != nil || clients != 1 {
		t.Errorf("check over %d connections: %v", clients, err)
	}
	o.Format = "raw"
	wantError(t, "what the URI says wins", openError(t, strings.Replace(uri, "nbd", "nbds", 1)+"&tls-hostname=elsewhere", o), "elsewhere")
	wantError(t, "without TLS", openError(t, uri, image.Options{}), "TLS")
}

// TestNBDEndsWithContext: a server that says nothing does not keep Open longer than its context lives.
func TestNBDEndsWithContext(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	start := time.Now()
	im, err := image.Open(ctx, "nbd+unix:///x?socket="+socket, image.Options{})
	if err == nil {
		im.Close()
	}
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 29*time.Second { // connecting may take 30 s by default
		t.Errorf("%v after %v", err, time.Since(start))
	}
}
