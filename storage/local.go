package storage

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"syscall"
)

// ErrReadOnly is wrapped by every change asked of a File that was opened read-only.
var ErrReadOnly = errors.New("the file was opened read-only")

// OpenOptions says how Open opens a local file. The zero value opens an existing file for reading and
// writing and takes the locks of a writer.
type OpenOptions struct {
	ReadOnly  bool // changes fail with ErrReadOnly; takes the locks of a reader
	Create    bool // create the file if there is none
	Exclusive bool // with Create: fail with fs.ErrExist if there is one
	Truncate  bool // empty a regular file, once its locks are held

	// Direct bypasses the page cache (O_DIRECT on linux, F_NOCACHE on darwin). Requests may still have any
	// alignment; those that suit the file system's are served without a copy.
	Direct bool

	Share  bool // with ReadOnly: tolerate that another process is writing the file
	NoLock bool // neither take nor look at locks

	// NoCoW asks a copy-on-write file system to write a file that this call creates in place (chattr +C).
	// File systems that know no such attribute ignore it.
	NoCoW bool

	Perm fs.FileMode // permissions of a created file before the umask; 0 means 0644
}

func (o OpenOptions) validate() error {
	switch {
	case o.ReadOnly && (o.Create || o.Truncate):
		return errors.New("a file opened read-only can be neither created nor truncated")
	case o.Exclusive && !o.Create:
		return errors.New("exclusive is an option of creating a file")
	case o.Share && !o.ReadOnly:
		return errors.New("only a file opened read-only can be shared with a writer")
	}
	return nil
}

// local is a regular file or block device of this machine.
type local struct {
	f        *os.File
	path     string
	readOnly bool
	device   bool // a block device: its size is fixed

	// mu is held shared while a call uses the descriptor itself instead of f, and exclusively by Close:
	// the number of a closed descriptor may belong to another file already.
	mu     sync.RWMutex
	fd     uintptr
	closed bool

	sys localSystem // what the operating system's part keeps
}

// Open opens a regular file or block device of this machine and takes the image locks described at
// LockError. Anything else (a directory, a FIFO, a terminal) is refused. A file that this call creates has its
// directory entry made durable.
func Open(path string, o OpenOptions) (File, error) {
	if err := o.validate(); err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	// Before opening, because opening a FIFO waits for its other end.
	if info, err := os.Stat(path); err == nil {
		if err := checkKind(path, info.Mode()); err != nil {
			return nil, err
		}
	}
	f, created, err := openFile(path, o)
	if err != nil {
		return nil, err
	}
	file, err := newLocal(f, path, o, created)
	if err != nil {
		f.Close()
		if created && !errors.Is(err, ErrLocked) {
			os.Remove(path)
		}
		return nil, err
	}
	return file, nil
}

// openFile opens path and reports whether that created it.
func openFile(path string, o OpenOptions) (f *os.File, created bool, err error) {
	flags := os.O_RDWR
	if o.ReadOnly {
		flags = os.O_RDONLY
	}
	perm := o.Perm
	if perm == 0 {
		perm = 0o644
	}
	if !o.Exclusive {
		f, err = openDescriptor(path, flags, perm, o.Direct)
		if err == nil || !o.Create || !errors.Is(err, fs.ErrNotExist) {
			return f, false, err
		}
	}
	f, err = openDescriptor(path, flags|os.O_CREATE|os.O_EXCL, perm, o.Direct)
	if err != nil && !o.Exclusive && errors.Is(err, fs.ErrExist) {
		// It appeared meanwhile, or path is a symbolic link to a file that does not exist yet.
		f, err = openDescriptor(path, flags|os.O_CREATE, perm, o.Direct)
		return f, false, err
	}
	return f, err == nil, err
}

// newLocal makes f, just opened, a File. On error the caller closes f.
func newLocal(f *os.File, path string, o OpenOptions, created bool) (File, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := checkKind(path, info.Mode()); err != nil {
		return nil, err
	}
	l := &local{f: f, path: path, readOnly: o.ReadOnly, device: isDevice(info.Mode()), fd: f.Fd()}
	if !o.NoLock {
		if err := lockFile(l.fd, path, o.ReadOnly, o.Share); err != nil {
			return nil, err
		}
	}
	if created {
		if o.NoCoW {
			setNoCoW(l.fd)
		}
		if err := syncDirectoryOf(path); err != nil {
			return nil, err
		}
	}
	if o.Truncate && !l.device {
		if err := f.Truncate(0); err != nil {
			return nil, err
		}
	}
	if o.Direct {
		return newDirect(l)
	}
	return l, nil
}

func isDevice(mode fs.FileMode) bool { return mode&fs.ModeDevice != 0 && mode&fs.ModeCharDevice == 0 }

func checkKind(path string, mode fs.FileMode) error {
	what := ""
	switch {
	case mode.IsRegular(), isDevice(mode) && blockDevices:
		return nil
	case isDevice(mode):
		return &fs.PathError{Op: "open", Path: path, Err: fmt.Errorf("block devices are used on linux only: %w", errors.ErrUnsupported)}
	case mode.IsDir():
		what = "a directory"
	case mode&fs.ModeNamedPipe != 0:
		what = "a FIFO"
	case mode&fs.ModeSocket != 0:
		what = "a socket"
	case mode&fs.ModeCharDevice != 0:
		what = "a character device"
	default:
		what = "neither, file mode " + mode.String()
	}
	return &fs.PathError{Op: "open", Path: path, Err: &kindError{what, mode.IsDir()}}
}

// ErrKind is wrapped by the error of opening what is neither a regular file nor a block device. It wraps fs.ErrInvalid;
// of a directory the error wraps syscall.EISDIR too.
var ErrKind = fmt.Errorf("want a regular file or a block device: %w", fs.ErrInvalid)

// kindError says what was found instead.
type kindError struct {
	found     string
	directory bool
}

func (e *kindError) Error() string {
	return "want a regular file or a block device, found " + e.found
}

func (e *kindError) Unwrap() []error {
	if e.directory {
		return []error{ErrKind, syscall.EISDIR}
	}
	return []error{ErrKind}
}

// withFD calls fn with the descriptor, which stays open meanwhile.
func (l *local) withFD(op string, fn func(fd uintptr) error) error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	err := fs.ErrClosed
	if !l.closed {
		err = fn(l.fd)
	}
	return l.wrap(op, err)
}

// wrap adds what was asked of which file. A bare error is expected, so that nothing is named twice.
func (l *local) wrap(op string, err error) error {
	if err == nil || err == io.EOF || err == ErrWouldBlock {
		return err
	}
	return &fs.PathError{Op: op, Path: l.path, Err: err}
}

// change checks a request that changes the file.
func (l *local) change(op string, off, length int64) error {
	err := checkRange(off, length)
	if err == nil && l.readOnly {
		err = ErrReadOnly
	}
	return l.wrap(op, err)
}

func (l *local) ReadAt(p []byte, off int64) (int, error) { return l.f.ReadAt(p, off) }

func (l *local) WriteAt(p []byte, off int64) (int, error) {
	if err := l.change("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	if l.device {
		return l.writeDevice(p, off, l.f.WriteAt)
	}
	return l.f.WriteAt(p, off)
}

// writeDevice writes to a container of fixed size. The device itself refuses what passes its end; asking for
// its size before each write would cost a system call.
func (l *local) writeDevice(p []byte, off int64, write func([]byte, int64) (int, error)) (int, error) {
	n, err := write(p, off)
	if err != nil {
		if size, sizeErr := l.Size(); sizeErr == nil && int64(len(p)) > size-off {
			err = l.wrap("write", fmt.Errorf("%d bytes at %d of a device of %d bytes: %w", len(p), off, size, io.ErrShortWrite))
		}
	}
	return n, err
}

func (l *local) Size() (int64, error) {
	if l.device {
		return l.f.Seek(0, io.SeekEnd) // the file position is used by nothing else
	}
	info, err := l.f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (l *local) Truncate(size int64) error {
	if err := l.change("truncate", 0, size); err != nil {
		return err
	}
	if !l.device {
		return l.f.Truncate(size)
	}
	now, err := l.Size()
	if err == nil && size != now {
		err = l.wrap("truncate", fmt.Errorf("to %d bytes: a block device keeps its size of %d: %w", size, now, errors.ErrUnsupported))
	}
	return err
}

func (l *local) Name() string { return l.path }

// Close waits for calls in flight, then closes the file, which drops its locks.
func (l *local) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	return l.f.Close()
}
