package block_test

import (
	"fmt"
	"log"
	"sync/atomic"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/raw"
	"github.com/platter-disk/platter/storage"
)

// counted counts what is read from a device. Everything that it does not define goes through as it is.
type counted struct {
	block.Device
	bytes atomic.Int64
}

// ReadAt implements block.Device.
func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.Device.ReadAt(p, off)
	c.bytes.Add(int64(n))
	return n, err
}

// TryReadAt implements block.Device. Who wraps reads must wrap both: servers prefer this one.
func (c *counted) TryReadAt(p []byte, off int64) error {
	err := c.Device.TryReadAt(p, off)
	if err == nil {
		c.bytes.Add(int64(len(p)))
	}
	return err
}

// A wrapper for any disk.
func ExampleDevice() {
	memory := storage.NewMemory("disk")
	if err := memory.Truncate(1 << 20); err != nil {
		log.Fatal(err)
	}
	device, err := raw.Open(memory, raw.Options{})
	if err != nil {
		log.Fatal(err)
	}
	disk := &counted{Device: device}
	if _, err := disk.ReadAt(make([]byte, 4096), 1000); err != nil {
		log.Fatal(err)
	}
	fmt.Println(disk.bytes.Load(), "of", disk.Size(), "bytes", disk.Close())
	// Output:
	// 4096 of 1048576 bytes <nil>
}
