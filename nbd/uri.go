package nbd

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strings"
)

// URI is a parsed NBD URI, for example
//
//	nbd://example.com:10809/disk
//	nbd+unix:///disk?socket=/run/nbd.sock
//	nbds://example.com/disk?tls-certificates=/etc/pki/nbd
//
// The rules are those of the NBD URI document. TLS is by X.509 certificates only.
type URI struct {
	Network string // "tcp" or "unix"
	Address string // host:port, or the path of the socket; a leading NUL names an abstract socket
	Export  string // "" is the default export
	TLS     bool   // nbds, nbds+unix: the connection fails unless it is encrypted

	TLSHostname     string // tls-hostname: the name to verify the server's certificate against, "" for the host
	TLSCertificates string // tls-certificates: a directory with ca-cert.pem, client-cert.pem and client-key.pem
	TLSNoVerify     bool   // tls-verify-peer=0: any certificate will do
}

var uriSchemes = map[string]URI{
	"nbd":       {Network: "tcp"},
	"nbds":      {Network: "tcp", TLS: true},
	"nbd+unix":  {Network: "unix"},
	"nbds+unix": {Network: "unix", TLS: true},
}

// IsURI tells whether s starts with the scheme of an NBD URI.
func IsURI(s string) bool {
	scheme, _, found := strings.Cut(s, ":")
	_, known := uriSchemes[strings.ToLower(scheme)]
	return found && known && strings.HasPrefix(s[len(scheme):], "://")
}

// ParseURI reads an NBD URI. Query parameters that are not known are errors.
func ParseURI(s string) (URI, error) {
	fail := func(format string, args ...any) (URI, error) {
		return URI{}, fmt.Errorf("NBD URI %q: "+format, append([]any{s}, args...)...)
	}
	p, err := url.Parse(s)
	if err != nil {
		return URI{}, fmt.Errorf("NBD URI: %w", err)
	}
	u, known := uriSchemes[p.Scheme]
	if !known || p.Opaque != "" {
		return fail("expected nbd://, nbds://, nbd+unix:// or nbds+unix://")
	}
	if p.Fragment != "" {
		return fail("fragment %q, expected none", p.Fragment)
	}
	u.Export = strings.TrimPrefix(p.Path, "/")
	if err := ValidString("export name", u.Export); err != nil {
		return fail("%w", err)
	}
	query, err := url.ParseQuery(p.RawQuery)
	if err != nil {
		return fail("query: %w", err)
	}
	for key, values := range query {
		if len(values) != 1 {
			return fail("query parameter %s is given %d times", key, len(values))
		}
		if err := u.setParameter(key, values[0]); err != nil {
			return fail("%w", err)
		}
	}
	switch u.Network {
	case "unix":
		if u.Address == "" {
			return fail("query parameter socket is missing")
		}
		if p.Host != "" {
			return fail("host %q, expected none with a Unix socket", p.Host)
		}
	case "tcp":
		if u.Address != "" {
			return fail("query parameter socket is for nbd+unix:// and nbds+unix:// only")
		}
		host := p.Hostname()
		if host == "" {
			return fail("the host is missing")
		}
		// url.Parse lets "::" pass and takes all but the last colon for the host.
		if _, err := netip.ParseAddr(host); err != nil && strings.Contains(host, ":") {
			return fail("host %q, expected a name, an IPv4 address or an IPv6 address in brackets", host)
		}
		port := p.Port()
		if port == "" {
			port = DefaultPort
		}
		u.Address = net.JoinHostPort(host, port)
	}
	return u, nil
}

func (u *URI) setParameter(key, value string) error {
	if !u.TLS && strings.HasPrefix(key, "tls-") {
		return fmt.Errorf("query parameter %s is for nbds:// and nbds+unix:// only", key)
	}
	switch key {
	case "socket":
		u.Address = value
	case "tls-type":
		if value != "x509" {
			return fmt.Errorf("tls-type %q, only x509 is supported", value)
		}
	case "tls-hostname":
		u.TLSHostname = value
	case "tls-certificates":
		u.TLSCertificates = value
	case "tls-verify-peer":
		switch value {
		case "0", "false":
			u.TLSNoVerify = true
		case "1", "true":
		default:
			return fmt.Errorf("tls-verify-peer %q, expected 0 or 1", value)
		}
	default:
		return fmt.Errorf("unknown query parameter %s", key)
	}
	return nil
}

// String is the URI that ParseURI reads back.
func (u URI) String() string {
	p := url.URL{Scheme: "nbd", Path: "/" + u.Export}
	if u.TLS {
		p.Scheme = "nbds"
	}
	// A plus sign in place of a space is a convention of web forms, which other NBD programs do not share.
	escaped := strings.NewReplacer("%2F", "/", "+", "%20")
	var query []string
	add := func(key, value string) {
		if value != "" {
			query = append(query, key+"="+escaped.Replace(url.QueryEscape(value)))
		}
	}
	if u.Network == "unix" {
		p.Scheme += "+unix"
		add("socket", u.Address)
	} else if host, port, err := net.SplitHostPort(u.Address); err == nil && port == DefaultPort && !strings.Contains(host, ":") {
		p.Host = host
	} else {
		p.Host = u.Address
	}
	add("tls-hostname", u.TLSHostname)
	add("tls-certificates", u.TLSCertificates)
	if u.TLSNoVerify {
		add("tls-verify-peer", "0")
	}
	p.RawQuery = strings.Join(query, "&")
	if p.Host == "" { // url.URL would leave the empty authority out
		return p.Scheme + "://" + p.EscapedPath() + "?" + p.RawQuery
	}
	return p.String()
}
