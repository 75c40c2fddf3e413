package crashlab

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/platter-disk/platter/storage"
)

// Fault makes operations of one kind fail. Its text form is "KIND:N:ACTION":
//
//	write:5:EIO        the fifth write fails and writes nothing
//	write:5+:ENOSPC    the fifth write and all after it
//	sync:*:EIO         every sync
//	write:7:short=512  the seventh write stops after 512 bytes
//
// KIND is a name of Kind.String. ACTION is EIO, ENOSPC, EDQUOT, EROFS, EACCES, EINTR, EFBIG or EOPNOTSUPP
// (which wraps errors.ErrUnsupported), errno=NUMBER, or short=BYTES for reads and writes.
type Fault struct {
	Kind   Kind
	N      int           // which operation of its kind, from 1; 0: every one
	Onward bool          // and all after it
	Err    syscall.Errno // what it fails with; 0 for a short one
	Short  int           // bytes that are still transferred where Err is 0
}

// faultErrors are the errors a fault can name.
func faultErrors() []struct {
	name string
	err  syscall.Errno
} {
	return []struct {
		name string
		err  syscall.Errno
	}{
		{"EIO", syscall.EIO}, {"ENOSPC", syscall.ENOSPC}, {"EDQUOT", syscall.EDQUOT}, {"EROFS", syscall.EROFS},
		{"EACCES", syscall.EACCES}, {"EINTR", syscall.EINTR}, {"EFBIG", syscall.EFBIG}, {"EOPNOTSUPP", syscall.EOPNOTSUPP},
	}
}

// String returns the fault in text form.
func (f Fault) String() string {
	n := "*"
	if f.N > 0 {
		n = strconv.Itoa(f.N)
		if f.Onward {
			n += "+"
		}
	}
	action := fmt.Sprintf("short=%d", f.Short)
	if f.Err != 0 {
		action = fmt.Sprintf("errno=%d", int(f.Err))
	}
	for _, e := range faultErrors() {
		if e.err == f.Err {
			action = e.name
		}
	}
	return fmt.Sprintf("%s:%s:%s", f.Kind, n, action)
}

// ParseFault is the reverse of Fault.String.
func ParseFault(text string) (Fault, error) {
	parts := strings.Split(text, ":")
	if len(parts) != 3 {
		return Fault{}, fmt.Errorf("fault %q: want KIND:N:ACTION, as in write:5:EIO", text)
	}
	var f Fault
	var err error
	if f.Kind, err = ParseKind(parts[0]); err != nil {
		return Fault{}, fmt.Errorf("fault %q: %w", text, err)
	}
	if n, onward := strings.CutSuffix(parts[1], "+"); parts[1] != "*" {
		f.Onward = onward
		if f.N, err = strconv.Atoi(n); err != nil || f.N < 1 {
			return Fault{}, fmt.Errorf("fault %q: N is %q: want a number from 1, one followed by +, or *", text, parts[1])
		}
	}
	if bytes, short := strings.CutPrefix(parts[2], "short="); short {
		if f.Short, err = strconv.Atoi(bytes); err != nil || f.Short < 0 {
			return Fault{}, fmt.Errorf("fault %q: short is %q: want a number of bytes, 0 or more", text, bytes)
		}
		if f.Kind != KindWrite && f.Kind != KindRead {
			return Fault{}, fmt.Errorf("fault %q: short is for read and write, not for %s", text, f.Kind)
		}
		return f, nil
	}
	if number, ok := strings.CutPrefix(parts[2], "errno="); ok {
		n, err := strconv.Atoi(number)
		if err != nil || n < 1 {
			return Fault{}, fmt.Errorf("fault %q: errno is %q: want a number from 1", text, number)
		}
		f.Err = syscall.Errno(n)
		return f, nil
	}
	var names []string
	for _, e := range faultErrors() {
		if e.name == parts[2] {
			f.Err = e.err
			return f, nil
		}
		names = append(names, e.name)
	}
	return Fault{}, fmt.Errorf("fault %q: action is %q: want short=BYTES, errno=NUMBER or one of %q", text, parts[2], names)
}

// hits says whether the fault concerns the n-th operation of a kind.
func (f *Fault) hits(kind Kind, n int) bool {
	return f.Kind == kind && (f.N == 0 || f.N == n || f.Onward && n > f.N)
}

// Injector makes operations fail on the files it wraps, whose operations it counts together. Safe for
// concurrent use.
type Injector struct {
	faults []Fault

	mu      sync.Mutex
	stopped bool
	count   [numKinds]int
	hit     int
	syncs   int // of the hits
}

// NewInjector returns an injector of the faults; of several that concern one operation the first counts.
func NewInjector(faults ...Fault) *Injector {
	return &Injector{faults: faults}
}

// Hits is how many operations were made to fail.
func (in *Injector) Hits() int {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.hit
}

// stop lets every operation pass from now on and says whether a sync has failed.
func (in *Injector) stop() (syncFailed bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.stopped = true
	return in.syncs > 0
}

// Wrap returns f with the faults.
func (in *Injector) Wrap(f storage.File) storage.File {
	return &faultFile{File: f, in: in}
}

// next counts an operation and returns the fault it must fail with, nil for none.
func (in *Injector) next(kind Kind) *Fault {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.count[kind]++
	f := in.find(kind, in.count[kind])
	if f == nil {
		return nil
	}
	in.hit++
	if kind == KindSync {
		in.syncs++
	}
	return f
}

// find returns the fault that concerns the n-th operation of a kind, nil for none. in.mu is held.
func (in *Injector) find(kind Kind, n int) *Fault {
	if in.stopped {
		return nil
	}
	for i := range in.faults {
		if f := &in.faults[i]; f.hits(kind, n) {
			return f
		}
	}
	return nil
}

// faultFile is a file with an injector in front. Size, Name and Close never fail.
type faultFile struct {
	storage.File
	in *Injector
}

// fail returns the error of an operation that has to fail.
func (f *faultFile) fail(kind Kind) error {
	if fault := f.in.next(kind); fault != nil {
		return f.wrap(fault, fault.Err)
	}
	return nil
}

func (f *faultFile) wrap(fault *Fault, err error) error {
	return &fs.PathError{Op: "injected " + fault.String(), Path: f.Name(), Err: err}
}

func (f *faultFile) ReadAt(p []byte, off int64) (int, error) {
	fault := f.in.next(KindRead)
	if fault == nil {
		return f.File.ReadAt(p, off)
	}
	if fault.Err != 0 {
		return 0, f.wrap(fault, fault.Err)
	}
	n, err := f.File.ReadAt(p[:min(fault.Short, len(p))], off)
	if err == nil || errors.Is(err, io.EOF) {
		err = f.wrap(fault, io.ErrUnexpectedEOF)
	}
	return n, err
}

// TryReadAt refuses where ReadAt would fail, so that the caller comes back through ReadAt.
func (f *faultFile) TryReadAt(p []byte, off int64) (int, error) {
	f.in.mu.Lock()
	defer f.in.mu.Unlock()
	if f.in.find(KindRead, f.in.count[KindRead]+1) != nil {
		return 0, storage.ErrWouldBlock
	}
	n, err := f.File.TryReadAt(p, off)
	if !errors.Is(err, storage.ErrWouldBlock) {
		f.in.count[KindRead]++
	}
	return n, err
}

func (f *faultFile) WriteAt(p []byte, off int64) (int, error) {
	fault := f.in.next(KindWrite)
	if fault == nil {
		return f.File.WriteAt(p, off)
	}
	if fault.Err != 0 {
		return 0, f.wrap(fault, fault.Err)
	}
	n, err := f.File.WriteAt(p[:min(fault.Short, len(p))], off)
	if err == nil {
		err = f.wrap(fault, io.ErrShortWrite)
	}
	return n, err
}

func (f *faultFile) Sync() error {
	if err := f.fail(KindSync); err != nil {
		return err
	}
	return f.File.Sync()
}

func (f *faultFile) Truncate(size int64) error {
	if err := f.fail(KindTruncate); err != nil {
		return err
	}
	return f.File.Truncate(size)
}

func (f *faultFile) PunchHole(off, length int64) error {
	if err := f.fail(KindPunch); err != nil {
		return err
	}
	return f.File.PunchHole(off, length)
}

func (f *faultFile) ZeroRange(off, length int64) error {
	if err := f.fail(KindZero); err != nil {
		return err
	}
	return f.File.ZeroRange(off, length)
}

func (f *faultFile) Allocate(off, length int64) error {
	if err := f.fail(KindAllocate); err != nil {
		return err
	}
	return f.File.Allocate(off, length)
}

func (f *faultFile) DataExtents(off, length int64, fn func(storage.Extent) bool) error {
	if err := f.fail(KindExtents); err != nil {
		return err
	}
	return f.File.DataExtents(off, length, fn)
}

// ForEachFault calls run with an injector of one fault after the other: for each of the faults given, whose N
// is ignored, N = 1, 2, 3 and so on until run does not come to an N-th operation of that kind any more, or N
// exceeds limit. It stops at the first error of run and returns it with the fault that provoked it.
func ForEachFault(faults []Fault, limit int, run func(in *Injector) error) error {
	for _, f := range faults {
		for f.N = 1; f.N <= limit; f.N++ {
			in := NewInjector(f)
			if err := run(in); err != nil {
				return fmt.Errorf("with fault %s: %w", f, err)
			}
			if in.Hits() == 0 {
				break
			}
		}
	}
	return nil
}
