package fvd

import "sync"

// nojournal is the discipline of images without a journal: metadata live in memory and reach the disk when the
// image is closed or prefetching ends. After a crash the image is dirty and opening it is refused (FVD
// specification 1.12); it is for data whose loss is acceptable, and for images that have no metadata.
type nojournal struct {
	m *metadata

	mu       sync.Mutex
	releases []chunkID

	checkpoints sync.Mutex // held for the length of one
}

func (d *nojournal) commit(u *update) error {
	if err := d.m.failed(); err != nil {
		return err
	}
	d.mu.Lock()
	d.releases = append(d.releases, u.releases...)
	d.mu.Unlock()
	d.m.settleSpan(&u.span)
	return nil
}

func (d *nojournal) drain() error { return d.m.failed() }

func (d *nojournal) checkpoint(change headerChange) error {
	d.checkpoints.Lock()
	defer d.checkpoints.Unlock()
	d.mu.Lock()
	releases := d.releases
	d.releases = nil
	d.mu.Unlock()
	if err := d.m.checkpoint(d.m.snapshotTables(), change); err != nil {
		return err
	}
	d.m.alloc.retire(releases)
	return nil
}

func (d *nojournal) holdsReleases() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.releases) > 0
}

func (d *nojournal) close() {}
