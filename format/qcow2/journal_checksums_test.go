package qcow2

import (
	"bytes"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/storage"
)

func overlayOf(size int64) CreateOptions {
	return CreateOptions{Size: size, ClusterSize: costCluster, BackingFile: "base", BackingFormat: "raw", BackingSize: size}
}

func checkedOverlay(t testing.TB) (*Image, *countingFile) {
	t.Helper()
	return costImage(t, overlayOf(costDisk),
		Options{Discipline: Journal, JournalDataChecksums: true, JournalCommitInterval: -1, Backing: fullDevice{size: costDisk}})
}

// TestCostOfDataChecksums: a copy-on-write and a flush are one barrier; so are many copy-on-writes, up to the bytes
// that are worth a checksum.
func TestCostOfDataChecksums(t *testing.T) {
	withoutRace(t)
	for _, c := range []struct {
		batch int
		syncs float64
	}{{1, 1}, {64, 1}, {2 * maxSummedBytes / costCluster, 2}} {
		im, f := checkedOverlay(t)
		clusters := rand.New(rand.NewPCG(7, 7)).Perm(costClusters)
		writeClusters(t, im, clusters[:c.batch]) // the L2 tables come into being
		clusters = clusters[c.batch:]
		f.reset()
		flushes := min(len(clusters)/c.batch, 200)
		for range flushes {
			writeClusters(t, im, clusters[:c.batch])
			clusters = clusters[c.batch:]
		}
		if got := float64(f.syncs.Load()) / float64(flushes); got > c.syncs*1.05 {
			t.Errorf("%d copy-on-writes and a flush: %.3f barriers, want %v", c.batch, got, c.syncs)
		}
	}
}

// TestOverwriteWaitsForProof: what the newest flush exposed is overwritten only after a barrier, once; what an
// older one did is overwritten at once, and so is what nobody flushed.
func TestOverwriteWaitsForProof(t *testing.T) {
	im, f := checkedOverlay(t)
	p := bytes.Repeat([]byte{3}, costCluster)
	step := func(what string, barriers int64, do func() error) {
		t.Helper()
		f.reset()
		if err := do(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if n := f.syncs.Load(); n != barriers {
			t.Errorf("%s: %d barriers, want %d", what, n, barriers)
		}
	}
	write := func(cluster int64) func() error {
		return func() error { _, err := im.WriteAt(p, cluster*costCluster); return err }
	}
	if err := write(9)(); err != nil { // the L2 table comes into being, and the session of the journal
		t.Fatal(err)
	}
	if err := im.Flush(); err != nil {
		t.Fatal(err)
	}
	step("copy-on-write", 0, write(0))
	step("flush", 1, im.Flush)
	step("overwrite of it", 1, write(0))
	step("and again", 0, write(0))
	step("flush", 1, im.Flush)
	step("copy-on-write of another", 0, write(1))
	step("overwrite before the flush", 0, write(1))
	step("flush, with the barrier in front", 2, im.Flush)
	step("copy-on-write of a third", 0, write(2))
	step("flush", 1, im.Flush)
	step("copy-on-write of a fourth", 0, write(3))
	step("flush", 1, im.Flush)
	step("overwrite of the third", 0, write(2))
	step("overwrite of the fourth", 1, write(3))
	step("copy-on-write of a fifth", 0, write(4))
	step("which is discarded", 0, func() error { return im.Discard(4*costCluster, costCluster) })
	step("flush, with the barrier in front", 2, im.Flush)
}

// TestModelWithDataChecksums runs random requests with data checksums and compares them with plain bytes, also
// after the image was left behind in the middle and recovered.
func TestModelWithDataChecksums(t *testing.T) {
	for _, create := range []CreateOptions{
		{Size: 1 << 20, ClusterSize: 4096},
		{Size: 1 << 20, ClusterSize: 16384, ExtendedL2: true},
		{Size: 64 << 10, ClusterSize: 512},
	} {
		create.Version, create.RefcountBits = 3, 16
		create.BackingFile, create.BackingFormat, create.BackingSize = "base", "raw", create.Size
		file, backing := storage.NewMemory("image"), newBacking(5, create.Size)
		if err := Create(file, create); err != nil {
			t.Fatal(err)
		}
		open := func() *Image {
			im, err := Open(keepOpen{file}, Options{
				Discipline: Journal, JournalDataChecksums: true, JournalSize: 1, JournalCommitInterval: -1, Discard: true, Backing: backing,
			})
			if err != nil {
				t.Fatal(err)
			}
			return im
		}
		want := bytes.Clone(backing.bytes)
		r := rand.New(rand.NewPCG(6, uint64(create.ClusterSize)))
		im := open()
		for i := range 1500 {
			off := r.Int64N(create.Size/sectorSize) * sectorSize
			n := min(sectorSize*(1+r.Int64N(24)), create.Size-off)
			var err error
			switch r.IntN(8) {
			case 0, 1, 2, 3:
				p := bytes.Repeat([]byte{byte(i) | 1}, int(n))
				copy(want[off:], p)
				_, err = im.WriteAt(p, off)
			case 4:
				clear(want[off : off+n])
				err = im.WriteZeroes(off, n, 0)
			default:
				err = im.Flush()
			}
			if i%300 == 299 {
				if err = im.Flush(); err == nil {
					im.discipline.(*journal).inPlace.Wait() // a crash would have stopped it; here it must not write later
					im = open()                             // the one before is abandoned
				}
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		got := make([]byte, len(want))
		if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("cluster size %d: the disk differs from the model (%v)", create.ClusterSize, err)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		if res, err := Check(file, CheckOptions{}); err != nil || !res.Clean() {
			t.Errorf("cluster size %d: check: %+v, %v", create.ClusterSize, res, err)
		}
	}
}

// TestFaultsWithDataChecksums is TestFaults for the discipline Journal with data checksums.
func TestFaultsWithDataChecksums(t *testing.T) {
	cfg := faultConfig{
		name: "checksums", create: CreateOptions{Size: 128 << 10, Version: 3, ClusterSize: 4096, RefcountBits: 16}, backed: true,
		options: Options{Discard: true, JournalDataChecksums: true, JournalCommitInterval: -1},
	}
	limit := envInt(t, "PLATTER_FAULTS", fewer(20))
	for _, f := range []crashlab.Fault{
		{Kind: crashlab.KindWrite, Err: syscall.EIO},
		{Kind: crashlab.KindWrite, Err: syscall.ENOSPC, Onward: true},
		{Kind: crashlab.KindSync, Err: syscall.EIO},
		{Kind: crashlab.KindRead, Err: syscall.EIO}, // also the reads that checksums are computed from
	} {
		err := crashlab.ForEachFault([]crashlab.Fault{f}, limit, func(in *crashlab.Injector) error {
			return within(time.Minute, func() error { return surviveFault(cfg, Journal, in) })
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// TestDataChecksumsAtOnce has several clients copy up, flush and overwrite at the same time, through a journal so
// small that checkpoints run all the while; what they flushed is there after the image was left behind.
func TestDataChecksumsAtOnce(t *testing.T) {
	const clients, part = 6, 64 << 10
	create := CreateOptions{Size: clients * part, Version: 3, ClusterSize: 4096, BackingFile: "base", BackingFormat: "raw", BackingSize: clients * part}
	file, backing := storage.NewMemory("image"), newBacking(3, create.Size)
	if err := Create(file, create); err != nil {
		t.Fatal(err)
	}
	o := Options{Discipline: Journal, JournalDataChecksums: true, JournalSize: 1, JournalCommitInterval: -1, Discard: true, Backing: backing}
	im, err := Open(keepOpen{file}, o)
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Clone(backing.bytes)
	client := func(id int64) error {
		r := rand.New(rand.NewPCG(9, uint64(id)))
		for i := range 150 {
			off := id*part + r.Int64N(part/sectorSize-6)*sectorSize
			p := bytes.Repeat([]byte{byte(i) | 1}, sectorSize*(1+r.IntN(6)))
			if _, err := im.WriteAt(p, off); err != nil {
				return err
			}
			copy(want[off:], p)
			switch r.IntN(6) {
			case 0, 1:
				if err := im.Flush(); err != nil {
					return err
				}
			case 2:
				at := off &^ 4095
				if err := im.Discard(at, 4096); err != nil {
					return err
				}
				clear(want[at : at+4096])
			}
		}
		return im.Flush()
	}
	var g errgroup.Group
	for id := range int64(clients) {
		g.Go(func() error { return client(id) })
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	im.discipline.(*journal).inPlace.Wait() // a crash would have stopped it
	if im, err = Open(keepOpen{file}, o); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the recovered disk differs from what was flushed (%v)", err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if res, err := Check(file, CheckOptions{}); err != nil || !res.Clean() {
		t.Errorf("check: %+v, %v", res, err)
	}
}

// TestProofIsPaidOnce: a guest that copies up and overwrites without a flush waits once, for what it flushed before.
func TestProofIsPaidOnce(t *testing.T) {
	im, f := checkedOverlay(t)
	p := bytes.Repeat([]byte{3}, costCluster)
	write := func(cluster int64) {
		if _, err := im.WriteAt(p, cluster*costCluster); err != nil {
			t.Fatal(err)
		}
	}
	write(0)
	if err := im.Flush(); err != nil {
		t.Fatal(err)
	}
	f.reset()
	for cluster := range int64(40) {
		write(cluster + 1)
		write(cluster)
	}
	if n := f.syncs.Load(); n > 1 {
		t.Errorf("%d barriers for writes without a flush, want 1", n)
	}
}
