package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/platter-disk/platter/nbd"
)

// baseGrace is for how long a base image may let reads wait without a sign of life when the work is to end.
const baseGrace = 5 * time.Second

// baseLines are the connections to the NBD servers that the files of images lie on. A disk can be closed when nothing
// waits for its base image any more, so that a server that answers nothing would keep a program from ending. Cutting
// the connection fails what waits. That loses nothing where the program only reads; a server that may owe the answer
// to a write is waited for.
type baseLines struct {
	grace time.Duration
	warn  func(message string)

	mu    sync.Mutex
	lines []*nbd.Client
	open  int  // how many of them are those of images that are open
	over  bool // the command is to end although an image is not open yet
}

// opening returns a context to open an image with, and a function to call when that is over. When ctx ends before, the
// connections of that image are closed, whatever they are for: nobody has been told yet that anything is safe.
func (b *baseLines) opening(ctx context.Context) (watched context.Context, opened func()) {
	b.mu.Lock()
	b.open = len(b.lines)
	b.mu.Unlock()
	stop := context.AfterFunc(ctx, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.over = true
		for _, c := range b.lines[b.open:] {
			c.Close()
		}
	})
	return nbd.Watch(ctx, b.add), func() { stop() }
}

func (b *baseLines) add(c *nbd.Client) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.lines = append(b.lines, c); b.over {
		c.Close()
	}
}

// ending cuts, from the end of ctx on, connections whose server lets reads wait without a sign of life, until the
// function that it returns is called.
func (b *baseLines) ending(ctx context.Context) (ended func()) {
	all, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Go(func() {
		select {
		case <-ctx.Done():
		case <-all.Done():
			return
		}
		began, tick := time.Now(), time.NewTicker(b.grace/20)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				b.cutSilent(began)
			case <-all.Done():
				return
			}
		}
	})
	return func() {
		cancel()
		work.Wait()
	}
}

// cutSilent cuts the connections whose server has been silent for the grace, all of it since began.
func (b *baseLines) cutSilent(began time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lines = slices.DeleteFunc(b.lines, func(c *nbd.Client) bool {
		if !c.ReadOnly() || min(c.Silent(), time.Since(began)) < b.grace {
			return false
		}
		b.warn(fmt.Sprintf("the base image %s has not answered for %v and is cut off", c.Name(), b.grace))
		c.Close()
		return true
	})
}

// interrupted is the error of opening images: when ctx has ended, what opening cut off is not what went wrong.
func interrupted(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, nbd.ErrClosed) {
		return ctx.Err()
	}
	return err
}
