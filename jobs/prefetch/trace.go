package prefetch

import (
	"bufio"
	"fmt"
	"io"
	"sync"
	"time"
)

// EventKind says what an Event of a trace is.
type EventKind string

// The events of a trace.
const (
	EventRead   EventKind = "read"   // bytes read from the base image at an offset
	EventWrite  EventKind = "write"  // bytes kept at an offset
	EventSample EventKind = "sample" // the averages moved
	EventPause  EventKind = "pause"  // prefetching pauses for Wait
	EventResume EventKind = "resume"
	EventYield  EventKind = "yield" // prefetching kept still for Wait, because the guest is busy
	EventRetry  EventKind = "retry" // the base image could not be read, and is tried again after Wait
	EventDone   EventKind = "done"  // the base image is not needed any more
	EventFailed EventKind = "failed"
)

// Event is one step of a Prefetcher, for plots.
type Event struct {
	Time         time.Time
	Kind         EventKind
	Offset       int64         // bytes
	Bytes        int64         // read or kept
	Took         time.Duration // the operation
	ReadAverage  float64       // bytes a second; negative: not measured
	WriteAverage float64
	Wait         time.Duration
	Err          error // why it failed, or must try again
}

// Trace writes events as comma-separated values: seconds since the first event, kind, offset, bytes, seconds the
// operation took, average read and write throughput in bytes a second (empty: not measured), seconds of pause.
// Safe for concurrent use.
type Trace struct {
	mu    sync.Mutex
	w     *bufio.Writer
	start time.Time
}

// NewTrace writes to w, a headline first.
func NewTrace(w io.Writer) *Trace {
	t := &Trace{w: bufio.NewWriter(w)}
	fmt.Fprintln(t.w, "time,event,offset,bytes,took,read_average,write_average,wait")
	return t
}

// Add appends an event. Errors show in Flush.
func (t *Trace) Add(e Event) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.start.IsZero() {
		t.start = e.Time
	}
	fmt.Fprintf(t.w, "%.6f,%s,%d,%d,%.6f,%s,%s,%.3f\n", e.Time.Sub(t.start).Seconds(), e.Kind, e.Offset, e.Bytes,
		e.Took.Seconds(), rate(e.ReadAverage), rate(e.WriteAverage), e.Wait.Seconds())
}

func rate(average float64) string {
	if average < 0 {
		return ""
	}
	return fmt.Sprintf("%.0f", average)
}

// Flush writes out what is buffered and returns the first error of all writes.
func (t *Trace) Flush() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.w.Flush()
}
