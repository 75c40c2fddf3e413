package bench

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// tracedCalls are the system calls that change a file at a given place, and the barriers. Servers write to
// their sockets with others.
var tracedCalls = map[string]int{
	"pwrite64": writeCalls, "pwritev": writeCalls, "pwritev2": writeCalls,
	"fdatasync": syncs, "fsync": syncs,
	"fallocate": otherChanges, "ftruncate": otherChanges,
	// Work that is queued with these cannot be counted: seeing one is an error.
	"io_submit": -1, "io_uring_enter": -1,
}

// straceMeter counts the system calls of another process with strace(1), which makes it several times
// slower.
type straceMeter struct{ tracer }

// StraceMeter counts what a process of this machine writes and how often it syncs. It needs the program
// strace and the right to trace the process.
func StraceMeter(pid int) Meter { return &straceMeter{tracer{pid: pid}} }

func (m *straceMeter) Start() error { return m.attach(tracedCalls) }

func (m *straceMeter) Stop() (cost Cost, err error) {
	err = m.detach(func(r io.Reader) error {
		cost, err = parseStrace(r)
		return err
	})
	return cost, err
}

// tracer records system calls of a running process.
type tracer struct {
	pid   int
	bytes int // how much of what is written the record shows

	cmd    *exec.Cmd
	dir    string
	output string
	stderr *bytes.Buffer
}

// straceFlags are those of strace for a record of some calls.
func straceFlags(output string, shown int, calls map[string]int) []string {
	names := slices.Sorted(maps.Keys(calls))
	return []string{"-f", "-s", strconv.Itoa(shown), "-o", output, "-e", "trace=" + strings.Join(names, ",")}
}

// attach begins to record.
func (m *tracer) attach(calls map[string]int) (err error) {
	if m.dir, err = os.MkdirTemp("", "platter-strace-"); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(m.dir)
		}
	}()
	m.output = filepath.Join(m.dir, "calls")
	m.cmd = exec.Command("strace", append(straceFlags(m.output, m.bytes, calls), "-p", strconv.Itoa(m.pid))...)
	m.stderr = &bytes.Buffer{}
	stderr, err := m.cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := m.cmd.Start(); err != nil {
		return fmt.Errorf("strace: %w", err)
	}
	// strace says so when it has attached; whatever else it says explains why it has not.
	lines := bufio.NewReader(io.TeeReader(stderr, m.stderr))
	for {
		line, err := lines.ReadString('\n')
		if strings.Contains(line, " attached") {
			go io.Copy(io.Discard, lines)
			return nil
		}
		if err != nil {
			m.cmd.Wait()
			return fmt.Errorf("strace could not attach to process %d: %s", m.pid, strings.TrimSpace(m.stderr.String()))
		}
	}
}

// detach ends the record and has it read.
func (m *tracer) detach(read func(io.Reader) error) error {
	defer os.RemoveAll(m.dir)
	if err := m.cmd.Process.Signal(os.Interrupt); err != nil {
		return fmt.Errorf("strace: %w", err)
	}
	// strace ends by the signal that it was given: its exit status tells nothing.
	if err := m.cmd.Wait(); err != nil && m.cmd.ProcessState == nil {
		return fmt.Errorf("strace: %w", err)
	}
	f, err := os.Open(m.output)
	if err != nil {
		return err
	}
	defer f.Close()
	return read(f)
}

var (
	straceUnfinished = regexp.MustCompile(`^(\d+)\s+(\w+\(.*) <unfinished \.\.\.>$`)
	straceResumed    = regexp.MustCompile(`^(\d+)\s+<\.\.\. (\w+) resumed>(.*)$`)
	straceCall       = regexp.MustCompile(`^(?:\d+\s+)?(\w+)\(.*\)\s+= (-?\d+)`)
)

// eachCall reports the calls of a record that have returned: their kind, their result, and the line that
// shows what they were given.
func eachCall(r io.Reader, calls map[string]int, fn func(kind int, result int64, line string)) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	unfinished := map[string]string{} // by thread
	for lines.Scan() {
		line := lines.Text()
		if m := straceUnfinished.FindStringSubmatch(line); m != nil {
			unfinished[m[1]] = m[2]
			continue
		}
		if m := straceResumed.FindStringSubmatch(line); m != nil {
			begin := unfinished[m[1]]
			if begin == "" {
				begin = m[2] + "(" // it began before the record did
			}
			line = begin + m[3]
			delete(unfinished, m[1])
		}
		m := straceCall.FindStringSubmatch(line)
		if m == nil {
			continue // a signal, an exit
		}
		kind, known := calls[m[1]]
		if !known {
			continue
		}
		if kind < 0 {
			return fmt.Errorf("the process uses %s: its writes cannot be counted", m[1])
		}
		result, err := strconv.ParseInt(m[2], 10, 64)
		if err != nil {
			return fmt.Errorf("strace: %q: %w", line, err)
		}
		fn(kind, result, line)
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("strace: unreadable output: %w", err)
	}
	return nil
}

// parseStrace adds up the calls that strace saw.
func parseStrace(r io.Reader) (Cost, error) {
	var n [numCounts]int64
	err := eachCall(r, tracedCalls, func(kind int, result int64, _ string) {
		n[kind]++
		if kind == writeCalls && result > 0 {
			n[bytesWritten] += result
		}
	})
	if err != nil {
		return Cost{}, err
	}
	return Cost{WriteCalls: &n[writeCalls], BytesWritten: &n[bytesWritten], Syncs: &n[syncs], OtherChanges: &n[otherChanges]}, nil
}
