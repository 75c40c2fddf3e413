package fvd_test

import (
	"fmt"
	"log"

	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/raw"
	"github.com/platter-disk/platter/storage"
)

// A clone of a base image, all in memory: the base image is read until the clone has a block of its own.
func Example() {
	base := storage.NewMemory("base.raw")
	if _, err := base.WriteAt(make([]byte, 1<<20), 0); err != nil {
		log.Fatal(err)
	}
	openBase := func() *raw.Device {
		device, err := raw.Open(base, raw.Options{ReadOnly: true})
		if err != nil {
			log.Fatal(err)
		}
		return device
	}

	file := storage.NewMemory("disk.fvd")
	o := fvd.CreateOptions{BaseImage: "base.raw", BaseFormat: "raw", Base: openBase(), Compact: true, BlockSize: 4096}
	if err := fvd.Create(file, o); err != nil {
		log.Fatal(err)
	}
	disk, err := fvd.Open(file, fvd.Options{Base: openBase()})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := disk.WriteAt(make([]byte, 4096), 0); err != nil {
		log.Fatal(err)
	}
	start, n := disk.NextInBase(0)
	fmt.Printf("in the base image: %d bytes from %d\n", n, start)
	if err := disk.Close(); err != nil {
		log.Fatal(err)
	}

	result, err := fvd.Check(file, fvd.CheckOptions{})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(result.LocalBlocks, "of", result.TotalBlocks, "blocks have left it")
	// Output:
	// in the base image: 1044480 bytes from 4096
	// 1 of 256 blocks have left it
}
