//go:build unix

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sort"
	"testing"
	"time"

	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/image/gate"
	nbdserver "github.com/platter-disk/platter/nbd/server"
	"github.com/platter-disk/platter/storage"
	"github.com/platter-disk/platter/test/e2e/guestlog"
)

const (
	statesPerGuest = 10 // crash states that are made of one recorded guest
	recordedOps    = 70 // operations of each of a recorded guest's workers
)

// guestModel says what the crashes may do (docs/crashlab.md). ext4 writes blocks of 4 KiB, the commits of its journal
// among them, under one checksum each: after a tear of 512 bytes it takes the commit for damage, not for one that
// did not happen. Tears inside of a guest's block are therefore left to the lab's own explorations.
var guestModel = crashlab.Model{Tear: 4096}

// TestGuestCrashStates records what the format writes below the disk of a Linux guest, and builds what a power cut
// at random moments may leave of it: writes lost, reordered and torn, growth of the file lost. Each state is
// judged as after a kill.
func TestGuestCrashStates(t *testing.T) {
	tm := newTemplate(t)
	m := savedMachine(t, tm.raw)
	states, first := budget(t, "PLATTER_GUEST_STATES", 4), firstSeed(t)
	for _, discipline := range disciplines {
		t.Run(discipline, func(t *testing.T) {
			var leaks []int
			promises, judged, guests, begun := 0, 0, 0, time.Now()
			for ; judged < states; guests++ {
				seed := first + uint64(guests)
				l := roundLayout(discipline, seed)
				n := min(statesPerGuest, states-judged)
				judged += n
				t.Run(fmt.Sprintf("seed %d, %s", seed, l.name), func(t *testing.T) {
					r := recordGuest(t, m, tm, l, discipline, seed, false)
					seq, err := r.lab.RandomCrashes(guestModel, n, seed)
					if err != nil {
						t.Fatal(err)
					}
					for st := range seq {
						t.Run(fmt.Sprintf("after event %d", st.Event()), func(t *testing.T) {
							a := r.aftermath(t, st)
							leaks = append(leaks, a.judge(t))
							promises += a.promises
							if t.Failed() {
								t.Log(st.Describe().Summary())
							}
						})
					}
				})
			}
			t.Logf("%d states of %d guests in %.0f s, %d promises kept; leaked clusters: %s",
				judged, guests, time.Since(begun).Seconds(), promises, spread(leaks))
		})
	}
}

// TestGuestCrashStatesJudge puts a guest on a disk that forgets every flush. If none of the crashes were found to
// have lost anything, the judgement would be worth nothing.
func TestGuestCrashStatesJudge(t *testing.T) {
	tm := newTemplate(t)
	r := recordGuest(t, savedMachine(t, tm.raw), tm, layouts[0], "ordered", firstSeed(t), true)
	seq, err := r.lab.RandomCrashes(guestModel, 8, firstSeed(t))
	if err != nil {
		t.Fatal(err)
	}
	var found []error
	for st := range seq {
		a := r.aftermath(t, st)
		if a.fileSystem(t, a.export(t)) != nil {
			return
		}
		found = append(found, errors.New(st.Describe().Summary()))
	}
	t.Errorf("these crashes of a disk that forgets every flush were found to be harmless:\n%v", errors.Join(found...))
}

// recording is what a guest did to a disk, as the file below saw it.
type recording struct {
	lab      *crashlab.Lab
	before   aftermath // what all crashes of it have in common
	promised []int     // events after which the guest's promises count, in order
}

// labFile is the file of a lab in place of a file that stays locked and unchanged.
type labFile struct {
	storage.File
	locked  storage.File
	forgets bool // flushes are answered and mean nothing
}

func (f labFile) Sync() error {
	if f.forgets {
		return nil
	}
	return f.File.Sync()
}

func (f labFile) Close() error { return errors.Join(f.File.Close(), f.locked.Close()) }

// recordGuest lets a guest work on a new disk until it is done. forgets: the disk forgets what is flushed.
func recordGuest(t *testing.T, m *saved, tm *template, l layout, discipline string, seed uint64, forgets bool) *recording {
	t.Helper()
	dir := crashDir(t)
	r := &recording{before: aftermath{template: tm, layout: l, discipline: discipline, log: guestlog.NewLog(seed)}}
	var err error
	if r.lab, err = crashlab.NewLab(crashlab.FileSpec{Name: "disk.qcow2"}); err != nil {
		t.Fatal(err)
	}
	var copyErr error
	im, err := image.Open(t.Context(), tm.disk(t, dir, l), image.Options{
		Format: "qcow2", Discipline: discipline, Discard: true, Gate: gate.Any{},
		Wrap: func(f storage.File) storage.File {
			in := r.lab.Files()[0]
			size, err := f.Size()
			copyErr = errors.Join(err, copySparse(in, f, size), in.Truncate(size))
			r.lab.Settle()
			return labFile{File: in, locked: f, forgets: forgets}
		},
	})
	if err := errors.Join(err, copyErr); err != nil {
		t.Fatal(err)
	}
	closed := false
	defer func() {
		if !closed {
			im.Close()
		}
	}()
	srv, err := nbdserver.New(nbdserver.Config{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := srv.AddExport(nbdserver.Export{Device: im}); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "socket")
	listener, err := nbdserver.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(t.Context(), listener) }()

	g := m.restore(t, "nbd+unix:///?socket="+socket)
	g.begin(t, seed, recordedOps)
	for line := g.next(t); line != guestlog.WordEnd; line = g.next(t) {
		// The guest said it before it got here: counting the promise from now on is never too early.
		if event := r.lab.Note(line, guestlog.IsSafe(line)); guestlog.IsSafe(line) {
			r.promised = append(r.promised, event)
		}
		if err := r.before.log.Add(line); err != nil {
			t.Fatalf("%v\n%s", err, g.console())
		}
	}
	g.off(t)
	limit, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	closed = true
	if err := errors.Join(srv.Shutdown(limit), <-ended, im.Close()); err != nil {
		t.Fatal(err)
	}
	return r
}

// aftermath puts a crash state into a file and returns what is to be judged.
func (r *recording) aftermath(t *testing.T, st *crashlab.State) *aftermath {
	t.Helper()
	a := r.before
	a.dir = crashDir(t)
	a.promises = sort.SearchInts(r.promised, st.Event()+1)
	a.image = filepath.Join(a.dir, "disk.qcow2")
	f, err := os.Create(a.image)
	if err != nil {
		t.Fatal(err)
	}
	state := st.Files()[0]
	size, err := state.Size()
	if err := errors.Join(err, copySparse(f, state, size), f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	copyFile(t, a.image, filepath.Join(a.dir, "crashed.qcow2"))
	return &a
}

// copySparse copies what is not zero.
func copySparse(to io.WriterAt, from io.ReaderAt, size int64) error {
	buf, zero := make([]byte, 64<<10), make([]byte, 64<<10)
	for off := int64(0); off < size; off += int64(len(buf)) {
		p := buf[:min(int64(len(buf)), size-off)]
		if _, err := from.ReadAt(p, off); err != nil && err != io.EOF {
			return err
		}
		if bytes.Equal(p, zero[:len(p)]) {
			continue
		}
		if _, err := to.WriteAt(p, off); err != nil {
			return err
		}
	}
	return nil
}
