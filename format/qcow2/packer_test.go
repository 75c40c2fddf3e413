package qcow2

import (
	"bytes"
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
