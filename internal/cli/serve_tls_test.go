package cli

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/nbd"
)

// certtoolDir makes a directory as QEMU and libnbd want it: an authority and, issued by it, a server's and a client's
// certificate. kind is that of the keys; GnuTLS chooses the certificate that it shows by it.
func certtoolDir(t *testing.T, kind string) string {
	t.Helper()
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	for _, c := range []struct{ name, template string }{
		{"ca", "ca\ncert_signing_key\n"},
		{"server", "dns_name = localhost\nip_address = 127.0.0.1\ntls_www_server\nsigning_key\nencryption_key\n"},
		{"client", "tls_www_client\nsigning_key\nencryption_key\n"},
	} {
		if err := os.WriteFile(in(c.name+".info"), []byte("cn = \"Test "+c.name+"\"\n"+c.template), 0o600); err != nil {
			t.Fatal(err)
		}
		testenv.Run(t, "certtool", "--generate-privkey", "--key-type", kind, "--sec-param", "high", "--outfile", in(c.name+"-key.pem"))
		args := []string{"--generate-self-signed"}
		if c.name != "ca" {
			args = []string{"--generate-certificate", "--load-ca-certificate", in("ca-cert.pem"), "--load-ca-privkey", in("ca-key.pem")}
		}
		testenv.Run(t, "certtool", append(args, "--load-privkey", in(c.name+"-key.pem"), "--template", in(c.name+".info"), "--outfile", in(c.name+"-cert.pem"))...)
	}
	return dir
}

// copyFiles makes a directory with some of the files of others.
func copyFiles(t *testing.T, files ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(f)), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestServeClientCertificates: with --tls-client-ca clients of every make get in with a certificate of that authority,
// and with another one or none they do not.
func TestServeClientCertificates(t *testing.T) {
	testenv.Need(t, "certtool", "nbdinfo", "qemu-img")
	for _, kind := range []string{"rsa", "ecdsa"} {
		t.Run(kind, func(t *testing.T) {
			ours, foreign := certtoolDir(t, kind), certtoolDir(t, kind)
			authority := filepath.Join(ours, "ca-cert.pem")
			r := startServe(t, "--create", "1M", "--listen", "127.0.0.1:0", "--tls-required", "--tls-client-ca", authority,
				"--tls-certificate", filepath.Join(ours, "server-cert.pem"), "--tls-key", filepath.Join(ours, "server-key.pem"), filepath.Join(t.TempDir(), "disk.qcow2"))
			address := strings.TrimSuffix(strings.TrimPrefix(r.uri, "nbds://"), "/")
			_, port, err := net.SplitHostPort(address)
			if err != nil {
				t.Fatalf("the URI is %s: %v", r.uri, err)
			}
			for _, c := range []struct {
				name  string
				dir   string // what the client has
				works bool
			}{
				{"our certificate", ours, true},
				{"a foreign certificate", copyFiles(t, authority, filepath.Join(foreign, "client-cert.pem"), filepath.Join(foreign, "client-key.pem")), false},
				{"no certificate", copyFiles(t, authority), false},
			} {
				for client, connect := range map[string]func() error{
					"nbdinfo": func() error {
						return exec.Command("nbdinfo", "--size", r.uri+"?tls-certificates="+c.dir).Run()
					},
					"qemu-img": func() error {
						return exec.Command("qemu-img", "info", "--object", "tls-creds-x509,id=tls,endpoint=client,dir="+c.dir,
							"--image-opts", "driver=nbd,host=127.0.0.1,tls-creds=tls,port="+port).Run()
					},
					"platter's client": func() error { return readOverTLS(t, address, authority, c.dir) },
				} {
					if err := connect(); (err == nil) != c.works {
						t.Errorf("%s with %s: %v\n%s", client, c.name, err, r.said())
					}
				}
			}
			r.end(t)
			for _, reason := range []string{"failed to verify certificate", "didn't provide a certificate"} {
				if !strings.Contains(r.said(), reason) {
					t.Errorf("no client was refused with %q:\n%s", reason, r.said())
				}
			}
		})
	}
}

// readOverTLS reads with the certificate in dir, if there is one.
func readOverTLS(t *testing.T, address, authority, dir string) error {
	t.Helper()
	config := &tls.Config{RootCAs: x509.NewCertPool()}
	pem, err := os.ReadFile(authority)
	if err != nil || !config.RootCAs.AppendCertsFromPEM(pem) {
		t.Fatalf("%s: %v", authority, err)
	}
	cert := filepath.Join(dir, "client-cert.pem")
	if _, err := os.Stat(cert); err == nil {
		pair, err := tls.LoadX509KeyPair(cert, filepath.Join(dir, "client-key.pem"))
		if err != nil {
			t.Fatal(err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	c, err := nbd.Dial("nbd://"+address, nbd.ClientOptions{TLS: config, ReconnectDelay: -1})
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.ReadAt(make([]byte, 512), 0)
	return err
}
