package cli

import (
	"strings"
	"testing"
)

// TestServeRefusesCachesThatAreNotThere: the tables that --l2-cache-size is about are those of qcow2.
func TestServeRefusesCachesThatAreNotThere(t *testing.T) {
	dir := t.TempDir()
	for _, format := range []string{"fvd", "raw"} {
		mustRun(t, dir, "create", "-q", "-f", format, "disk", "1M")
		o := runHere(t, dir, "serve", "-f", format, "--socket", "s", "--l2-cache-size", "1M", "disk")
		if want := "Could not open 'disk': Block format '" + format + "' does not support the option 'l2-cache-size'"; o.status != statusError || !strings.Contains(o.stderr, want) {
			t.Errorf("%s: exit status %d, %s", format, o.status, o.stderr)
		}
	}
}
