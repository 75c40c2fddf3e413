package prefetch

import "time"

// meter averages the throughput of one kind of operation (FVD specification 2.4): bytes and time add up until a
// measuring period is full; its throughput then moves the average, which keeps alpha of its old value.
type meter struct {
	period time.Duration
	alpha  float64

	bytes   int64
	busy    time.Duration
	average float64 // bytes a second; negative: not measured yet
}

func newMeter(period time.Duration, alphaPercent int) meter {
	return meter{period: period, alpha: float64(alphaPercent) / 100, average: -1}
}

// add notes an operation; sampled says that the average has just moved.
func (m *meter) add(bytes int64, took time.Duration) (sampled bool) {
	m.bytes += bytes
	m.busy += took
	if m.busy <= m.period {
		return false
	}
	sample := float64(m.bytes) / m.busy.Seconds()
	if m.average < 0 {
		m.average = sample
	} else {
		m.average = m.alpha*m.average + (1-m.alpha)*sample
	}
	m.bytes, m.busy = 0, 0
	return true
}

// reset forgets everything.
func (m *meter) reset() { m.bytes, m.busy, m.average = 0, 0, -1 }

// verdict is what an average that moved asks for.
type verdict uint8

const (
	carryOn verdict = iota
	pause
)

// judge compares the average with the least that is acceptable, in bytes a second. Below it a fair coin decides
// between a pause and measuring anew: not everyone who suffers from the same congestion shall stop.
func (m *meter) judge(least float64, coin func() bool) verdict {
	if m.average >= least {
		return carryOn
	}
	if coin() {
		return pause
	}
	m.reset()
	return carryOn
}

// pacer keeps a stream of operations below a rate.
type pacer struct {
	rate float64   // bytes a second; 0: no limit
	next time.Time // when the next operation may begin
}

// reserve admits an operation of that many bytes and returns how long it must wait before it begins. Time that was
// not used is not saved up.
func (p *pacer) reserve(now time.Time, bytes int64) (wait time.Duration) {
	if p.rate <= 0 {
		return 0
	}
	if p.next.Before(now) {
		p.next = now
	}
	wait = p.next.Sub(now)
	p.next = p.next.Add(time.Duration(float64(bytes) / p.rate * float64(time.Second)))
	return wait
}
