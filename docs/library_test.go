// Package docs holds the documentation, and the tests that keep it true.
package docs

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestLibraryPrograms: the programs in library.md are those of the examples that are compiled and run.
func TestLibraryPrograms(t *testing.T) {
	page, err := os.ReadFile("library.md")
	if err != nil {
		t.Fatal(err)
	}
	marked := regexp.MustCompile("(?ms)^<!-- from (\\S+): ([\\w ]+) -->\n\n```go\n(.*?)```\n").FindAllSubmatch(page, -1)
	if n := strings.Count(string(page), "```go\n"); n != len(marked) || n == 0 {
		t.Errorf("of %d programs %d say where they are from", n, len(marked))
	}
	for _, m := range marked {
		file, names := string(m[1]), strings.Fields(string(m[2]))
		want, err := declarations(filepath.Join("..", filepath.FromSlash(file)), names)
		if err != nil {
			t.Error(err)
		} else if string(m[3]) != want {
			t.Errorf("%v of %s are not what library.md shows; they are:\n%s", names, file, want)
		}
	}
}

// declarations is the source text of functions, methods and types of a file, with their comments.
func declarations(file string, names []string) (string, error) {
	source, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	positions := token.NewFileSet()
	parsed, err := parser.ParseFile(positions, file, source, parser.ParseComments)
	if err != nil {
		return "", err
	}
	found := map[string]string{}
	for _, d := range parsed.Decls {
		var name string
		var doc *ast.CommentGroup
		switch d := d.(type) {
		case *ast.FuncDecl:
			name, doc = d.Name.Name, d.Doc
		case *ast.GenDecl:
			if spec, ok := d.Specs[0].(*ast.TypeSpec); ok {
				name, doc = spec.Name.Name, d.Doc
			}
		}
		begin := d.Pos()
		if doc != nil {
			begin = doc.Pos()
		}
		found[name] = string(source[positions.Position(begin).Offset:positions.Position(d.End()).Offset]) + "\n"
	}
	var texts []string
	for _, name := range names {
		text, ok := found[name]
		if !ok {
			return "", fmt.Errorf("%s declares no %s", file, name)
		}
		texts = append(texts, text)
	}
	return strings.Join(texts, "\n"), nil
}
