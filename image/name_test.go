package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/platter-disk/platter/image/gate"
	"pgregory.net/rapid"
)

func ptr[T any](v T) *T { return &v }

func TestParseName(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.WriteFile("there:is", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	file := func(path string) *location { return &location{path: path} }
	for _, test := range []struct {
		name string
		want *node
		err  string
	}{
		{name: "disk.qcow2", want: &node{at: file("disk.qcow2")}},
		{name: "/a/b:c", want: &node{at: file("/a/b:c")}},
		{name: "./a:b", want: &node{at: file("./a:b")}},
		{name: "there:is", want: &node{at: file("there:is")}},
		{name: "foo:bar", err: "Unknown protocol 'foo'"},
		{name: "http://host/x", err: "Unknown protocol 'http'"},
		{name: "file:a:b", want: &node{at: file("a:b")}},
		{name: "", err: "requires a file name"},
		{name: "file:", err: "requires a file name"},
		{name: "a\x00b", err: "zero byte"},
		{name: "nbd://host/x", want: &node{at: &location{uri: "nbd://host/x"}}},
		{name: "nbd+unix:///x?socket=/s", want: &node{at: &location{uri: "nbd+unix:///x?socket=/s"}}},
		{name: "nbds://host", want: &node{at: &location{uri: "nbds://host"}}},
		{name: "nbd://", err: "host is missing"},
		{name: "nbd:localhost:10809", want: &node{at: &location{uri: "nbd://localhost/"}}},
		{name: "nbd:[::1]:7:exportname=a:b", want: &node{at: &location{uri: "nbd://[::1]:7/a:b"}}},
		{name: "nbd:unix:/s:exportname=x", want: &node{at: &location{uri: "nbd+unix:///x?socket=/s"}}},
		{name: "nbd:nothing", err: "expected nbd:HOST:PORT"},

		{name: `json:{"driver":"qcow2","file":{"driver":"file","filename":"t"}}`, want: &node{format: "qcow2", at: file("t")}},
		{name: `json:{"driver":"qcow2","file.driver":"file","file.filename":"t"}`, want: &node{format: "qcow2", at: file("t")}},
		{name: `json:{"file.filename":"nbd://h/x"}`, want: &node{at: &location{uri: "nbd://h/x"}}},
		{name: `json:{"file":{"driver":"file","filename":"nbd://h/x"}}`, want: &node{at: file("nbd://h/x")}},
		{name: `json:{"driver":"file","filename":"t"}`, want: &node{format: "raw", shown: "file", at: file("t")}},
		{name: `json:{"driver":"host_device","filename":"/dev/x"}`, want: &node{format: "raw", shown: "host_device", at: file("/dev/x")}},
		{name: `json:{"driver":"nbd","server":{"type":"unix","path":"/s"}}`, want: &node{format: "raw", shown: "nbd", at: &location{uri: "nbd+unix:///?socket=/s"}}},
		{name: `json:{"driver":"raw","file":{"driver":"nbd","server":{"type":"inet","host":"h","port":"7"},"export":"x"}}`, want: &node{format: "raw", at: &location{uri: "nbd://h:7/x"}}},
		{name: `json:{"driver":"raw","file":{"driver":"nbd","host":"h","export":"x"}}`, want: &node{format: "raw", at: &location{uri: "nbd://h/x"}}},
		{name: `json:{"driver":"raw","offset":512,"size":"1k","read-only":true,"discard":"ignore","file":{"filename":"t","locking":"off","cache":{"direct":true}}}`,
			want: &node{format: "raw", offset: 512, size: 1024, readOnly: true, discard: ptr(false), at: &location{path: "t", noLock: true, direct: true}}},
		{name: `json:{"driver":"qcow2","lazy-refcounts":"on","l2-cache-size":65536,"discipline":"ordered","cache":{"writeback":false},"force-share":true,"node-name":"n","file":{"filename":"t"}}`,
			want: &node{format: "qcow2", l2Cache: 65536, discipline: "ordered", writethrough: true, share: true, at: file("t")}},
		{name: `json:{"driver":"qcow2","cache-size":"1M","refcount-cache-size":"256k","pass-discard-request":true,"file":{"filename":"t"}}`,
			want: &node{format: "qcow2", l2Cache: 768 << 10, refcountCache: 256 << 10, discard: ptr(true), at: file("t")}},
		{name: `json:{"driver":"qcow2","backing":null,"file":{"filename":"t"}}`, want: &node{format: "qcow2", noBacking: true, at: file("t")}},
		{name: `json:{"driver":"qcow2","backing":{"driver":"raw","file":{"filename":"b"}},"file":{"filename":"t"}}`,
			want: &node{format: "qcow2", at: file("t"), backing: &node{format: "raw", at: file("b")}}},
		{name: `json:{"driver":"qcow2","data-file":{"driver":"file","filename":"d"},"file":{"filename":"t"}}`,
			want: &node{format: "qcow2", at: file("t"), dataFile: file("d")}},

		{name: `json:{bad`, err: "Could not parse the JSON options"},
		{name: `json:[1]`, err: "expected an object"},
		{name: `json:{"driver":"raw"} x`, err: "Could not parse the JSON options"},
		{name: `json:{"driver":"raw"`, err: "Could not parse the JSON options: unexpected EOF"},
		{name: `json:{"driver":"raw","driver":"qcow2"}`, err: "given twice"},
		{name: `json:{"file":{"filename":"a"},"file.filename":"b"}`, err: "given twice"},
		{name: `json:{"file":"a","file.filename":"b"}`, err: "both a value and a group"},
		{name: `json:{"file":"a"}`, err: `option "file": found "a", expected an object`},
		{name: `json:{"driver":"raw","file":{}}`, err: "requires a file name"},
		{name: `json:{"driver":"raw","file":{"driver":"file"}}`, err: "The 'file' block driver requires a file name"},
		{name: `json:{"driver":"raw","file":{"driver":"qcow2"}}`, err: "Unknown driver 'qcow2'"},
		{name: `json:{"driver":["raw"]}`, err: "is an array"},
		{name: `json:{"driver":null}`, err: "found null, expected a string"},
		{name: `json:{"driver":"qcow2"}`, err: `A block device must be specified for "file"`},
		{name: `json:{}`, err: "Must specify either driver or file"},
		{name: `json:{"driver":"nope","file":{"filename":"t"}}`, err: "Unknown driver 'nope'"},
		{name: `json:{"driver":"qcow2","bogus":1,"file":{"filename":"t"}}`, err: "Block format 'qcow2' does not support the option 'bogus'"},
		{name: `json:{"driver":"raw","backing.file.filename":"b","file":{"filename":"t"}}`, err: "Block format 'raw' does not support the option 'backing.file.filename'"},
		{name: `json:{"driver":"raw","file":{"filename":"t","bogus":1}}`, err: "Block protocol 'file' doesn't support the option 'bogus'"},
		{name: `json:{"driver":"nbd","server":{"path":"/s","x":1}}`, err: "server.x"},
		{name: `json:{"driver":"nbd","server":{"type":"vsock"}}`, err: "expected inet or unix"},
		{name: `json:{"driver":"nbd"}`, err: "host or path is missing"},
		{name: `json:{"driver":"nbd","path":"/s","host":"h"}`, err: "exclude each other"},
		{name: `json:{"driver":"qcow2","lazy-refcounts":"maybe","file":{"filename":"t"}}`, err: "Parameter 'lazy-refcounts' expects 'on' or 'off'"},
		{name: `json:{"driver":"qcow2","l2-cache-size":"x","file":{"filename":"t"}}`, err: "Parameter 'l2-cache-size' expects a non-negative number"},
		{name: `json:{"driver":"qcow2","l2-cache-size":-1,"file":{"filename":"t"}}`, err: "Parameter 'l2-cache-size' expects"},
		{name: `json:{"driver":"qcow2","l2-cache-size":"9999999E","file":{"filename":"t"}}`, err: "Parameter 'l2-cache-size' expects"},
		{name: `json:{"driver":"qcow2","cache-size":1,"l2-cache-size":2,"file":{"filename":"t"}}`, err: "cache-size 1 is less"},
		{name: `json:{"driver":"qcow2","backing":"x","file":{"filename":"t"}}`, err: `option "backing": found "x", expected an object or null`},
		{name: `json:{"driver":"qcow2","backing":{"driver":"raw"},"file":{"filename":"t"}}`, err: "backing: A block device"},
		{name: `json:{"driver":"raw","cache":{"no-flush":true},"file":{"filename":"t"}}`, err: "would lose data"},
		{name: `json:{"driver":"raw","cache":{"x":true},"file":{"filename":"t"}}`, err: `"cache.x" is not known`},
		{name: `json:{"driver":"raw","discard":"maybe","file":{"filename":"t"}}`, err: `found "maybe", expected one of unmap`},
		{name: `json:{"a..b":1}`, err: "a part of the name is empty"},
		{name: "json:" + strings.Repeat(`{"a":`, 70) + "1" + strings.Repeat("}", 70), err: "deep"},
		{name: `json:{"a` + strings.Repeat(".a", 70) + `":1}`, err: "deep"},
		{name: `json:{"a":"` + strings.Repeat("x", maxNameLength) + `"}`, err: "bytes, at most"},

		{name: "driver=qcow2,file.filename=t", want: &node{format: "qcow2", at: file("t")}},
		{name: "driver=raw,file.filename=foo,,bar,offset=1k", want: &node{format: "raw", offset: 1024, at: file("foo,bar")}},
		{name: "driver=qcow2,file.filename=t,backing.driver=qcow2,backing.file.filename=b,backing.backing.file.filename=c",
			want: &node{format: "qcow2", at: file("t"), backing: &node{format: "qcow2", at: file("b"), backing: &node{at: file("c")}}}},
		{name: "driver=qcow2,file.filename=t,backing=", want: &node{format: "qcow2", noBacking: true, at: file("t")}},
		{name: "driver=nbd,host=h,port=1", want: &node{format: "raw", shown: "nbd", at: &location{uri: "nbd://h:1/"}}},
		{name: "driver=raw,foo", err: `option "foo": expected name=value`},
		{name: "driver=raw,,x", err: "Unknown driver 'raw,x'"},
		{name: "driver=" + strings.Repeat("x", maxNameLength), err: "bytes, at most"},
	} {
		got, err := parseName(test.name, false)
		shown := test.name[:min(len(test.name), 120)]
		switch {
		case test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)):
			t.Errorf("%s\n\terror %v, want %q", shown, err, test.err)
		case test.err == "" && (err != nil || !reflect.DeepEqual(got, test.want)):
			t.Errorf("%s\n\t%+v, %v, want %+v", shown, got, err, test.want)
		}
	}
	if n, err := parseName("file.filename=x", true); err != nil || n.at.path != "x" {
		t.Errorf("options by demand: %+v, %v", n, err)
	}
}

func TestParseReference(t *testing.T) {
	disk := &location{path: "dir/sub/top.qcow2"}
	remote := &location{uri: "nbd://host/x"}
	for _, test := range []struct {
		kind      gate.Kind
		from      *location
		ref       string
		protocol  string
		name, err string
	}{
		{gate.Backing, disk, "base.raw", "file", "dir/sub/base.raw", ""},
		{gate.Backing, disk, "../base.raw", "file", "dir/sub/../base.raw", ""},
		{gate.Backing, disk, "/abs/base.raw", "file", "/abs/base.raw", ""},
		{gate.Backing, disk, "./a:b", "file", "dir/sub/./a:b", ""},
		{gate.Backing, &location{path: "top"}, "base", "file", "base", ""},
		{gate.Backing, &location{path: "a:b/top"}, "base", "file", "a:b/base", ""},
		{gate.Backing, disk, "file:base", "file", "base", ""},
		{gate.Backing, disk, "nbd://h/y", "nbd", "nbd://h/y", ""},
		{gate.Backing, disk, `json:{"file.filename":"z"}`, "json", `json:{"file.filename":"z"}`, ""},
		{gate.Backing, disk, "foo:bar", "", "", "Unknown protocol 'foo'"},
		{gate.Backing, disk, "driver=raw,file.filename=x", "file", "dir/sub/driver=raw,file.filename=x", ""},
		{gate.Backing, remote, "base", "", "", "cannot be resolved"},
		{gate.Backing, remote, "/abs", "file", "/abs", ""},
		{gate.DataFile, disk, "data", "file", "data", ""},
		{gate.DataFile, disk, "nbd://h/d", "nbd", "nbd://h/d", ""},
		{gate.DataFile, disk, `json:{}`, "", "", "Unknown protocol 'json'"},
	} {
		relative := besideImage
		if test.kind == gate.DataFile { // as qcow2 has it
			relative = fromWorkingDirectory
		}
		_, r, err := parseReference(test.kind, test.from, test.ref, relative)
		if test.err != "" {
			if err == nil || !strings.Contains(err.Error(), test.err) {
				t.Errorf("%q: error %v, want %q", test.ref, err, test.err)
			}
			continue
		}
		if err != nil || r.Protocol != test.protocol || r.Name != test.name || r.Image != test.from.String() || r.Kind != test.kind {
			t.Errorf("%q: %+v, %v, want %s %s", test.ref, r, err, test.protocol, test.name)
		}
	}
}

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{"0": 0, "1": 1, "512b": 512, "1k": 1024, "2K": 2048, "3M": 3 << 20, "1G": 1 << 30, "1T": 1 << 40, "1P": 1 << 50, "7E": 7 << 60} {
		if got, ok := parseSize(s); !ok || got != want {
			t.Errorf("%q: %d, %v, want %d", s, got, ok, want)
		}
	}
	for _, s := range []string{"", "k", "-1", "+1", "1x", "1.5k", "8E", "9223372036854775808", "0x10", " 1"} {
		if got, ok := parseSize(s); ok {
			t.Errorf("%q: %d, want it refused", s, got)
		}
	}
}

// TestFormsAgree: nested JSON, JSON with dotted names and an option string say the same.
func TestFormsAgree(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		path := rapid.StringMatching(`[a-z,=:"\\ ]{1,20}`).Draw(t, "path")
		base := rapid.StringMatching(`[a-z,.=]{1,20}`).Draw(t, "base")
		quote := func(s string) string {
			b, err := json.Marshal(s)
			if err != nil {
				t.Fatal(err)
			}
			return string(b)
		}
		escape := func(s string) string { return strings.ReplaceAll(s, ",", ",,") }
		var first *node
		for i, name := range []string{
			`json:{"driver":"qcow2","file":{"driver":"file","filename":` + quote(path) + `},"backing":{"driver":"raw","file":{"driver":"file","filename":` + quote(base) + `}}}`,
			`json:{"driver":"qcow2","file.driver":"file","file.filename":` + quote(path) + `,"backing.driver":"raw","backing.file.driver":"file","backing.file.filename":` + quote(base) + `}`,
			`driver=qcow2,file.driver=file,file.filename=` + escape(path) + `,backing.driver=raw,backing.file.driver=file,backing.file.filename=` + escape(base),
		} {
			n, err := parseName(name, false)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if i == 0 {
				first = n
			} else if !reflect.DeepEqual(n, first) {
				t.Fatalf("%s: %+v, want %+v", name, n, first)
			}
		}
	})
}

// FuzzParseName: whatever the name, it is parsed or refused, and what is parsed is whole.
func FuzzParseName(f *testing.F) {
	for _, seed := range []string{
		"disk", "a:b", "nbd://h/x", "nbd:h:1:exportname=x", "nbd:unix:/s", "file:x",
		`json:{"driver":"qcow2","file":{"driver":"file","filename":"t"},"backing":null}`,
		`json:{"driver":"nbd","server.path":"/s","server.type":"unix"}`,
		"driver=qcow2,file.filename=a,,b,backing.file.filename=c,l2-cache-size=1M",
	} {
		f.Add(seed, true)
		f.Add(seed, false)
	}
	f.Fuzz(func(t *testing.T, name string, isOptions bool) {
		n, err := parseName(name, isOptions)
		if err == nil {
			checkNode(t, n)
		}
		n, _, err = parseReference(gate.Backing, &location{path: "d/x"}, name, besideImage)
		if err == nil {
			checkNode(t, n)
		}
	})
}

func checkNode(t *testing.T, n *node) {
	depth := 0
	for ; n != nil; n = n.backing {
		if n.at == nil || (n.at.path == "") == (n.at.uri == "") {
			t.Fatalf("node without a place: %+v", n)
		}
		if n.format != "" && checkFormat(n.format) != nil {
			t.Fatalf("unknown format %q", n.format)
		}
		if n.l2Cache < 0 || n.offset < 0 || n.size < 0 {
			t.Fatalf("negative number in %+v", n)
		}
		if depth++; depth > maxTreeDepth {
			t.Fatal("explicit chain too deep")
		}
	}
}

func TestErrorsShowNoControlCharacters(t *testing.T) {
	_, err := Open(t.Context(), filepath.Join(t.TempDir(), "a\x1b[31mb"), Options{})
	var named *NameError
	if !errors.As(err, &named) || strings.Contains(err.Error(), "\x1b") || !strings.Contains(err.Error(), `a\x1b[31mb`) {
		t.Errorf("%q", err)
	}
}

// FuzzParseReference: whatever an image says, no panic, and what the gate is asked about is what is opened.
func FuzzParseReference(f *testing.F) {
	for _, s := range []string{
		"base", "../x", "file:base", "file:nbd://h/x", "./a:b", "nbd://h:1/x?tls-hostname=y", "NBD+unix:///x?socket=%00s", "nbd:h:1:exportname=../x",
		"nbd:unix:/s:exportname=?socket=/other", `json:{"driver":"qcow2","file":{"driver":"file","filename":"x"},"backing":null}`, `json:{"a.b":{"c":1},"a":{"b.c":2}}`,
		`json:{"file.filename":"json:{}"}`, "json:", "json:{", "driver=raw", "host_device:/dev/sda", "a\x00b", ":", "",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		for _, from := range []*location{{path: "dir/top"}, {uri: "nbd://host/x"}} {
			for _, kind := range []gate.Kind{gate.Backing, gate.DataFile} {
				n, r, err := parseReference(kind, from, s, relativity(kind == gate.Backing))
				if err != nil {
					continue
				}
				if r.Image != from.String() || r.Kind != kind {
					t.Fatalf("%q: the gate is asked about %+v", s, r)
				}
				if r.Protocol == "json" {
					if kind != gate.Backing || r.Name != s {
						t.Fatalf("%q: the gate is asked about %+v", s, r)
					}
					continue
				}
				if r.Name != n.at.String() || r.Protocol != n.at.protocol() || n.backing != nil || n.dataFile != nil || n.format != "" {
					t.Fatalf("%q: the gate is asked about %+v, opened would be %+v at %+v", s, r, n, n.at)
				}
				if n.at.local() && (n.at.path == "" || strings.IndexByte(n.at.path, 0) >= 0) {
					t.Fatalf("%q: path %q", s, n.at.path)
				}
			}
		}
	})
}

// TestLongNamesAreCut: an error shows enough of an absurd name to recognise it.
func TestLongNamesAreCut(t *testing.T) {
	long := strings.Repeat("x", 20000)
	for _, name := range []string{
		"json:{" + long, `json:{"driver":"` + long + `"}`, `json:{"driver":"raw","` + long + `":1,"file":{"filename":"disk"}}`,
		`json:{"driver":"raw","read-only":"` + long + `","file":{"filename":"disk"}}`, "driver=" + long, "driver=raw," + long, long,
	} {
		_, err := Open(t.Context(), name, Options{ReadOnly: true})
		if err == nil || len(err.Error()) > 4000 || !strings.HasPrefix(err.Error(), "Could not open '"+name[:100]) {
			t.Errorf("%.30s…: an error of %d bytes: %.200s", name, len(fmt.Sprint(err)), err)
		}
	}
}
