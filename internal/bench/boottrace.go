package bench

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"time"
)

const (
	traceUnit   = 4 << 10   // bytes: requests are multiples of it, as of a file system's blocks
	traceLog    = 32 << 20  // bytes at the end of the disk that log files are written to
	traceInodes = 16 << 20  // bytes before that: directories and inodes, read a block at a time
	fileSteps   = 10        // files have 4 KiB to 2 MiB, each power of two as often
	readMax     = 128 << 10 // bytes of the largest read, what Linux reads ahead
	readMin     = 16 << 10  // bytes of a file's first read
	mappedFrom  = 256 << 10 // bytes from which on a file may be mapped: its pages are then read as they are needed
)

// bootRequest is what a machine that starts asks of its disk.
type bootRequest struct {
	off, n int64
	write  bool
}

// bootTrace is made up to look like the start of a machine: files all over the disk are read, a few blocks of
// directories and inodes before each, from their beginnings in growing steps or here and there as mapped programs
// are; some are read again, and logs are written.
type bootTrace struct {
	requests []bootRequest
	disk     int64 // bytes
	touched  int64 // bytes that are read and were not written before: what the base image must be asked for
	read     int64 // bytes read, those read again included
	written  int64

	rng   *rand.Rand
	known blockSet
	logAt int64
}

// newBootTrace makes a trace that reads about touch bytes of a disk. The same arguments make the same trace.
func newBootTrace(disk, touch int64, seed uint64) *bootTrace {
	t := &bootTrace{disk: disk, rng: rand.New(rand.NewPCG(seed, 2)), known: newBlockSet(disk), logAt: disk - traceLog}
	inodes := disk - traceLog - traceInodes
	var files []bootRequest
	for t.touched < touch {
		f := bootRequest{n: traceUnit << t.rng.IntN(fileSteps)}
		f.off = t.blocks(inodes - f.n)
		if len(files) > 0 && t.rng.IntN(10) == 0 {
			f = files[t.rng.IntN(len(files))]
		}
		files = append(files, f)
		for range 1 + t.rng.IntN(3) {
			t.add(bootRequest{off: inodes + t.blocks(traceInodes), n: traceUnit})
		}
		if f.n >= mappedFrom && t.rng.IntN(2) == 0 {
			for range f.n / (64 << 10) {
				n := int64(readMin) << t.rng.IntN(2)
				t.add(bootRequest{off: f.off + t.blocks(f.n-n), n: n})
			}
		} else {
			t.sequential(f)
		}
		if t.rng.IntN(3) == 0 {
			t.log(traceUnit * (1 + t.rng.Int64N(16)))
		}
	}
	return t
}

// blocks is a random multiple of traceUnit below n.
func (t *bootTrace) blocks(n int64) int64 { return t.rng.Int64N(n/traceUnit) * traceUnit }

func (t *bootTrace) add(r bootRequest) {
	t.requests = append(t.requests, r)
	fresh := t.known.add(r.off, r.n)
	if r.write {
		t.written += r.n
		return
	}
	t.read += r.n
	t.touched += fresh
}

// sequential reads a file from its beginning, a quarter of the files in part only.
func (t *bootTrace) sequential(f bootRequest) {
	end := f.off + f.n
	if t.rng.IntN(4) == 0 {
		end = f.off + max(traceUnit, f.n/4)
	}
	for at, step := f.off, int64(readMin); at < end; step = min(step*2, readMax) {
		n := min(step, end-at)
		t.add(bootRequest{off: at, n: n})
		at += n
	}
}

// log appends to the logs.
func (t *bootTrace) log(n int64) {
	if t.logAt+n > t.disk {
		t.logAt = t.disk - traceLog
	}
	t.add(bootRequest{off: t.logAt, n: n, write: true})
	t.logAt += n
}

// needs is how much of the base image a clone with blocks of that many bytes cannot do without: every block that is
// read, or written in part, before all of it is the clone's own.
func (t *bootTrace) needs(block int64) (n int64) {
	local := make([]bool, (t.disk+block-1)/block)
	for _, r := range t.requests {
		for b := r.off / block; b*block < r.off+r.n; b++ {
			whole := r.off <= b*block && (b+1)*block <= r.off+r.n
			if !local[b] && !(r.write && whole) {
				n += min(block, t.disk-b*block)
			}
			local[b] = true
		}
	}
	return n
}

// blockSet is a set of blocks of traceUnit bytes.
type blockSet []bool

func newBlockSet(disk int64) blockSet { return make(blockSet, disk/traceUnit) }

// add adds a range and tells how many bytes of it are new.
func (s blockSet) add(off, n int64) (fresh int64) {
	for b := off / traceUnit; b < (off+n)/traceUnit; b++ {
		if !s[b] {
			s[b] = true
			fresh += traceUnit
		}
	}
	return fresh
}

// guest runs traces on a disk, one request at a time, and knows what it has to hold: the base image is the pattern
// of nbdkit's pattern plugin, each 8 bytes their own offset, and what the guest wrote is its complement.
type guest struct {
	written blockSet
	buf     []byte
}

func newGuest(disk int64) *guest { return &guest{newBlockSet(disk), make([]byte, readMax)} }

// disk is what a guest reads and writes.
type disk interface {
	io.ReaderAt
	io.WriterAt
}

// boot runs the trace and tells how long that took. With readOnly writes are left out.
func (g *guest) boot(ctx context.Context, d disk, t *bootTrace, readOnly bool) (time.Duration, error) {
	begin := time.Now()
	for _, r := range t.requests {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		p := g.buf[:r.n]
		if r.write {
			if readOnly {
				continue
			}
			for i := 0; i < len(p); i += 8 {
				binary.BigEndian.PutUint64(p[i:], ^uint64(r.off+int64(i)))
			}
			if _, err := d.WriteAt(p, r.off); err != nil {
				return 0, err
			}
			g.written.add(r.off, r.n)
			continue
		}
		if _, err := d.ReadAt(p, r.off); err != nil {
			return 0, err
		}
		if err := g.check(p, r.off); err != nil {
			return 0, err
		}
	}
	return time.Since(begin), nil
}

// check compares what was read with what the disk has to hold. It looks at one word of each 512 bytes.
func (g *guest) check(p []byte, off int64) error {
	for i := int64(0); i < int64(len(p)); i += 512 {
		want := uint64(off + i)
		if g.written[(off+i)/traceUnit] {
			want = ^want
		}
		if got := binary.BigEndian.Uint64(p[i:]); got != want {
			return fmt.Errorf("the disk holds %#x at %d, expected %#x", got, off+i, want)
		}
	}
	return nil
}
