package server

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
)

// RequireClientCertificates makes config refuse clients that do not show a certificate for client
// authentication that one of the authorities has issued.
//
// It does what tls.RequireAndVerifyClientCert with ClientCAs does, except that clients are not told the names of
// the authorities. Where they are told, a client with GnuTLS (libnbd, QEMU) whose certificate has an RSA key finds
// that it has none that was asked for, and shows none: seen with GnuTLS 3.7.9 over TLS 1.3. To a server that
// names nobody it shows the one it has.
func RequireClientCertificates(config *tls.Config, authorities *x509.CertPool) {
	config.ClientAuth = tls.RequireAnyClientCert
	config.ClientCAs = nil
	// Unlike VerifyPeerCertificate it is called for resumed sessions, too.
	config.VerifyConnection = func(state tls.ConnectionState) error {
		shown := state.PeerCertificates
		if len(shown) == 0 {
			return errors.New("tls: the client shows no certificate")
		}
		o := x509.VerifyOptions{
			Roots:         authorities,
			Intermediates: x509.NewCertPool(),
			KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}
		if config.Time != nil {
			o.CurrentTime = config.Time()
		}
		for _, c := range shown[1:] {
			o.Intermediates.AddCert(c)
		}
		if _, err := shown[0].Verify(o); err != nil {
			return &tls.CertificateVerificationError{UnverifiedCertificates: shown, Err: err}
		}
		return nil
	}
}
