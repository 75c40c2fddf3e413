package prefetch

import (
	"context"
	"time"
)

// Clock is the time a Prefetcher lives by; tests bring their own.
type Clock interface {
	Now() time.Time
	// Sleep returns after d, or with the context's error when that ends before.
	Sleep(ctx context.Context, d time.Duration) error
}

// systemClock is the real time.
type systemClock struct{}

func (systemClock) Now() time.Time { return time.Now() }

func (systemClock) Sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
