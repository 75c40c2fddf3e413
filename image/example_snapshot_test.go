package image_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image"
)

// attempt changes a disk, and takes all of it back, its size too, if change fails. Others may use the disk meanwhile;
// what they wrote is taken back as well.
func attempt(disk *image.Image, change func() error) error {
	q := disk.Qcow2()
	if q == nil {
		return fmt.Errorf("%s: a disk in format %s has no snapshots", disk.Name(), disk.Format())
	}
	before, err := q.CreateSnapshot("before", qcow2.SnapshotOptions{})
	if err != nil {
		return err
	}
	if err := change(); err != nil {
		// Should this fail, the snapshot stays.
		if undo := q.ApplySnapshot(before.ID); undo != nil {
			return errors.Join(err, undo)
		}
		return errors.Join(err, q.DeleteSnapshot(before.ID))
	}
	return q.DeleteSnapshot(before.ID)
}

// Growing a disk, with a snapshot to go back to.
func ExampleImage_Qcow2() {
	dir, err := os.MkdirTemp("", "platter")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx := context.Background()
	name := filepath.Join(dir, "disk.qcow2")
	var o image.CreateOptions
	o.Size = 1 << 30
	if err := image.Create(ctx, "qcow2", name, o); err != nil {
		log.Fatal(err)
	}
	disk, err := image.Open(ctx, name, image.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer disk.Close()

	err = attempt(disk, func() error { return disk.Resize(2<<30, block.PreallocOff) })
	fmt.Println(disk.Size(), err)

	err = attempt(disk, func() error {
		snapshots, err := disk.Qcow2().Snapshots()
		if err != nil {
			return err
		}
		for _, s := range snapshots {
			fmt.Println("snapshot", s.ID, s.Name, s.DiskSize)
		}
		if err := disk.Resize(4<<30, block.PreallocOff); err != nil {
			return err
		}
		return disk.Qcow2().DeleteSnapshot("no such snapshot")
	})
	fmt.Println(disk.Size(), errors.Is(err, qcow2.ErrNoSnapshot))
	// Output:
	// 2147483648 <nil>
	// snapshot 1 before 2147483648
	// 2147483648 true
}
