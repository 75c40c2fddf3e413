package jobs

import (
	"context"
	"io"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/bufpool"
)

// load reads the window into buf and appends to ops what the target is to be asked, in order.
// Whatever a data run covers is in buf afterwards, zeros included.
func (c *conversion) load(w window, buf []byte, ops []run) ([]run, error) {
	for _, r := range w.runs {
		if r.kind != data {
			ops = appendRun(ops, r)
			continue
		}
		p := buf[r.off-w.off:][:r.length]
		if err := c.read(p, r.off); err != nil {
			return nil, err
		}
		if c.o.NoSparse {
			ops = appendRun(ops, r)
			continue
		}
		// Zeros are looked for in units of the sparse size that lie on multiples of it.
		unit := c.o.SparseSize
		for off := r.off; off < r.off+r.length; {
			n := min(unit-off%unit, r.off+r.length-off)
			k := data
			if isZero(buf[off-w.off:][:n]) {
				k = zero
			}
			ops = appendRun(ops, run{off, n, k})
			off += n
		}
	}
	if c.o.Compressed {
		return c.wholeClusters(w, buf, ops)
	}
	return c.alignZeros(w, buf, ops), nil
}

// alignZeros turns the parts of zero runs that share a cluster with something else into data, unless they
// need no writing at all: the target would have to write them out one by one, or copy up around them.
func (c *conversion) alignZeros(w window, buf []byte, ops []run) []run {
	if w.off >= c.zeroFrom {
		return ops
	}
	out := make([]run, 0, len(ops)+2)
	for _, r := range ops {
		if r.kind != zero || r.off >= c.zeroFrom {
			out = appendRun(out, r)
			continue
		}
		end := r.off + r.length
		from := (r.off + c.cluster - 1) / c.cluster * c.cluster
		to := end
		if end != c.size {
			to = end / c.cluster * c.cluster
		}
		if from >= to {
			from, to = end, end
		}
		for _, part := range [...]run{{r.off, from - r.off, data}, {from, to - from, zero}, {to, end - to, data}} {
			if part.length == 0 {
				continue
			}
			if part.kind == data {
				clear(buf[part.off-w.off:][:part.length])
			}
			out = appendRun(out, part)
		}
	}
	return out
}

// wholeClusters makes every cluster of the window one kind, as WriteCompressed wants it: a cluster with any
// data in it is data altogether.
func (c *conversion) wholeClusters(w window, buf []byte, ops []run) ([]run, error) {
	var out []run
	i := 0
	for off := w.off; off < w.off+w.length; {
		n := min(c.cluster-off%c.cluster, w.off+w.length-off)
		for ops[i].off+ops[i].length <= off {
			i++
		}
		k := ops[i].kind
		if ops[i].off+ops[i].length < off+n {
			k = data
			if err := c.fill(ops[i:], buf[off-w.off:][:n], off); err != nil {
				return nil, err
			}
		}
		out = appendRun(out, run{off, n, k})
		off += n
	}
	return out, nil
}

// fill completes the cluster p at off, whose data runs are in place: zeros are cleared, and what was to be
// skipped is read after all.
func (c *conversion) fill(ops []run, p []byte, off int64) error {
	end := off + int64(len(p))
	for _, r := range ops {
		from, to := max(r.off, off), min(r.off+r.length, end)
		if from >= to {
			break
		}
		part := p[from-off : to-off]
		switch r.kind {
		case zero:
			clear(part)
		case skip:
			if err := c.read(part, from); err != nil {
				return err
			}
		}
	}
	return nil
}

// read fills p from the source; what cannot be read is salvaged sector by sector when the caller wants that.
func (c *conversion) read(p []byte, off int64) error {
	n, err := c.src.ReadAt(p, off)
	if n == len(p) && (err == nil || err == io.EOF) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if c.o.Salvage == nil {
		return &ReadError{Offset: off, Err: err}
	}
	if len(p) <= sectorSize {
		clear(p)
		c.o.Salvage(off, int64(len(p)), err)
		return nil
	}
	for i := 0; i < len(p); i += sectorSize {
		part := p[i:min(i+sectorSize, len(p))]
		if err := c.read(part, off+int64(i)); err != nil {
			return err
		}
	}
	return nil
}

// store asks the target for the runs of a window, whose bytes are in buf.
func (c *conversion) store(ctx context.Context, w window, buf *bufpool.Buffer, ops []run) error {
	for _, r := range ops {
		switch r.kind {
		case zero:
			if r.off >= c.zeroFrom {
				continue
			}
			// A run may go on to where the target is zero anyway; whole clusters there are left alone.
			length := min(r.length, (c.zeroFrom-r.off+c.cluster-1)/c.cluster*c.cluster)
			if err := c.dst.WriteZeroes(r.off, length, block.MayUnmap); err != nil {
				return &WriteError{Offset: r.off, Err: err}
			}
		case data:
			if err := c.limit.wait(ctx, r.length); err != nil {
				return err
			}
			if err := c.write(buf.B[r.off-w.off:][:r.length], r.off); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *conversion) write(p []byte, off int64) error {
	if !c.o.Compressed {
		if _, err := c.dst.WriteAt(p, off); err != nil {
			return &WriteError{Offset: off, Err: err}
		}
		return nil
	}
	for len(p) > 0 {
		n := min(c.cluster, int64(len(p)))
		var err error
		if n < c.cluster && off+n < c.dst.Size() {
			// The source ends inside a cluster of a larger target: there is no whole cluster to compress.
			_, err = c.dst.WriteAt(p[:n], off)
		} else {
			err = c.dst.WriteCompressed(p[:n], off)
		}
		if err != nil {
			return &WriteError{Offset: off, Err: err}
		}
		p, off = p[n:], off+n
	}
	return nil
}
