package qcow2

import (
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/platter-disk/platter/internal/bufpool"
)

// A partial is a cluster whose copy-up is delayed: the guest wrote a part of it to a new host cluster, the
// rest still is what the tables say. It is linked when every sector has been written, and otherwise filled
// in from what lies underneath when a flush needs it or when there are too many. Sequential small writes
// over a backing file so copy nothing.
//
// A partial changes only while its guest cluster is held exclusively.
type partial struct {
	at      guestOff // of the cluster
	old     mapping
	own     bool    // host is the cluster's own already: zeros preallocated, or unallocated subclusters of it
	run     freeRun // the new host cluster, unless own
	host    hostOff
	zeroed  bool     // what was not written there reads as zeros
	zeroSrc bool     // and zeros are what lies underneath
	written []uint64 // sectors of the cluster that hold the guest's bytes
	missing int      // sectors not written
}

// maxPartials and maxPartialBytes bound the clusters whose copy-up is delayed at the same time: their records in
// memory, and what a flush may have to copy.
const (
	maxPartials     = 1024
	maxPartialBytes = 64 << 20
)

// tooManyPartials reports whether more copy-ups are delayed than may be.
func (im *Image) tooManyPartials() bool {
	n := im.partials.n.Load()
	return n > maxPartials || n<<im.geo.clusterBits > maxPartialBytes
}

// partialSet is the set of partials, by guest cluster.
type partialSet struct {
	n  atomic.Int64
	mu sync.Mutex
	m  map[guestOff]*partial
}

func (s *partialSet) empty() bool { return s.n.Load() == 0 }

// find returns the partial for off, if there is one, and how many of n bytes at off the answer holds for.
func (s *partialSet) find(off guestOff, n, clusterSize int64) (*partial, int64) {
	if s.empty() {
		return nil, n
	}
	start := off &^ guestOff(clusterSize-1)
	return s.get(start), min(n, int64(start)+clusterSize-int64(off))
}

func (s *partialSet) get(at guestOff) *partial {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.m[at]
}

func (s *partialSet) add(p *partial) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.m == nil {
		s.m = map[guestOff]*partial{}
	}
	s.m[p.at] = p
	s.n.Store(int64(len(s.m)))
}

func (s *partialSet) remove(p *partial) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.m, p.at)
	s.n.Store(int64(len(s.m)))
}

func (s *partialSet) all() []guestOff {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := make([]guestOff, 0, len(s.m))
	for off := range s.m {
		at = append(at, off)
	}
	return at
}

// mark notes that the guest wrote [from, to) of the cluster, whole sectors.
func (p *partial) mark(from, to int64) {
	for sector := from / sectorSize; sector < to/sectorSize; sector++ {
		if bit := uint64(1) << (sector % 64); p.written[sector/64]&bit == 0 {
			p.written[sector/64] |= bit
			p.missing--
		}
	}
}

// run returns the length in bytes of the run of equal sectors at from, up to to, and whether they are written.
func (p *partial) sectors(from, to int64) (n int64, written bool) {
	first := from / sectorSize
	written = p.written[first/64]>>(first%64)&1 != 0
	for s := first + 1; s*sectorSize < to; s++ {
		if p.written[s/64]>>(s%64)&1 != 0 != written {
			return s*sectorSize - from, written
		}
	}
	return to - from, written
}

// maxBridge is how many bytes of the guest's between two stretches to fill are rather written once more with those than
// left out: fewer than another write call costs.
const maxBridge = 16 << 10

// stretch returns how far from from on, a sector that is missing, up to to, one write fills what is missing.
func (p *partial) stretch(from, to int64) int64 {
	n, _ := p.sectors(from, to)
	end := from + n
	for end < to {
		n, _ := p.sectors(end, to)
		if n > maxBridge || end+n == to {
			break
		}
		end += n
		n, _ = p.sectors(end, to)
		end += n
	}
	return end - from
}

// units has bit i set for every allocatable piece (subcluster, or the whole cluster) the guest wrote into.
func (p *partial) units(g *geometry) uint64 {
	var mask uint64
	for w, word := range p.written {
		for ; word != 0; word &= word - 1 {
			sector := int64(w*64 + bits.TrailingZeros64(word))
			mask |= 1 << (sector * sectorSize >> g.unitBits)
		}
	}
	return mask
}

// held reports whether the image is going to hold the piece at off once the cluster is linked, and how many of n bytes
// the answer holds for. s is what the tables say about them now: a subcluster that the guest did not write stays what
// they say.
func (p *partial) held(g *geometry, off guestOff, n int64, s *span) (int64, bool) {
	if s.kind != kindUnallocated && s.kind != kindZero {
		return n, true
	}
	in := g.inCluster(int64(off))
	units, unit := p.units(g), in>>g.unitBits
	held := units>>unit&1 != 0
	end := unit + 1
	for end<<g.unitBits < in+n && units>>end&1 != 0 == held {
		end++
	}
	return min(n, end<<g.unitBits-in), held
}

// newPartial makes the record of a cluster that the guest is about to write a part of.
func (im *Image) newPartial(at guestOff, old mapping, own bool, run freeRun, zeroSrc bool) *partial {
	sectors := int(im.geo.clusterSize / sectorSize)
	p := &partial{
		at: at, old: old, own: own, run: run,
		zeroed: !own && run.zeroed != never, zeroSrc: zeroSrc,
		host:    im.geo.offsetOf(run.start),
		written: make([]uint64, (sectors+63)/64), missing: sectors,
	}
	if own {
		p.host = old.entry.offset()
	}
	return p
}

// readPartial reads from a cluster whose copy-up is delayed.
func (im *Image) readPartial(p *partial, buf []byte, off guestOff) error {
	for len(buf) > 0 {
		in := im.geo.inCluster(int64(off))
		n, written := p.sectors(in, in+int64(len(buf)))
		var err error
		if written {
			s := span{kind: kindNormal, host: p.host + hostOff(in)}
			err = im.readSpan(buf[:n], off, &s)
		} else {
			err = im.readFill(p, buf[:n], off)
		}
		if err != nil {
			return err
		}
		buf, off = buf[n:], off+guestOff(n)
	}
	return nil
}

// completePartials fills in and links every cluster whose copy-up is delayed.
func (im *Image) completePartials() error {
	if im.partials.empty() {
		return nil
	}
	for _, at := range im.partials.all() {
		hold := im.locks.lock(int64(at), int64(at)+im.geo.clusterSize, true)
		err := im.completePartial(at)
		im.locks.unlock(hold)
		if err != nil {
			return err
		}
	}
	return nil
}

// completePartial is completePartials for one cluster, which the caller holds exclusively.
func (im *Image) completePartial(at guestOff) error {
	if p := im.partials.get(at); p != nil {
		return im.link(p)
	}
	return nil
}

// link fills in what the guest did not write and brings the cluster into the tables. The caller holds the
// cluster exclusively.
func (im *Image) link(p *partial) error {
	g := &im.geo
	units := p.units(g)
	alloc, zero := uint64(0), uint64(0)
	if g.extended && !p.old.entry.compressed() {
		alloc, zero = p.old.bitmap&0xffffffff, p.old.bitmap>>32
	}
	fill := units
	if p.own {
		fill &^= alloc // these are complete in place
	} else {
		fill |= alloc // the new cluster takes over all that the old one held
	}
	if p.old.entry.compressed() && g.extended {
		fill = 1<<subclusters - 1
	}
	if err := im.fill(p, fill); err != nil {
		return err
	}
	words := []uint64{uint64(p.host) | entryCopied}
	if g.extended {
		alloc |= fill
		words = append(words, zero&^alloc<<32|alloc)
	}
	at, _, _, err := im.l2Word(p.at)
	if err != nil {
		return err
	}
	u := update{words: words, exposes: im.now()}
	if im.opts.Mutant == MutantNoCopyUp {
		u.exposes = 0
	}
	if !p.own {
		u.releases = im.releases(p.old, false)
		if !g.dataFile {
			u.uses = []freeRun{p.run}
		}
	}
	if err := im.apply(at, u); err != nil {
		return err
	}
	im.partials.remove(p)
	return nil
}

// fill copies up what the guest did not write of the given pieces of a cluster.
func (im *Image) fill(p *partial, units uint64) error {
	if p.missing == 0 || p.zeroed && p.zeroSrc {
		return nil
	}
	g := &im.geo
	var buf *bufpool.Buffer
	for in := int64(0); in < g.clusterSize; {
		end := (in>>g.unitBits + 1) << g.unitBits
		if units>>(in>>g.unitBits)&1 == 0 {
			in = end
			continue
		}
		for end < g.clusterSize && units>>(end>>g.unitBits)&1 != 0 {
			end += g.unitSize()
		}
		n, written := p.sectors(in, end)
		if !written {
			if buf == nil {
				buf = bufpool.Get(int(g.clusterSize))
				defer buf.Put()
			}
			n = p.stretch(in, end)
			if err := im.readPartial(p, buf.B[:n], p.at+guestOff(in)); err != nil {
				return err
			}
			if err := im.writeData(buf.B[:n], p.host+hostOff(in)); err != nil {
				return err
			}
		}
		in += n
	}
	return nil
}

// readFill reads what lies underneath a part of a cluster that the guest did not write; past the end of the disk that
// is zeros.
func (im *Image) readFill(p *partial, buf []byte, off guestOff) error {
	inside := max(min(int64(len(buf)), im.size.Load()-int64(off)), 0)
	clear(buf[inside:])
	if p.zeroSrc {
		clear(buf)
		return nil
	}
	return im.readSource(buf[:inside], off)
}

// abandonPartial forgets a partial whose cluster is about to get other contents as a whole. The caller holds
// the cluster exclusively.
func (im *Image) abandonPartial(at guestOff) {
	p := im.partials.get(at)
	if p == nil {
		return
	}
	im.partials.remove(p)
	if !p.own {
		im.giveBack(p.run)
	}
}
