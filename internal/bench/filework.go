package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"
)

const (
	fileDirs     = 10       // directories that files are spread over
	fileSmallest = 500      // bytes
	fileLargest  = 10_000   // bytes
	appendLimit  = 4 << 10  // bytes added to a file at a time, at most
	fileWarm     = 20       // files made before those that are measured
	fileBuffer   = 16 << 10 // bytes; more than a file or an addition has
	batchFactor  = 4        // files of a batch for each file that is created with an fsync
)

// fileWork is what PostMark does, with an fsync for each change: many small files are created, then a mixture of
// transactions, a read or an addition together with a creation or a deletion each, then everything is deleted. In a
// batch files are created as PostMark itself does it, without an fsync.
type fileWork struct {
	root  string
	count int // files, and transactions
	rng   *rand.Rand
	data  []byte
	live  []string
	made  int
	batch bool // leave out fsync
}

// newFileWork prepares work in a directory. The same seed gives the same files.
func newFileWork(root string, count int, seed uint64) (*fileWork, error) {
	w := &fileWork{root: root, count: count, rng: rand.New(rand.NewPCG(seed, 1)), data: make([]byte, fileBuffer)}
	for i := range w.data {
		w.data[i] = byte(w.rng.Uint32() | 1)
	}
	for d := range fileDirs {
		if err := os.Mkdir(filepath.Join(root, fmt.Sprint(d)), 0o777); err != nil {
			return nil, err
		}
	}
	for range fileWarm {
		if err := w.create(); err != nil {
			return nil, err
		}
	}
	return w, nil
}

// creation creates the files and tells how long it took.
func (w *fileWork) creation(ctx context.Context) (time.Duration, error) {
	return timed(ctx, w.count, w.create)
}

// batches creates files and makes them durable with one sync at the end.
func (w *fileWork) batches(ctx context.Context) (time.Duration, error) {
	w.batch = true
	defer func() { w.batch = false }()
	begin := time.Now()
	if _, err := timed(ctx, w.count*batchFactor, w.create); err != nil {
		return 0, err
	}
	_, err := program(ctx, "sync", "--file-system", w.root)
	return time.Since(begin), err
}

// transactions carries out the mixture and tells how long it took.
func (w *fileWork) transactions(ctx context.Context) (time.Duration, error) {
	return timed(ctx, w.count, w.transaction)
}

// deletion deletes what is left.
func (w *fileWork) deletion(ctx context.Context) error {
	_, err := timed(ctx, len(w.live), w.remove)
	return err
}

func timed(ctx context.Context, n int, one func() error) (time.Duration, error) {
	begin := time.Now()
	for range n {
		if err := errors.Join(ctx.Err(), one()); err != nil {
			return 0, err
		}
	}
	return time.Since(begin), nil
}

func (w *fileWork) transaction() error {
	if w.rng.IntN(2) == 0 {
		if _, err := os.ReadFile(w.any()); err != nil {
			return err
		}
	} else if err := w.write(w.any(), os.O_APPEND, 1+w.rng.IntN(appendLimit)); err != nil {
		return err
	}
	if w.rng.IntN(2) == 0 && len(w.live) > 1 {
		return w.remove()
	}
	return w.create()
}

func (w *fileWork) any() string { return w.live[w.rng.IntN(len(w.live))] }

func (w *fileWork) create() error {
	name := filepath.Join(w.root, fmt.Sprint(w.made%fileDirs), fmt.Sprint(w.made))
	w.made++
	w.live = append(w.live, name)
	return w.write(name, os.O_CREATE|os.O_EXCL, fileSmallest+w.rng.IntN(fileLargest-fileSmallest))
}

// write writes n bytes and makes them durable.
func (w *fileWork) write(name string, flags, n int) error {
	f, err := os.OpenFile(name, os.O_WRONLY|flags, 0o666)
	if err != nil {
		return err
	}
	if _, err := f.Write(w.data[:n]); err != nil {
		f.Close()
		return err
	}
	if !w.batch {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func (w *fileWork) remove() error {
	i := w.rng.IntN(len(w.live))
	name := w.live[i]
	w.live[i] = w.live[len(w.live)-1]
	w.live = w.live[:len(w.live)-1]
	return os.Remove(name)
}
