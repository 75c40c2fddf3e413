package qcow2

import "fmt"

// lazy does not write reference counts at all while the image is open (lazy refcounts, 2012). Before the first word that may disagree with them reaches the disk, the dirty bit is durable; a
// clean close writes the counts and clears it. After a crash the next writable open rebuilds all counts.
//
// Unlike its model it keeps the barrier between data and the word that exposes it wherever old bytes of the
// host cluster could show through.
type lazy struct {
	committer
	marked bool // the dirty bit is durable; guarded by committer.commits
}

func newLazy(im *Image) (*lazy, error) {
	if im.header.Version < 3 {
		return nil, fmt.Errorf("%s: discipline %q needs the dirty bit of version 3; the image has version %d", im.file.Name(), Lazy, im.header.Version)
	}
	d := &lazy{committer: committer{im: im, holdCounts: true}}
	d.prepare = d.mark
	return d, nil
}

func (d *lazy) accept(u *update) error { return d.take(u) }

func (d *lazy) settle() error { return d.bound() }

// settleCounts makes the dirty bit durable: the counts that the header is going to rely on are not.
func (d *lazy) settleCounts() error {
	d.commits.Lock()
	err := d.mark()
	d.commits.Unlock()
	if err != nil {
		return err
	}
	return d.flush()
}

// mark sets the dirty bit durably, and the lazy refcounts bit that records the choice.
func (d *lazy) mark() error {
	if d.marked {
		return nil
	}
	im := d.im
	im.mu.Lock()
	defer im.mu.Unlock()
	im.header.Incompatible |= IncompatDirty
	im.header.Compatible |= CompatLazyRefcounts
	if err := im.switchHeader(fieldFeatures); err != nil {
		return err
	}
	d.marked = true
	return nil
}

func (d *lazy) close() error {
	early := d.im.opts.Mutant == MutantDirtyEarly
	if err := d.clear(early); err != nil {
		return err
	}
	if err := d.finish(); err != nil {
		return err
	}
	if err := d.clear(!early); err != nil {
		return err
	}
	return d.im.trim()
}

// clear clears the dirty bit durably, if that is due.
func (d *lazy) clear(due bool) error {
	if !d.marked || !due {
		return nil
	}
	im := d.im
	im.mu.Lock()
	defer im.mu.Unlock()
	im.header.Incompatible &^= IncompatDirty
	return im.switchHeader(fieldFeatures)
}
