package jobs

import "fmt"

// ReadError says that a device could not be read.
type ReadError struct {
	Offset int64 // bytes, on the device (for a target: on the target)
	Err    error
}

func (e *ReadError) Error() string {
	return fmt.Sprintf("error while reading at byte %d: %v", e.Offset, e.Err)
}

func (e *ReadError) Unwrap() error { return e.Err }

// WriteError says that the target could not be written.
type WriteError struct {
	Offset int64 // bytes, on the target
	Err    error
}

func (e *WriteError) Error() string {
	return fmt.Sprintf("error while writing at byte %d: %v", e.Offset, e.Err)
}

func (e *WriteError) Unwrap() error { return e.Err }

// ExtentsError says that a device could not tell what is allocated where.
type ExtentsError struct {
	Offset int64 // bytes
	Err    error
}

func (e *ExtentsError) Error() string {
	return fmt.Sprintf("error while reading block status at offset %d: %v", e.Offset, e.Err)
}

func (e *ExtentsError) Unwrap() error { return e.Err }
