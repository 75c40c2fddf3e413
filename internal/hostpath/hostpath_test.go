package hostpath_test

import (
	"runtime"
	"testing"

	"github.com/platter-disk/platter/internal/hostpath"
)

func TestBeside(t *testing.T) {
	everywhere := []struct{ image, ref, want string }{
		{"top", "base", "base"},
		{"dir/top", "base", "dir/base"},
		{"dir/top", "../base", "dir/../base"},
		{"/dir/top", "sub/base", "/dir/sub/base"},
		{"/top", "base", "/base"},
		{"dir/top", "/base", "/base"},
		{"", "base", "base"},
		{"dir/top", "", "dir/"},
	}
	elsewhere := []struct{ image, ref, want string }{ // a backslash and a colon are parts of a name
		{`dir\top`, "base", "base"},
		{"dir/top", `\base`, `dir/\base`},
		{"C:top", "base", "base"},
		{"dir/top", "C:base", "dir/C:base"},
	}
	windows := []struct{ image, ref, want string }{
		{`dir\top`, "base", `dir\base`},
		{`dir\sub/top`, "base", `dir\sub/base`},
		{`dir/sub\top`, `..\base`, `dir/sub\..\base`},
		{`C:\dir\top`, "base", `C:\dir\base`},
		{`C:top`, "base", `C:base`},
		{`C:\top`, "base", `C:\base`},
		{`C:\dir\top`, `\base`, `C:\base`},
		{`C:\dir\top`, "/disks/base", "C:/disks/base"},
		{`C:\dir\top`, "D:base", "D:base"},
		{`C:\dir\top`, `D:\base`, `D:\base`},
		{`C:\dir\top`, `\\server\share\base`, `\\server\share\base`},
		{`\\server\share\dir\top`, "base", `\\server\share\dir\base`},
		{`\\server\share\dir\top`, `\base`, `\\server\share\base`},
		{`\\?\C:\dir\top`, "base", `\\?\C:\dir\base`},
	}
	tests := append(everywhere, elsewhere...)
	if runtime.GOOS == "windows" {
		tests = append(everywhere, windows...)
	}
	for _, test := range tests {
		if got := hostpath.Beside(test.image, test.ref); got != test.want {
			t.Errorf("%q beside %q: %q, want %q", test.ref, test.image, got, test.want)
		}
	}
}
