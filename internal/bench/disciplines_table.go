package bench

import (
	"fmt"
	"io"
	"slices"
)

// DisciplineReport is everything that was measured.
type DisciplineReport struct {
	Operations []DisciplineResult `json:"operations"`
	Recovery   []RecoveryResult   `json:"recovery,omitempty"`
}

func (r *DisciplineReport) tables() []table {
	kib := func(n float64) string { return fmt.Sprintf("%.1f", n/1024) }
	all := []table{
		r.operations("fdatasyncs an operation", func(d DisciplineResult) string { return fmt.Sprintf("%.2f", d.Syncs) }),
		r.operations("write calls an operation", func(d DisciplineResult) string { return fmt.Sprintf("%.2f", d.Writes) }),
		r.operations("KiB of metadata written an operation", func(d DisciplineResult) string { return kib(d.Metadata) }),
		r.operations("KiB of data copied an operation", func(d DisciplineResult) string { return kib(d.Copied) }),
	}
	if len(r.Recovery) > 0 {
		all = append(all, r.recovery())
	}
	return all
}

// operations is a table of one measure: a row for each case, a column for each discipline.
func (r *DisciplineReport) operations(title string, value func(DisciplineResult) string) table {
	var cases, disciplines []string
	cells := map[[2]string]string{}
	for _, d := range r.Operations {
		if !slices.Contains(cases, d.Title) {
			cases = append(cases, d.Title)
		}
		if !slices.Contains(disciplines, d.Discipline) {
			disciplines = append(disciplines, d.Discipline)
		}
		cells[[2]string{d.Title, d.Discipline}] = value(d)
	}
	t := table{title: title, rows: [][]string{append([]string{"operation"}, disciplines...)}}
	for _, c := range cases {
		row := []string{c}
		for _, d := range disciplines {
			v, measured := cells[[2]string{c, d}]
			if !measured {
				v = "-"
			}
			row = append(row, v)
		}
		t.rows = append(t.rows, row)
	}
	return t
}

// recovery gives times as multiples of the journal's at the same size: only ratios of one run mean anything.
func (r *DisciplineReport) recovery() table {
	t := table{title: "recovery after a crash", rows: [][]string{{
		"mapped", "discipline", "recovered by", "reads", "KiB read", "writes", "KiB written", "fdatasyncs",
		"leaked clusters left", "time, journal = 1",
	}}}
	unit := map[int64]float64{}
	for _, x := range r.Recovery {
		if x.Discipline == "journal" {
			unit[x.Mapped] = x.Seconds
		}
	}
	for _, x := range r.Recovery {
		t.rows = append(t.rows, []string{
			mapped(x.Mapped), x.Discipline, x.By, fmt.Sprint(x.Reads), fmt.Sprintf("%.0f", float64(x.BytesRead)/1024),
			fmt.Sprint(x.Writes), fmt.Sprintf("%.0f", float64(x.BytesWritten)/1024), fmt.Sprint(x.Syncs), fmt.Sprint(x.Leaked),
			fmt.Sprintf("%.2f", x.Seconds/unit[x.Mapped]),
		})
	}
	return t
}

// mapped prints a size in the largest unit that it is a multiple of.
func mapped(n int64) string {
	for _, u := range []struct {
		shift int
		name  string
	}{{40, "TiB"}, {30, "GiB"}, {20, "MiB"}} {
		if n&(1<<u.shift-1) == 0 {
			return fmt.Sprintf("%d %s", n>>u.shift, u.name)
		}
	}
	return fmt.Sprintf("%d bytes", n)
}

// Write prints the report as aligned columns.
func (r *DisciplineReport) Write(w io.Writer) error { return writeColumns(w, r.tables()) }

// WriteMarkdown prints the report for documents.
func (r *DisciplineReport) WriteMarkdown(w io.Writer) error { return writeMarkdown(w, r.tables()) }
