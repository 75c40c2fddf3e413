package storage

import "fmt"

// LockError says why an image could not be locked. It wraps ErrLocked.
//
// On linux the locks are QEMU's, so that the two respect each other. An open image holds shared open file
// description locks on single bytes of the file: byte 100+n says "I use permission n", byte 200+n says "no one
// else may use permission n". Who wants a permission looks for a lock on byte 200+n, who forbids one for a
// lock on byte 100+n. The permissions used here are
//
//	0  consistent read
//	1  write
//	3  resize
//
// A file open for writing uses all three and forbids others to write and resize; a file open for reading uses
// the first and forbids the same; with OpenOptions.Share it uses the first and forbids nothing. As the locks
// belong to the open file and not to the process, two opens in one process conflict as well.
//
// Elsewhere one lock is taken on the whole file, exclusive for writing and shared for reading (flock on
// darwin, LockFileEx on windows), none with Share.
type LockError struct {
	Path       string
	Permission string // what conflicts: "consistent read", "write" or "resize"
	Shared     bool   // the other one uses Permission; otherwise it forbids it
}

// Error uses the words of QEMU, which scripts look for, on two lines as there.
func (e *LockError) Error() string {
	shared := ""
	if e.Shared {
		shared = "shared "
	}
	return fmt.Sprintf("Failed to get %s%q lock\nIs another process using the image [%s]?", shared, e.Permission, e.Path)
}

// Unwrap makes errors.Is(err, ErrLocked) true.
func (e *LockError) Unwrap() error { return ErrLocked }
