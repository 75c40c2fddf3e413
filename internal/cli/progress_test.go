package cli

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestPercentMeter(t *testing.T) {
	for _, tt := range []struct {
		name  string
		steps []int64
		total int64
		want  string
	}{
		{"steps of less than a percent are not shown", []int64{0, 4, 5, 10, 1000}, 1000,
			"    (0.00/100%)\r    (1.00/100%)\r    (100.00/100%)\r\n"},
		{"the end is shown once", []int64{0, 1000, 1000}, 1000, "    (0.00/100%)\r    (100.00/100%)\r\n"},
		{"nothing to do", []int64{0}, 0, "    (0.00/100%)\r    (100.00/100%)\r\n"},
	} {
		var out bytes.Buffer
		m := &percentMeter{out: &out, shown: -1}
		for _, done := range tt.steps {
			m.update(done, tt.total)
		}
		m.end()
		if out.String() != tt.want {
			t.Errorf("%s: %q, expected %q", tt.name, out.String(), tt.want)
		}
	}
}

func TestJSONMeter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		m := &jsonMeter{out: json.NewEncoder(&out), job: "convert", start: time.Now()}
		for done := int64(0); done <= 1000; done++ {
			m.update(done, 1000)
		}
		m.end()
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		if len(lines) != 2 {
			t.Fatalf("%d lines for a job that takes no time:\n%s", len(lines), out.String())
		}
		var last progressLine
		if err := json.Unmarshal([]byte(lines[len(lines)-1]), &last); err != nil {
			t.Fatal(err)
		}
		last.Seconds = 0
		if want := (progressLine{Job: "convert", Done: 1000, Total: 1000, Percent: 100}); last != want {
			t.Errorf("the last line is %+v, expected %+v", last, want)
		}
	})
}

func TestBarMeter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		quick := &barMeter{out: &out, job: "convert", start: time.Now()}
		quick.update(0, 100)
		quick.update(100, 100)
		quick.end()
		if out.Len() > 0 {
			t.Errorf("a quick job shows %q", out.String())
		}
		long := &barMeter{out: &out, job: "convert", start: time.Now().Add(-2 * barDelay)}
		long.update(0, 0)
		long.update(10<<20, 100<<20)
		if s := out.String(); !strings.Contains(s, "convert") || !strings.Contains(s, "10%") {
			t.Errorf("a long job shows %q", s)
		}
		long.end()
	})
}
