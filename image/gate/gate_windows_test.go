package gate_test

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/platter-disk/platter/image/gate"
)

// TestSameDirectoryAsksNobody: a path on another machine is refused without a look there.
func TestSameDirectoryAsksNobody(t *testing.T) {
	top := filepath.Join(t.TempDir(), "top")
	for _, name := range []string{`\\server\share\base`, `//server/share/base`, `\\?\UNC\server\share\base`, `\\.\pipe\base`} {
		err := gate.SameDirectory{}.Allow(ref(top, "file", name))
		if !errors.Is(err, gate.ErrRefused) || !strings.Contains(err.Error(), "drive") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
