package qcow2

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/platter-disk/platter/storage"
)

// TestPackerAbandons: a stream whose write fails leaves its cluster to those that were placed behind it meanwhile,
// whether they are linked by then or not.
func TestPackerAbandons(t *testing.T) {
	for _, how := range []string{Synchronous, Ordered, Lazy} {
		for _, linkedFirst := range []bool{false, true} {
			name := how + "/linked later"
			if linkedFirst {
				name = how + "/linked before"
			}
			t.Run(name, func(t *testing.T) {
				const cluster = 4096
				f := storage.NewMemory("image")
				if err := Create(f, CreateOptions{Size: 4 << 20, ClusterSize: cluster}); err != nil {
					t.Fatal(err)
				}
				im, err := Open(keepOpen{f}, Options{Discipline: how})
				if err != nil {
					t.Fatal(err)
				}
				want := bytes.Repeat([]byte{0xab}, cluster)
				var stream bytes.Buffer
				if err := im.codec.compress(&stream, want); err != nil {
					t.Fatal(err)
				}
				if err := im.ownL2(0); err != nil {
					t.Fatal(err)
				}
				place := func() placement {
					im.mu.Lock()
					defer im.mu.Unlock()
					p, err := im.alloc.place(int64(stream.Len()))
					if err != nil {
						t.Fatal(err)
					}
					return p
				}
				end := func(p placement, linked bool) {
					im.mu.Lock()
					defer im.mu.Unlock()
					if err := im.alloc.placed(p, linked); err != nil {
						t.Fatal(err)
					}
				}
				fails, other := place(), place()
				if other.shared != fails.own.start {
					t.Fatalf("the streams share no cluster: %+v, %+v", fails, other)
				}
				steps := []func(){
					func() { end(fails, false) },
					func() {
						if err := im.linkPlaced(stream.Bytes(), 0, mapping{}, other); err != nil {
							t.Fatal(err)
						}
						end(other, true)
					},
				}
				if linkedFirst {
					steps[0], steps[1] = steps[1], steps[0]
				}
				for i, step := range steps {
					step()
					plain := bytes.Repeat([]byte{byte(1 + i)}, 1<<20)
					if _, err := im.WriteAt(plain, int64(1+i)<<20); err != nil {
						t.Fatal(err)
					}
				}
				im.inflated.forget()
				got := make([]byte, cluster)
				if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
					t.Errorf("the stream behind the one that failed is lost: %v", err)
				}
				if err := im.Close(); err != nil {
					t.Fatal(err)
				}
				checkClean(t, f)
			})
		}
	}
}

// TestPackerKeeps: a cluster whose last user goes away while another stream is on its way there stays, under every
// discipline and however often metadata becomes durable meanwhile, until that stream is linked and gone or given up.
func TestPackerKeeps(t *testing.T) {
	const cluster = 4096
	want := bytes.Repeat([]byte{0xcd}, cluster)
	for _, how := range Disciplines() {
		for _, linked := range []bool{false, true} {
			for flushes := range 4 { // bit 0: before the stream is linked, bit 1: afterwards
				t.Run(fmt.Sprintf("%s/linked=%v/flushes=%d", how, linked, flushes), func(t *testing.T) {
					f := storage.NewMemory("image")
					if err := Create(f, CreateOptions{Size: 4 << 20, ClusterSize: cluster}); err != nil {
						t.Fatal(err)
					}
					im, err := Open(keepOpen{f}, Options{Discipline: how, JournalSize: 1})
					if err != nil {
						t.Fatal(err)
					}
					flush := func(bit int) {
						if flushes&bit == 0 {
							return
						}
						if err := im.Flush(); err != nil {
							t.Fatal(err)
						}
					}
					var stream bytes.Buffer
					if err := im.codec.compress(&stream, want); err != nil {
						t.Fatal(err)
					}
					if err := im.WriteCompressed(bytes.Repeat([]byte{1}, cluster), 0); err != nil {
						t.Fatal(err)
					}
					im.mu.Lock()
					p, err := im.alloc.place(int64(stream.Len()))
					im.mu.Unlock()
					if err != nil || p.shared == 0 {
						t.Fatalf("the streams share no cluster: %+v, %v", p, err)
					}
					if err := im.Discard(0, cluster); err != nil {
						t.Fatal(err)
					}
					flush(1)
					if linked {
						if err := im.linkPlaced(stream.Bytes(), cluster, mapping{}, p); err != nil {
							t.Fatal(err)
						}
					}
					im.mu.Lock()
					err = im.alloc.placed(p, linked)
					im.mu.Unlock()
					if err != nil {
						t.Fatal(err)
					}
					flush(2)
					for i := range 3 {
						if _, err := im.WriteAt(bytes.Repeat([]byte{byte(2 + i)}, 1<<20), int64(1+i)<<20); err != nil {
							t.Fatal(err)
						}
						flush(2)
					}
					im.inflated.forget()
					got := make([]byte, cluster)
					if _, err := im.ReadAt(got, cluster); err != nil || bytes.Equal(got, want) != linked {
						t.Errorf("the stream holds something else: %v", err)
					}
					if err := strandedClusters(im); err != nil {
						t.Error(err)
					}
					if err := im.Close(); err != nil {
						t.Fatal(err)
					}
					checkClean(t, f)
				})
			}
		}
	}
}
