package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/platter-disk/platter/format/raw"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/server"
	"github.com/platter-disk/platter/storage"
)

// upload writes data to an export, 64 requests of 256 KiB at a time, and makes it durable. A client that writes does not
// connect again by itself: nobody knows which of the writes since the last Sync took place. upload does all of them
// again, tries times.
func upload(ctx context.Context, uri string, data []byte, tries int) error {
	for {
		err := uploadOnce(ctx, uri, data)
		tries--
		var refused *nbd.RemoteError // the server answered: no space, read-only, out of range …
		if err == nil || tries <= 0 || errors.As(err, &refused) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func uploadOnce(ctx context.Context, uri string, data []byte) error {
	// More connections are made only where the server says that a Sync on one of them counts for all.
	client, err := nbd.DialContext(ctx, uri, nbd.ClientOptions{Connections: 4, RequestTimeout: time.Minute})
	if err != nil {
		return err
	}
	defer client.Close()
	defer context.AfterFunc(ctx, func() { client.Close() })() // requests under way fail when ctx ends

	const piece = 256 << 10
	var g errgroup.Group
	g.SetLimit(64)
	for off := 0; off < len(data) && ctx.Err() == nil; off += piece {
		g.Go(func() error {
			_, err := client.WriteAt(data[off:min(off+piece, len(data))], int64(off))
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return client.Sync()
}

// download reads the first len(p) bytes of an export. A client that only reads connects again when the connection is
// lost, and asks again for what it has no answer to.
func download(ctx context.Context, uri string, p []byte) error {
	client, err := nbd.DialContext(ctx, uri, nbd.ClientOptions{ReadOnly: true, ReconnectDelay: 10 * time.Second})
	if err != nil {
		return err
	}
	defer client.Close()
	_, err = client.ReadAt(p, 0)
	return err
}

// Writing to an export with many requests under way, and reading it back.
func ExampleDialContext() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "platter")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	uri, stop := serveMemory(filepath.Join(dir, "s"), 16<<20)
	defer stop()

	data := bytes.Repeat([]byte("platter "), 1<<20)
	fmt.Println(upload(ctx, uri, data, 3))
	back := make([]byte, len(data))
	fmt.Println(download(ctx, uri, back), bytes.Equal(back, data))
	// Output:
	// <nil>
	// <nil> true
}

// serveMemory serves a disk of size bytes in memory, for the example.
func serveMemory(socket string, size int64) (uri string, stop func()) {
	disk := storage.NewMemory("memory")
	if err := disk.Truncate(size); err != nil {
		log.Fatal(err)
	}
	device, err := raw.Open(disk, raw.Options{})
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
