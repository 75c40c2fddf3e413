package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"
)

// The forms of --progress.
const (
	progressAuto    = "auto"
	progressPercent = "percent"
	progressJSON    = "json"
	progressNone    = "none"
)

const (
	barDelay     = time.Second            // work that is done sooner shows no bar
	barInterval  = 100 * time.Millisecond // how often a bar changes
	jsonInterval = 250 * time.Millisecond // how often a JSON line is printed
)

// progressFlags are -p, --progress and -q of commands that work for long.
type progressFlags struct {
	form  string
	quiet bool
}

func (f *progressFlags) register(fs *pflag.FlagSet) {
	fs.StringVarP(&f.form, "progress", "p", progressAuto,
		"show progress in this `FORM`: percent as qemu-img does (-p alone),\njson for programs (lines on standard error), none, or auto:\na bar on a terminal")
	fs.Lookup("progress").NoOptDefVal = progressPercent
	fs.BoolVarP(&f.quiet, "quiet", "q", false, "print nothing but errors")
}

func (f *progressFlags) check(cmd *cobra.Command) error {
	switch f.form {
	case progressAuto, progressPercent, progressJSON, progressNone:
		return nil
	default:
		return usagef(cmd, "--progress must be used with auto, percent, json or none as argument.")
	}
}

// meter shows how far a job is. Its methods are called one at a time.
type meter interface {
	update(done, total int64)
	// end is called once, after the last update, whether or not the job succeeded.
	end()
}

// meter returns what the flags ask for, nil for nothing.
func (f *progressFlags) meter(cmd *cobra.Command, job string) meter {
	stderr := cmd.ErrOrStderr()
	switch {
	case f.quiet || f.form == progressNone:
		return nil
	case f.form == progressPercent:
		return &percentMeter{out: cmd.OutOrStdout(), shown: -1}
	case f.form == progressJSON:
		return &jsonMeter{out: json.NewEncoder(stderr), job: job, start: time.Now()}
	}
	if file, ok := stderr.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
		return &barMeter{out: stderr, job: job, start: time.Now()}
	}
	return nil
}

// updater returns the progress callback for a meter that may be nil.
func updater(m meter) func(done, total int64) {
	if m == nil {
		return nil
	}
	return m.update
}

func percentOf(done, total int64) float64 {
	if total == 0 {
		return 100
	}
	return float64(done) / float64(total) * 100
}

// percentMeter prints "    (12.34/100%)" over and over on one line, as qemu-img -p does.
type percentMeter struct {
	out   io.Writer
	shown float64
}

func (m *percentMeter) update(done, total int64) {
	p := percentOf(done, total)
	if m.shown < 0 && p > 0 {
		m.print(0)
	}
	if p >= m.shown+1 || (p == 100 && m.shown < 100) {
		m.print(p)
	}
}

func (m *percentMeter) print(p float64) {
	m.shown = p
	fmt.Fprintf(m.out, "    (%3.2f/100%%)\r", p)
}

func (m *percentMeter) end() { fmt.Fprintln(m.out) }

// jsonMeter prints a JSON object a line.
type jsonMeter struct {
	out   *json.Encoder
	job   string
	start time.Time
	last  time.Time
}

// progressLine is what --progress=json prints.
type progressLine struct {
	Job     string  `json:"job"`
	Done    int64   `json:"done"`  // bytes
	Total   int64   `json:"total"` // bytes
	Percent float64 `json:"percent"`
	Seconds float64 `json:"seconds"` // since the job began
}

func (m *jsonMeter) update(done, total int64) {
	now := time.Now()
	if done < total && now.Sub(m.last) < jsonInterval {
		return
	}
	m.last = now
	seconds := now.Sub(m.start).Round(time.Millisecond).Seconds()
	// A program that closed its end of the pipe no longer wants to know.
	_ = m.out.Encode(progressLine{m.job, done, total, percentOf(done, total), seconds})
}

func (m *jsonMeter) end() {}

// barMeter shows a bar on a terminal once the work has taken a while.
type barMeter struct {
	out   io.Writer
	job   string
	start time.Time
	bar   *progressbar.ProgressBar
}

func (m *barMeter) update(done, total int64) {
	if total == 0 {
		return
	}
	if m.bar == nil {
		if time.Since(m.start) < barDelay {
			return
		}
		m.bar = progressbar.NewOptions64(total,
			progressbar.OptionSetWriter(m.out),
			progressbar.OptionSetDescription(m.job),
			progressbar.OptionSetWidth(32),
			progressbar.OptionShowBytes(true),
			progressbar.OptionUseIECUnits(true),
			progressbar.OptionThrottle(barInterval),
			progressbar.OptionClearOnFinish(),
		)
	}
	// The bar is for the eye: a terminal that cannot be written changes nothing about the job.
	_ = m.bar.Set64(done)
}

func (m *barMeter) end() {
	if m.bar != nil {
		_ = m.bar.Clear()
	}
}
