package fvd

import (
	"testing"

	"pgregory.net/rapid"
)

// TestBitset compares with a slice of bools.
func TestBitset(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 300).Draw(t, "n")
		b, model := newBitset(blockIndex(n)), make([]bool, n)
		for range rapid.IntRange(0, 6).Draw(t, "sets") {
			from := rapid.IntRange(0, n).Draw(t, "from")
			to := rapid.IntRange(from, n).Draw(t, "to")
			b.setRange(blockIndex(from), blockIndex(to))
			for i := from; i < to; i++ {
				model[i] = true
			}
		}
		count := 0
		for i, set := range model {
			if b.get(blockIndex(i)) != set {
				t.Fatalf("bit %d is %v", i, !set)
			}
			if set {
				count++
			}
		}
		if int(b.count()) != count {
			t.Fatalf("count is %d, want %d", b.count(), count)
		}
		from := rapid.IntRange(0, n-1).Draw(t, "run from")
		to := rapid.IntRange(from+1, n).Draw(t, "run to")
		want := 1
		for from+want < to && model[from+want] == model[from] {
			want++
		}
		if got, set := b.run(blockIndex(from), blockIndex(to)); int(got) != want || set != model[from] {
			t.Fatalf("run(%d,%d) is %d %v, want %d %v", from, to, got, set, want, model[from])
		}
		if got := b.all(blockIndex(from), blockIndex(to)); got != (model[from] && want == to-from) {
			t.Fatalf("all(%d,%d) is %v", from, to, got)
		}
		page := make([]byte, pageSize)
		b.encodePage(0, page)
		again := newBitset(blockIndex(n))
		if again.decode(page[:(n+7)/8], 0) {
			t.Fatal("stray bits")
		}
		for i, set := range model {
			if page[i/8]>>(i%8)&1 == 1 != set || again.get(blockIndex(i)) != set {
				t.Fatalf("bit %d on disk is wrong", i)
			}
		}
	})
}

// TestBitsetStray: bits past the end are dropped and noticed.
func TestBitsetStray(t *testing.T) {
	for _, n := range []blockIndex{1, 63, 64, 65, 100} {
		b := newBitset(n)
		page := make([]byte, pageSize)
		page[n/8] = 1 << (n % 8)
		if !b.decode(page, 0) || b.count() != 0 {
			t.Errorf("%d bits: stray bit was taken over or not noticed", n)
		}
		b.decode([]byte{0xFF, 0xFF}, 0)
		if b.count() != min(n, 16) {
			t.Errorf("%d bits: %d set", n, b.count())
		}
	}
}

func FuzzBitmap(f *testing.F) {
	f.Add([]byte{1, 2, 3}, uint16(20))
	f.Fuzz(func(t *testing.T, p []byte, n uint16) {
		b := newBitset(blockIndex(n))
		if int64(len(p)) > ceilDiv(int64(n), 8) {
			p = p[:ceilDiv(int64(n), 8)]
		}
		b.decode(p, 0)
		if b.count() > b.n {
			t.Fatal("more bits than there are")
		}
	})
}

func FuzzTable(f *testing.F) {
	f.Add([]byte{0xFF, 0xFF, 0xFF, 0xFF, 1, 0, 0, 0}, int64(10))
	f.Fuzz(func(t *testing.T, b []byte, stored int64) {
		n := min(len(b)/4, 1<<16)
		m := &metadata{g: geometry{chunkSize: 4096}, header: &Header{}, table: make(table, n), maxMemory: 1 << 20}
		decodeEntries(m.table, b[:4*n])
		faults := map[chunkIndex]bool{}
		u, err := m.scanTable(min(stored, 1<<20), func(c chunkIndex, _ entry, _ tableFault) bool {
			faults[c] = true
			return true
		})
		must(t, err)
		seen := map[chunkID]bool{}
		for c := range chunkIndex(n) {
			if e := m.table.get(c); e != entryEmpty && !faults[c] {
				if seen[e.id()] || int64(e.id()) >= stored || e.id() >= u.next {
					t.Fatalf("entry %d, %#x, was accepted", c, e)
				}
				seen[e.id()] = true
			}
		}
	})
}
