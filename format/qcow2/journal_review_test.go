package qcow2

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/platter-disk/platter/storage"
)

// TestFlushBehindStoppedTimer: a flush that waits while the timer, which was stopped meanwhile, has its turn still
// commits.
func TestFlushBehindStoppedTimer(t *testing.T) {
	f := storage.NewMemory("image")
	if err := Create(f, CreateOptions{Size: 1 << 20, Version: 3}); err != nil {
		t.Fatal(err)
	}
	im, err := Open(keepOpen{f}, Options{Discipline: Journal, JournalCommitInterval: -1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := im.WriteAt(make([]byte, 65536), 0); err != nil {
		t.Fatal(err)
	}
	d := im.discipline.(*journal)
	d.stopTimer()
	// The flush begins between the moment at which the timer takes its turn and the one at which it finds
	// that it was stopped.
	entered, leave := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = d.commits.flush(func() error {
			close(entered)
			<-leave
			return d.commitIdle()
		})
	})
	<-entered
	d.commits.started.Add(^uint64(0)) // as if the flush had come before the timer was counted
	wg.Go(func() {
		if err := im.Flush(); err != nil {
			t.Error(err)
		}
	})
	time.Sleep(20 * time.Millisecond) // until it waits for the lock
	d.commits.started.Add(1)
	close(leave)
	wg.Wait()
	if got := pendingTransactions(t, f); got != 1 {
		t.Errorf("%d transactions in the journal after a flush, want 1", got)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestSetBackingLeavesRoomForJournal: a reference after which a session could not begin is refused, rather than every
// later flush; an image whose header cannot be changed any more is refused when it is opened.
func TestSetBackingLeavesRoomForJournal(t *testing.T) {
	var refused, accepted int
	var long strings.Builder // no part of it is like another one
	for i := 100; long.Len() < 1023; i++ {
		fmt.Fprint(&long, i)
	}
	for n := 1; n <= 1023; n += 7 {
		f := storage.NewMemory("image")
		err := Create(f, CreateOptions{Size: 1 << 20, ClusterSize: 1024, BackingFile: "base", BackingFormat: "raw"})
		if err != nil {
			t.Fatal(err)
		}
		o := Options{Discipline: Journal, NoBacking: true, JournalCommitInterval: -1}
		im, err := Open(keepOpen{f}, o)
		if err != nil {
			t.Fatal(err)
		}
		if err := im.SetBacking(long.String()[:n], "raw"); err != nil {
			if !errors.Is(err, ErrHeaderFull) {
				t.Errorf("a name of %d bytes: %v", n, err)
			}
			refused++
		} else {
			accepted++
		}
		for range 2 { // a new journal, and one whose extension is there
			if _, err := im.WriteAt(make([]byte, 512), 0); err != nil {
				t.Fatal(err)
			}
			if err := im.Close(); err != nil {
				t.Fatalf("a name of %d bytes: %v", n, err)
			}
			if im, err = Open(keepOpen{f}, o); err != nil {
				if !errors.Is(err, ErrHeaderFull) {
					t.Fatalf("a name of %d bytes: %v", n, err)
				}
				break
			}
		}
		if err != nil {
			continue
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if refused == 0 || accepted == 0 {
		t.Errorf("%d names refused, %d accepted", refused, accepted)
	}
}

// unreadableHeader fails reads of the header cluster for a while.
type unreadableHeader struct {
	storage.File
	broken bool
}

func (f *unreadableHeader) ReadAt(p []byte, off int64) (int, error) {
	if f.broken && off == 0 {
		return 0, errors.New("broken")
	}
	return f.File.ReadAt(p, off)
}

// TestJournalBeginsWhereItFailed: a session that could not begin is begun again in the same place.
func TestJournalBeginsWhereItFailed(t *testing.T) {
	m := storage.NewMemory("image")
	if err := Create(m, CreateOptions{Size: 1 << 20, Version: 3}); err != nil {
		t.Fatal(err)
	}
	f := &unreadableHeader{File: keepOpen{m}}
	im, err := Open(f, Options{Discipline: Journal, JournalCommitInterval: -1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := im.WriteAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	f.broken = true
	var sizes []int64
	for range 3 {
		if err := im.Flush(); err == nil {
			t.Fatal("the header cannot be read, and the flush succeeds")
		}
		n, err := m.Size()
		if err != nil {
			t.Fatal(err)
		}
		sizes = append(sizes, n)
	}
	f.broken = false
	if err := im.Flush(); err != nil {
		t.Fatal(err)
	}
	if sizes[2] != sizes[0] {
		t.Errorf("each attempt makes the file larger: %d", sizes)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	wellFormed(t, m)
}
