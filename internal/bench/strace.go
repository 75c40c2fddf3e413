package bench

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
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
type straceMeter struct {
	pid    int
	cmd    *exec.Cmd
	dir    string
	output string
	stderr *bytes.Buffer
}

// StraceMeter counts what a process of this machine writes and how often it syncs. It needs the program
// strace and the right to trace the process.
func StraceMeter(pid int) Meter { return &straceMeter{pid: pid} }

func (m *straceMeter) Start() (err error) {
	if m.dir, err = os.MkdirTemp("", "platter-strace-"); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(m.dir)
		}
	}()
	m.output = filepath.Join(m.dir, "calls")
	var names []string
	for name := range tracedCalls {
		names = append(names, name)
	}
	m.cmd = exec.Command("strace", "-f", "-s", "0", "-o", m.output, "-e", "trace="+strings.Join(names, ","),
		"-p", strconv.Itoa(m.pid))
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

func (m *straceMeter) Stop() (Cost, error) {
	defer os.RemoveAll(m.dir)
	if err := m.cmd.Process.Signal(os.Interrupt); err != nil {
		return Cost{}, fmt.Errorf("strace: %w", err)
	}
	// strace ends by the signal that it was given: its exit status tells nothing.
	if err := m.cmd.Wait(); err != nil && m.cmd.ProcessState == nil {
		return Cost{}, fmt.Errorf("strace: %w", err)
	}
	f, err := os.Open(m.output)
	if err != nil {
		return Cost{}, err
	}
	defer f.Close()
	return parseStrace(f)
}

// straceCall matches a call that has returned: on one line, or where it was resumed.
var straceCall = regexp.MustCompile(`^(?:\d+\s+)?(?:<\.\.\. )?(\w+)(?:\(| resumed>).*\)\s+= (-?\d+)`)

// parseStrace adds up the calls that strace saw.
func parseStrace(r io.Reader) (Cost, error) {
	var n [numCounts]int64
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		m := straceCall.FindStringSubmatch(lines.Text())
		if m == nil {
			continue // a signal, an exit, a call that has not returned
		}
		kind, known := tracedCalls[m[1]]
		if !known {
			continue
		}
		if kind < 0 {
			return Cost{}, fmt.Errorf("the process uses %s: its writes cannot be counted", m[1])
		}
		result, err := strconv.ParseInt(m[2], 10, 64)
		if err != nil {
			return Cost{}, fmt.Errorf("strace: %q: %w", lines.Text(), err)
		}
		n[kind]++
		if kind == writeCalls && result > 0 {
			n[bytesWritten] += result
		}
	}
	if err := lines.Err(); err != nil {
		return Cost{}, errors.Join(errors.New("strace: unreadable output"), err)
	}
	return Cost{WriteCalls: &n[writeCalls], BytesWritten: &n[bytesWritten], Syncs: &n[syncs], OtherChanges: &n[otherChanges]}, nil
}
