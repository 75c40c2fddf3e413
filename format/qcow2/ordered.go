package qcow2

// ordered keeps changed table words in memory and writes them back when the guest flushes.
//
// Counts are raised ahead in batches whose barrier is one that the guest pays anyway, and clusters that read
// as zeros where zeros were before owe no barrier to the words that expose them. So a flush after any number
// of plain allocations is one barrier, and one more if something was copied up. After a crash nothing needs
// to be done: what may be left over are leaks, at most the reserve and what the last operations released.
type ordered struct{ committer }

func newOrdered(im *Image) *ordered { return &ordered{committer{im: im}} }

func (d *ordered) accept(u *update) error { return d.take(u) }

func (d *ordered) settle() error { return d.bound() }

func (d *ordered) close() error {
	if err := d.finish(); err != nil {
		return err
	}
	return d.im.trim()
}
