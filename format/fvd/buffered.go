package fvd

import (
	"sync"
	"time"
)

// buffered is the discipline that collects records in memory and writes them when the guest flushes, when the
// buffer is full, or when a period has passed (FVD specification 1.11). It is legal because without a flush
// the guest has no claim; it is safe because every flush drains, and a drain that fails latches the image.
type buffered struct {
	*journal
	limit  int64 // bytes of records to keep before writing them
	period time.Duration
	after  func(time.Duration, func()) (stop func() bool)

	mu       sync.Mutex
	spans    []span
	releases []chunkID
	bytes    int64       // estimate of what the spans take as records
	stop     func() bool // cancels the timer, true if it had not fired; nil when none runs
	timers   sync.WaitGroup
	closed   bool

	spareSpans    []span // of the holder of journal.lead
	spareReleases []chunkID
}

func newBuffered(j *journal, limit int64, period time.Duration, after func(time.Duration, func()) func() bool) *buffered {
	return &buffered{journal: j, limit: limit, period: period, after: after}
}

func (d *buffered) commit(u *update) error {
	if err := d.m.failed(); err != nil {
		return err
	}
	d.mu.Lock()
	d.add(u.span)
	d.releases = append(d.releases, u.releases...)
	// Under mu, so that whoever finds the metadata settled and flushes finds the span in the buffer.
	d.m.settleSpan(&u.span)
	full := d.bytes >= d.limit
	if d.stop == nil && d.period > 0 && !full && !d.closed {
		d.timers.Add(1)
		d.stop = d.after(d.period, d.timeout)
	}
	d.mu.Unlock()
	if full {
		return d.drain()
	}
	return nil
}

// add appends a span, joining it to the last one where that says the same.
func (d *buffered) add(s span) {
	if n := len(d.spans); n > 0 {
		last := &d.spans[n-1]
		if last.bits == s.bits && last.entries == s.entries && s.off <= last.end && last.off <= s.end {
			last.off, last.end = min(last.off, s.off), max(last.end, s.end)
			last.exposesData = last.exposesData || s.exposesData
			return
		}
	}
	d.spans = append(d.spans, s)
	if s.entries {
		first, last := d.m.g.chunkRange(s.off, s.end)
		d.bytes += tableRecordHead + 4*int64(last-first)
	}
	if s.bits {
		d.bytes += bitmapRecordSize
	}
}

// timeout drains for the timer. An error is latched and meets the next request.
func (d *buffered) timeout() {
	defer d.timers.Done()
	_ = d.drain()
}

func (d *buffered) drain() error {
	d.lead.Lock()
	defer d.lead.Unlock()
	d.mu.Lock()
	spans, releases := d.spans, d.releases
	d.spans, d.releases, d.bytes = d.spareSpans[:0], d.spareReleases[:0], 0
	d.disarm()
	d.mu.Unlock()
	d.spareSpans, d.spareReleases = spans, releases
	if len(spans) == 0 {
		return d.m.failed()
	}
	return d.append(spans, releases)
}

// disarm stops the timer; the caller holds mu.
func (d *buffered) disarm() {
	if d.stop != nil {
		if d.stop() {
			d.timers.Done()
		}
		d.stop = nil
	}
}

func (d *buffered) checkpoint(change headerChange) error {
	// The tables will hold everything that is in the buffer; writing it first keeps one way for releases.
	if err := d.drain(); err != nil {
		return err
	}
	return d.journal.checkpoint(change)
}

func (d *buffered) close() {
	d.mu.Lock()
	d.closed = true
	d.disarm()
	d.mu.Unlock()
	d.timers.Wait()
	d.awaitIdle()
}
