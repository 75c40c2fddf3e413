package cli

import (
	"slices"
	"testing"
)

func TestParseOptionLists(t *testing.T) {
	for _, tt := range []struct {
		lists []string
		want  []parameter
		help  bool
		bad   bool
	}{
		{[]string{"size=1G"}, []parameter{{"size", "1G"}}, false, false},
		{[]string{"a=1,b=2", "c"}, []parameter{{"a", "1"}, {"b", "2"}, {"c", "on"}}, false, false},
		{[]string{"data_file=a,,b=c"}, []parameter{{"data_file", "a,b=c"}}, false, false},
		{[]string{"a="}, []parameter{{"a", ""}}, false, false},
		{[]string{"help"}, nil, true, false},
		{[]string{"a=1,?"}, nil, true, false},
		{[]string{"help=1"}, []parameter{{"help", "1"}}, false, false},
		{[]string{""}, nil, false, true},
		{[]string{"a=1,"}, nil, false, true},
		{[]string{"=1"}, nil, false, true},
		{nil, nil, false, false},
	} {
		got, help, err := parseOptionLists(tt.lists)
		if !slices.Equal(got, tt.want) || help != tt.help || (err != nil) != tt.bad {
			t.Errorf("%q: %v, help %v, %v; expected %v, help %v, error %v", tt.lists, got, help, err, tt.want, tt.help, tt.bad)
		}
	}
}

func FuzzSplitCommas(f *testing.F) {
	f.Add("a=1,b=2")
	f.Add("a,,b,,,c")
	f.Fuzz(func(t *testing.T, s string) {
		joined := ""
		for i, p := range splitCommas(s) {
			if i > 0 {
				joined += ","
			}
			joined += quoteCommas(p)
		}
		again := splitCommas(joined)
		if !slices.Equal(again, splitCommas(s)) {
			t.Errorf("%q splits into %q, and quoted again into %q", s, splitCommas(s), again)
		}
	})
}
