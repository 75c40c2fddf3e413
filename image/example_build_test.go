package image_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/image"
)

// part is what a stretch of a disk is to hold.
type part struct {
	offset int64 // bytes, a multiple of the cluster size: a compressed cluster is written whole
	r      io.Reader
}

// build makes a qcow2 image of parts, four at a time. It appears at path whole, or, after an error or when ctx ends,
// not at all. progress is called from several goroutines.
func build(ctx context.Context, path string, o image.CreateOptions, parts []part, progress func(stored int64)) (err error) {
	// In the same directory, so that it can be renamed and names of backing files mean the same.
	unfinished := path + ".part"
	if err := image.Create(ctx, "qcow2", unfinished, o); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(unfinished)
		}
	}()
	disk, err := image.Open(ctx, unfinished, image.Options{Format: "qcow2"})
	if err != nil {
		return err
	}
	var stored atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for _, p := range parts {
		g.Go(func() error { return fill(ctx, disk, p, func(n int64) { progress(stored.Add(n)) }) })
	}
	if err := errors.Join(g.Wait(), disk.Close()); err != nil { // Close makes everything durable
		return err
	}
	return os.Rename(unfinished, path)
}

// fill stores p compressed, cluster by cluster, and lets zeros take no space.
func fill(ctx context.Context, disk block.Device, p part, stored func(n int64)) error {
	buf := make([]byte, disk.Limits().Preferred)
	for off := p.offset; ctx.Err() == nil; off += int64(len(buf)) {
		n, err := io.ReadFull(p.r, buf)
		if err == io.EOF {
			return nil
		}
		if err != nil && err != io.ErrUnexpectedEOF {
			return err
		}
		clear(buf[n:])
		cluster := buf[:max(int64(n), min(int64(len(buf)), disk.Size()-off))] // the last one of a disk may be short
		if bytes.Count(cluster, []byte{0}) == len(cluster) {
			err = disk.WriteZeroes(off, int64(len(cluster)), block.MayUnmap)
		} else {
			err = disk.WriteCompressed(cluster, off)
		}
		if err != nil {
			return err
		}
		stored(int64(n))
	}
	return ctx.Err()
}

// Making an image and an overlay over it, filled from readers by several goroutines.
func ExampleCreate() {
	dir, err := os.MkdirTemp("", "platter")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx := context.Background()

	var base image.CreateOptions
	base.Size = 1 << 30
	base.CompressionType = "zstd"
	err = build(ctx, filepath.Join(dir, "base.qcow2"), base, []part{
		{0, strings.NewReader("the boot sector")},
		{512 << 20, io.LimitReader(zeroReader{}, 1<<20)},
	}, func(int64) {})
	if err != nil {
		log.Fatal(err)
	}

	var overlay image.CreateOptions // as large as its backing file
	overlay.BackingFile, overlay.BackingFormat = "base.qcow2", "qcow2"
	err = build(ctx, filepath.Join(dir, "disk.qcow2"), overlay, []part{
		{256 << 20, strings.NewReader("more")},
	}, func(stored int64) { fmt.Println(stored, "bytes of the overlay") })
	if err != nil {
		log.Fatal(err)
	}

	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	err = build(cancelled, filepath.Join(dir, "never.qcow2"), base, nil, func(int64) {})
	left, _ := filepath.Glob(filepath.Join(dir, "never*"))
	fmt.Println(errors.Is(err, context.Canceled), left)

	disk, err := image.Open(ctx, filepath.Join(dir, "disk.qcow2"), image.Options{ReadOnly: true})
	if err != nil {
		log.Fatal(err)
	}
	defer disk.Close()
	head := make([]byte, 15)
	if _, err := disk.ReadAt(head, 0); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%q, %d bytes, %d layers\n", head, disk.Size(), len(disk.Chain()))
	// Output:
	// 4 bytes of the overlay
	// true []
	// "the boot sector", 1073741824 bytes, 2 layers
}

// zeroReader reads zeros without end.
type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
