package storage

import (
	"fmt"
	"io"
	"slices"
	"sync"
)

// memoryPage is the unit in bytes in which a Memory keeps data and reports extents.
const memoryPage = 4096

// Memory is a sparse File in memory, for tests and for scratch space. It may be far larger than memory: only
// pages that were written are kept. Nothing in it outlives the process, so Sync has nothing to do.
//
// Close keeps the contents and the Memory usable: a test hands it to a format, closes the format, and opens
// the same bytes again.
type Memory struct {
	name string

	mu    sync.RWMutex
	size  int64
	pages map[int64]*[memoryPage]byte // by offset / memoryPage; an absent page reads as zeros
}

// NewMemory returns an empty Memory; name identifies it in error messages.
func NewMemory(name string) *Memory {
	return &Memory{name: name, pages: make(map[int64]*[memoryPage]byte)}
}

func (m *Memory) check(op string, off, length int64) error {
	if err := checkRange(off, length); err != nil {
		return fmt.Errorf("%s %s: %w", op, m.name, err)
	}
	return nil
}

// ReadAt implements File.
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	if err := m.check("read", off, int64(len(p))); err != nil {
		return 0, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	want := len(p)
	p = p[:max(0, min(int64(want), m.size-off))]
	for done := 0; done < len(p); {
		page, in := (off+int64(done))/memoryPage, (off+int64(done))%memoryPage
		part := p[done:min(len(p), done+memoryPage-int(in))]
		if b := m.pages[page]; b != nil {
			copy(part, b[in:])
		} else {
			clear(part)
		}
		done += len(part)
	}
	if len(p) < want {
		return len(p), io.EOF
	}
	return want, nil
}

// TryReadAt implements File; memory never blocks.
func (m *Memory) TryReadAt(p []byte, off int64) (int, error) { return m.ReadAt(p, off) }

// WriteAt implements File.
func (m *Memory) WriteAt(p []byte, off int64) (int, error) {
	if err := m.check("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for done := 0; done < len(p); {
		page, in := (off+int64(done))/memoryPage, (off+int64(done))%memoryPage
		b := m.pages[page]
		if b == nil {
			b = new([memoryPage]byte)
			m.pages[page] = b
		}
		done += copy(b[in:], p[done:])
	}
	if len(p) > 0 {
		m.size = max(m.size, off+int64(len(p)))
	}
	return len(p), nil
}

// Sync implements File.
func (m *Memory) Sync() error { return nil }

// Size implements File.
func (m *Memory) Size() (int64, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.size, nil
}

// Truncate implements File.
func (m *Memory) Truncate(size int64) error {
	if err := m.check("truncate", 0, size); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if size < m.size {
		m.drop(size, m.size)
	}
	m.size = size
	return nil
}

// PunchHole implements File.
func (m *Memory) PunchHole(off, length int64) error {
	if err := m.check("punch hole", off, length); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.drop(off, min(off+length, m.size))
	return nil
}

// ZeroRange implements File. Like the unwritten extents of a file system, the range is a hole afterwards.
func (m *Memory) ZeroRange(off, length int64) error {
	if err := m.check("zero", off, length); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.drop(off, min(off+length, m.size))
	if length > 0 {
		m.size = max(m.size, off+length)
	}
	return nil
}

// Allocate implements File; memory is not reserved.
func (m *Memory) Allocate(off, length int64) error {
	if err := m.check("allocate", off, length); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if length > 0 {
		m.size = max(m.size, off+length)
	}
	return nil
}

// drop makes [off, end) read as zeros and frees the whole pages in it. The caller holds mu.
func (m *Memory) drop(off, end int64) {
	if off >= end {
		return
	}
	for _, page := range m.sortedPages(off, end) {
		start := page * memoryPage
		from, to := max(off, start), min(end, start+memoryPage)
		// What lies past the size in the last page is zero already, and must stay so.
		if to-from == memoryPage || (from == start && to == m.size) {
			delete(m.pages, page)
			continue
		}
		clear(m.pages[page][from-start : to-start])
	}
}

// sortedPages returns the pages present in [off, end), ascending. It looks at the smaller of the range and
// the contents, so that neither a huge sparse range nor a huge file is slow. The caller holds mu.
func (m *Memory) sortedPages(off, end int64) []int64 {
	first, last := off/memoryPage, (end-1)/memoryPage
	var found []int64
	if last-first < int64(len(m.pages)) {
		for page := first; page <= last; page++ {
			if m.pages[page] != nil {
				found = append(found, page)
			}
		}
		return found
	}
	for page := range m.pages {
		if page >= first && page <= last {
			found = append(found, page)
		}
	}
	slices.Sort(found)
	return found
}

// DataExtents implements File, with pages of 4 KiB as the granularity.
func (m *Memory) DataExtents(off, length int64, fn func(Extent) bool) error {
	if err := m.check("map", off, length); err != nil {
		return err
	}
	m.mu.RLock()
	end := min(off+length, m.size)
	var pages []int64
	if off < end {
		pages = m.sortedPages(off, end)
	}
	m.mu.RUnlock() // fn may use the Memory

	for pos := off; pos < end; {
		e := Extent{Offset: pos}
		switch {
		case len(pages) == 0:
			e.Length = end - pos
		case pages[0]*memoryPage > pos:
			e.Length = pages[0]*memoryPage - pos
		default:
			e.Data = true
			n := 1
			for n < len(pages) && pages[n] == pages[0]+int64(n) {
				n++
			}
			e.Length = min(end, (pages[0]+int64(n))*memoryPage) - pos
			pages = pages[n:]
		}
		pos += e.Length
		if !fn(e) {
			return nil
		}
	}
	return nil
}

// Name implements File.
func (m *Memory) Name() string { return m.name }

// Close implements File; the contents stay and the Memory may be used again.
func (m *Memory) Close() error { return nil }
