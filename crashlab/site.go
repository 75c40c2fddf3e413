package crashlab

import (
	"fmt"
	"path"
	"runtime"
	"strings"
	"sync"
)

// Site is the place in the engine's source that issued an operation: the innermost caller outside packages
// crashlab and storage.
type Site struct {
	Func string `json:"function"` // package and function, without the import path
	File string `json:"file"`     // directory and file name
	Line int    `json:"line"`
}

// String returns "qcow2.(*table).write (qcow2/table.go:12)".
func (s Site) String() string {
	if s.Func == "" {
		return "unknown caller"
	}
	return fmt.Sprintf("%s (%s:%d)", s.Func, s.File, s.Line)
}

// siteTable finds and deduplicates sites. A program counter is resolved once. Safe for concurrent use.
type siteTable struct {
	mu     sync.RWMutex
	byPC   map[uintptr]*Site // nil: every function at this address is one to look past
	unique map[Site]*Site
}

func newSiteTable() *siteTable {
	return &siteTable{byPC: make(map[uintptr]*Site), unique: make(map[Site]*Site)}
}

// maxSiteDepth is how many callers are looked at; usually the first few do, and unwinding a stack costs time.
const (
	nearSiteDepth = 4
	maxSiteDepth  = 24
)

// caller returns the site that called into this package.
func (t *siteTable) caller() *Site {
	const skip = 3 // runtime.Callers, this function and its caller
	var pcs [maxSiteDepth]uintptr
	if site := t.first(pcs[:runtime.Callers(skip, pcs[:nearSiteDepth])]); site != nil {
		return site
	}
	if site := t.first(pcs[:runtime.Callers(skip+nearSiteDepth, pcs[:])]); site != nil {
		return site
	}
	return t.intern(Site{})
}

// first returns the first site among callers, nil when there is none.
func (t *siteTable) first(pcs []uintptr) *Site {
	for _, pc := range pcs {
		t.mu.RLock()
		site, known := t.byPC[pc]
		t.mu.RUnlock()
		if !known {
			site = t.resolve(pc)
		}
		if site != nil {
			return site
		}
	}
	return nil
}

// resolve expands one program counter, inlined calls included, and remembers the outcome.
func (t *siteTable) resolve(pc uintptr) *Site {
	var site *Site
	frames := runtime.CallersFrames([]uintptr{pc})
	for {
		f, more := frames.Next()
		if f.Function != "" && !lookPast(f) {
			dir, file := path.Split(f.File)
			site = t.intern(Site{
				Func: path.Base(f.Function),
				File: path.Join(path.Base(dir), file),
				Line: f.Line,
			})
			break
		}
		if !more {
			break
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.byPC[pc] = site
	return site
}

func (t *siteTable) intern(s Site) *Site {
	t.mu.Lock()
	defer t.mu.Unlock()
	if known := t.unique[s]; known != nil {
		return known
	}
	t.unique[s] = &s
	return &s
}

// lookPast says that a frame belongs to the file layer and not to the engine above it.
func lookPast(f runtime.Frame) bool {
	const module = "github.com/platter-disk/platter/"
	return (strings.HasPrefix(f.Function, module+"crashlab.") || strings.HasPrefix(f.Function, module+"storage.")) &&
		!strings.HasSuffix(f.File, "_test.go")
}
