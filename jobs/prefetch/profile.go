package prefetch

import (
	"bufio"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
)

const (
	profileHead = "platter prefetch profile 1" // the first line of a stored profile
	maxRuns     = 1 << 20                      // runs in a profile
	recordUnit  = 16 << 10                     // bytes: what is touched is noted in such units
	maxLine     = 64                           // bytes of a line
	maxSeen     = 1 << 28                      // units: 4 TiB of a disk
)

// Run is a part of a disk, in bytes.
type Run struct{ Offset, Length int64 }

// Profile is the order in which a machine first touches parts of its base image, as recorded while it started.
// Prefetching goes by it first and then through the rest of the image.
type Profile []Run

// WriteTo stores the profile as text: a headline, then a line with offset and length a run.
func (p Profile) WriteTo(w io.Writer) (int64, error) {
	c := &countingWriter{w: w}
	b := bufio.NewWriter(c)
	fmt.Fprintln(b, profileHead)
	for _, r := range p {
		fmt.Fprintln(b, r.Offset, r.Length)
	}
	err := b.Flush()
	return c.n, err
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// ReadProfile is the reverse of Profile.WriteTo. Runs are taken as they are; what lies outside a disk is passed over
// when the profile is used.
func ReadProfile(r io.Reader) (Profile, error) {
	s := bufio.NewScanner(r)
	s.Buffer(nil, maxLine)
	if !s.Scan() || s.Text() != profileHead {
		return nil, fmt.Errorf("prefetch profile: line 1 is %.40q, want %q", s.Text(), profileHead)
	}
	var p Profile
	for line := 2; s.Scan(); line++ {
		off, length, _ := strings.Cut(s.Text(), " ")
		o, errO := strconv.ParseInt(off, 10, 64)
		n, errN := strconv.ParseInt(length, 10, 64)
		if errO != nil || errN != nil || o < 0 || n <= 0 || o > 1<<62 || n > 1<<62 {
			return nil, fmt.Errorf("prefetch profile: line %d is %.40q, want an offset and a length in bytes", line, s.Text())
		}
		if len(p) == maxRuns {
			return nil, fmt.Errorf("prefetch profile: more than %d lines", maxRuns)
		}
		p = append(p, Run{o, n})
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("prefetch profile: %w", err)
	}
	return p, nil
}

// Recorder notes which parts of a disk are touched for the first time, in order. Safe for concurrent use. Its
// memory is bounded: a bit for every 16 KiB of the first 4 TiB of the disk, and a million runs.
type Recorder struct {
	mu   sync.Mutex
	seen []uint64
	runs Profile
}

// NewRecorder records touches below size bytes.
func NewRecorder(size int64) *Recorder {
	return &Recorder{seen: make([]uint64, (min(size/recordUnit, maxSeen-1)+64)/64)}
}

// Touch notes a read of [off, off+n).
func (r *Recorder) Touch(off, n int64) {
	if off < 0 || n <= 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for unit := off / recordUnit; unit <= (off+n-1)/recordUnit && unit>>6 < int64(len(r.seen)); unit++ {
		if bit := uint64(1) << (unit & 63); r.seen[unit>>6]&bit == 0 {
			r.seen[unit>>6] |= bit
			r.add(unit * recordUnit)
		}
	}
}

// add appends a unit, joining it to the last run where it follows that.
func (r *Recorder) add(off int64) {
	if n := len(r.runs); n > 0 && r.runs[n-1].Offset+r.runs[n-1].Length == off {
		r.runs[n-1].Length += recordUnit
		return
	}
	if len(r.runs) < maxRuns {
		r.runs = append(r.runs, Run{off, recordUnit})
	}
}

// Profile returns what was recorded so far.
func (r *Recorder) Profile() Profile {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append(Profile(nil), r.runs...)
}
