package cli

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/platter-disk/platter/internal/testenv"
)

var (
	ioTimes    = regexp.MustCompile(`1 ops; .* ops/sec\)`)
	ioNumbers  = regexp.MustCompile(`(?m)^(\d+),1,.*$`)
	ioTestSets = map[string][]string{
		"patterns": {"write -P 7 0 64k", "read -P 7 0 64k", "read -P 8 0 64k", "write 1000 1001", "read -v 990 40",
			"write -P 0x41 1M 1.5k", "read -P 0x41 0x100000 1536", "read -P 0x41 -s 512 -l 10 1M 1536", "writev 2M 512 512", "readv -P 0xcd 2M 512 512"},
		"allocation": {"write 64k 320k", "write -z 128k 64k", "write -z -u 256k 64k", "discard 64k 64k", "map",
			"alloc 0", "alloc 64k 128k", "write -c 1M 64k", "map", "write -f 3M 10", "map", "read -P 0 64k 128k", "read -P 0xcd 192k 64k"},
		"sizes":  {"length", "truncate 5M", "length", "truncate 5632k", "length", "map", "truncate 5663k", "length", "truncate 1024M", "length"},
		"quiet":  {"write -q 0 512", "write -C 0 512", "read -C 0 1k", "read -q 0 512", "discard -C 0 64k", "flush"},
		"wrong":  {"read -P 3 0 64k", "foo", "write -x 0 512", "read -P 300 0 512", "write -u 0 512", "help foo", "write -P", "read 0 1Q"},
		"in one": {"write -zu 0 64k", "write -qP7 0 512", "read -P7 0 512", "r 0 1k", "w 0 1k", "l", "d 0 1k", "f", "q", "read 0 512"},
	}
)

// TestSameAsQemuIO runs the same commands with qemu-io and compares what is printed on standard output, speeds
// apart, and the exit status. qemu-io says some of what is wrong with a line on standard output and some on
// standard error, always in its own words; there Platter only has to fail, too.
func TestSameAsQemuIO(t *testing.T) {
	testenv.Need(t, "qemu-io")
	for name, commands := range ioTestSets {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			args := []string{"-f", "qcow2"}
			for _, c := range commands {
				args = append(args, "-c", c)
			}
			image := filepath.Join(dir, "disk.qcow2")
			create := func() {
				t.Helper()
				if o := runHere(t, dir, "create", "-q", "-f", "qcow2", image, "4M"); o.status != 0 {
					t.Fatal(o.stderr)
				}
			}
			create()
			cmd := exec.Command("qemu-io", append(args, image)...)
			var theirs, complaints bytes.Buffer
			cmd.Stdout, cmd.Stderr = &theirs, &complaints
			cmd.Run()
			create()
			ours := runHere(t, dir, append(append([]string{"io"}, args...), image)...)
			if got, want := ours.status, cmd.ProcessState.ExitCode(); got != want {
				t.Errorf("exit status %d, of qemu-io %d", got, want)
			}
			if got, want := speechless(ours.stdout, ours.stderr), speechless(theirs.String(), complaints.String()); got != want {
				t.Errorf("platter io printed\n%s\nqemu-io\n%s", got, want)
			}
		})
	}
}

// speechless is what remains to be compared of the results: no speeds, and of complaints only how many.
func speechless(stdout, stderr string) string {
	stdout = ioTimes.ReplaceAllString(stdout, "1 ops")
	stdout = ioNumbers.ReplaceAllString(stdout, "$1,1")
	var kept []string
	complaints := strings.Count(stderr, "\n")
	for line := range strings.Lines(stdout) {
		switch line = strings.TrimRight(line, "\n"); {
		case strings.Contains(line, "Parsing error"), strings.Contains(line, "not a valid pattern"),
			strings.Contains(line, "requires -z"), strings.Contains(line, "not found"):
			complaints++
		case strings.Contains(line, " -- "): // qemu-io explains a command that was called wrongly
		default:
			kept = append(kept, line)
		}
	}
	return strings.Join(kept, "\n") + "\ncomplaints: " + strings.Repeat("x", complaints)
}

func TestIOSize(t *testing.T) {
	for n, want := range map[float64]string{
		0: "0 bytes", 512: "512 bytes", 1023: "1023 bytes", 1024: "1 KiB", 1536: "1.500 KiB", 1 << 20: "1 MiB",
		15 << 17: "1.875 MiB", 1 << 40: "1 TiB", 0.5: "0.500 bytes",
	} {
		if got := ioSize(n); got != want {
			t.Errorf("ioSize(%v) = %q, want %q", n, got, want)
		}
	}
}

func TestIOTime(t *testing.T) {
	for _, tc := range []struct {
		d    time.Duration
		long bool
		want string
	}{
		{1500 * time.Millisecond, false, "01.50 sec"},
		{1500 * time.Millisecond, true, "0:00:01.50"},
		{90 * time.Second, false, "0:01:30.00"},
		{2*time.Hour + 61*time.Second, true, "2:01:01.00"},
	} {
		if got := ioTime(tc.d, tc.long); got != tc.want {
			t.Errorf("ioTime(%v, %t) = %q, want %q", tc.d, tc.long, got, tc.want)
		}
	}
}

// TestIOHolds verifies patterns that begin and end in different chunks.
func TestIOHolds(t *testing.T) {
	b := []byte{1, 2, 2, 2, 1}
	for _, tc := range []struct {
		pos, skip, verify int64
		want              bool
	}{
		{0, 0, 5, false}, {0, 1, 3, true}, {0, 1, 4, false}, {0, 0, 0, true},
		{100, 0, 101, false}, {100, 0, 100, true}, {100, 101, 3, true}, {100, 101, 50, false}, {100, 105, 50, true},
	} {
		if got := holds(b, tc.pos, tc.skip, tc.verify, 2); got != tc.want {
			t.Errorf("holds at %d, skip %d, verify %d: %t, want %t", tc.pos, tc.skip, tc.verify, got, tc.want)
		}
	}
}
