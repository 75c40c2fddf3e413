package cli

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/platter-disk/platter/nbd/server"
)

// serveTLS are the --tls- flags of serve.
type serveTLS struct {
	certificate, key, clientCA string
	required                   bool
}

func (f *serveTLS) register(fs *pflag.FlagSet) {
	fs.StringVar(&f.certificate, "tls-certificate", "", "PEM `FILE` with the server's certificate and its chain: clients may\nencrypt their connection")
	fs.StringVar(&f.key, "tls-key", "", "PEM `FILE` with the private key of the certificate")
	fs.StringVar(&f.clientCA, "tls-client-ca", "", "PEM `FILE` with the authorities that a client's certificate must\ncome from; with it, encrypted clients must show one (the names of the\nauthorities are not sent)")
	fs.BoolVar(&f.required, "tls-required", false, "refuse clients that do not encrypt")
}

// config reads the files. Without a certificate TLS is off.
func (f *serveTLS) config(cmd *cobra.Command) (server.TLSMode, *tls.Config, error) {
	if f.certificate == "" && f.key == "" {
		if f.required || f.clientCA != "" {
			return server.TLSOff, nil, usagef(cmd, "--tls-required and --tls-client-ca need --tls-certificate and --tls-key")
		}
		return server.TLSOff, nil, nil
	}
	if f.certificate == "" || f.key == "" {
		return server.TLSOff, nil, usagef(cmd, "--tls-certificate and --tls-key go together")
	}
	cert, err := tls.LoadX509KeyPair(f.certificate, f.key)
	if err != nil {
		return server.TLSOff, nil, fmt.Errorf("TLS certificate '%s' with key '%s': %w", f.certificate, f.key, err)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{cert}}
	if f.clientCA != "" {
		pem, err := os.ReadFile(f.clientCA)
		if err != nil {
			return server.TLSOff, nil, fmt.Errorf("--tls-client-ca: %w", err)
		}
		authorities := x509.NewCertPool()
		if !authorities.AppendCertsFromPEM(pem) {
			return server.TLSOff, nil, fmt.Errorf("--tls-client-ca: no certificate in '%s'", f.clientCA)
		}
		server.RequireClientCertificates(config, authorities)
	}
	if f.required {
		return server.TLSRequired, config, nil
	}
	return server.TLSAllowed, config, nil
}
