package jobs

import (
	"context"
	"sync"
	"time"
)

// rateSlack is the shortest wait worth going to sleep for: many small writes would otherwise sleep much longer
// than they should, a timer tick each. What is not waited now is waited later.
const rateSlack = 10 * time.Millisecond

// rateLimit spaces out work so that it averages at most perSecond bytes a second. A nil rateLimit does not
// limit. It is safe for concurrent use.
type rateLimit struct {
	perSecond int64

	mu   sync.Mutex
	free time.Time // when the bytes handed out so far have used up their time
}

func newRateLimit(perSecond int64) *rateLimit {
	if perSecond <= 0 {
		return nil
	}
	return &rateLimit{perSecond: perSecond}
}

// wait blocks until n more bytes may move, or ctx is done.
func (r *rateLimit) wait(ctx context.Context, n int64) error {
	if r == nil {
		return nil
	}
	r.mu.Lock()
	now := time.Now()
	if r.free.Before(now) {
		r.free = now
	}
	delay := r.free.Sub(now)
	r.free = r.free.Add(time.Duration(float64(n) / float64(r.perSecond) * float64(time.Second)))
	r.mu.Unlock()
	if delay < rateSlack {
		return ctx.Err()
	}
	t := time.NewTimer(delay)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
