package bench

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"time"
)

// userHz is the unit of CPU time in /proc: USER_HZ, 100 on every architecture Linux runs Go on (proc(5)).
const userHz = 100

// processMeter measures another process by what /proc tells about it.
type processMeter struct {
	pid    int
	before time.Duration
}

// ProcessMeter measures the CPU time and the memory of a process of this machine.
func ProcessMeter(pid int) (Meter, error) {
	m := &processMeter{pid: pid}
	_, err := m.cpu()
	return m, err
}

func (m *processMeter) Start() error {
	var err error
	m.before, err = m.cpu()
	return err
}

func (m *processMeter) Stop() (Cost, error) {
	now, err := m.cpu()
	if err != nil {
		return Cost{}, err
	}
	peak, err := m.memoryPeak()
	if err != nil {
		return Cost{}, err
	}
	cpu := now - m.before
	return Cost{CPU: &cpu, MemoryPeak: &peak}, nil
}

// cpu is the time all threads of the process have spent on CPUs, those that ended included.
func (m *processMeter) cpu() (time.Duration, error) {
	name := fmt.Sprintf("/proc/%d/stat", m.pid)
	b, err := os.ReadFile(name)
	if err != nil {
		return 0, err
	}
	// The second field is the program's name in parentheses and may itself hold anything.
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	const utime, stime = 14 - 3, 15 - 3 // proc(5) counts from 1; the first field after the name is number 3
	if len(fields) <= stime {
		return 0, fmt.Errorf("%s: %d fields after the name, expected more than %d", name, len(fields), stime)
	}
	var ticks int64
	for _, f := range [][]byte{fields[utime], fields[stime]} {
		n, err := strconv.ParseInt(string(f), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", name, err)
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / userHz, nil
}

// memoryPeak is the largest resident memory so far, in bytes.
func (m *processMeter) memoryPeak() (int64, error) {
	name := fmt.Sprintf("/proc/%d/status", m.pid)
	b, err := os.ReadFile(name)
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(b) {
		if rest, ok := bytes.CutPrefix(line, []byte("VmHWM:")); ok {
			kib, err := strconv.ParseInt(string(bytes.Fields(rest)[0]), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("%s: VmHWM: %w", name, err)
			}
			return kib << 10, nil
		}
	}
	return 0, fmt.Errorf("%s: no VmHWM", name)
}
