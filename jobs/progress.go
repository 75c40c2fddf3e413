package jobs

import "sync"

// progress adds up what workers have done and tells the caller, one call at a time, never backwards.
// A nil progress ignores everything.
type progress struct {
	mu    sync.Mutex
	fn    func(done, total int64)
	done  int64
	total int64
}

func newProgress(fn func(done, total int64), total int64) *progress {
	if fn == nil {
		return nil
	}
	fn(0, total)
	return &progress{fn: fn, total: total}
}

// add counts n bytes as done; what exceeds the total (the disk changed while it was scanned) is not shown.
func (p *progress) add(n int64) {
	if p == nil || n == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done = min(p.done+n, p.total)
	p.fn(p.done, p.total)
}

// finish reports that everything is done, unless it was reported already.
func (p *progress) finish() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.done < p.total {
		p.fn(p.total, p.total)
	}
}
