package cli

import (
	"strings"
	"testing"
)

func TestPrintTree(t *testing.T) {
	type flag struct {
		Flags []string `json:"flags"`
		Name  string   `json:"name-of-it"`
		Size  int64    `json:"size"`
	}
	v := struct {
		On   bool           `json:"lazy-refcounts"`
		List []flag         `json:"bitmaps,omitempty"`
		Sub  map[string]int `json:"sub,omitempty"`
	}{true, []flag{{[]string{"auto"}, "a", 65536}, {[]string{}, "b", 1 << 60}}, map[string]int{"x-y": 1}}
	var b strings.Builder
	if err := printTree(&b, v); err != nil {
		t.Fatal(err)
	}
	want := `    lazy refcounts: true
    bitmaps:
        [0]:
            flags:
                [0]: auto
            name of it: a
            size: 65536
        [1]:
            flags:
            name of it: b
            size: 1152921504606846976
    sub:
        x y: 1
`
	if b.String() != want {
		t.Errorf("printed\n%s\nexpected\n%s", b.String(), want)
	}
	if err := printTree(&b, 5); err == nil {
		t.Error("a number is printed as a tree")
	}
	if err := printTree(&b, make(chan int)); err == nil {
		t.Error("a channel is printed as a tree")
	}
}
