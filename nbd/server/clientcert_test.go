package server_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/nbd/internal/nbdtest"
	"github.com/platter-disk/platter/nbd/server"
)

// handshake connects a client to a server over TLS and exchanges a byte, because with TLS 1.3 a client learns that
// it was refused only then. It tells whether the session was resumed.
func handshake(t *testing.T, serve, dial *tls.Config) (resumed bool, err error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		defer far.Close()
		s := tls.Server(far, serve)
		ctx, cancel := context.WithTimeout(context.Background(), testenv.Patience)
		defer cancel()
		err := s.HandshakeContext(ctx)
		if err == nil {
			_, err = s.Write([]byte{1})
		}
		ended <- err
	}()
	c := tls.Client(near, dial)
	_, rerr := io.ReadFull(c, make([]byte, 1))
	near.Close()
	if err = <-ended; (err == nil) != (rerr == nil) {
		t.Errorf("the server says %v, the client %v", err, rerr)
	}
	return c.ConnectionState().DidResume, err
}

// TestRequireClientCertificates: a certificate of another authority and none at all are refused, whatever the
// version of TLS, and so is a session that began when the certificate was still good.
func TestRequireClientCertificates(t *testing.T) {
	ours, foreign := nbdtest.NewCertificates(t), nbdtest.NewCertificates(t)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			config := ours.ServerConfig(t, false)
			config.MaxVersion = version
			server.RequireClientCertificates(config, ours.Pool)
			client := func(certificates ...tls.Certificate) *tls.Config {
				return &tls.Config{ServerName: "localhost", RootCAs: ours.Pool, Certificates: certificates, ClientSessionCache: tls.NewLRUClientSessionCache(1)}
			}
			for _, c := range []struct {
				name   string
				client *tls.Config
				want   string
			}{
				{"none", client(), "didn't provide a certificate"},
				{"of another authority", client(foreign.Pair(t, "client")), "failed to verify certificate"},
			} {
				for range 2 { // that the first one was refused helps nobody
					if _, err := handshake(t, config, c.client); err == nil || !strings.Contains(err.Error(), c.want) {
						t.Errorf("a certificate that is %s: %v, want %q", c.name, err, c.want)
					}
				}
			}
			good := client(ours.Pair(t, "client"))
			for _, want := range []bool{false, true} {
				if resumed, err := handshake(t, config, good); err != nil || resumed != want {
					t.Fatalf("our certificate: %v, resumed %v, want %v", err, resumed, want)
				}
			}
			// The same tickets, other authorities: what the session was let in with no longer counts.
			server.RequireClientCertificates(config, x509.NewCertPool())
			if _, err := handshake(t, config, good); err == nil {
				t.Error("a resumed session with a certificate that is not good any more was let in")
			}
			if err := config.VerifyConnection(tls.ConnectionState{}); err == nil {
				t.Error("a connection without certificates was let in")
			}
		})
	}
}
