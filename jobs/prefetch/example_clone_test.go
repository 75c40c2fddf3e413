package prefetch_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"math"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/raw"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/image/gate"
	"github.com/platter-disk/platter/jobs/prefetch"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/server"
	"github.com/platter-disk/platter/storage"
)

// clone is a disk that moves over from its base image while it is in use.
type clone struct {
	disk       *image.Image
	Device     block.Device // what to serve: it keeps what its guest reads
	reading    *prefetch.CopyOnRead
	prefetcher *prefetch.Prefetcher
	stop       context.CancelFunc
	ended      chan error

	mu    sync.Mutex
	bases []*nbd.Client // the connections below the disk
}

// openClone opens an FVD or qcow2 image that has a base image, and begins to fetch what is still there.
func openClone(ctx context.Context, name string) (*clone, error) {
	c := &clone{ended: make(chan error, 1), stop: func() {}}
	ctx = nbd.Watch(ctx, func(base *nbd.Client) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.bases = append(c.bases, base)
	})
	// The base image is elsewhere on purpose, and the image is one of our own making.
	disk, err := image.Open(ctx, name, image.Options{Gate: gate.Any{}})
	if err != nil {
		return nil, err
	}
	c.disk, c.Device = disk, disk
	over, err := overlayOf(disk)
	if err != nil {
		return nil, errors.Join(err, disk.Close())
	}
	if over == nil { // all of it is here
		c.ended <- nil
		return c, nil
	}
	c.reading = prefetch.NewCopyOnRead(over, prefetch.CopyOnReadOptions{})
	c.Device = c.reading
	o := prefetch.Options{
		Guest:    c.reading.Guest(),  // gives way to it
		Announce: c.reading.Announce, // what is fetched is not asked for twice
		MaxRead:  100 << 20,
	}
	if f := disk.FVD(); f != nil { // such an image says when to begin
		seconds := min(max(f.Header().PrefetchStartDelay, 0), math.MaxInt64/int64(time.Second))
		o.StartDelay = time.Duration(seconds) * time.Second
	}
	c.prefetcher = prefetch.New(over, o)
	running, stop := context.WithCancel(context.Background())
	c.stop = stop
	go func() { c.ended <- c.prefetcher.Run(running) }()
	return c, nil
}

// overlayOf is nil for a disk that needs no base image.
func overlayOf(disk *image.Image) (prefetch.Overlay, error) {
	if f := disk.FVD(); f != nil {
		if f.BaseSize() == 0 {
			return nil, nil
		}
		return f, nil // FVD knows of copies
	}
	q := disk.Qcow2()
	if q == nil || len(disk.Chain()) < 2 {
		return nil, nil
	}
	header := q.Header()
	o := prefetch.GuardedOptions{
		Unit:     disk.Limits().Preferred,
		Whole:    !header.ExtendedL2(),
		BaseSize: disk.LayerDevice(1).Size(),
	}
	snapshots, err := q.Snapshots()
	if err != nil {
		return nil, err
	}
	if len(snapshots) == 0 { // snapshots go on reading the base image
		o.Detach = func() error { return q.SetBacking("", "") }
	}
	return prefetch.Guard(disk, o), nil
}

// status is how far it is; ok is false if there was nothing to fetch.
func (c *clone) status() (s prefetch.Status, ok bool) {
	if c.prefetcher == nil {
		return s, false
	}
	return c.prefetcher.Status(), true
}

// close keeps what was fetched; the next openClone goes on from there. A base image that does not answer is waited for
// five seconds: a disk cannot be closed before what it waits for has failed.
func (c *clone) close() error {
	defer time.AfterFunc(5*time.Second, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, base := range c.bases {
			base.Close()
		}
	}).Stop()
	c.stop()
	err := <-c.ended
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	return errors.Join(err, c.Device.Close(), c.disk.Close())
}

// A disk over a base image across the network, in use before it has arrived.
func Example() {
	dir, err := os.MkdirTemp("", "platter")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx := context.Background()
	contents := bytes.Repeat([]byte("platter "), 128<<10)
	uri, stop := serveBase(filepath.Join(dir, "base"), contents)

	for _, format := range []string{"fvd", "qcow2"} {
		var o image.CreateOptions
		o.BackingFile, o.BackingFormat = uri, "raw"
		name := filepath.Join(dir, "disk."+format)
		if err := image.Create(ctx, format, name, o); err != nil {
			log.Fatal(err)
		}
		c, err := openClone(ctx, name)
		if err != nil {
			log.Fatal(err)
		}
		p := make([]byte, 7)
		if _, err := c.Device.ReadAt(p, 512<<10); err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s: %q\n", format, p)
		for s, _ := c.status(); s.State != prefetch.StateDone; s, _ = c.status() {
			if s.State == prefetch.StateFailed {
				log.Fatal(s.Error)
			}
			time.Sleep(time.Millisecond)
		}
		if err := c.close(); err != nil {
			log.Fatal(err)
		}
	}
	stop() // nobody needs it any more

	for _, format := range []string{"fvd", "qcow2"} {
		c, err := openClone(ctx, filepath.Join(dir, "disk."+format))
		if err != nil {
			log.Fatal(err)
		}
		p := make([]byte, len(contents))
		_, err = c.Device.ReadAt(p, 0)
		_, fetching := c.status()
		fmt.Println(format, bytes.Equal(p, contents), fetching, err, c.close())
	}
	// Output:
	// fvd: "platter"
	// qcow2: "platter"
	// fvd true false <nil> <nil>
	// qcow2 true false <nil> <nil>
}

// serveBase serves contents, for the example.
func serveBase(socket string, contents []byte) (uri string, stop func()) {
	memory := storage.NewMemory("base")
	if _, err := memory.WriteAt(contents, 0); err != nil {
		log.Fatal(err)
	}
	device, err := raw.Open(memory, raw.Options{ReadOnly: true})
	if err != nil {
		log.Fatal(err)
	}
	s, err := server.New(server.Config{})
	if err != nil {
		log.Fatal(err)
	}
	if err := s.AddExport(server.Export{Device: device}); err != nil {
		log.Fatal(err)
	}
	l, err := server.Listen("unix", socket)
	if err != nil {
		log.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background(), l) }()
	return nbd.URI{Network: "unix", Address: socket}.String(), func() {
		if err := s.Shutdown(context.Background()); err != nil {
			log.Fatal(err)
		}
		if err := <-served; err != nil {
			log.Fatal(err)
		}
	}
}
