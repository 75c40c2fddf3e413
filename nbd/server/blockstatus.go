package server

import (
	"errors"
	"slices"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/bufpool"
	"github.com/platter-disk/platter/nbd"
)

// maxDescriptors bounds the descriptors of one reply for one context: 64 KiB with extended headers. A
// client asks again for what is left.
const maxDescriptors = 4 << 10

// contextKind says what a metadata context tells of an extent.
type contextKind uint8

const (
	allocationContext contextKind = iota // base:allocation
	depthContext                         // qemu:allocation-depth
)

// status is the value of a context for an extent.
func (k contextKind) status(e block.Extent) uint64 {
	if k == depthContext { // 0 nowhere, 1 in this layer, 2 in its backing device …
		if !e.Allocated {
			return 0
		}
		return uint64(e.Depth) + 1
	}
	switch {
	case e.Zero && !e.Data:
		return nbd.StateHole | nbd.StateZero
	case e.Zero:
		return nbd.StateZero
	}
	return 0 // never a hole with unknown contents: a client need not read it
}

// join is the value for a block that lies in two extents.
func (k contextKind) join(a, b uint64) uint64 {
	if k == depthContext { // the nearest layer that holds any of it
		if a == 0 || b == 0 {
			return max(a, b)
		}
		return min(a, b)
	}
	return a & b
}

// descriptors gathers the descriptors of one context: neighbours with the same value are one, and lengths
// are multiples of the minimum block size.
type descriptors struct {
	context metaContext
	minimum uint64
	limit   int
	full    bool // takes no more; from the start when the client does not want the context
	runs    []nbd.BlockStatus

	partial uint64 // bytes at the end that do not make up a minimum block yet
	value   uint64 // of those
}

func (d *descriptors) add(length, value uint64) {
	for length > 0 && !d.full {
		if d.partial > 0 {
			n := min(length, d.minimum-d.partial)
			d.value = d.context.kind.join(d.value, value)
			d.partial += n
			length -= n
			if d.partial == d.minimum {
				d.partial = 0
				d.push(d.minimum, d.value)
			}
			continue
		}
		whole := length &^ (d.minimum - 1)
		if whole > 0 {
			d.push(whole, value)
		}
		d.partial, d.value = length-whole, value
		return
	}
}

func (d *descriptors) push(length, value uint64) {
	if last := len(d.runs) - 1; last >= 0 && d.runs[last].Flags == value {
		d.runs[last].Length += length
	} else if len(d.runs) == d.limit {
		d.full = true
	} else {
		d.runs = append(d.runs, nbd.BlockStatus{Length: length, Flags: value})
	}
}

// blockStatus answers a block status request; it answers nothing when it returns an error.
func (w *worker) blockStatus(q *request) error {
	r := q.Request
	var wanted []uint32
	if q.payload != nil {
		p, err := nbd.DecodeBlockStatusPayload(q.payload.B)
		if err != nil {
			return protocolViolation(&r, err.Error())
		}
		r.Length, wanted = p.Length, p.Contexts
		r.Flags &^= nbd.CmdFlagPayloadLen
		if _, rule := w.check(&r); rule != "" {
			return protocolViolation(&r, rule)
		}
		if !w.negotiated(wanted) {
			return protocolViolation(&r, "the payload must name metadata contexts that were negotiated, each once")
		}
	}
	limit := maxDescriptors
	if r.Flags&nbd.CmdFlagReqOne != 0 {
		limit = 1
	}
	for len(w.lists) < len(w.contexts) {
		w.lists = append(w.lists, descriptors{})
	}
	lists := w.lists[:len(w.contexts)]
	for i, m := range w.contexts {
		lists[i] = descriptors{context: m, minimum: uint64(w.blocks.Minimum), limit: limit, runs: lists[i].runs[:0]}
		lists[i].full = wanted != nil && !slices.Contains(wanted, m.id)
	}

	err := w.export.Device.Extents(int64(r.Offset), int64(r.Length), func(e block.Extent) bool {
		more := false
		for i := range lists {
			lists[i].add(uint64(e.Length), lists[i].context.kind.status(e))
			more = more || !lists[i].full
		}
		return more
	})
	if errors.Is(err, errors.ErrUnsupported) { // always safe: data, in this layer
		err = nil
		for i := range lists {
			lists[i].add(r.Length, lists[i].context.kind.status(block.Extent{Allocated: true, Data: true}))
		}
	}
	if err != nil {
		return err
	}
	out := bufpool.Get(len(lists) * (nbd.ExtendedReplySize + 8 + 16*maxDescriptors))
	out.B = out.B[:0]
	left := len(lists)
	if wanted != nil {
		left = len(wanted)
	}
	for i := range lists {
		if len(lists[i].runs) == 0 {
			continue
		}
		left--
		var flags nbd.ReplyFlags
		if left == 0 {
			flags = nbd.ReplyFlagDone
		}
		out.B = nbd.AppendBlockStatus(out.B, w.extended(), flags, &r, lists[i].context.id, lists[i].runs)
	}
	if left > 0 {
		out.Put()
		return errors.New("the device reported no extents")
	}
	w.counters.succeeded(nbd.CmdBlockStatus, r.Length)
	w.head = w.head[:0]
	w.send(out)
	return nil
}

// negotiated tells whether ids is a non-empty list of negotiated contexts without repetition.
func (w *worker) negotiated(ids []uint32) bool {
	for i, id := range ids {
		if slices.Contains(ids[:i], id) || !slices.ContainsFunc(w.contexts, func(m metaContext) bool { return m.id == id }) {
			return false
		}
	}
	return len(ids) > 0
}
