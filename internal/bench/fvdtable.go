package bench

import (
	"fmt"
	"io"
	"strings"
)

// Write prints the report as aligned columns.
func (r *FVDReport) Write(w io.Writer) error { return writeColumns(w, r.tables()) }

// WriteMarkdown prints the report for documents.
func (r *FVDReport) WriteMarkdown(w io.Writer) error { return writeMarkdown(w, r.tables()) }

func (r *FVDReport) tables() (all []table) {
	if r.Files != nil {
		all = append(all, r.Files.tables()...)
	}
	if r.Boot != nil {
		all = append(all, r.Boot.table())
	}
	if r.Load != nil {
		all = append(all, r.Load.table())
	}
	if r.Clones != nil {
		all = append(all, r.Clones.table())
	}
	return all
}

// megabytes prints a number of bytes.
func megabytes(n float64) string { return fmt.Sprintf("%.1f", n/1e6) }

// tables are one for the storage as it is, and one for each slower kind.
func (r *FilesReport) tables() (all []table) {
	for _, x := range r.Results {
		title := fmt.Sprintf("small files in a guest's ext4, created with an fsync each; a write of 4 KiB and fdatasync take %.2f ms", r.Storage)
		if x.Barrier > 0 {
			title = fmt.Sprintf("the same, each fdatasync %g ms longer", x.Barrier)
		}
		if len(all) == 0 || all[len(all)-1].title != title {
			all = append(all, table{title: title, rows: [][]string{{"disk", "created/s", "ratio", "transactions/s",
				"one sync: created/s", "ratio", "fdatasyncs/file", "writes/file", "KiB/file", "server CPU µs/file"}}})
		}
		t := &all[len(all)-1]
		t.rows = append(t.rows, []string{x.Disk, fmt.Sprintf("%.0f", x.Created), fmt.Sprintf("%.2f", x.Ratio),
			fmt.Sprintf("%.0f", x.Transactions), fmt.Sprintf("%.0f", x.Batch), fmt.Sprintf("%.2f", x.BatchRatio), fmt.Sprintf("%.2f", x.Syncs), fmt.Sprintf("%.2f", x.Writes),
			fmt.Sprintf("%.1f", x.Bytes/1024), fmt.Sprintf("%.0f", x.CPU)})
	}
	return all
}

func (r *BootReport) table() table {
	t := table{
		title: fmt.Sprintf("a start of %d requests that reads %s MB of a base image, over a link of %s and %s MB/s",
			r.Requests, megabytes(float64(r.Touched)), r.Link.Delay, megabytes(float64(r.Link.Rate))),
		rows: [][]string{{"", "seconds", "time, base image alone = 1", "MB read from the base image"}},
	}
	for _, x := range r.Runs {
		t.rows = append(t.rows, []string{x.How, each(x.Seconds, func(s float64) string { return fmt.Sprintf("%.1f", s) }),
			fmt.Sprintf("%.2f", x.Ratio), each(x.Base, func(n int64) string { return megabytes(float64(n)) })})
	}
	return t
}

func (r *LoadReport) table() table {
	t := table{
		title: fmt.Sprintf("a guest at work while its disk is prefetched over a link of %s and %s MB/s", r.Link.Delay, megabytes(float64(r.Link.Rate))),
		rows:  [][]string{{"guest", "prefetching", "guest without it, MB/s", "with it", "lost", "prefetched, MB/s", "pauses"}},
	}
	for _, x := range r.Runs {
		t.rows = append(t.rows, []string{x.Work, x.How, megabytes(median(x.Without)), megabytes(median(x.With)), fmt.Sprintf("%.1f ± %.1f %%", x.Lost*100, x.Error*100),
			fmt.Sprintf("%.2f", x.Prefetched/1e6), fmt.Sprint(x.Pauses)})
	}
	return t
}

func (r *ClonesReport) table() table {
	t := table{
		title: fmt.Sprintf("%d machines that start from one base image at the same time and touch %s MB of it together",
			r.Clones, megabytes(float64(r.Touched))),
		rows: [][]string{{"block size", "MB in the blocks they touch", "MB read from the base image", "ratio to what they touch", "MB read again by a second start"}},
	}
	for _, x := range r.Runs {
		t.rows = append(t.rows, []string{fmt.Sprintf("%d KiB", x.Block>>10), megabytes(float64(x.Needed)), megabytes(float64(x.First)),
			fmt.Sprintf("%.3f", x.Ratio), megabytes(float64(x.Second))})
	}
	return t
}

// each prints the values of all rounds.
func each[T any](values []T, form func(T) string) string {
	var s []string
	for _, v := range values {
		s = append(s, form(v))
	}
	return strings.Join(s, ", ")
}
