package qcow2

// synchronous makes every change of metadata durable before the operation that needed it returns: raised
// counts, then what refers to them, then lowered counts, with a barrier after each (the safe order of 2008 with
// the barriers of 2010). Nothing is reserved ahead, so a crash leaks no more than the
// operations in flight were about to use or to free.
type synchronous struct{ committer }

func newSynchronous(im *Image) *synchronous {
	im.alloc.policy = countExact
	return &synchronous{committer{im: im}}
}

func (d *synchronous) accept(u *update) error { return d.take(u) }

func (d *synchronous) settle() error {
	if err := d.flush(); err != nil {
		return err
	}
	d.im.mu.Lock()
	lowered := d.im.alloc.refs.changed()
	d.im.mu.Unlock()
	if !lowered {
		return nil
	}
	return d.flush()
}

func (d *synchronous) close() error {
	if err := d.finish(); err != nil {
		return err
	}
	return d.im.trim()
}
