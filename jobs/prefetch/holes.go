package prefetch

import "github.com/platter-disk/platter/block"

const (
	holesWindow = 256 << 20 // bytes of the disk asked for at a time
	holesRuns   = 4096      // runs remembered of a window
)

// holes knows which parts of a base image read as zeros without reading them. An answer counts for what lived in the
// base image when it was asked, and the base image does not change. One goroutine uses it.
type holes struct {
	over Overlay
	unit int64

	from, end int64 // the window it knows of, in whole units but for the end of the base image
	runs      []Run // of zeros in it, in whole units, in order
}

// sameKind tells whether what lives in the base image at [off, off+n) begins with zeros, and how many bytes from off on
// are alike. A base image that cannot tell has none.
func (h *holes) sameKind(off, n int64) (zeros bool, length int64) {
	if off < h.from || off >= h.end {
		h.ask(off)
	}
	n = min(n, h.end-off)
	for len(h.runs) > 0 && h.runs[0].Offset+h.runs[0].Length <= off {
		h.runs = h.runs[1:]
	}
	if len(h.runs) == 0 {
		return false, n
	}
	if start := h.runs[0].Offset; start > off {
		return false, min(n, start-off)
	}
	return true, min(n, h.runs[0].Offset+h.runs[0].Length-off)
}

// ask learns about a window that begins at off, where a unit does.
func (h *holes) ask(off int64) {
	base := h.over.BaseSize()
	window := off + max(h.unit, holesWindow/h.unit*h.unit)
	h.from, h.end, h.runs = off, window, nil
	if off >= base {
		return
	}
	h.end = min(h.end, base)
	var at, length int64 // of the zeros that end where the next extent begins
	keep := func() {
		first := (at + h.unit - 1) / h.unit * h.unit
		last := (at + length) / h.unit * h.unit
		if at+length == base {
			last = base
		}
		if first < last {
			h.runs = append(h.runs, Run{first, last - first})
		}
	}
	err := h.over.Extents(off, h.end-off, func(e block.Extent) bool {
		switch {
		case e.Depth == 0 || !e.Zero:
		case at+length == e.Offset && length > 0:
			length += e.Length
			return true
		default:
			keep()
			if at, length = e.Offset, e.Length; len(h.runs) == holesRuns {
				h.end = e.Offset / h.unit * h.unit
				return false
			}
		}
		return true
	})
	if err != nil {
		h.end, h.runs = min(window, base), nil
		return
	}
	keep()
}
