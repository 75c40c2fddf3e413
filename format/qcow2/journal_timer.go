package qcow2

import "time"

// defaultCommitInterval is how long a change of metadata stays in memory if the guest does not flush (qcow2
// journal specification, "Writer protocol").
const defaultCommitInterval = 5 * time.Second

// commitTimer ends transactions that a guest has left alone. At most one timer runs, and none unless something
// waits; it is armed once a period at most, however many transactions there are. Guarded by Image.mu.
type commitTimer struct {
	period time.Duration // not above 0: off
	oldest time.Time     // when the oldest change in memory was accepted; zero: there is none
	timer  *time.Timer   // nil until it is needed
	armed  bool
	closed bool // guarded by commits as well
}

func newCommitTimer(o *Options) commitTimer {
	if o.JournalCommitInterval == 0 {
		return commitTimer{period: defaultCommitInterval}
	}
	return commitTimer{period: o.JournalCommitInterval}
}

// changed notes that something waits for a commit. The caller holds Image.mu.
func (d *journal) changed() {
	t := &d.idle
	if t.period <= 0 || !t.oldest.IsZero() || t.closed {
		return
	}
	t.oldest = time.Now()
	d.arm(t.period)
}

// arm has tick run after a while. The caller holds Image.mu.
func (d *journal) arm(after time.Duration) {
	t := &d.idle
	switch {
	case t.armed:
		return
	case t.timer == nil:
		t.timer = time.AfterFunc(after, d.tick)
	default:
		t.timer.Reset(after)
	}
	t.armed = true
}

// tick commits what has waited for a period.
func (d *journal) tick() {
	im, t := d.im, &d.idle
	im.mu.Lock()
	t.armed = false
	due := !t.closed && !t.oldest.IsZero()
	if due {
		if rest := t.period - time.Since(t.oldest); rest > 0 {
			d.arm(rest)
			due = false
		}
	}
	im.mu.Unlock()
	if !due {
		return
	}
	err := d.commits.flush(d.commitIdle)
	im.mu.Lock()
	defer im.mu.Unlock()
	if err != nil && im.failed() == nil && !t.closed {
		d.arm(t.period) // there was no space; the next commit tries again
	}
}

// commitIdle commits what was left alone; if that is nothing, the newest transaction is proven. The caller holds
// commits.
func (d *journal) commitIdle() error {
	if d.idle.closed {
		return d.im.errClosed() // success would tell a flush that waits that it has nothing left to do
	}
	d.im.mu.Lock()
	idle := d.tx.empty() && d.inDoubt()
	if idle {
		d.idle.oldest = time.Time{}
	}
	d.im.mu.Unlock()
	if idle {
		return d.prove()
	}
	return d.commit(false)
}

// stopTimer waits for a commit that the timer began, and lets it begin none any more.
func (d *journal) stopTimer() {
	d.commits.Lock()
	defer d.commits.Unlock()
	d.im.mu.Lock()
	defer d.im.mu.Unlock()
	d.idle.closed = true
	if d.idle.timer != nil {
		d.idle.timer.Stop()
	}
}
