package fvd

import "sync"

// immediate is the discipline that writes the records of a request before the request is acknowledged (FVD
// specification 1.11). Requests that arrive while a journal write is under way share the next one (D-31).
type immediate struct {
	*journal

	mu    sync.Mutex
	queue []*update

	batch    []*update // below: of the holder of journal.lead, reused
	spans    []span
	releases []chunkID
}

func newImmediate(j *journal) *immediate { return &immediate{journal: j} }

func (d *immediate) commit(u *update) error {
	d.mu.Lock()
	d.queue = append(d.queue, u)
	d.mu.Unlock()

	d.lead.Lock()
	defer d.lead.Unlock()
	if u.done {
		return u.err
	}
	// Nobody before has taken this update along: lead, for everyone who waits by now.
	d.mu.Lock()
	d.batch, d.queue = d.queue, d.batch[:0]
	d.mu.Unlock()
	d.spans, d.releases = d.spans[:0], d.releases[:0]
	for _, w := range d.batch {
		d.spans = append(d.spans, w.span)
		d.releases = append(d.releases, w.releases...)
	}
	err := d.append(d.spans, d.releases)
	for _, w := range d.batch {
		w.done, w.err = true, err
	}
	clear(d.batch)
	return u.err
}

func (d *immediate) drain() error { return nil }

func (d *immediate) close() { d.awaitIdle() }
