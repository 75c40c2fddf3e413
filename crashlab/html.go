package crashlab

import (
	"html/template"
	"io"
)

// WriteHTML writes the report as one self-contained page, with a timeline for each crash of each violation:
// a row an operation, a line a barrier, colours for what survived.
func (r *Report) WriteHTML(w io.Writer) error {
	page, err := template.New("report").Funcs(template.FuncMap{
		"class": fateClass,
		"last":  func(s SectorRun) int64 { return s.First + s.Count - 1 },
		"inc":   func(i int) int { return i + 1 },
	}).Parse(reportPage)
	if err != nil {
		return err
	}
	return page.Execute(w, r)
}

// fateClass is the style class of a fate.
func fateClass(f Fate) string {
	if f == FateCutOff {
		return "cut"
	}
	return string(f)
}

const reportPage = `<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>crash lab: {{.Scenario}}</title>
<style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
table { border-collapse: collapse; margin: .5em 0 1.5em }
th { text-align: left; border-bottom: 2px solid #999 }
td, th { padding: 2px 8px; vertical-align: top }
code, td.n { font-family: ui-monospace, monospace; font-size: 12px }
td.n { text-align: right }
tr.barrier td { border-top: 3px double #333; color: #333; font-weight: 600 }
tr.sync td { color: #777 }
tr.guest td { color: #06c }
tr.crash td { border-top: 3px solid #b00; color: #b00; font-weight: 600 }
.f { padding: 0 6px; border-radius: 3px; white-space: nowrap }
.durable { background: #ddd } .kept { background: #b7e4b0 } .lost { background: #f4b0b0 }
.torn { background: #fbdc8c } .replaced { background: #d9ecd5 } .poisoned { background: #d7b3e8 }
.cut { background: #f9d3d3 } .immaterial { background: #f2f2f2 }
.bad { color: #b00 } .good { color: #070 }
pre { background: #f7f7f7; padding: 1em; overflow: auto }
</style></head><body>
<h1>{{.Scenario}}</h1>
<p>Explored <b>{{.Explored}}</b> of <b>{{.Possible}}</b> crash states, seed {{.Seed}}.
{{if .Violations}}<b class="bad">{{len .Violations}} violations.</b>{{else}}<b class="good">No violations.</b>{{end}}
Recorded: {{.Operations}} operations, {{.Barriers}} of them barriers.</p>
<table><tr><th>model<th>states<th>of<th>points<th>explored exhaustively</tr>
{{range .Models}}<tr><td>{{.Model}}<td class="n">{{.Explored}}<td class="n">{{.Possible}}<td class="n">{{.Points}}<td class="n">{{.Exhaustive}}</tr>
{{end}}</table>
<table><tr><th>phase<th>states<th>of</tr>
{{range .Phases}}<tr><td>{{.Phase}}<td class="n">{{.Explored}}<td class="n">{{.Possible}}</tr>
{{end}}</table>
{{range $i, $v := .Violations}}<h2>Violation {{inc $i}}: <span class="bad">{{$v.Stage}}</span></h2>
<p class="bad">{{$v.Message}}</p>
{{range $k, $c := $v.Path}}<h3>Crash {{inc $k}}, phase {{$c.Phase}}</h3>
<p>{{$c.Summary}}.{{if $c.Omitted}} The first {{$c.Omitted}} events are left out.{{end}}</p>
<table><tr><th>event<th>file<th>operation<th>range<th>fate<th>sectors<th>issued by</tr>
{{range $c.Timeline}}{{if eq .Kind "guest"}}<tr class="guest"><td class="n">{{.Event}}<td colspan="6">{{.Text}}</tr>
{{else if eq .Kind "barrier"}}<tr class="barrier"><td class="n">{{.Event}}<td>{{.File}}<td colspan="4">barrier complete<td><code>{{.Site}}</code></tr>
{{else if eq .Kind "sync"}}<tr class="sync"><td class="n">{{.Event}}<td>{{.File}}<td colspan="4">barrier begins{{if not .Ended}} (in flight){{end}}<td><code>{{.Site}}</code></tr>
{{else}}<tr><td class="n">{{.Event}}<td>{{.File}}<td>{{.Kind}}{{if not .Ended}} (in flight){{end}}<td class="n">{{if eq .Kind "truncate"}}to {{.Offset}}{{else}}{{.Offset}} +{{.Length}}{{end}}
<td><span class="f {{class .Fate}}">{{.Fate}}</span>{{with .Size}} <span class="f {{class .Fate}}">size {{.Size}}</span>{{end}}
<td>{{range .Sectors}}<span class="f {{class .Fate}}" title="{{.Fate}}">{{.First}}{{if gt .Count 1}}–{{last .}}{{end}}</span> {{end}}<td><code>{{.Site}}</code></tr>
{{end}}{{end}}<tr class="crash"><td><td colspan="6">crash</tr>
</table>
{{end}}{{if $v.Stack}}<pre>{{$v.Stack}}</pre>{{end}}
{{end}}<h2>Crashed at</h2>
<table><tr><th>place in the source<th>operations in the work<th>crashes</tr>
{{range .Sites}}<tr><td><code>{{.Site}}</code><td class="n">{{.Operations}}<td class="n">{{.Crashes}}</tr>
{{end}}</table>
</body></html>
`
