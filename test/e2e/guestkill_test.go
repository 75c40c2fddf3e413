//go:build unix

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/platter-disk/platter/test/e2e/guestlog"
)

// noticing is how long a guest may take to find out that its disk is gone.
const noticing = 2 * time.Minute

// TestGuestKill kills the server of a disk on which a Linux guest works, at random moments, under every
// discipline. Afterwards the image must be what the discipline promises, recover, and hold an ext4 file system
// without a fault with everything in it that fsync promised.
func TestGuestKill(t *testing.T) {
	tm := newTemplate(t)
	m := savedMachine(t, tm.raw)
	rounds, first := budget(t, "PLATTER_GUEST_ROUNDS", 2), firstSeed(t)
	for _, discipline := range disciplines {
		t.Run(discipline, func(t *testing.T) {
			var leaks []int
			promises, begun := 0, time.Now()
			for i := range rounds {
				seed := first + uint64(i)
				l := roundLayout(discipline, seed)
				t.Run(fmt.Sprintf("seed %d, %s", seed, l.name), func(t *testing.T) {
					a := killGuest(t, m, tm, l, discipline, seed)
					leaks = append(leaks, a.judge(t))
					promises += a.promises
				})
			}
			t.Logf("%d rounds in %.0f s, %d promises kept; leaked clusters: %s", rounds, time.Since(begun).Seconds(), promises, spread(leaks))
		})
	}
}

// killGuest lets a guest work on a new disk until its server is killed.
func killGuest(t *testing.T, m *saved, tm *template, l layout, discipline string, seed uint64) *aftermath {
	t.Helper()
	rng := roundRand(discipline, seed)
	dir := crashDir(t)
	a := &aftermath{template: tm, layout: l, discipline: discipline, dir: dir, log: guestlog.NewLog(seed)}
	a.image = tm.disk(t, dir, l)
	s := serve(t, a.image, "--format", "qcow2", "--discipline", discipline, "--socket", filepath.Join(dir, "socket"))
	g := m.restore(t, s.uri)
	g.begin(t, seed, 0)

	// One round in ten strikes while the file system is mounted or the first files are made.
	wait, delay := 0, time.Duration(rng.IntN(600))*time.Millisecond
	if rng.IntN(10) > 0 {
		wait, delay = 1+rng.IntN(200), time.Duration(rng.IntN(30_000))*time.Microsecond
	}
	add := func(line string) {
		if err := a.log.Add(line); err != nil {
			t.Fatalf("%v\n%s", err, g.console())
		}
	}
	for a.log.Promises() < wait {
		add(g.next(t))
	}
	time.Sleep(delay)
	for len(g.lines) > 0 {
		add(<-g.lines)
	}
	a.promises = a.log.Promises()
	s.kill(t)
	copyFile(t, a.image, filepath.Join(dir, "crashed.qcow2")) // to look at, should it fail

	limit := time.Now().Add(noticing)
	for line := g.next(t); !strings.HasPrefix(line, guestlog.WordOver); line = g.next(t) {
		add(line)
		if time.Now().After(limit) {
			t.Fatalf("the guest did not notice that its disk is gone\n%s", g.console())
		}
	}
	g.off(t)
	if err := os.WriteFile(filepath.Join(dir, "console"), []byte(g.console()), 0o600); err != nil {
		t.Fatal(err)
	}
	return a
}
