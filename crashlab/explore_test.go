package crashlab_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/storage"
)

var toyMix = crashlab.Mix{
	MaxLength: 4 * storage.SectorSize, Seed: 1,
	Write: 8, Zero: 1, Discard: 1, Flush: 3, Check: 1,
}

// toyScenario uses the toy with a bug.
func toyScenario(b bug, requests int) crashlab.Scenario {
	mix, again := toyMix, toyMix
	mix.Requests, again.Requests, again.Seed = requests, 6, 2
	return crashlab.Scenario{
		Name:        "toy " + string(b),
		Files:       []crashlab.FileSpec{{Name: "toy.img"}},
		Prepare:     func(files []storage.File) error { return makeToy(files[0]) },
		Open:        func(files []storage.File) (crashlab.Subject, error) { return openToy(files[0], b) },
		Work:        mix.Run,
		Again:       again.Run,
		DiscardUnit: storage.SectorSize,
	}
}

func explore(t *testing.T, sc crashlab.Scenario, o crashlab.Options) *crashlab.Report {
	t.Helper()
	r, err := crashlab.Explore(context.Background(), sc, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func textOf(t *testing.T, r *crashlab.Report) string {
	t.Helper()
	var b bytes.Buffer
	if err := r.WriteText(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestCorrectToySurvives(t *testing.T) {
	for seed := range uint64(2) {
		sc := toyScenario(noBug, 60)
		mix := toyMix
		mix.Seed, mix.Requests = seed+10, 60
		sc.Work = mix.Run
		r := explore(t, sc, crashlab.Options{States: 1000, Seed: seed, Depth: 2})
		if len(r.Violations) != 0 {
			t.Fatalf("the correct toy was found guilty\n%s", textOf(t, r))
		}
		for _, p := range r.Phases {
			if p.Explored < 100 {
				t.Errorf("phase %s: only %d states explored", p.Phase, p.Explored)
			}
		}
	}
}

// TestConcurrentGuests has several requests, and so several operations, in flight at a crash.
func TestConcurrentGuests(t *testing.T) {
	sc := toyScenario(noBug, 0)
	mix := toyMix
	mix.Requests, mix.Workers = 15, 4
	sc.Work = mix.Run
	r := explore(t, sc, crashlab.Options{States: 1000, Seed: 3})
	if len(r.Violations) != 0 {
		t.Errorf("the correct toy was found guilty\n%s", textOf(t, r))
	}
}

// TestEveryBugIsFound is the proof that the lab can find anything.
func TestEveryBugIsFound(t *testing.T) {
	for b, crashes := range map[bug]int{ // how many crashes in a row it takes
		noDataBarrier:      1,
		noCommitBarrier:    1,
		noChecksum:         1,
		earlyReuse:         1,
		headerBeforeTable:  1,
		noHeaderBarrier:    1,
		earlyTruncate:      1,
		earlyPunch:         1,
		recoveryHeader:     2,
		recoveryDrops:      1,
		recoveryForgets:    1,
		recoveryCannotGrow: 1,
	} {
		t.Run(string(b), func(t *testing.T) {
			r := explore(t, toyScenario(b, 60), crashlab.Options{States: 2000, Seed: 7})
			if len(r.Violations) != 1 {
				t.Fatalf("%d violations\n%s", len(r.Violations), textOf(t, r))
			}
			v := r.Violations[0]
			if len(v.Path) != crashes {
				t.Errorf("found after %d crashes in a row: it takes %d\n%s", len(v.Path), crashes, textOf(t, r))
			}
			if (v.Stage == crashlab.StagePanic) != (b == recoveryCannotGrow) || (v.Stack != "") != (v.Stage == crashlab.StagePanic) {
				t.Errorf("stage %s, stack %q", v.Stage, v.Stack)
			}
			if b == recoveryDrops && v.Stage != crashlab.StageRepeat {
				t.Errorf("stage %s", v.Stage)
			}
			c := v.Path[0]
			if b == noChecksum && (c.Torn != 1 || c.Kept+c.Lost != 0) {
				t.Errorf("the smallest crash is one torn record, not\n%s", textOf(t, r))
			}
		})
	}
}

// TestReportDependsOnTheSeedAlone compares reports made by one worker and by several.
func TestReportDependsOnTheSeedAlone(t *testing.T) {
	for _, b := range []bug{noBug, noCommitBarrier} {
		asJSON := func(seed uint64, workers int) string {
			var out bytes.Buffer
			r := explore(t, toyScenario(b, 40), crashlab.Options{States: 200, Seed: seed, Workers: workers, Violations: 2})
			if err := r.WriteJSON(&out); err != nil {
				t.Fatal(err)
			}
			if want := map[bug]int{noBug: 0, noCommitBarrier: 2}[b]; len(r.Violations) != want {
				t.Fatalf("%d violations: want %d", len(r.Violations), want)
			}
			return out.String()
		}
		one := asJSON(5, 1)
		if many := asJSON(5, 7); one != many {
			t.Errorf("%s: one worker reports\n%s\nseven report\n%s", b, one, many)
		}
		if other := asJSON(6, 2); one == other {
			t.Errorf("%s: the seed makes no difference", b)
		}
	}
}

// TestExhaustive explores every state of a short history and of its recoveries.
func TestExhaustive(t *testing.T) {
	sc := toyScenario(noBug, 0)
	sc.Work = func(g *crashlab.Guest) error {
		return errors.Join(g.Write(0, 1024), g.Flush(), g.Write(512, 512), g.Flush())
	}
	r := explore(t, sc, crashlab.Options{
		States: 1 << 20, Models: []crashlab.Model{{Tear: 512}},
		Recovery: crashlab.Sampling{Every: 1, States: 1 << 20}, Again: crashlab.Sampling{Every: 20, States: 20},
	})
	if len(r.Violations) != 0 {
		t.Fatal(textOf(t, r))
	}
	m := r.Models[0]
	if n, exact := m.Possible.Exact(); !exact || int(n) != m.Explored || m.Points != m.Exhaustive {
		t.Errorf("model %+v: want everything explored", m)
	}
	p := r.Phases[crashlab.PhaseRecovery]
	if n, exact := p.Possible.Exact(); !exact || int64(n) != p.Explored || n == 0 {
		t.Errorf("phase %+v: want everything explored", p)
	}
}

func TestExploreRefusals(t *testing.T) {
	good := toyScenario(noBug, 3)
	for name, test := range map[string]struct {
		change func(sc *crashlab.Scenario, o *crashlab.Options)
		want   string
	}{
		"no files":   {func(sc *crashlab.Scenario, _ *crashlab.Options) { sc.Files = nil }, "Files is empty"},
		"no open":    {func(sc *crashlab.Scenario, _ *crashlab.Options) { sc.Open = nil }, "Open is missing"},
		"no work":    {func(sc *crashlab.Scenario, _ *crashlab.Options) { sc.Work = nil }, "Work is missing"},
		"bad size":   {func(sc *crashlab.Scenario, _ *crashlab.Options) { sc.Files[0].Size = -1 }, "-1 bytes"},
		"bad model":  {func(_ *crashlab.Scenario, o *crashlab.Options) { o.Models = []crashlab.Model{{}} }, "tear is 0"},
		"bad option": {func(_ *crashlab.Scenario, o *crashlab.Options) { o.States = -5 }, "States is -5"},
		"cannot prepare": {func(sc *crashlab.Scenario, _ *crashlab.Options) {
			sc.Prepare = func([]storage.File) error { return errors.New("no disk") }
		}, "prepare: no disk"},
		"cannot open": {func(sc *crashlab.Scenario, _ *crashlab.Options) { sc.Prepare = nil }, "without any crash: open"},
		"work panics": {func(sc *crashlab.Scenario, _ *crashlab.Options) {
			sc.Work = func(*crashlab.Guest) error { panic("oops") }
		}, "panic: oops"},
		"work fails": {func(sc *crashlab.Scenario, _ *crashlab.Options) {
			sc.Work = func(g *crashlab.Guest) error { return g.Write(-512, 512) }
		}, "want a range"},
		"overlapping watch": {func(sc *crashlab.Scenario, _ *crashlab.Options) {
			sc.Watch = []crashlab.Range{{Offset: 0, Length: 1024}, {Offset: 512, Length: 512}}
		}, "whole sectors"},
		"too much watched": {func(sc *crashlab.Scenario, _ *crashlab.Options) {
			sc.Watch = []crashlab.Range{{Offset: 0, Length: 1 << 40}}
		}, "are watched"},
		"unwatched": {func(sc *crashlab.Scenario, _ *crashlab.Options) {
			sc.Watch = []crashlab.Range{{Offset: 0, Length: 512}}
			sc.Work = func(g *crashlab.Guest) error { return g.Write(512, 512) }
		}, "not watched"},
	} {
		t.Run(name, func(t *testing.T) {
			sc, o := good, crashlab.Options{States: 10}
			sc.Files = slices.Clone(good.Files)
			test.change(&sc, &o)
			if _, err := crashlab.Explore(context.Background(), sc, o); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v: want %q in it", err, test.want)
			}
		})
	}
}

func TestExploreCanBeCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	o := crashlab.Options{States: 100000, Progress: func(n int) {
		if n > 1000 {
			cancel()
		}
	}}
	r, err := crashlab.Explore(ctx, toyScenario(noBug, 60), o)
	if !errors.Is(err, context.Canceled) || r == nil || r.Explored < 1000 || r.Explored > 50000 {
		t.Errorf("%v, %+v", err, r)
	}
}

// TestJudgeAndClosed checks the judgements that a scenario adds.
func TestJudgeAndClosed(t *testing.T) {
	sc := toyScenario(noBug, 10)
	sc.Judge = func(_ crashlab.Subject, at crashlab.Moment) error {
		flushes := 0
		for _, m := range at.Marks() {
			if m.Promise {
				flushes++
			}
		}
		if flushes > 1 {
			return fmt.Errorf("%d promises were made", flushes)
		}
		return nil
	}
	r := explore(t, sc, crashlab.Options{States: 500})
	if len(r.Violations) != 1 || r.Violations[0].Stage != crashlab.StageJudge || r.Violations[0].Message != "2 promises were made" {
		t.Errorf("violations %+v: want 2 promises", r.Violations)
	}
	sc.Judge = nil
	sc.Closed = func(files []storage.File) error { return errors.New("not clean") }
	r = explore(t, sc, crashlab.Options{States: 500})
	if len(r.Violations) != 1 || r.Violations[0].Stage != crashlab.StageClosed || len(r.Violations[0].Path) != 0 {
		t.Errorf("violations %+v: want a file that is not clean", r.Violations)
	}
}

// TestFaults makes every operation of the work fail in turn, and crashes what it leaves.
func TestFaults(t *testing.T) {
	for _, text := range []string{
		"write:1:EIO", "write:1:ENOSPC", "write:1:short=100", "sync:1:EIO", "read:1:EIO", "punch:1:EIO", "truncate:1:EIO",
	} {
		f, err := crashlab.ParseFault(text)
		if err != nil {
			t.Fatal(err)
		}
		for n := 1; n <= 16; n++ {
			f.N = n
			r := explore(t, toyScenario(noBug, 60), crashlab.Options{States: 20, Seed: uint64(n), Faults: []crashlab.Fault{f}})
			if len(r.Violations) > 0 {
				t.Fatal(textOf(t, r))
			}
			if r.FaultHits == 0 {
				if n == 1 {
					t.Errorf("the work never came to a %s", f.Kind)
				}
				break
			}
		}
	}
}

func TestFaultBugsAreFound(t *testing.T) {
	for _, test := range []struct {
		bug   bug
		fault string
		stage crashlab.Stage
	}{
		{notSticky, "sync:2:EIO", crashlab.StageSticky},
		{ignoresWriteError, "write:3:EIO", crashlab.StageLive},
		{panicsOnError, "write:3:short=1", crashlab.StagePanic},
	} {
		f, err := crashlab.ParseFault(test.fault)
		if err != nil {
			t.Fatal(err)
		}
		r := explore(t, toyScenario(test.bug, 30), crashlab.Options{States: 40, Faults: []crashlab.Fault{f}})
		if len(r.Violations) != 1 || r.Violations[0].Stage != test.stage {
			t.Errorf("%s: want a violation at stage %s\n%s", test.bug, test.stage, textOf(t, r))
		}
	}
}

// TestCrashedDisksAreUsedAgain finds what goes wrong only then, and files that are not clean after that.
func TestCrashedDisksAreUsedAgain(t *testing.T) {
	every := crashlab.Sampling{Every: 1, States: 4}
	sc := toyScenario(noBug, 10)
	sc.Again = func(g *crashlab.Guest) error {
		g.Note("used again")
		return errors.New("does not work")
	}
	r := explore(t, sc, crashlab.Options{States: 50, Again: every})
	if len(r.Violations) != 1 || r.Violations[0].Stage != crashlab.StageAgain {
		t.Errorf("violations %+v: want a disk that does not work", r.Violations)
	}
	sc = toyScenario(noBug, 10)
	closed := 0
	sc.Closed = func([]storage.File) error {
		if closed++; closed > 1 {
			return errors.New("not clean")
		}
		return nil
	}
	r = explore(t, sc, crashlab.Options{States: 50, Again: every, Workers: 1})
	if len(r.Violations) != 1 || r.Violations[0].Stage != crashlab.StageClosed || len(r.Violations[0].Path) != 1 {
		t.Errorf("violations %+v: want files that are not clean", r.Violations)
	}
}

// TestPoisonAndZap explores the models that the toy was not made for, and one that it was.
func TestPoisonAndZap(t *testing.T) {
	o := crashlab.Options{States: 500, Models: []crashlab.Model{{Tear: 512, Poison: true}}}
	if r := explore(t, toyScenario(noBug, 40), o); len(r.Violations) != 0 {
		t.Errorf("with poison\n%s", textOf(t, r))
	}
	o.Models = []crashlab.Model{{Tear: 512, Zap: true}}
	if r := explore(t, toyScenario(noBug, 40), o); len(r.Violations) != 1 {
		t.Errorf("the toy has one header only and cannot survive its loss\n%s", textOf(t, r))
	}
}

func TestReportForms(t *testing.T) {
	sc := toyScenario(noChecksum, 60)
	sc.Name = `<script>alert("x")</script>`
	r := explore(t, sc, crashlab.Options{States: 4000, Seed: 7})
	var page, js bytes.Buffer
	if err := errors.Join(r.WriteHTML(&page), r.WriteJSON(&js)); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Violation 1", "barrier complete", "kept", "lost", "torn", "toy.img", "crashlab_test.(*toy).flush", "answered: flush"} {
		if !strings.Contains(page.String(), want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	for _, not := range []string{"<script", "http:", "https:", "src="} {
		if strings.Contains(page.String(), not) {
			t.Errorf("the page contains %q", not)
		}
	}
	var back struct {
		Explored   int64             `json:"states_explored"`
		Possible   crashlab.Count    `json:"states_possible"`
		Violations []json.RawMessage `json:"violations"`
		Sites      []struct {
			Crashes int64
			Site    crashlab.Site
		}
	}
	if err := json.Unmarshal(js.Bytes(), &back); err != nil {
		t.Fatal(err)
	}
	if back.Explored != r.Explored || back.Possible != r.Possible || len(back.Violations) != 1 || len(back.Sites) == 0 {
		t.Errorf("JSON %s", js.String())
	}
	if !strings.Contains(textOf(t, r), "torn      write toy.img [") {
		t.Error(textOf(t, r))
	}
}
