package qcow2

import (
	"bytes"
	"testing"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
)

// TestMeasure: an image with everything preallocated has exactly the size that was foretold, and each cluster
// that is to hold data is counted once.
func TestMeasure(t *testing.T) {
	for name, o := range map[string]CreateOptions{
		"plain":         {Size: 40 << 20},
		"small":         {Size: 40<<20 + 512, ClusterSize: 4096},
		"narrow counts": {Size: 3 << 20, ClusterSize: 1024, RefcountBits: 1},
		"extended":      {Size: 40 << 20, ExtendedL2: true},
		"wide counts":   {Size: 40 << 20, RefcountBits: 64},
		"version 2":     {Size: 1 << 20, Version: 2},
		"no bytes":      {},
		"large cluster": {Size: 40 << 20, ClusterSize: 2 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			empty, err := o.Measure(nil)
			if err != nil {
				t.Fatal(err)
			}
			full := o
			full.Preallocation = block.PreallocFull
			file := storage.NewMemory("image")
			if err := Create(file, full); err != nil {
				t.Fatal(err)
			}
			if n := fileSize(t, file); n != empty.FullyAllocated {
				t.Errorf("a full image has %d bytes, %d were foretold", n, empty.FullyAllocated)
			}
			if m, err := full.Measure(nil); err != nil || m.Required != m.FullyAllocated || m.FullyAllocated != empty.FullyAllocated {
				t.Errorf("preallocated: %+v, %v", m, err)
			}
			if o.Size == 0 {
				return
			}
			disk := bytes.Repeat([]byte{1}, int(o.Size))
			all, err := o.Measure(&memDevice{bytes: disk})
			if err != nil || all.Required != all.FullyAllocated {
				t.Errorf("a disk without zeros: %+v, %v", all, err)
			}
			cluster := o.ClusterSize
			if cluster == 0 {
				cluster = 64 << 10
			}
			clear(disk[512 : len(disk)-512])
			some, err := o.Measure(&memDevice{bytes: disk})
			if want := empty.Required + 2*cluster; err != nil || some.Required != want {
				t.Errorf("two clusters of data: %+v, %v; want %d", some, err, want)
			}
		})
	}
}
