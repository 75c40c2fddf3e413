package nbd

import (
	"strings"
	"testing"
)

func TestParseURI(t *testing.T) {
	for s, want := range map[string]URI{
		"nbd://example.com":                            {Network: "tcp", Address: "example.com:10809"},
		"nbd://example.com/":                           {Network: "tcp", Address: "example.com:10809"},
		"nbd://example.com/disk":                       {Network: "tcp", Address: "example.com:10809", Export: "disk"},
		"nbd://example.com//disk":                      {Network: "tcp", Address: "example.com:10809", Export: "/disk"},
		"nbd://example.com:99/hello%20world":           {Network: "tcp", Address: "example.com:99", Export: "hello world"},
		"nbd://[::1]/":                                 {Network: "tcp", Address: "[::1]:10809"},
		"nbd://[::1]:7/x":                              {Network: "tcp", Address: "[::1]:7", Export: "x"},
		"NBD://example.com/":                           {Network: "tcp", Address: "example.com:10809"},
		"nbd+unix:///?socket=/run/s":                   {Network: "unix", Address: "/run/s"},
		"nbd+unix:///disk?socket=nbd.sock":             {Network: "unix", Address: "nbd.sock", Export: "disk"},
		"nbd+unix:///?socket=%00/abstract":             {Network: "unix", Address: "\x00/abstract"},
		"nbds://h/x?tls-certificates=/etc/pki":         {Network: "tcp", Address: "h:10809", Export: "x", TLS: true, TLSCertificates: "/etc/pki"},
		"nbds://h/?tls-hostname=n&tls-type=x509":       {Network: "tcp", Address: "h:10809", TLS: true, TLSHostname: "n"},
		"nbds+unix:///?socket=s&tls-verify-peer=0":     {Network: "unix", Address: "s", TLS: true, TLSNoVerify: true},
		"nbds+unix:///?socket=s&tls-verify-peer=true":  {Network: "unix", Address: "s", TLS: true},
		"nbd+unix:///a%3Fb%25?socket=/tmp/with%20room": {Network: "unix", Address: "/tmp/with room", Export: "a?b%"},
	} {
		got, err := ParseURI(s)
		if err != nil || got != want {
			t.Errorf("ParseURI(%q) = %+v, %v, want %+v", s, got, err, want)
			continue
		}
		if again, err := ParseURI(got.String()); err != nil || again != want {
			t.Errorf("%q is written as %q, which reads as %+v, %v", s, got.String(), again, err)
		}
		if !IsURI(s) {
			t.Errorf("IsURI(%q) is false", s)
		}
	}
}

func TestParseURIRefuses(t *testing.T) {
	for s, say := range map[string]string{
		"":                                     "expected nbd://",
		"/dev/nbd0":                            "expected nbd://",
		"http://example.com/":                  "expected nbd://",
		"nbd:unix:/run/s":                      "expected nbd://",
		"nbd://":                               "host is missing",
		"nbd:///x":                             "host is missing",
		"nbd+unix:///x":                        "socket is missing",
		"nbd+unix://host/?socket=s":            "host \"host\"",
		"nbd://host/?socket=s":                 "socket is for",
		"nbd://host/#frag":                     "fragment",
		"nbd://host/?foo=1":                    "unknown query parameter foo",
		"nbd+unix:///?socket=a&socket=b":       "2 times",
		"nbds://host/?tls-type=psk":            "only x509",
		"nbds://host/?tls-verify-peer=maybe":   "expected 0 or 1",
		"nbd://host/?tls-hostname=x":           "for nbds://",
		"nbd://host/%00":                       "NUL",
		"nbd://host/%ff":                       "UTF-8",
		"nbd://host/?a=%zz":                    "query",
		"nbd://host:port/":                     "port",
		"nBd://::":                             "expected a name",
		"nbd://h/" + strings.Repeat("x", 4097): "4096",
	} {
		if u, err := ParseURI(s); err == nil || !strings.Contains(err.Error(), say) {
			t.Errorf("ParseURI(%.60q) = %+v, %v, want an error with %q", s, u, err, say)
		}
	}
	for _, s := range []string{"", "nbd", "nbd:", "nbd:unix:/x", "http://x", "file.qcow2"} {
		if IsURI(s) {
			t.Errorf("IsURI(%q) is true", s)
		}
	}
}

func FuzzParseURI(f *testing.F) {
	for _, s := range []string{"nbd://h:1/x", "nbd+unix:///e?socket=/s", "nbds://[::1]/?tls-verify-peer=0", "nbds+unix:///?socket=%00a&tls-certificates=/d"} {
		f.Add(s)
	}
	f.Add("nbd://::")
	f.Add("nbd://[fe80::1%25eth0]/")
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURI(s)
		if err != nil {
			return
		}
		if again, err := ParseURI(u.String()); err != nil || again != u {
			t.Fatalf("%q reads as %+v, is written as %q, which reads as %+v, %v", s, u, u.String(), again, err)
		}
	})
}

// Other NBD programs do not take a plus sign for a space.
func TestURISpaces(t *testing.T) {
	u := URI{Network: "unix", Address: "/run/my disks/a+b", Export: "the disk"}
	want := "nbd+unix:///the%20disk?socket=/run/my%20disks/a%2Bb"
	if got := u.String(); got != want {
		t.Errorf("%+v is printed as %s, want %s", u, got, want)
	}
	if back, err := ParseURI(want); err != nil || back != u {
		t.Errorf("%s is read as %+v, %v; want %+v", want, back, err, u)
	}
}
