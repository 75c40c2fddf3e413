package image_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/image/gate"
	"github.com/platter-disk/platter/storage"
)

// maxUpload is the largest disk in bytes that users may bring.
const maxUpload = 1 << 40

// accept judges an image that a user has sent. problem is for the user; err is ours: the image may be fine.
func accept(ctx context.Context, path, format string) (problem string, err error) {
	// Open understands more than paths (json:…, nbd://…). A name that begins with the root is always a path.
	path, err = filepath.Abs(path)
	if err != nil {
		return "", err
	}
	o := image.Options{
		Format:   format, // nobody guesses: a raw disk may begin with whatever its guest wrote
		ReadOnly: true,
		Gate:     gate.Deny{}, // no backing file, no data file
	}
	switch format { // memory
	case "qcow2":
		o.L2CacheSize, o.RefcountCacheSize = 1<<20, 256<<10
	case "fvd":
		o.MaxMetadata = 32 << 20
	default:
		return "the format is neither qcow2 nor fvd", nil
	}

	size := int64(0)
	result, err := image.Check(ctx, path, o, image.CheckOptions{Memory: 64 << 20}) // looks at every table
	if err == nil && result.Damaged() == 0 {
		size, err = diskSize(ctx, path, o)
	}
	switch {
	case errors.Is(err, gate.ErrRefused):
		return "the image refers to another file", nil
	case image.IsInvalid(err), errors.Is(err, qcow2.ErrCheckMemory), errors.Is(err, fvd.ErrMaxMetadata):
		return err.Error(), nil
	case err != nil:
		return "", err
	case result.Damaged() > 0:
		return fmt.Sprintf("%d places in the image are damaged", result.Damaged()), nil
	case size > maxUpload:
		return fmt.Sprintf("the disk has %d bytes, at most %d are allowed", size, int64(maxUpload)), nil
	}
	return "", nil
}

// diskSize opens an image to learn the size of its disk, and whether it can be used as it is.
func diskSize(ctx context.Context, path string, o image.Options) (int64, error) {
	disk, err := image.Open(ctx, path, o)
	if err != nil {
		return 0, err
	}
	return disk.Size(), disk.Close()
}

// Looking at images that somebody else has made.
func ExampleIsInvalid() {
	dir, err := os.MkdirTemp("", "platter")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx := context.Background()

	var o image.CreateOptions
	o.Size = 1 << 30
	if err := image.Create(ctx, "qcow2", filepath.Join(dir, "good"), o); err != nil {
		log.Fatal(err)
	}
	o.BackingFile, o.BackingFormat, o.BackingUnseen = "/etc/passwd", "raw", true
	if err := image.Create(ctx, "qcow2", filepath.Join(dir, "curious"), o); err != nil {
		log.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "letter"), []byte("Dear all"), 0o600); err != nil {
		log.Fatal(err)
	}
	busy, err := storage.Open(filepath.Join(dir, "good"), storage.OpenOptions{})
	if err != nil {
		log.Fatal(err)
	}
	_, err = accept(ctx, filepath.Join(dir, "good"), "qcow2")
	fmt.Println("while somebody writes it:", errors.Is(err, storage.ErrLocked))
	busy.Close()

	o = image.CreateOptions{}
	o.Size = 1 << 44
	o.FVD.Compact = true
	if err := image.Create(ctx, "fvd", filepath.Join(dir, "huge"), o); err != nil {
		log.Fatal(err)
	}
	formats := map[string]string{"huge": "fvd"}
	for _, name := range []string{"good", "curious", "letter", "huge", "lost"} {
		problem, err := accept(ctx, filepath.Join(dir, name), cmp.Or(formats[name], "qcow2"))
		fmt.Printf("%s: rejected %t, failed %t\n", name, problem != "", err != nil)
	}
	// Output:
	// while somebody writes it: true
	// good: rejected false, failed false
	// curious: rejected true, failed false
	// letter: rejected true, failed false
	// huge: rejected true, failed false
	// lost: rejected false, failed true
}
