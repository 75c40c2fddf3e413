package image_test

import (
	"testing"

	"github.com/platter-disk/platter/image"
)

func TestSameFileOfExports(t *testing.T) {
	t.Chdir(t.TempDir())
	create(t, "raw", "sock", sized(512)) // any file: only where a name leads counts
	for _, test := range []struct {
		a, b string
		want bool
	}{
		{"nbd+unix:///?socket=sock", "nbd+unix:///?socket=./sock", true},
		{"nbd+unix:///?socket=sock", "nbd+unix://?socket=%73ock", true},
		{"nbd+unix:///x?socket=sock", "nbds+unix:///x?socket=sock", true},
		{"nbd+unix:///x?socket=sock", "nbd+unix:///y?socket=sock", false},
		{"nbd+unix:///x?socket=sock", "nbd+unix:///x?socket=other", false},
		{"nbd://host/x", "nbd://HOST:10809/x", true},
		{"nbd://host/x", "nbd://host:10810/x", false},
		{"nbd://host/x", "nbd://other/x", false},
		{"nbd://localhost/x", "nbd://127.0.0.1/x", false}, // another server may listen on only one of the two
		{"nbd://host/x", "sock", false},
		{"./sock", "sock", true},
		{"missing", "./missing", false},
	} {
		if got := image.SameFile(test.a, test.b); got != test.want {
			t.Errorf("%s, %s: %v, want %v", test.a, test.b, got, test.want)
		}
	}
}

// Overwriting is another matter than taking for equal.
func TestCreateSparesExportOfThisMachine(t *testing.T) {
	o := image.CreateOptions{BackingUnseen: true}
	o.Size, o.BackingFile, o.BackingFormat = 1<<20, "nbd://localhost:1/x", "raw"
	_, err := image.ResolveCreate(t.Context(), "qcow2", "nbd:127.0.0.1:1:exportname=x", o)
	wantError(t, "an overlay in its own base", err, "same filename as the backing file")
	if _, err := image.ResolveCreate(t.Context(), "qcow2", "nbd:127.0.0.1:1:exportname=y", o); err != nil {
		t.Errorf("another export: %v", err)
	}
}
