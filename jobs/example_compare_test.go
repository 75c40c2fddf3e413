package jobs_test

import (
	"context"
	"fmt"
	"log"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/raw"
	"github.com/platter-disk/platter/jobs"
	"github.com/platter-disk/platter/storage"
)

// What Compare says of two disks that differ in one byte, and of two lengths.
func ExampleCompare() {
	disk := func(size, nonzero int64) block.Device {
		memory := storage.NewMemory("disk")
		if err := memory.Truncate(size); err != nil {
			log.Fatal(err)
		}
		if _, err := memory.WriteAt([]byte{1}, nonzero); err != nil {
			log.Fatal(err)
		}
		device, err := raw.Open(memory, raw.Options{ReadOnly: true})
		if err != nil {
			log.Fatal(err)
		}
		return device
	}
	show := func(a, b block.Device, strict bool) {
		verdict, err := jobs.Compare(context.Background(), a, b, jobs.CompareOptions{Strict: strict})
		fmt.Println(verdict.Difference, verdict.Offset, verdict.SizesDiffer, err)
	}
	show(disk(1<<20, 5000), disk(1<<20, 5000), false)
	show(disk(1<<20, 5000), disk(1<<20, 9000), false) // tells the sector
	show(disk(1<<20, 5000), disk(2<<20, 5000), false) // the rest reads as zeros
	show(disk(1<<20, 5000), disk(2<<20, 5000), true)
	// Output:
	// identical 0 false <nil>
	// content differs 4608 false <nil>
	// identical 0 true <nil>
	// size differs 0 true <nil>
}
