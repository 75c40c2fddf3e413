package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/bufpool"
	"github.com/platter-disk/platter/storage"
)

// deflateWindow is the history deflate streams may refer to. Readers of the format may have no more than
// 4 KiB (specification section 9).
const deflateWindow = 4096

// maxZstdWindow bounds the memory for inflating a zstd stream, in bytes: what a stream of the largest cluster
// needs, with room for encoders that round up.
const maxZstdWindow = 8 << 20

// codec compresses and inflates clusters of one image. Its coders are pooled.
type codec struct {
	kind                   uint8 // CompressionDeflate, CompressionZstd
	compressors, inflaters sync.Pool
}

// compress appends the compressed form of a cluster to out.
func (c *codec) compress(out *bytes.Buffer, p []byte) error {
	type compressor interface {
		io.WriteCloser
		Reset(io.Writer)
	}
	w, ok := c.compressors.Get().(compressor)
	if !ok {
		var err error
		if c.kind == CompressionZstd {
			w, err = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
		} else {
			w, err = flate.NewWriterWindow(nil, deflateWindow)
		}
		if err != nil {
			return err
		}
	}
	defer c.compressors.Put(w)
	w.Reset(out)
	if _, err := w.Write(p); err != nil {
		return err
	}
	return w.Close()
}

// inflate fills out from a stream that starts src; what follows the stream in src is ignored, and a deflate
// stream need not have a final block.
func (c *codec) inflate(out, src []byte) error {
	if c.kind == CompressionZstd {
		return c.inflateZstd(out, src)
	}
	r, ok := c.inflaters.Get().(io.Reader)
	if !ok {
		r = flate.NewReader(nil)
	}
	defer c.inflaters.Put(r)
	if err := r.(flate.Resetter).Reset(bytes.NewReader(src), nil); err != nil {
		return err
	}
	_, err := io.ReadFull(r, out)
	return err
}

func (c *codec) inflateZstd(out, src []byte) error {
	r, ok := c.inflaters.Get().(*zstd.Decoder)
	if !ok {
		var err error
		// The window is bounded: a hostile stream must not choose how much memory it takes.
		r, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxZstdWindow))
		if err != nil {
			return err
		}
	}
	defer c.inflaters.Put(r)
	if err := r.Reset(bytes.NewReader(src)); err != nil {
		return err
	}
	_, err := io.ReadFull(r, out)
	return errors.Join(err, r.Reset(nil))
}

// inflateCache keeps the clusters that were inflated last, because guests read compressed clusters in pieces.
type inflateCache struct {
	mu      sync.Mutex
	epoch   uint64 // moves when a compressed cluster goes away: its place may hold something else later
	entries []inflated
	next    int
}

type inflated struct {
	entry l2Entry
	bytes []byte // nil: unused
}

const inflateCacheBytes = 1 << 20

func (c *inflateCache) init(clusterSize int64) {
	c.entries = make([]inflated, max(inflateCacheBytes/clusterSize, 1))
}

// read copies from a cached cluster. If it is not there, epoch is what put wants.
func (c *inflateCache) read(e l2Entry, p []byte, in int64) (ok bool, epoch uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.entries {
		if c.entries[i].bytes != nil && c.entries[i].entry == e {
			copy(p, c.entries[i].bytes[in:])
			return true, c.epoch
		}
	}
	return false, c.epoch
}

func (c *inflateCache) put(e l2Entry, cluster []byte, epoch uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.epoch != epoch {
		return
	}
	slot := &c.entries[c.next]
	c.next = (c.next + 1) % len(c.entries)
	slot.entry = e
	slot.bytes = append(slot.bytes[:0], cluster...)
}

func (c *inflateCache) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.epoch++
	for i := range c.entries {
		c.entries[i].bytes = nil
	}
}

// readCompressed reads from one compressed cluster.
func (im *Image) readCompressed(p []byte, off guestOff, e l2Entry) error {
	g := &im.geo
	in := g.inCluster(int64(off))
	ok, epoch := im.inflated.read(e, p, in)
	if ok {
		return nil
	}
	at, n := g.compressedRange(e)
	src := bufpool.Get(int(n))
	defer src.Put()
	out := bufpool.Get(int(g.clusterSize))
	defer out.Put()
	if err := storage.ReadFull(im.file, src.B, int64(at)); err != nil {
		return fmt.Errorf("%s: compressed cluster at offset %#x: %w", im.file.Name(), at, err)
	}
	if err := im.codec.inflate(out.B, src.B); err != nil {
		return im.corrupt(fmt.Sprintf("compressed cluster of guest offset %#x at offset %#x, %d bytes", off, at, n), err.Error(),
			fmt.Sprintf("a stream of %d bytes of data", g.clusterSize))
	}
	copy(p, out.B[in:])
	im.inflated.put(e, out.B, epoch)
	return nil
}

// packer lays compressed clusters out one after the other, over the ends of host clusters.
type packer struct {
	next    hostOff             // where the next stream may start; 0: in a new cluster
	streams map[hostCluster]int // streams that were placed in a cluster that others use, and are not linked yet

	// kept holds busy clusters whose last user went away while such streams were on their way there.
	kept map[hostCluster]struct{}
}

// leave keeps the next stream out of a cluster that has lost its last user.
func (k *packer) leave(g *geometry, c hostCluster) {
	if g.clusterOf(k.next) == c {
		k.next = 0
	}
}

// pending reports whether a stream was placed in a cluster of others and is not linked yet.
func (k *packer) pending(c hostCluster) bool { return k.streams[c] > 0 }

// placement is where a compressed stream goes: over the end of a cluster that others use, a cluster of its
// own, or both.
type placement struct {
	at     hostOff
	shared hostCluster // 0: none
	own    freeRun     // n is 0: none
}

// keep holds a cluster whose count is 0 for the streams that are on their way there.
func (a *allocator) keep(c hostCluster) {
	a.busy[c] = struct{}{}
	a.packer.kept[c] = struct{}{}
}

// giveUp frees a cluster that was kept for streams of which none was linked. That it lost its last user may not be
// durable yet, so it goes the way of a cluster that loses it now.
func (a *allocator) giveUp(c hostCluster) error {
	if _, kept := a.packer.kept[c]; !kept {
		return nil
	}
	delete(a.packer.kept, c)
	delete(a.busy, c)
	if err := a.refs.set(c, 1); err != nil {
		return err
	}
	return a.im.discipline.accept(&update{releases: []hostRun{{start: c, n: 1}}})
}

// place allocates n bytes for a stream, at most a cluster.
func (a *allocator) place(n int64) (placement, error) {
	g, k := a.geo, &a.packer
	p := placement{at: k.next}
	if tail := g.inCluster(int64(k.next)); tail != 0 {
		c := g.clusterOf(k.next)
		v, err := a.refs.get(c)
		if err != nil {
			return p, err
		}
		if v > 0 && v+uint64(k.streams[c]) < maxRefcount(g.refOrder) {
			p.shared = c
		}
	}
	if room := g.clusterSize - g.inCluster(int64(k.next)); p.shared == 0 || n > room {
		own, err := a.take(1, false)
		if err != nil {
			return p, err
		}
		p.own = own
		if own.start != p.shared+1 {
			p.shared = 0
		}
		if p.shared == 0 {
			p.at = g.offsetOf(own.start)
		}
	}
	if p.shared != 0 {
		k.streams[p.shared]++
	}
	k.next = p.at + hostOff(n)
	return p, nil
}

// placed ends what place began: with the stream linked (its counts are the update's business), or abandoned. It
// fails only for what was abandoned.
func (a *allocator) placed(p placement, linked bool) error {
	if p.shared != 0 {
		if a.packer.streams[p.shared]--; a.packer.streams[p.shared] == 0 {
			delete(a.packer.streams, p.shared)
			if err := a.giveUp(p.shared); err != nil {
				return err
			}
		}
	}
	if !linked && p.own.n > 0 {
		a.packer.next = 0
		return a.abandon(p.own)
	}
	return nil
}

// abandon gives up a cluster whose first stream was not stored. Streams that were placed behind it meanwhile keep the
// cluster, without the count that it was raised by; they are only placed where there is a count.
func (a *allocator) abandon(own freeRun) error {
	v, err := a.refs.get(own.start)
	if err != nil {
		return err // what others may refer to must not be used again
	}
	if !own.raised || v == 1 && !a.packer.pending(own.start) {
		a.giveBack(own)
		return nil
	}
	if v == 1 {
		a.keep(own.start) // until the first of them is linked
	}
	return a.refs.set(own.start, v-1)
}

// WriteCompressed stores one cluster compressed, or plain if that makes it no smaller.
func (im *Image) WriteCompressed(p []byte, off int64) error {
	if err := im.checkChange("compressed write", off, int64(len(p))); err != nil {
		return err
	}
	g := &im.geo
	if g.dataFile {
		return fmt.Errorf("%s: compressed write to an image with an external data file: %w", im.file.Name(), errors.ErrUnsupported)
	}
	if g.inCluster(off) != 0 || int64(len(p)) != min(g.clusterSize, im.size.Load()-off) {
		return fmt.Errorf("%s: compressed write of %d bytes at %d: want one whole cluster of %d bytes: %w",
			im.file.Name(), len(p), off, g.clusterSize, block.ErrOutOfRange)
	}
	whole := p
	if int64(len(p)) < g.clusterSize {
		padded := bufpool.Get(int(g.clusterSize))
		defer padded.Put()
		clear(padded.B[copy(padded.B, p):])
		whole = padded.B
	}
	buf := bufpool.Get(int(g.clusterSize) * 2)
	defer buf.Put()
	out := bytes.NewBuffer(buf.B[:0])
	if err := im.codec.compress(out, whole); err != nil {
		return fmt.Errorf("%s: compress the cluster at %d: %w", im.file.Name(), off, err)
	}
	linked := false
	var err error
	if int64(out.Len()) < g.clusterSize {
		linked, err = im.linkCompressed(out.Bytes(), guestOff(off), int64(len(p)))
	}
	if err == nil && !linked {
		_, err = im.write(p, guestOff(off))
	}
	if err != nil {
		return err
	}
	return im.afterChange()
}

// linkCompressed stores a stream, of which n bytes are the guest's and the rest is zeros past the end of the disk, and
// maps a cluster to it. It does nothing if the disk has grown since: what lies behind those bytes is not the caller's.
func (im *Image) linkCompressed(stream []byte, off guestOff, n int64) (linked bool, err error) {
	g := &im.geo
	hold, err := im.lockClusters(off, g.clusterSize)
	if err != nil {
		return false, err
	}
	defer im.locks.unlock(hold)
	if n < min(g.clusterSize, im.size.Load()-int64(off)) {
		return false, nil
	}
	if err := im.ownL2(off); err != nil {
		return false, err
	}
	old, _, err := im.mapping(off)
	if err != nil {
		return false, err
	}
	im.mu.Lock()
	place, err := im.alloc.place(int64(len(stream)))
	im.mu.Unlock()
	if err != nil {
		return false, err
	}
	err = im.linkPlaced(stream, off, old, place)
	im.mu.Lock()
	err = errors.Join(err, im.alloc.placed(place, err == nil))
	im.mu.Unlock()
	return err == nil, err
}

func (im *Image) linkPlaced(stream []byte, off guestOff, old mapping, place placement) error {
	if err := im.overwrite(stream, place.at); err != nil {
		return err
	}
	u := update{
		words:    []uint64{uint64(im.geo.compressedEntry(place.at, int64(len(stream))))},
		exposes:  im.now(),
		releases: im.releases(old, false),
	}
	if im.geo.extended {
		u.words = append(u.words, 0)
	}
	if place.shared != 0 {
		u.uses = append(u.uses, freeRun{start: place.shared, n: 1})
	}
	if place.own.n != 0 {
		u.uses = append(u.uses, place.own)
	}
	word, _, _, err := im.l2Word(off)
	if err != nil {
		return err
	}
	if err := im.apply(word, u); err != nil {
		return err
	}
	im.abandonPartial(off)
	return nil
}
