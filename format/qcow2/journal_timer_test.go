package qcow2

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/platter-disk/platter/storage"
)

// pendingTransactions is what a crash would leave in the journal of an image; -1 if there is none.
func pendingTransactions(t *testing.T, f storage.File) int {
	t.Helper()
	h, err := ReadHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	if h.Incompatible&IncompatJournal == 0 {
		return -1
	}
	l, err := scanJournal(f, h, "")
	if err != nil {
		t.Fatal(err)
	}
	return l.pending
}

// TestCommitTimer: a guest that does not flush has its metadata in the journal after a while, a period after the
// first change and not at every one, and never without the timer.
func TestCommitTimer(t *testing.T) {
	const period = defaultCommitInterval
	for name, c := range map[string]struct {
		interval    time.Duration
		early, late int // transactions
	}{
		"default": {0, -1, 1},
		"longer":  {3 * period, -1, -1},
		"off":     {-1, -1, -1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := storage.NewMemory("image")
				if err := Create(f, CreateOptions{Size: 1 << 20, Version: 3}); err != nil {
					t.Fatal(err)
				}
				im, err := Open(keepOpen{f}, Options{Discipline: Journal, JournalCommitInterval: c.interval})
				if err != nil {
					t.Fatal(err)
				}
				for at := range int64(4) {
					if _, err := im.WriteAt(make([]byte, 65536), at<<16); err != nil {
						t.Fatal(err)
					}
					time.Sleep(period / 5)
				}
				if got := pendingTransactions(t, f); got != c.early {
					t.Errorf("%d transactions before the period is over, want %d", got, c.early)
				}
				time.Sleep(period / 2)
				synctest.Wait()
				if got := pendingTransactions(t, f); got != c.late {
					t.Errorf("%d transactions after the period, want %d", got, c.late)
				}
				if err := im.Close(); err != nil {
					t.Fatal(err)
				}
				time.Sleep(10 * period)
				synctest.Wait()
				if got := pendingTransactions(t, f); got != -1 {
					t.Errorf("%d transactions after a clean close, want no journal", got)
				}
			})
		})
	}
}

// TestCommitTimerSettles: an idle image is committed once, and what its newest transaction exposed may be
// overwritten at once afterwards.
func TestCommitTimerSettles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		im, f := costImage(t, overlayOf(1<<20), Options{Discipline: Journal, JournalDataChecksums: true, Backing: fullDevice{size: 1 << 20}})
		p := make([]byte, 4096)
		if _, err := im.WriteAt(p, 8192); err != nil {
			t.Fatal(err)
		}
		if err := im.Flush(); err != nil {
			t.Fatal(err)
		}
		f.reset()
		time.Sleep(20 * defaultCommitInterval)
		synctest.Wait()
		if n := f.syncs.Load(); n != 1 {
			t.Errorf("%d barriers while idle, want the one that proves the flush", n)
		}
		f.reset()
		if _, err := im.WriteAt(p, 8192); err != nil {
			t.Fatal(err)
		}
		if n := f.syncs.Load(); n != 0 {
			t.Errorf("the overwrite waited for %d barriers", n)
		}
	})
}
