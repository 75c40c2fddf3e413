package crashlab

import (
	"fmt"
	"strings"
)

// Fate is what a crash made of an operation, or of a part of one.
type Fate string

// The fates.
const (
	FateDurable    Fate = "durable"    // covered by a completed barrier
	FateKept       Fate = "kept"       // survived though nothing had made it durable
	FateLost       Fate = "lost"       //
	FateTorn       Fate = "torn"       // survived in part
	FateReplaced   Fate = "replaced"   // something later survived in the same place
	FatePoisoned   Fate = "poisoned"   // the place survived without contents, or was lost while being written
	FateCutOff     Fate = "cut off"    // beyond the size that survived
	FateImmaterial Fate = "immaterial" // whether it survived makes no difference
)

// Crash is one crash state: where in the history, and what survived.
type Crash struct {
	Phase    Phase  `json:"phase"` // what was interrupted
	Model    string `json:"model"`
	Event    int    `json:"event"` // the crash came after this event of the history; -1: before the first
	Kept     int    `json:"kept"`  // operations not yet durable that survived
	Torn     int    `json:"torn"`  // ... in part
	Lost     int    `json:"lost"`  // ... not
	Timeline []Row  `json:"timeline"`
	Omitted  int    `json:"omitted"` // earlier events that the timeline leaves out
}

// Row is a line of a timeline: an operation, a completed barrier, or a mark.
type Row struct {
	Event   int         `json:"event"`
	File    string      `json:"file,omitempty"`
	Kind    string      `json:"kind"`   // an operation of storage.File, or "guest"
	Offset  int64       `json:"offset"` // bytes
	Length  int64       `json:"length"` // bytes
	Site    *Site       `json:"site,omitempty"`
	Text    string      `json:"text,omitempty"`  // of a mark
	Ended   bool        `json:"ended,omitempty"` // it had returned before the crash
	Fate    Fate        `json:"fate,omitempty"`
	Size    *SizeFate   `json:"size,omitempty"`    // where it changed the size of the file
	Sectors []SectorRun `json:"sectors,omitempty"` // where its parts have different fates
}

// SizeFate is the size an operation gave to its file, and whether that survived.
type SizeFate struct {
	Size int64 `json:"size"`
	Fate Fate  `json:"fate"`
}

// SectorRun is a run of sectors of the file with one fate.
type SectorRun struct {
	First int64 `json:"first"`
	Count int64 `json:"count"`
	Fate  Fate  `json:"fate"`
}

// maxTimeline bounds the rows of a timeline; the latest are kept.
const maxTimeline = 400

// lead is how many events before the oldest uncertain operation a timeline begins.
const lead = 12

// describe returns the description of a state.
func describe(p Phase, st *State) Crash {
	at := st.space.at.event
	c := Crash{Phase: p, Model: st.space.model.String(), Event: at, Timeline: []Row{}}
	from := at
	if ops := st.space.uncertain(); len(ops) > 0 {
		from = ops[0].begin
	}
	from = max(from-lead, at-maxTimeline, 0)
	c.Omitted = from
	bound := durableBefore(st.h, at)
	for i, e := range st.h.events[from : at+1] {
		if e.mark != nil {
			c.Timeline = append(c.Timeline, Row{Event: from + i, Kind: "guest", Text: e.mark.Text})
			continue
		}
		if e.ends {
			if e.op.kind == KindSync {
				c.Timeline = append(c.Timeline, Row{
					Event: from + i, Kind: "barrier", File: st.h.files[e.op.file].spec.Name, Site: e.op.site, Ended: true,
				})
			}
			continue
		}
		row := st.row(e.op, e.op.end < bound[e.op.file])
		c.Timeline = append(c.Timeline, row)
		switch row.Fate {
		case FateKept, FateReplaced:
			c.Kept++
		case FateTorn, FatePoisoned:
			c.Torn++
		case FateLost, FateCutOff:
			c.Lost++
		}
	}
	return c
}

// durableBefore returns for each file the beginning of the last barrier that had completed by the event.
func durableBefore(h *history, event int) []int {
	bound := make([]int, len(h.files))
	for _, e := range h.events[:event+1] {
		if e.op != nil && e.ends && e.op.kind == KindSync {
			bound[e.op.file] = max(bound[e.op.file], e.op.begin)
		}
	}
	return bound
}

// row describes an operation and what became of it.
func (st *State) row(o *op, durable bool) Row {
	r := Row{
		Event: o.begin, File: st.h.files[o.file].spec.Name, Kind: o.kind.String(), Offset: o.off, Length: o.len,
		Site: o.site, Ended: o.end <= st.space.at.event,
	}
	if o.kind == KindSync {
		return r
	}
	fs := &st.space.files[o.file]
	picks := st.picks[fs.first:]
	sc := &fs.sizes[picks[0]]
	if o.newSize != o.oldSize {
		r.Size = &SizeFate{Size: o.newSize, Fate: FateDurable}
		if !durable {
			r.Size.Fate = fateOf(fs.steps, o, picks[0])
		}
	}
	if durable {
		r.Fate = FateDurable
		return r
	}
	units := make(map[int64]int, len(fs.units))
	for i, ch := range fs.units {
		units[ch.unit] = i
	}
	per := st.space.model.sectors()
	for _, c := range o.changes {
		f := FateImmaterial
		if i, uncertain := units[c.sector/per]; uncertain {
			ch := fs.units[i]
			switch {
			case c.sector*int64(len(c.data)) >= sc.size:
				f = FateCutOff
			case ch.zap != 0 && picks[1+i] == ch.zap, picks[1+i] == 0 && ch.cands[0].sum != ch.was:
				f = FatePoisoned
			default:
				f = fateOf(ch.steps, o, picks[1+i])
			}
		}
		r.Sectors = appendRun(r.Sectors, c.sector, f)
	}
	r.Fate = r.total()
	if len(r.Sectors) == 1 {
		r.Sectors = nil
	}
	return r
}

// fateOf returns what became of what o gave to a place, where picked survived.
func fateOf(steps []step, o *op, picked pick) Fate {
	f := FateImmaterial
	for _, st := range steps {
		switch {
		case st.op == o && st.cand == picked:
			f = FateKept
		case st.op == o:
			f = FateLost
		case st.op.index > o.index && f == FateLost && st.cand == picked:
			f = FateReplaced
		}
	}
	return f
}

func appendRun(runs []SectorRun, sector int64, f Fate) []SectorRun {
	if n := len(runs); n > 0 && runs[n-1].Fate == f && runs[n-1].First+runs[n-1].Count == sector {
		runs[n-1].Count++
		return runs
	}
	return append(runs, SectorRun{First: sector, Count: 1, Fate: f})
}

// total sums up the fates of an operation's parts: what was replaced by something later counts as kept, where
// nothing else tells, and what was cut off as lost.
func (r *Row) total() Fate {
	seen := make(map[Fate]bool)
	if r.Size != nil {
		seen[r.Size.Fate] = true
	}
	for _, s := range r.Sectors {
		seen[s.Fate] = true
	}
	lost, kept := seen[FateLost] || seen[FateCutOff], seen[FateKept]
	switch {
	case lost && kept:
		return FateTorn
	case seen[FatePoisoned]:
		return FatePoisoned
	case lost:
		return FateLost
	case kept:
		return FateKept
	case seen[FateReplaced]:
		return FateReplaced
	default:
		return FateImmaterial
	}
}

// String returns the row as a line of text.
func (r Row) String() string {
	b := &strings.Builder{}
	fmt.Fprintf(b, "%5d  ", r.Event)
	switch {
	case r.Kind == "guest":
		b.WriteString(r.Text)
		return b.String()
	case r.Kind == "barrier":
		fmt.Fprintf(b, "---------- barrier of %s complete: %s", r.File, r.Site)
		return b.String()
	case r.Kind == KindSync.String():
		fmt.Fprintf(b, "%-9s sync of %s begins", "", r.File)
	case r.Kind == KindTruncate.String():
		fmt.Fprintf(b, "%-9s truncate %s to %d", r.Fate, r.File, r.Offset)
	default:
		fmt.Fprintf(b, "%-9s %s %s [%d, +%d)", r.Fate, r.Kind, r.File, r.Offset, r.Length)
	}
	if r.Size != nil {
		fmt.Fprintf(b, " size %d %s", r.Size.Size, r.Size.Fate)
	}
	for _, s := range r.Sectors {
		fmt.Fprintf(b, " %s:%d", s.Fate, s.First)
		if s.Count > 1 {
			fmt.Fprintf(b, "-%d", s.First+s.Count-1)
		}
	}
	if !r.Ended {
		b.WriteString(" (in flight)")
	}
	fmt.Fprintf(b, "  %s", r.Site)
	return b.String()
}

// Summary says in one line what the crash interrupted and how much survived.
func (c Crash) Summary() string {
	at := "before the first event"
	if c.Event >= 0 {
		at = fmt.Sprintf("after event %d", c.Event)
	}
	return fmt.Sprintf("%s, %s: of what was not durable %d operations kept, %d torn, %d lost", at, c.Model, c.Kept, c.Torn, c.Lost)
}

func (c Crash) phaseName() string {
	switch c.Phase {
	case PhaseRecovery:
		return "the recovery"
	case PhaseAgain:
		return "the disk in use again"
	default:
		return "the work"
	}
}

// Describe returns what the crash kept and lost, as in the path of a violation.
func (st *State) Describe() Crash { return describe(PhaseWork, st) }
