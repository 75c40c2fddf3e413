package qcow2

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/platter-disk/platter/storage"
)

// operationCost is what an operation of a guest may cost under a discipline: barriers, the guest's flush
// included.
type operationCost struct {
	operation  string
	batch      int // writes before the flush
	prepare    func(t *testing.T, how string) (*Image, *countingFile)
	discipline string
	syncs      float64
}

// TestCostOfDisciplines holds every discipline to the number of barriers that it promises for an operation in
// steady state (docs/disciplines.md). What is set aside in batches may add a twentieth.
func TestCostOfDisciplines(t *testing.T) {
	withoutRace(t)
	const most = 1.05
	for _, c := range []operationCost{
		{"allocating write", 1, emptyDisk, Synchronous, 2},
		{"allocating write", 1, emptyDisk, Ordered, 1},
		{"allocating write", 1, emptyDisk, Lazy, 1},
		{"allocating write", 1, emptyDisk, Journal, 1},
		{"allocating write", 64, emptyDisk, Synchronous, 2 * 64},
		{"allocating write", 64, emptyDisk, Ordered, 1},
		{"allocating write", 64, emptyDisk, Lazy, 1},
		{"allocating write", 64, emptyDisk, Journal, 1},
		{"overlay copy-on-write", 1, overlayDisk, Synchronous, 2},
		{"overlay copy-on-write", 1, overlayDisk, Ordered, 2},
		{"overlay copy-on-write", 1, overlayDisk, Lazy, 2},
		{"overlay copy-on-write", 1, overlayDisk, Journal, 2},
		{"overlay copy-on-write", 64, overlayDisk, Synchronous, 2 * 64},
		{"overlay copy-on-write", 64, overlayDisk, Ordered, 2},
		{"overlay copy-on-write", 64, overlayDisk, Lazy, 2},
		{"overlay copy-on-write", 64, overlayDisk, Journal, 2},
		{"snapshot copy-on-write", 1, snapshottedDisk, Synchronous, 3},
		{"snapshot copy-on-write", 1, snapshottedDisk, Ordered, 2},
		{"snapshot copy-on-write", 1, snapshottedDisk, Lazy, 2},
		{"snapshot copy-on-write", 1, snapshottedDisk, Journal, 2},
		{"snapshot copy-on-write", 64, snapshottedDisk, Synchronous, 3 * 64},
		{"snapshot copy-on-write", 64, snapshottedDisk, Ordered, 2},
		{"snapshot copy-on-write", 64, snapshottedDisk, Lazy, 2},
		{"snapshot copy-on-write", 64, snapshottedDisk, Journal, 2},
	} {
		t.Run(fmt.Sprintf("%d %s/%s", c.batch, c.operation, c.discipline), func(t *testing.T) {
			im, f := c.prepare(t, c.discipline)
			r := rand.New(rand.NewPCG(7, 7))
			clusters := r.Perm(costClusters)
			flushes := costClusters / 2 / c.batch
			syncs := func(flushes int) float64 {
				f.reset()
				for range flushes {
					writeClusters(t, im, clusters[:c.batch])
					clusters = clusters[c.batch:]
				}
				return float64(f.syncs.Load()) / float64(flushes)
			}
			syncs(flushes) // L2 tables come into being, and what is set aside ahead grows to the guest's pace
			if got := syncs(flushes); got > c.syncs*most {
				t.Errorf("%.3f barriers, want %v", got, c.syncs)
			}
		})
	}
}

const (
	costClusters = 1024     // guest clusters that operations are spread over
	costCluster  = 16 << 10 // bytes
	costDisk     = costClusters * costCluster
)

// writeClusters writes a part of each guest cluster and flushes once.
func writeClusters(t testing.TB, im *Image, clusters []int) {
	t.Helper()
	buf := make([]byte, 4096)
	for i := range buf {
		buf[i] = byte(i) | 1
	}
	for _, c := range clusters {
		if _, err := im.WriteAt(buf, int64(c)*im.geo.clusterSize+4096); err != nil {
			t.Fatal(err)
		}
	}
	if err := im.Flush(); err != nil {
		t.Fatal(err)
	}
}

func emptyDisk(t *testing.T, how string) (*Image, *countingFile) {
	return costImage(t, CreateOptions{Size: costDisk, ClusterSize: costCluster}, Options{Discipline: how})
}

func overlayDisk(t *testing.T, how string) (*Image, *countingFile) {
	return costImage(t,
		CreateOptions{Size: costDisk, ClusterSize: costCluster, BackingFile: "base", BackingFormat: "raw", BackingSize: costDisk},
		Options{Discipline: how, Backing: fullDevice{size: costDisk}})
}

// snapshottedDisk is full of data that a snapshot shares.
func snapshottedDisk(t *testing.T, how string) (*Image, *countingFile) {
	file := storage.NewMemory("image")
	if err := Create(file, CreateOptions{Size: costDisk, ClusterSize: costCluster}); err != nil {
		t.Fatal(err)
	}
	im, err := Open(keepOpen{file}, Options{Discipline: Ordered})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := im.WriteAt(bytes.Repeat([]byte{0x5a}, costDisk), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := im.CreateSnapshot("before", SnapshotOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	f := &countingFile{File: file}
	if im, err = Open(f, Options{Discipline: how}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := im.Close(); err != nil {
			t.Error(err)
		}
	})
	return im, f
}
