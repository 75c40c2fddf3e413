package qcow2_test

import (
	"fmt"
	"log"

	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/storage"
)

// An image in memory, written and checked. Package image does the same for files by name, with locks, backing files and
// all that belongs to that.
func Example() {
	file := storage.NewMemory("disk.qcow2")
	if err := qcow2.Create(file, qcow2.CreateOptions{Size: 1 << 40, CompressionType: "zstd"}); err != nil {
		log.Fatal(err)
	}
	disk, err := qcow2.Open(file, qcow2.Options{})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := disk.WriteAt([]byte("in the middle"), 1<<39); err != nil {
		log.Fatal(err)
	}
	if err := disk.Close(); err != nil { // a Memory keeps its contents
		log.Fatal(err)
	}

	result, err := qcow2.Check(file, qcow2.CheckOptions{Report: func(f qcow2.Finding) { fmt.Println(f.Message) }})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(result.Clean(), result.AllocatedClusters, "of", result.TotalClusters)
	// Output:
	// true 1 of 16777216
}
