package jobs_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/jobs"
	"github.com/platter-disk/platter/storage"
)

// backup copies the disk that an image holds, with everything below it, into a new qcow2 image at target.
//
// share is for a disk that another process is writing; without it such a disk is refused with storage.ErrLocked. What is
// read then is from no single moment, and may be nothing that the disk ever held, as its tables change meanwhile: have
// the machine paused and its disk flushed, or see backupRunning.
func backup(ctx context.Context, source, target string, share bool, progress func(done, total int64)) error {
	src, err := image.Open(ctx, source, image.Options{ReadOnly: true, Share: share})
	if err != nil {
		return err
	}
	defer src.Close()
	return copyOut(ctx, src, target, progress)
}

// backupRunning does the same for a qcow2 disk that this process has open and may be serving: what it holds now, whatever
// is written to it meanwhile.
func backupRunning(ctx context.Context, disk *image.Image, target string, progress func(done, total int64)) (err error) {
	q := disk.Qcow2()
	if q == nil {
		return fmt.Errorf("%s: a disk in format %s has no snapshots", disk.Name(), disk.Format())
	}
	moment, err := q.CreateSnapshot("backup", qcow2.SnapshotOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, q.DeleteSnapshot(moment.ID)) }()
	src, err := q.SnapshotDevice(moment.ID)
	if err != nil {
		return err
	}
	defer src.Close()
	return copyOut(ctx, src, target, progress)
}

// copyOut copies src into a new image and compares the two. Memory is bounded by Workers × BufferSize, twice that while
// it compares, and the table caches, whatever the size of the disk. progress is called from several goroutines, one at a
// time, with bytes.
func copyOut(ctx context.Context, src block.Device, target string, progress func(done, total int64)) (err error) {
	var o image.CreateOptions
	o.Size = src.Size()
	if err := image.Create(ctx, "qcow2", target, o); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(target)
		}
	}()
	dst, err := image.Open(ctx, target, image.Options{Format: "qcow2"})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dst.Close()) }()

	err = jobs.Convert(ctx, src, dst, jobs.ConvertOptions{
		Workers: 4, BufferSize: 1 << 20, // 4 MiB
		TargetIsZero: true, // a new qcow2 image is; image.CreatedZero tells of others
		Progress:     progress,
	})
	if err != nil {
		return err
	}
	verdict, err := jobs.Compare(ctx, src, dst, jobs.CompareOptions{Workers: 4, BufferSize: 1 << 20})
	if err != nil {
		return err
	}
	if verdict.Difference != jobs.Identical {
		return fmt.Errorf("%s: %v at byte %d", target, verdict.Difference, verdict.Offset)
	}
	return nil
}

// usage is how many bytes of a disk the top layer decides, and how many any layer does. In a raw image that is all.
func usage(disk block.Device) (top, all int64, err error) {
	err = disk.Extents(0, disk.Size(), func(e block.Extent) bool {
		if e.Allocated {
			all += e.Length
			if e.Depth == 0 {
				top += e.Length
			}
		}
		return true
	})
	return top, all, err
}

// verify checks an image that nobody is writing, and writes what it finds as JSON: a line a finding, and the result.
func verify(ctx context.Context, path, format string, w io.Writer) (clean bool, err error) {
	out := json.NewEncoder(w)
	var writing error
	result, err := image.Check(ctx, path, image.Options{Format: format}, image.CheckOptions{
		Report: func(f qcow2.Finding) { writing = errors.Join(writing, out.Encode(f)) },
	})
	if errors.Is(err, image.ErrNoChecker) { // a raw image has no tables
		return true, nil
	}
	if err := errors.Join(err, writing); err != nil {
		return false, err
	}
	return result.Clean(), out.Encode(result) // an FVD image has its findings in the result
}

// Copying disks out of their images, also of one that is in use.
func ExampleConvert() {
	dir, err := os.MkdirTemp("", "platter")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx := context.Background()
	at := func(name string) string { return filepath.Join(dir, name) }

	var o image.CreateOptions
	o.Size = 1 << 30
	if err := image.Create(ctx, "raw", at("base.raw"), o); err != nil {
		log.Fatal(err)
	}
	o = image.CreateOptions{}
	o.BackingFile, o.BackingFormat = "base.raw", "raw"
	if err := image.Create(ctx, "qcow2", at("disk.qcow2"), o); err != nil {
		log.Fatal(err)
	}
	disk, err := image.Open(ctx, at("disk.qcow2"), image.Options{}) // the machine
	if err != nil {
		log.Fatal(err)
	}
	if _, err := disk.WriteAt([]byte("written"), 3<<20); err != nil {
		log.Fatal(err)
	}
	if err := disk.Flush(); err != nil {
		log.Fatal(err)
	}
	top, all, err := usage(disk)
	fmt.Println("allocated:", top, all, err)

	var last int64
	progress := func(done, total int64) { last = 100 * done / max(total, 1) }
	err = backup(ctx, at("disk.qcow2"), at("backup.qcow2"), false, progress)
	fmt.Println("in use:", errors.Is(err, storage.ErrLocked))
	fmt.Println("shared:", backup(ctx, at("disk.qcow2"), at("shared.qcow2"), true, progress))
	fmt.Println("running:", backupRunning(ctx, disk, at("backup.qcow2"), progress), last, "%")
	if err := disk.Close(); err != nil {
		log.Fatal(err)
	}
	clean, err := verify(ctx, at("backup.qcow2"), "qcow2", io.Discard)
	fmt.Println("clean:", clean, err)
	// Output:
	// allocated: 65536 1073741824 <nil>
	// in use: true
	// shared: <nil>
	// running: <nil> 100 %
	// clean: true <nil>
}
