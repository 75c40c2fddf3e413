package bench

import (
	"bytes"
	"fmt"
	"html"
	"io"
	"math"
	"slices"
)

// plot is a diagram of quantities over time, written as SVG.
type plot struct {
	title   string
	x, y    string // what the axes show
	end     float64
	series  []series
	bands   []band
	caption string // of the bands
}

// series is a line of a plot. Points follow each other from left to right; the line breaks where y is negative.
type series struct {
	name   string
	color  string
	dashed bool
	points []point
}

type point struct{ x, y float64 }

// band is a part of the time that stands out.
type band struct{ from, to float64 }

// Layout, in SVG's units.
const (
	plotWidth, plotHeight               = 960, 400
	plotLeft, plotRight                 = 60, 20
	plotTop, plotBottom                 = 70, 50
	bandColor, gridColor, plotTextColor = "#fbe3c0", "#dddddd", "#333333"
)

// write writes the plot.
func (p *plot) write(w io.Writer) error {
	var top float64
	for _, s := range p.series {
		for _, q := range s.points {
			top = max(top, q.y)
		}
	}
	yStep, xStep := tick(top), tick(p.end)
	top = math.Ceil(top/yStep) * yStep
	x := func(v float64) float64 { return plotLeft + v/p.end*(plotWidth-plotLeft-plotRight) }
	y := func(v float64) float64 { return plotHeight - plotBottom - v/top*(plotHeight-plotTop-plotBottom) }

	var b bytes.Buffer
	text := func(at, down float64, anchor, s string) {
		fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" text-anchor="%s" fill="%s">%s</text>`+"\n", at, down, anchor, plotTextColor, html.EscapeString(s))
	}
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="13">`+"\n", plotWidth, plotHeight)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="white"/>`+"\n", plotWidth, plotHeight)
	text(plotLeft, 22, "start", p.title)
	for _, d := range p.bands {
		from, to := x(max(d.from, 0)), x(min(d.to, p.end))
		fmt.Fprintf(&b, `<rect x="%.1f" y="%d" width="%.1f" height="%d" fill="%s"/>`+"\n", from, plotTop, max(to-from, 0), plotHeight-plotTop-plotBottom, bandColor)
	}
	for v := 0.0; v <= top+yStep/2; v += yStep {
		fmt.Fprintf(&b, `<line x1="%d" y1="%.1f" x2="%d" y2="%.1f" stroke="%s"/>`+"\n", plotLeft, y(v), plotWidth-plotRight, y(v), gridColor)
		text(plotLeft-8, y(v)+4, "end", fmt.Sprintf("%g", v))
	}
	for v := 0.0; v <= p.end; v += xStep {
		text(x(v), plotHeight-plotBottom+18, "middle", fmt.Sprintf("%g", v))
	}
	text((plotLeft+plotWidth-plotRight)/2, plotHeight-10, "middle", p.x)
	text(plotLeft-8, plotTop-10, "end", p.y)
	legend := float64(plotLeft)
	entry := func(name, mark string) {
		fmt.Fprintf(&b, `<g transform="translate(%.1f 38)">%s</g>`+"\n", legend, mark)
		text(legend+28, 43, "start", name)
		legend += 44 + 7*float64(len(name))
	}
	for _, s := range p.series {
		style := fmt.Sprintf(`fill="none" stroke="%s" stroke-width="2"`, s.color)
		if s.dashed {
			style += ` stroke-dasharray="6 4"`
		}
		entry(s.name, fmt.Sprintf(`<line x1="0" y1="0" x2="22" y2="0" %s/>`, style))
		for rest := s.points; len(rest) > 0; {
			n := slices.IndexFunc(rest, func(q point) bool { return q.y < 0 })
			if n < 0 {
				n = len(rest)
			}
			if n > 0 {
				fmt.Fprintf(&b, `<polyline %s points="`, style)
				for _, q := range rest[:n] {
					fmt.Fprintf(&b, "%.1f,%.1f ", x(min(q.x, p.end)), y(q.y))
				}
				b.WriteString("\"/>\n")
			}
			rest = rest[min(n+1, len(rest)):]
		}
	}
	if p.caption != "" {
		entry(p.caption, fmt.Sprintf(`<rect x="0" y="-7" width="22" height="14" fill="%s"/>`, bandColor))
	}
	b.WriteString("</svg>\n")
	_, err := w.Write(b.Bytes())
	return err
}

// tick is a distance of marks that divides an axis into about eight parts.
func tick(length float64) float64 {
	if length <= 0 {
		return 1
	}
	unit := math.Pow(10, math.Floor(math.Log10(length/8)))
	for _, m := range []float64{1, 2, 5} {
		if length/(m*unit) <= 10 {
			return m * unit
		}
	}
	return 10 * unit
}
