package bench

import (
	"runtime"
	"time"
)

// Meter is what a run is charged to.
type Meter interface {
	Start() error
	Stop() (Cost, error) // since Start
}

// selfMeter measures this process, and what an engine in it does to its files.
type selfMeter struct {
	counts *counts

	before  [numCounts]int64
	mallocs uint64
	cpu     time.Duration
}

func (m *selfMeter) Start() error {
	m.before = m.counts.read()
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	m.mallocs = mem.Mallocs
	var err error
	m.cpu, err = selfCPU()
	return err
}

func (m *selfMeter) Stop() (Cost, error) {
	cpu, err := selfCPU()
	cpu -= m.cpu
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	mallocs := int64(mem.Mallocs - m.mallocs)
	now := m.counts.read()
	for i := range now {
		now[i] -= m.before[i]
	}
	return Cost{
		CPU:          &cpu,
		Allocations:  &mallocs,
		WriteCalls:   &now[writeCalls],
		BytesWritten: &now[bytesWritten],
		Syncs:        &now[syncs],
		OtherChanges: &now[otherChanges],
	}, err
}
