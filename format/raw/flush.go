package raw

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/platter-disk/platter/storage"
)

// flusher combines flushes: however many wait, the next single Sync serves them all. The first failure stays,
// because nobody knows what is on the disk after it.
type flusher struct {
	f storage.File

	mu      sync.Mutex
	ended   sync.Cond // a Sync has ended
	running bool
	started uint64 // number of Syncs begun
	done    uint64 // number of the last Sync that has ended
	err     error

	broken atomic.Bool // err is set; lets changes look without taking mu
}

func (fl *flusher) init(f storage.File) {
	fl.f = f
	fl.ended.L = &fl.mu
}

// flush returns when a Sync that began after the call has ended. A Sync that is running already began too
// early: it may not cover the caller's writes.
func (fl *flusher) flush() error {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	for mine := fl.started + 1; fl.done < mine && fl.err == nil; {
		if fl.running {
			fl.ended.Wait()
			continue
		}
		fl.running = true
		fl.started++
		number := fl.started
		fl.mu.Unlock()
		err := fl.f.Sync()
		fl.mu.Lock()
		fl.running = false
		fl.done = number
		if err != nil {
			fl.err = fmt.Errorf("flush of %s failed, it must be reopened: %w", fl.f.Name(), err)
			fl.broken.Store(true)
		}
		fl.ended.Broadcast()
	}
	return fl.err
}

// failed returns the error of the flush that failed, if one has.
func (fl *flusher) failed() error {
	if !fl.broken.Load() {
		return nil
	}
	fl.mu.Lock()
	defer fl.mu.Unlock()
	return fl.err
}
