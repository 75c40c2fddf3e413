package gate_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/platter-disk/platter/image/gate"
)

func ref(image, protocol, name string) gate.Reference {
	return gate.Reference{Kind: gate.Backing, Image: image, Protocol: protocol, Name: name}
}

func TestSameDirectory(t *testing.T) {
	root := t.TempDir()
	in, out := filepath.Join(root, "in"), filepath.Join(root, "out")
	for _, dir := range []string{in, out} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{filepath.Join(in, "top"), filepath.Join(in, "base"), filepath.Join(out, "secret")} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	links := map[string]string{
		"good": "base", "bad": filepath.Join(out, "secret"), "twice": "bad", "dangling": filepath.Join(out, "none"), "loop": "loop",
	}
	for name, target := range links {
		if err := os.Symlink(target, filepath.Join(in, name)); err != nil {
			t.Skipf("needs symbolic links: %v", err)
		}
	}
	if err := os.Symlink(in, filepath.Join(root, "alias")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(out, filepath.Join(in, "dir")); err != nil {
		t.Fatal(err)
	}
	top := filepath.Join(in, "top")
	for _, test := range []struct {
		image, protocol, name string
		allowed               bool
	}{
		{top, "file", filepath.Join(in, "base"), true},
		{top, "file", in + "/../in/base", true},
		{top, "file", filepath.Join(in, "good"), true},
		{top, "file", filepath.Join(in, "not there"), true},
		{filepath.Join(root, "alias", "top"), "file", filepath.Join(in, "base"), true},
		{top, "file", filepath.Join(root, "alias", "base"), true},
		{top, "file", filepath.Join(out, "secret"), false},
		{top, "file", in + "/../out/secret", false},
		{top, "file", "/etc/passwd", false},
		{top, "file", filepath.Join(in, "bad"), false},
		{top, "file", filepath.Join(in, "twice"), false},
		{top, "file", filepath.Join(in, "dangling"), false},
		{top, "file", filepath.Join(in, "loop"), false},
		{top, "file", filepath.Join(in, "dir", "secret"), false},
		{top, "file", filepath.Join(in, "nodir", "x"), false},
		{top, "nbd", "nbd://localhost/x", false},
		{top, "json", `json:{"file.filename":"` + filepath.Join(in, "base") + `"}`, false},
		{"nbd://localhost/x", "file", filepath.Join(in, "base"), false},
	} {
		err := gate.SameDirectory{}.Allow(ref(test.image, test.protocol, test.name))
		if (err == nil) != test.allowed || err != nil && !errors.Is(err, gate.ErrRefused) {
			t.Errorf("%s refers to %s: %v, want allowed %v", test.image, test.name, err, test.allowed)
		}
	}
	t.Chdir(in)
	if err := (gate.SameDirectory{}).Allow(ref("top", "file", "base")); err != nil {
		t.Errorf("relative names: %v", err)
	}
	if err := (gate.SameDirectory{}).Allow(ref("top", "file", "../out/secret")); err == nil {
		t.Error("relative name out of the directory: allowed")
	}
}

func TestAnyAndDeny(t *testing.T) {
	r := ref("top", "file", "base")
	if err := (gate.Any{}).Allow(r); err != nil {
		t.Error(err)
	}
	if err := (gate.Deny{}).Allow(r); !errors.Is(err, gate.ErrRefused) {
		t.Error(err)
	}
	if gate.Backing.String() != "backing file" || gate.DataFile.String() != "data file" {
		t.Error("names of kinds")
	}
}
