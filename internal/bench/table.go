package bench

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// table is rows of cells under a title; the first row is the header.
type table struct {
	title string
	rows  [][]string
}

// writeColumns prints tables as aligned columns.
func writeColumns(w io.Writer, tables []table) error {
	for i, t := range tables {
		if i > 0 {
			fmt.Fprintln(w)
		}
		fmt.Fprintf(w, "%s:\n", t.title)
		tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		for _, row := range t.rows {
			fmt.Fprintln(tw, strings.Join(row, "\t"))
		}
		if err := tw.Flush(); err != nil {
			return err
		}
	}
	return nil
}

// writeMarkdown prints tables for documents.
func writeMarkdown(w io.Writer, tables []table) error {
	var b strings.Builder
	for i, t := range tables {
		if i > 0 {
			b.WriteString("\n")
		}
		fmt.Fprintf(&b, "%s:\n\n", t.title)
		for k, row := range t.rows {
			fmt.Fprintf(&b, "| %s |\n", strings.Join(row, " | "))
			if k == 0 {
				fmt.Fprintf(&b, "|%s\n", strings.Repeat("---|", len(row)))
			}
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}
