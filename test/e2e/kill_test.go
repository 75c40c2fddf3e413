//go:build unix

package e2e

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/storage"
)

const (
	killBlocks  = 1024     // blocks that are written
	killBlock   = 4 << 10  // bytes of a block
	killStride  = 40 << 10 // bytes from block to block: several in a cluster, some across two
	killWriters = 4        // each has blocks of its own, which follow one another
	killWipe    = 48       // blocks that are wiped at once, with what lies between them: whole clusters become free
	killSize    = killBlocks * killStride
	sectors     = killBlock / storage.SectorSize
)

// content is what a sector may hold: zeros for gen < 0, else a tag of the block, the sector and the
// generation.
type content int64

const zeros content = -1

// tag fills a sector with what it holds at a generation.
func (c content) tag(b []byte, block, sector int) {
	if c < 0 {
		clear(b)
		return
	}
	for i := 0; i < len(b); i += 16 {
		binary.BigEndian.PutUint32(b[i:], 0x506c7400+uint32(sector))
		binary.BigEndian.PutUint32(b[i+4:], uint32(block))
		binary.BigEndian.PutUint64(b[i+8:], uint64(c))
	}
}

// blockState is what is known of a block since the server was started.
type blockState struct {
	base    [sectors]content // what was found then
	writes  []content        // what was written, in order; at most the last is still in flight
	acked   int              // how many of them were acknowledged
	durable int              // how many of them a flush that was acknowledged covered
}

// allows tells whether a sector may hold c: the last durable content, or anything that was written later.
func (b *blockState) allows(sector int, c content) bool {
	if b.durable == 0 && b.base[sector] == c {
		return true
	}
	return slices.Contains(b.writes[max(b.durable-1, 0):], c)
}

// ledger is what the client knows about the disk.
type ledger struct {
	mu     sync.Mutex
	blocks [killBlocks]blockState
	gen    content
	acked  int           // operations acknowledged since the server was started
	limit  int           // how many close enough
	enough chan struct{} // closed when there are so many
}

// begin notes a write that is about to be sent and returns what it is to write.
func (l *ledger) begin(block int, zero bool) content {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := zeros
	if !zero {
		l.gen++
		c = l.gen
	}
	l.blocks[block].writes = append(l.blocks[block].writes, c)
	return c
}

// end notes that the write of a block was acknowledged.
func (l *ledger) end(block int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.blocks[block].acked = len(l.blocks[block].writes)
	l.count()
}

func (l *ledger) count() {
	if l.acked++; l.acked == l.limit {
		close(l.enough)
	}
}

// flush runs a flush and notes what it made durable.
func (l *ledger) flush(sync func() error) error {
	l.mu.Lock()
	var covered [killBlocks]int
	for i := range l.blocks {
		covered[i] = l.blocks[i].acked
	}
	l.mu.Unlock()
	if err := sync(); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.blocks {
		l.blocks[i].durable = max(l.blocks[i].durable, covered[i])
	}
	l.count()
	return nil
}

// work writes blocks of its own until the server is gone.
func (l *ledger) work(c *nbd.Client, rng *rand.Rand, writer int) {
	buf := make([]byte, killBlock)
	for {
		const own = killBlocks / killWriters
		block := writer*own + rng.IntN(own)
		off := int64(block) * killStride
		var err error
		switch n := rng.IntN(100); {
		case n < 1:
			wiped := min(killWipe, (writer+1)*own-block)
			for i := range wiped {
				l.begin(block+i, true)
			}
			if err = c.PunchHole(off, int64(wiped)*killStride); err == nil {
				for i := range wiped {
					l.end(block + i)
				}
			}
		case n < 8:
			err = l.flush(c.Sync)
		case n < 16:
			l.begin(block, true)
			if n%2 == 0 {
				err = c.PunchHole(off, killBlock)
			} else {
				err = c.ZeroRange(off, killBlock)
			}
			if err == nil {
				l.end(block)
			}
		default:
			v := l.begin(block, false)
			for s := range sectors {
				v.tag(buf[s*storage.SectorSize:][:storage.SectorSize], block, s)
			}
			if _, err = c.WriteAt(buf, off); err == nil {
				l.end(block)
			}
		}
		if err != nil {
			return
		}
	}
}

// settle compares the disk with the ledger and begins a new account with what was found.
func (l *ledger) settle(t *testing.T, disk io.ReaderAt) {
	t.Helper()
	buf, want := make([]byte, killBlock), make([]byte, storage.SectorSize)
	for i := range l.blocks {
		b := &l.blocks[i]
		if _, err := disk.ReadAt(buf, int64(i)*killStride); err != nil {
			t.Fatalf("reading block %d: %v", i, err)
		}
		for s := range sectors {
			got := buf[s*storage.SectorSize:][:storage.SectorSize]
			c := zeros
			if got[0] != 0 {
				c = content(binary.BigEndian.Uint64(got[8:]))
			}
			c.tag(want, i, s)
			if !bytes.Equal(got, want) {
				t.Errorf("block %d, sector %d holds something that was never written there: % x…", i, s, got[:32])
			} else if !b.allows(s, c) {
				t.Errorf("block %d, sector %d holds generation %d; durable were %d of the writes %v over %d",
					i, s, c, b.durable, b.writes, b.base[s])
			}
			b.base[s] = c
		}
		b.writes, b.acked, b.durable = nil, 0, 0
	}
}

// checkAfterKill expects that a checker finds at most leaked clusters, and returns how many.
func checkAfterKill(t *testing.T, checker, image string) (leaks int) {
	t.Helper()
	stdout, stderr, code := output(t, checker, "check", "-f", "qcow2", "--output=json", image)
	var result struct {
		Corruptions int `json:"corruptions"`
		CheckErrors int `json:"check-errors"`
		Leaks       int `json:"leaks"`
	}
	if err := json.Unmarshal([]byte(stdout), &result); err != nil {
		t.Fatalf("%s check: exit status %d: %v\n%s%s", filepath.Base(checker), code, err, stdout, stderr)
	}
	if code != 0 && code != 3 || result.Corruptions+result.CheckErrors > 0 {
		t.Errorf("%s check: exit status %d\n%s%s", filepath.Base(checker), code, stdout, stderr)
	}
	return result.Leaks
}

// TestKill kills the server in the middle of writes, again and again. Each time the image must be free of
// corruption (space may have leaked), and every sector must hold what the last acknowledged flush covered or
// something that was written later.
func TestKill(t *testing.T) {
	testenv.Need(t, "qemu-img")
	rounds := 10
	if v := os.Getenv("PLATTER_KILL_ROUNDS"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 {
			t.Fatalf("PLATTER_KILL_ROUNDS is %q, want a positive number", v)
		}
		rounds = n
	}
	for _, tc := range []struct {
		name    string
		overlay bool
		options string // of platter create
	}{
		{"plain", false, "cluster_size=64k"},
		{"overlay", true, "cluster_size=16k"},
		{"subclusters", true, "cluster_size=64k,extended_l2=on"},
		{"small refcounts", false, "cluster_size=4k,refcount_bits=1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			image, socket := disk(t)
			l := &ledger{}
			args := []string{"create", "-q", "-f", "qcow2", "-o", tc.options}
			if tc.overlay {
				base := filepath.Join(filepath.Dir(image), "base.raw")
				l.writeBase(t, base)
				args = append(args, "-b", base, "-F", "raw")
			} else {
				for i := range l.blocks {
					for s := range sectors {
						l.blocks[i].base[s] = zeros
					}
				}
			}
			testenv.Run(t, platter(t), append(args, image, strconv.Itoa(killSize))...)
			leaks := 0
			for round := range rounds {
				rng := rand.New(rand.NewPCG(uint64(round), 99))
				l.round(t, image, socket, rng)
				ours := checkAfterKill(t, platter(t), image)
				if theirs := checkAfterKill(t, "qemu-img", image); ours != theirs {
					t.Errorf("round %d: platter check finds %d leaks, qemu-img check %d", round, ours, theirs)
				}
				if t.Failed() {
					t.Fatalf("round %d of %d failed; the image was %s", round, rounds, image)
				}
				leaks = ours
			}
			t.Logf("%d rounds, %d leaked clusters in all", rounds, leaks)
			last := serve(t, image, "--socket", socket)
			l.compare(t, last)
			last.stop(t)
		})
	}
}

// round starts the server, verifies what is on the disk, writes, and kills the server.
func (l *ledger) round(t *testing.T, image, socket string, rng *rand.Rand) {
	t.Helper()
	s := serve(t, image, "--socket", socket)
	c := l.compare(t, s)
	defer c.Close()
	l.acked, l.limit, l.enough = 0, 50+rng.IntN(2000), make(chan struct{})
	var work errgroup.Group
	for writer := range killWriters {
		seed := rng.Uint64()
		work.Go(func() error {
			l.work(c, rand.New(rand.NewPCG(seed, 1)), writer)
			return nil
		})
	}
	select {
	case <-l.enough:
	case <-s.done:
		t.Errorf("the server ended by itself: %v\n%s", s.err, s.stderr)
	case <-time.After(patience):
		t.Errorf("%d operations were not acknowledged in time", l.limit)
	}
	s.kill(t)
	if err := work.Wait(); err != nil {
		t.Error(err)
	}
}

// compare connects to the server and compares the disk with the ledger.
func (l *ledger) compare(t *testing.T, s *server) *nbd.Client {
	t.Helper()
	c, err := nbd.Dial(s.uri, nbd.ClientOptions{})
	if err != nil {
		t.Fatal(err)
	}
	l.settle(t, c)
	return c
}

// writeBase makes a backing file in which every block holds generation 0.
func (l *ledger) writeBase(t *testing.T, name string) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, killBlock)
	for i := range l.blocks {
		for s := range sectors {
			content(0).tag(buf[s*storage.SectorSize:][:storage.SectorSize], i, s)
		}
		if _, err := f.WriteAt(buf, int64(i)*killStride); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(killSize); err != nil {
		t.Fatal(err)
	}
}
