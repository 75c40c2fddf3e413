package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
)

// boundedFile is a file on a file system with a limit on the size of files.
type boundedFile struct{ storage.File }

const boundedSize = 1 << 44

func (f boundedFile) WriteAt(p []byte, off int64) (int, error) {
	if off > boundedSize-int64(len(p)) {
		return 0, syscall.EFBIG
	}
	return f.File.WriteAt(p, off)
}

func (f boundedFile) Truncate(size int64) error {
	if size > boundedSize {
		return syscall.EFBIG
	}
	return f.File.Truncate(size)
}

func (boundedFile) Close() error { return nil }

// victim is a sound image that others are made of by damaging it.
type victim struct {
	name   string
	file   *storage.Memory
	header *Header
	places []hostOff // of everything that is worth damaging: tables, blocks, compressed data, journal
}

// victims makes images with every kind of structure in them.
func victims(t testing.TB) []*victim {
	t.Helper()
	var all []*victim
	add := func(name string, o CreateOptions, how string, finish bool) {
		o.Size = max(o.Size, 1<<20)
		f := storage.NewMemory(name)
		if err := Create(f, o); err != nil {
			t.Fatal(err)
		}
		im, err := Open(keepOpen{f}, Options{Discipline: how, JournalCommitInterval: -1})
		if err != nil {
			t.Fatal(err)
		}
		cs := im.geo.clusterSize
		work := func(seed byte) {
			for i := int64(0); i < 6; i++ {
				if _, err := im.WriteAt(bytes.Repeat([]byte{seed + byte(i)}, int(cs)+700), i*3*cs); err != nil {
					t.Fatal(err)
				}
			}
			if err := im.WriteCompressed(bytes.Repeat([]byte{seed, 5}, int(cs/2)), 30*cs); err != nil {
				t.Fatal(err)
			}
			if err := im.WriteZeroes(40*cs, 2*cs, 0); err != nil {
				t.Fatal(err)
			}
		}
		work(1)
		if how == Ordered {
			if _, err := im.CreateSnapshot("before", SnapshotOptions{}); err != nil {
				t.Fatal(err)
			}
			work(100)
		}
		if err := im.Flush(); err != nil {
			t.Fatal(err)
		}
		if finish {
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
		}
		all = append(all, newVictim(t, name, f))
	}
	v3 := CreateOptions{Version: 3, ClusterSize: 4096, RefcountBits: 16}
	add("plain", v3, Ordered, true)
	add("version 2", CreateOptions{Version: 2, ClusterSize: 512, RefcountBits: 16}, Ordered, true)
	add("zstd", CreateOptions{Version: 3, ClusterSize: 65536, RefcountBits: 1, CompressionType: "zstd", Size: 4 << 20}, Synchronous, true)
	add("extended", CreateOptions{Version: 3, ClusterSize: 16384, RefcountBits: 64, ExtendedL2: true}, Ordered, true)
	add("dirty", v3, Lazy, false)
	add("journal", v3, Journal, false)
	return all
}

func newVictim(t testing.TB, name string, f *storage.Memory) *victim {
	t.Helper()
	h, err := ReadHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	v := &victim{name: name, file: f, header: h}
	v.places = []hostOff{0, 24, 72, 112, hostOff(h.L1Offset), hostOff(h.RefcountTableOffset), hostOff(h.SnapshotsOffset)}
	g := newGeometry(h)
	word := func(at hostOff) uint64 {
		var p [8]byte
		if err := storage.ReadFull(f, p[:], int64(at)); err != nil {
			t.Fatal(err)
		}
		return binary.BigEndian.Uint64(p[:])
	}
	for i := range hostOff(min(h.L1Size, 4)) {
		table := l1Entry(word(hostOff(h.L1Offset) + i*8)).offset()
		if table == 0 {
			continue
		}
		v.places = append(v.places, table)
		for k := range hostOff(min(g.l2Entries(), 48)) {
			at := table + k*hostOff(g.entrySize())
			if e := l2Entry(word(at)); e != 0 {
				v.places = append(v.places, at)
				if e.compressed() {
					stream, _ := g.compressedRange(e)
					v.places = append(v.places, stream)
				}
			}
		}
	}
	for i := range hostOff(2) {
		if at := hostOff(word(hostOff(h.RefcountTableOffset)+i*8) &^ 511); at != 0 {
			v.places = append(v.places, at)
		}
	}
	if h.Journal != nil {
		for i := range hostOff(6) {
			v.places = append(v.places, hostOff(h.Journal.Offset)+i<<h.Journal.BlockOrder)
		}
	}
	return v
}

func (v *victim) clone(t testing.TB) *storage.Memory {
	t.Helper()
	size, err := v.file.Size()
	if err != nil {
		t.Fatal(err)
	}
	c := storage.NewMemory(v.name)
	p := make([]byte, 4096)
	for off := int64(0); off < size; off += int64(len(p)) {
		if err := storage.ReadFull(v.file, p, off); err != nil {
			t.Fatal(err)
		}
		if len(bytes.Trim(p, "\x00")) > 0 {
			if _, err := c.WriteAt(p[:min(int64(len(p)), size-off)], off); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := c.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return c
}

// damage changes one to four things and tells which.
func (v *victim) damage(t testing.TB, f storage.File, r *rand.Rand) string {
	t.Helper()
	var log strings.Builder
	for range 1 + r.IntN(4) {
		at := v.places[r.IntN(len(v.places))]
		if r.IntN(2) == 0 {
			at += hostOff(r.IntN(64) * 4)
		}
		var p [8]byte
		if err := storage.ReadFull(f, p[:], int64(at)); err != nil {
			t.Fatal(err)
		}
		old := binary.BigEndian.Uint64(p[:])
		now := old
		switch r.IntN(6) {
		case 0, 1:
			now ^= 1 << r.IntN(64)
		case 2:
			now = uint64(v.places[r.IntN(len(v.places))]) &^ 511
			now |= uint64(r.IntN(2)) << 63
		case 3:
			now = r.Uint64() >> r.IntN(64)
		case 4:
			now = ^uint64(0)
		case 5:
			now = 0
		}
		binary.BigEndian.PutUint64(p[:], now)
		if _, err := f.WriteAt(p[:], int64(at)); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&log, " %#x: %016x -> %016x;", at, old, now)
	}
	return log.String()
}

// exercise opens an image whatever is in it and uses everything a device has. What fails may fail; the caller
// watches for panics and hangs.
func exercise(f storage.File, o Options, r *rand.Rand, steps int) error {
	im, err := Open(boundedFile{f}, o)
	if err != nil {
		return err
	}
	size := im.Size()
	span := min(size, 4<<20)
	var firsts []error
	note := func(err error) {
		if err != nil && len(firsts) < 20 {
			firsts = append(firsts, err)
		}
	}
	buf := make([]byte, 150000)
	for range steps {
		if span == 0 {
			break
		}
		off := r.Int64N(span)
		if r.IntN(8) == 0 {
			off = r.Int64N(size)
		}
		n := min(1+r.Int64N(int64(len(buf))), size-off)
		switch r.IntN(11) {
		case 0, 1:
			_, err := im.ReadAt(buf[:n], off)
			note(err)
		case 2, 3, 4:
			_, err := im.WriteAt(buf[:n], off)
			note(err)
		case 5:
			note(im.WriteZeroes(off, n, block.ZeroFlags(r.IntN(4))))
		case 6:
			note(im.Discard(off, n))
		case 7:
			cs := im.geo.clusterSize
			off = off / cs * cs
			note(im.WriteCompressed(make([]byte, min(cs, size-off)), off))
		case 8:
			note(im.Flush())
		case 9:
			note(im.Extents(off, n, func(block.Extent) bool { return true }))
			note(im.TryReadAt(buf[:n], off))
		case 10:
			if r.IntN(4) == 0 && size < 1<<40 {
				note(im.Resize(size+int64(r.IntN(1<<20))&^511, block.Preallocation(r.IntN(4))))
			}
		}
	}
	note(im.Close())
	return errors.Join(firsts...)
}

// hostileMemory bounds what opening and using a hostile image may allocate altogether. Most of it is request
// buffers and L1 tables that are within their limit.
const hostileMemory = 1 << 30

func survive(t testing.TB, f storage.File, o Options, r *rand.Rand, what string) error {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	defer func() {
		if p := recover(); p != nil {
			t.Errorf("%s: panic %v", what, p)
			panic(p)
		}
	}()
	var result error
	timer := time.AfterFunc(testenv.Patience, func() { panic("a hang: " + what) })
	result = exercise(f, o, r, 40)
	timer.Stop()
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > hostileMemory {
		t.Errorf("%s: %d bytes allocated", what, n)
	}
	return result
}

// TestHostile damages sound images at random, mostly where it hurts, and uses them: no panic, no hang, bounded
// memory, and what decides where the image's references lead stays as it was.
func TestHostile(t *testing.T) {
	rounds := envInt(t, "PLATTER_HOSTILE", fewer(60))
	for _, v := range victims(t) {
		t.Run(v.name, func(t *testing.T) {
			for seed := range rounds {
				r := rand.New(rand.NewPCG(uint64(seed), 99))
				f := v.clone(t)
				what := fmt.Sprintf("%s, seed %d:%s", v.name, seed, v.damage(t, f, r))
				var name [24]byte
				if err := storage.ReadFull(f, name[:], 0); err != nil {
					t.Fatal(err)
				}
				survive(t, f, Options{ReadOnly: true, NoBacking: true}, r, what+" read-only")
				o := Options{NoBacking: true, Discard: true}
				if seed%2 == 0 {
					o.L2CacheSize, o.RefcountCacheSize = 1, 1
				}
				survive(t, f, o, r, what)
				now := name
				if err := storage.ReadFull(f, now[:], 0); err != nil {
					t.Fatal(err)
				}
				if now != name && !slices.Contains([]string{"journal"}, v.name) {
					t.Errorf("%s: the start of the header changed from %x to %x", what, name, now)
				}
			}
		})
	}
}

// TestHostileReferences damages a sound image in ways that would have the engine destroy its own metadata. Each
// is refused, when the image is opened for writing or when the damage would be done, with an error that says
// where; the tables stay as they are, and reading goes on.
func TestHostileReferences(t *testing.T) {
	const cs = 4096
	type damage struct {
		name string
		do   func(v *victim, put func(at hostOff, word uint64), word func(at hostOff) uint64)
	}
	for _, d := range []damage{
		{"a data cluster is the L1 table", func(v *victim, put func(hostOff, uint64), word func(hostOff) uint64) {
			put(l1Entry(word(hostOff(v.header.L1Offset))).offset(), v.header.L1Offset|entryCopied)
		}},
		{"a data cluster is a refcount block", func(v *victim, put func(hostOff, uint64), word func(hostOff) uint64) {
			put(l1Entry(word(hostOff(v.header.L1Offset))).offset(), word(hostOff(v.header.RefcountTableOffset))|entryCopied)
		}},
		{"a compressed cluster is the header", func(v *victim, put func(hostOff, uint64), word func(hostOff) uint64) {
			put(l1Entry(word(hostOff(v.header.L1Offset))).offset(), entryCompressed)
		}},
		{"an L2 table is its own cluster", func(v *victim, put func(hostOff, uint64), word func(hostOff) uint64) {
			table := l1Entry(word(hostOff(v.header.L1Offset))).offset()
			put(table, uint64(table)|entryCopied)
		}},
		{"an L2 table is the refcount table", func(v *victim, put func(hostOff, uint64), word func(hostOff) uint64) {
			put(hostOff(v.header.L1Offset), v.header.RefcountTableOffset|entryCopied)
		}},
		{"an L2 table lies past the end", func(v *victim, put func(hostOff, uint64), _ func(hostOff) uint64) {
			put(hostOff(v.header.L1Offset), 1<<40|entryCopied)
		}},
		{"the refcount table is its own block", func(v *victim, put func(hostOff, uint64), _ func(hostOff) uint64) {
			put(hostOff(v.header.RefcountTableOffset), v.header.RefcountTableOffset)
		}},
		{"nothing is counted", func(v *victim, put func(hostOff, uint64), word func(hostOff) uint64) {
			block := hostOff(word(hostOff(v.header.RefcountTableOffset)))
			for at := block; at < block+cs; at += 8 {
				put(at, 0)
			}
		}},
	} {
		for _, how := range Disciplines() {
			t.Run(d.name+"/"+how, func(t *testing.T) {
				f := storage.NewMemory("image")
				if err := Create(f, CreateOptions{Size: 1 << 20, Version: 3, ClusterSize: cs, RefcountBits: 16}); err != nil {
					t.Fatal(err)
				}
				im, err := Open(keepOpen{f}, Options{})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := im.WriteAt(bytes.Repeat([]byte{7}, 5*cs), 0); err != nil {
					t.Fatal(err)
				}
				if err := im.Close(); err != nil {
					t.Fatal(err)
				}
				v := newVictim(t, "image", f)
				put := func(at hostOff, word uint64) {
					if _, err := f.WriteAt(binary.BigEndian.AppendUint64(nil, word), int64(at)); err != nil {
						t.Fatal(err)
					}
				}
				word := func(at hostOff) uint64 {
					var p [8]byte
					if err := storage.ReadFull(f, p[:], int64(at)); err != nil {
						t.Fatal(err)
					}
					return binary.BigEndian.Uint64(p[:])
				}
				d.do(v, put, word)
				before := [][]byte{make([]byte, 24), make([]byte, 8), make([]byte, 8)}
				places := []int64{0, int64(v.header.L1Offset), int64(v.header.RefcountTableOffset)}
				for i, p := range before {
					if err := storage.ReadFull(f, p, places[i]); err != nil {
						t.Fatal(err)
					}
				}
				refused := func() error {
					im, err := Open(keepOpen{f}, Options{Discard: true, Discipline: how})
					if err != nil {
						return err
					}
					defer im.Close()
					for _, do := range []func() error{
						func() error { return im.Discard(0, 2*cs) },
						func() error { _, err := im.WriteAt(make([]byte, 40*cs), cs); return err },
						im.Flush,
					} {
						if err := do(); err != nil {
							return err
						}
					}
					return nil
				}()
				var bad *FormatError
				if !errors.As(refused, &bad) {
					t.Errorf("the damage is not noticed: %v", refused)
				}
				for i, p := range before {
					now := make([]byte, len(p))
					if err := storage.ReadFull(f, now, places[i]); err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(now, p) {
						t.Errorf("metadata at offset %#x changed from %x to %x", places[i], p, now)
					}
				}
				ro, err := Open(keepOpen{f}, Options{ReadOnly: true})
				if err != nil {
					t.Fatalf("read-only: %v", err)
				}
				if _, err := ro.ReadAt(make([]byte, 512), 3*cs); err != nil && !errors.As(err, &bad) {
					t.Errorf("read: %v", err)
				}
				if err := ro.Close(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestReleasedTwice: two entries claim the same cluster, whose count is 1. Giving both up must not put the
// cluster into the reserve twice, where it would be handed out twice.
func TestReleasedTwice(t *testing.T) {
	for _, how := range Disciplines() {
		t.Run(how, func(t *testing.T) {
			f := storage.NewMemory("image")
			if err := Create(f, CreateOptions{Size: 1 << 20, ClusterSize: 4096}); err != nil {
				t.Fatal(err)
			}
			open := func() *Image {
				im, err := Open(keepOpen{f}, Options{Discipline: how, Reserve: 4})
				if err != nil {
					t.Fatal(err)
				}
				return im
			}
			im := open()
			if _, err := im.WriteAt(bytes.Repeat([]byte{1}, 4096), 0); err != nil {
				t.Fatal(err)
			}
			table, _, _, err := im.l2Word(0)
			if err != nil {
				t.Fatal(err)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			var word [8]byte
			if _, err := f.ReadAt(word[:], int64(table)); err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt(word[:], int64(table)+8); err != nil {
				t.Fatal(err)
			}

			im = open()
			defer im.Close()
			err = im.Discard(0, 2*4096)
			if err == nil {
				err = im.Flush()
			}
			if err == nil {
				t.Fatal("the cluster was given up twice without a complaint")
			}
			if _, err := im.WriteAt(word[:], 8192); err == nil {
				t.Error("the image took another change")
			}
		})
	}
}

// Blocks full of counts say that a great deal past the end of the file is in use. Looking for a free cluster gives
// up soon.
func TestCountsPastTheEnd(t *testing.T) {
	const cluster, blocks = 512, 1000 // a block of 1 bit counts describes 4096 clusters
	f := storage.NewMemory("stray")
	if err := Create(f, CreateOptions{Size: 1 << 20, ClusterSize: cluster, RefcountBits: 1}); err != nil {
		t.Fatal(err)
	}
	h, err := ReadHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	end, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	at := (end + cluster - 1) / cluster * cluster
	full := bytes.Repeat([]byte{0xff}, cluster)
	table := read(t, f, int64(h.RefcountTableOffset), 8)
	writeAll(t, f, full, int64(binary.BigEndian.Uint64(table)))
	for i := range int64(blocks) {
		table = binary.BigEndian.AppendUint64(table, uint64(at+i*cluster))
		writeAll(t, f, full, at+i*cluster)
	}
	table = append(table, make([]byte, -len(table)&(cluster-1))...)
	tableAt := at + blocks*cluster
	writeAll(t, f, table, tableAt)
	writeAll(t, f, binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(nil, uint64(tableAt)), uint32(len(table)/cluster)), 48)

	im, err := Open(keepOpen{f}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	var bad *FormatError
	if _, err := im.WriteAt([]byte("x"), 0); !errors.As(err, &bad) || bad.Field != "reference counts" {
		t.Errorf("writing to an image whose counts go on past the end of its file: %v", err)
	}
	if most := maxStrayCounts/(8*cluster) + 8; len(im.alloc.refs.order) > most {
		t.Errorf("%d refcount blocks were read, want at most %d of %d", len(im.alloc.refs.order), most, blocks)
	}
}

func read(t *testing.T, f storage.File, off, n int64) []byte {
	t.Helper()
	p := make([]byte, n)
	if err := storage.ReadFull(f, p, off); err != nil {
		t.Fatal(err)
	}
	return p
}

func writeAll(t *testing.T, f storage.File, p []byte, off int64) {
	t.Helper()
	if _, err := f.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}
