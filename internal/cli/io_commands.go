package cli

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/bufpool"
)

// ioChunk is how much of a command's data is in memory at a time, in bytes; a multiple of any cluster size.
const ioChunk = 16 << 20

// defaultPattern is the byte that write fills the disk with when none is given.
const defaultPattern = 0xcd

// errPattern says that a read found something else than the pattern.
var errPattern = errors.New("pattern verification failed")

const (
	readUsage   = "[-Cqv] [-P BYTE [-s SKIP] [-l LENGTH]] OFFSET LENGTH"
	readDetails = `Reads LENGTH bytes at OFFSET.
  -P BYTE    expect every byte to be this one, and fail otherwise
  -s SKIP    do not verify the first SKIP bytes
  -l LENGTH  verify only so many bytes after those
  -v         print what was read
  -C         report in a form for programs: bytes,operations,time,bytes/s,operations/s
  -q         report nothing`
	writeUsage   = "[-Ccfnquz] [-P BYTE] OFFSET LENGTH"
	writeDetails = `Writes LENGTH bytes at OFFSET, all of them 0xcd.
  -P BYTE  all of them this one
  -z       write zeros as such, without data
  -u       with -z: the space may be given back
  -n       with -z: fail rather than write zeros out
  -c       compressed; OFFSET and LENGTH in whole clusters
  -f       durable when the command returns
  -C       report in a form for programs: bytes,operations,time,bytes/s,operations/s
  -q       report nothing`
)

// ioCommands returns the commands, in the order of the help.
func ioCommands() []*ioCommand {
	return []*ioCommand{
		{name: "read", alias: "r", options: "CpqvP:s:l:", min: 2, max: 2, run: ioRead,
			usage: readUsage, summary: "read, verify, print", details: readDetails},
		{name: "readv", options: "CqvP:", min: 2, max: -1, run: ioRead,
			usage: "[-Cqv] [-P BYTE] OFFSET LENGTH...", summary: "read the sum of the lengths", details: readDetails},
		{name: "write", alias: "w", options: "CcfnpquzP:", min: 2, max: 2, run: ioWrite,
			usage: writeUsage, summary: "write a pattern or zeros", details: writeDetails},
		{name: "writev", options: "CfqP:", min: 2, max: -1, run: ioWrite,
			usage: "[-Cfq] [-P BYTE] OFFSET LENGTH...", summary: "write the sum of the lengths", details: writeDetails},
		{name: "zero", options: "Cfnqu", min: 2, max: 2, run: ioZero,
			usage: "[-Cfnqu] OFFSET LENGTH", summary: "the same as write -z", details: writeDetails},
		{name: "discard", alias: "d", options: "Cq", min: 2, max: 2, run: ioDiscard,
			usage: "[-Cq] OFFSET LENGTH", summary: "say that the contents are not needed"},
		{name: "flush", alias: "f", run: ioFlush,
			summary: "make everything written durable"},
		{name: "aio_read", options: "CqvP:", min: 2, max: -1, run: ioRead, background: true,
			usage: "[-Cqv] [-P BYTE] OFFSET LENGTH...", summary: "read; the next command begins at once", details: readDetails},
		{name: "aio_write", options: "CfiquzP:", min: 2, max: -1, run: ioWrite, background: true,
			usage: "[-Cfquz] [-P BYTE] OFFSET LENGTH...", summary: "write; the next command begins at once", details: writeDetails},
		{name: "aio_flush", run: func(_ context.Context, s *ioSession, _ *ioCall) error { s.wait(); return s.dev.Flush() },
			summary: "wait for aio_read and aio_write, then flush"},
		{name: "alloc", options: "", min: 1, max: 2, run: ioAlloc,
			usage: "OFFSET [LENGTH]", summary: "how much is allocated in this image (of 512 bytes)"},
		{name: "map", run: ioMap,
			summary: "print what is allocated in this image"},
		{name: "length", alias: "l", run: ioLength,
			summary: "print the size of the disk"},
		{name: "truncate", alias: "t", options: "m:", min: 1, max: 1, run: ioTruncate,
			usage: "[-m PREALLOCATION] SIZE", summary: "change the size of the disk"},
		{name: "info", alias: "i", run: ioInfo,
			summary: "print the format and its unit of allocation"},
		{name: "sleep", min: 1, max: 1, run: ioSleep,
			usage: "MILLISECONDS", summary: "wait"},
		{name: "help", alias: "?", max: 1, run: ioPrintHelp,
			usage: "[COMMAND]", summary: "explain the commands, or one of them"},
		{name: "quit", alias: "q", run: func(context.Context, *ioSession, *ioCall) error { return errQuit },
			summary: "end"},
	}
}

// span reads the offset and the sum of the lengths.
func (c *ioCall) span() (off, length int64, err error) {
	if off, err = c.size(0); err != nil {
		return 0, 0, err
	}
	for i := 1; i < len(c.args); i++ {
		n, err := c.size(i)
		if err != nil {
			return 0, 0, err
		}
		if length+n < length {
			return 0, 0, argumentf("Parsing error: argument too large -- %q", c.args[i])
		}
		length += n
	}
	return off, length, nil
}

// pattern reads the byte of -P.
func (c *ioCall) pattern() (byte, error) {
	if !c.has('P') {
		return defaultPattern, nil
	}
	n, err := strconv.ParseUint(c.options['P'], 0, 8)
	if err != nil {
		return 0, argumentf("%s is not a valid pattern byte", c.options['P'])
	}
	return byte(n), nil
}

// optionalSize is an option that holds a number of bytes.
func (c *ioCall) optionalSize(option byte, missing int64) (int64, error) {
	if !c.has(option) {
		return missing, nil
	}
	return ioSizeArgument(c.options[option])
}

func ioRead(ctx context.Context, s *ioSession, c *ioCall) error {
	off, length, err := c.span()
	if err != nil {
		return err
	}
	pattern, err := c.pattern()
	if err != nil {
		return err
	}
	if (c.has('s') || c.has('l')) && !c.has('P') {
		return argumentf("-s and -l are meaningful only with -P")
	}
	skip, err := c.optionalSize('s', 0)
	if err != nil {
		return err
	}
	verify, err := c.optionalSize('l', max(length-skip, 0))
	if err != nil {
		return err
	}
	if skip > length || verify > length-skip {
		return argumentf("pattern verification range exceeds end of read data")
	}
	if err := block.CheckRange("read", off, length, s.dev.Size()); err != nil {
		return err
	}
	begin := time.Now()
	mismatch := false
	err = inChunks(ctx, off, length, func(b []byte, at int64) error {
		if _, err := s.dev.ReadAt(b, at); err != nil {
			return err
		}
		if c.has('P') && !holds(b, at-off, skip, verify, pattern) {
			mismatch = true
		}
		if c.has('v') {
			s.dump(b, at)
		}
		return nil
	})
	if err != nil {
		return err
	}
	took := time.Since(begin)
	if mismatch {
		s.print("Pattern verification failed at offset %d, %d bytes\n", off+skip, verify)
	}
	s.result(c, "read", off, length, took)
	if mismatch {
		return errPattern
	}
	return nil
}

// holds tells whether the bytes of b that lie in [skip, skip+verify) of the whole read are all pattern.
// b begins pos bytes into the read.
func holds(b []byte, pos, skip, verify int64, pattern byte) bool {
	from := min(max(skip-pos, 0), int64(len(b)))
	to := min(max(skip+verify-pos, 0), int64(len(b)))
	for _, v := range b[from:to] {
		if v != pattern {
			return false
		}
	}
	return true
}

func ioWrite(ctx context.Context, s *ioSession, c *ioCall) error {
	switch {
	case c.has('z') && c.has('c'):
		return argumentf("-c and -z cannot be specified at the same time")
	case c.has('z') && c.has('P'):
		return argumentf("-z and -P cannot be specified at the same time")
	case c.has('u') && !c.has('z'):
		return argumentf("-u requires -z to be specified")
	case c.has('n') && !c.has('z'):
		return argumentf("-n requires -z to be specified")
	case c.has('z'):
		return ioZero(ctx, s, c)
	}
	off, length, err := c.span()
	if err != nil {
		return err
	}
	pattern, err := c.pattern()
	if err != nil {
		return err
	}
	if err := block.CheckRange("write", off, length, s.dev.Size()); err != nil {
		return err
	}
	begin := time.Now()
	err = inChunks(ctx, off, length, func(b []byte, at int64) error {
		for i := range b {
			b[i] = pattern
		}
		if c.has('c') {
			return writeCompressed(s.dev, b, at)
		}
		_, err := s.dev.WriteAt(b, at)
		return err
	})
	if err == nil && c.has('f') {
		err = s.dev.Flush()
	}
	if err != nil {
		return err
	}
	s.result(c, "wrote", off, length, time.Since(begin))
	return nil
}

// writeCompressed stores b cluster by cluster.
func writeCompressed(dev block.Device, b []byte, off int64) error {
	unit := dev.Limits().Preferred
	for len(b) > 0 {
		n := min(unit, int64(len(b)))
		if err := dev.WriteCompressed(b[:n], off); err != nil {
			return err
		}
		b, off = b[n:], off+n
	}
	return nil
}

func ioZero(_ context.Context, s *ioSession, c *ioCall) error {
	off, length, err := c.span()
	if err != nil {
		return err
	}
	var flags block.ZeroFlags
	if c.has('u') {
		flags |= block.MayUnmap
	}
	if c.has('n') {
		flags |= block.FastOnly
	}
	begin := time.Now()
	if err := s.dev.WriteZeroes(off, length, flags); err != nil {
		return err
	}
	if c.has('f') {
		if err := s.dev.Flush(); err != nil {
			return err
		}
	}
	s.result(c, "wrote", off, length, time.Since(begin))
	return nil
}

func ioDiscard(_ context.Context, s *ioSession, c *ioCall) error {
	off, length, err := c.span()
	if err != nil {
		return err
	}
	begin := time.Now()
	if err := s.dev.Discard(off, length); err != nil {
		return err
	}
	s.result(c, "discard", off, length, time.Since(begin))
	return nil
}

func ioFlush(_ context.Context, s *ioSession, _ *ioCall) error { return s.dev.Flush() }

func ioAlloc(_ context.Context, s *ioSession, c *ioCall) error {
	off, err := c.size(0)
	if err != nil {
		return err
	}
	length := int64(512)
	if len(c.args) > 1 {
		if length, err = c.size(1); err != nil {
			return err
		}
	}
	if err := block.CheckRange("alloc", off, length, s.dev.Size()); err != nil {
		return err
	}
	var sum int64
	err = s.dev.Extents(off, length, func(e block.Extent) bool {
		if inThisImage(e) {
			sum += e.Length
		}
		return true
	})
	if err != nil {
		return err
	}
	s.print("%d/%d bytes allocated at offset %s\n", sum, length, ioSize(float64(off)))
	return nil
}

// inThisImage tells whether the image itself decides the contents, rather than one below it.
func inThisImage(e block.Extent) bool { return e.Allocated && e.Depth == 0 }

func ioMap(ctx context.Context, s *ioSession, _ *ioCall) error {
	var run block.Extent
	show := func() {
		if run.Length == 0 {
			return
		}
		not := "not"
		if run.Allocated {
			not = "   "
		}
		s.print("%s (0x%x) bytes %s allocated at offset %s (0x%x)\n",
			ioSize(float64(run.Length)), run.Length, not, ioSize(float64(run.Offset)), run.Offset)
	}
	err := s.dev.Extents(0, s.dev.Size(), func(e block.Extent) bool {
		if inThisImage(e) == run.Allocated && run.Length > 0 {
			run.Length += e.Length
			return ctx.Err() == nil
		}
		show()
		run = block.Extent{Offset: e.Offset, Length: e.Length, Allocated: inThisImage(e)}
		return ctx.Err() == nil
	})
	show()
	return errors.Join(err, ctx.Err())
}

func ioLength(_ context.Context, s *ioSession, _ *ioCall) error {
	s.print("%s\n", ioSize(float64(s.dev.Size())))
	return nil
}

func ioTruncate(_ context.Context, s *ioSession, c *ioCall) error {
	size, err := c.size(0)
	if err != nil {
		return err
	}
	var prealloc block.Preallocation
	if c.has('m') {
		if prealloc, err = block.ParsePreallocation(c.options['m']); err != nil {
			return argumentf("%s", err)
		}
	}
	return s.dev.Resize(size, prealloc)
}

func ioInfo(_ context.Context, s *ioSession, _ *ioCall) error {
	s.print("format name: %s\ncluster size: %s\n", s.format, ioSize(float64(s.dev.Limits().Preferred)))
	return nil
}

func ioSleep(ctx context.Context, _ *ioSession, c *ioCall) error {
	ms, err := strconv.ParseUint(c.args[0], 0, 31)
	if err != nil {
		return argumentf("sleep: %q is not a number of milliseconds", c.args[0])
	}
	select {
	case <-time.After(time.Duration(ms) * time.Millisecond):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func ioPrintHelp(_ context.Context, s *ioSession, c *ioCall) error {
	if len(c.args) == 0 {
		s.print("%s\n", ioHelp())
		return nil
	}
	about := findIOCommand(c.args[0])
	if about == nil {
		return argumentf("command %s not found", c.args[0])
	}
	s.print("%s -- %s\n", strings.TrimSpace(about.name+" "+about.usage), about.summary)
	if about.details != "" {
		s.print("\n%s\n", about.details)
	}
	return nil
}

// inChunks calls fn with a buffer for each part of [off, off+length) in turn.
func inChunks(ctx context.Context, off, length int64, fn func(b []byte, at int64) error) error {
	buf := bufpool.Get(int(min(length, ioChunk)))
	defer buf.Put()
	for done := int64(0); done < length; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(length-done, ioChunk)
		if err := fn(buf.B[:n], off+done); err != nil {
			return err
		}
		done += n
	}
	return nil
}

// result prints what a command did, in the form of qemu-io.
func (s *ioSession) result(c *ioCall, verb string, off, length int64, took time.Duration) {
	if c.has('q') {
		return
	}
	seconds := max(took, time.Microsecond).Seconds()
	if c.has('C') {
		s.print("%d,1,%s,%.3f,%.3f\n", length, ioTime(took, true), float64(length)/seconds, 1/seconds)
		return
	}
	s.print("%s %d/%d bytes at offset %d\n%s, 1 ops; %s (%s/sec and %.4f ops/sec)\n",
		verb, length, length, off, ioSize(float64(length)), ioTime(took, false), ioSize(float64(length)/seconds), 1/seconds)
}

// ioSize prints a number of bytes as qemu-io does: with three digits after the point, or none when it is
// whole.
func ioSize(n float64) string {
	units := [...]string{"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	i := 0
	for n >= 1024 && i < len(units)-1 {
		n /= 1024
		i++
	}
	if n == float64(int64(n)) {
		return fmt.Sprintf("%d %s", int64(n), units[i])
	}
	return fmt.Sprintf("%.3f %s", n, units[i])
}

// ioTime prints a duration as qemu-io does; long says to name the hours even when there are none.
func ioTime(d time.Duration, long bool) string {
	hours, minutes := int(d.Hours()), int(d.Minutes())%60
	seconds := (d % time.Minute).Seconds()
	if hours > 0 || minutes > 0 || long {
		return fmt.Sprintf("%d:%02d:%05.2f", hours, minutes, seconds)
	}
	return fmt.Sprintf("%05.2f sec", seconds)
}

// dump prints b, which lies at off, as qemu-io does: 16 bytes a line, in hexadecimal and as text.
func (s *ioSession) dump(b []byte, off int64) {
	for len(b) > 0 {
		line := b[:min(16, len(b))]
		text := make([]byte, len(line))
		for i, v := range line {
			text[i] = v
			if v < 0x20 || v > 0x7e {
				text[i] = '.'
			}
		}
		s.print("%08x:  % x  %s\n", off, line, text)
		b, off = b[len(line):], off+int64(len(line))
	}
}
