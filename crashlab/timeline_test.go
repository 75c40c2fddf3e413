package crashlab

import (
	"strings"
	"testing"
)

// TestDescribe checks what a timeline says about every fate.
func TestDescribe(t *testing.T) {
	l, files := newLab(t, FileSpec{Name: "img", Size: 8192})
	f := files[0]
	put(t, f, 0, 512, 1)
	must(t, f.Sync())
	l.Note("from here on nothing is durable", false)
	put(t, f, 0, 1024, 2)
	put(t, f, 512, 512, 3)
	put(t, f, 1024, 512, 5)
	put(t, f, 1024, 512, 6)
	must(t, f.PunchHole(4096, 512))
	put(t, f, 8192, 1024, 4)
	must(t, f.Truncate(10240))
	put(t, f, 3072, 512, 7)

	find := func(m Model, want ...string) {
		t.Helper()
		seq, err := l.Crashes(m, 1<<20, 1)
		must(t, err)
		var last string
	states:
		for st := range seq {
			var b strings.Builder
			for _, row := range st.Describe().Timeline {
				b.WriteString(row.String() + "\n")
			}
			last = b.String()
			for _, w := range want {
				if !strings.Contains(last, w) {
					continue states
				}
			}
			return
		}
		t.Errorf("%s: no state with %q; the last is\n%s", m, want, last)
	}
	plain := Model{Tear: 512}
	find(plain, "durable   write img [0, +512)", "---------- barrier of img complete", "from here on nothing is durable")
	find(plain, "lost      write img [0, +1024) lost:0 replaced:1", "kept      write img [512, +512)", "(in flight)")
	find(plain, "torn      write img [0, +1024) kept:0 lost:1", "lost      write img [512, +512)")
	find(plain, "replaced  write img [1024, +512)", "immaterial punch img [4096, +512)")
	find(plain, "lost      write img [8192, +1024) size 9216 lost  ", "lost      truncate img to 10240 size 10240 lost")
	find(plain, "torn      write img [8192, +1024) size 9216 replaced lost:16 kept:17", "kept      truncate img to 10240 size 10240 kept")
	find(Model{Tear: 512, Poison: true}, "poisoned  write img [8192, +1024) size 9216 kept poisoned:16 kept:17")
}

func TestModelText(t *testing.T) {
	if s := (Model{Tear: 4096, Poison: true, Zap: true}).String(); s != "torn at 4096 bytes, poison, zap" {
		t.Error(s)
	}
}
