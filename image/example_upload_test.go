package image_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/image/gate"
	"github.com/platter-disk/platter/storage"
)

// maxUpload is the largest disk in bytes that users may bring.
const maxUpload = 1 << 40

// accept judges a qcow2 image that a user has sent. problem is for the user; err is ours: the image may be fine.
func accept(ctx context.Context, path string) (problem string, err error) {
	// Open understands more than paths (json:…, nbd://…). A name that begins with the root is always a path.
	path, err = filepath.Abs(path)
	if err != nil {
		return "", err
	}
	disk, err := image.Open(ctx, path, image.Options{
		Format:            "qcow2", // nobody guesses: a raw disk may begin with whatever its guest wrote
		ReadOnly:          true,
		Gate:              gate.Deny{}, // no backing file, no data file
		L2CacheSize:       1 << 20,
		RefcountCacheSize: 256 << 10,
	})
	switch {
	case err == nil:
		defer disk.Close()
	case errors.Is(err, gate.ErrRefused):
		return "the image refers to another file", nil
	case image.IsInvalid(err):
		return err.Error(), nil
	default:
		return "", err
	}
	if disk.Size() > maxUpload {
		return fmt.Sprintf("the disk has %d bytes, at most %d are allowed", disk.Size(), int64(maxUpload)), nil
	}

	// Opening looks at the header. This looks at every table, in a bounded amount of memory.
	result, err := qcow2.Check(disk.File(), qcow2.CheckOptions{Memory: 64 << 20, Interrupt: ctx.Err})
	switch {
	case image.IsInvalid(err):
		return err.Error(), nil
	case err != nil:
		return "", err
	case result.Corruptions > 0 || result.CheckErrors > 0:
		return fmt.Sprintf("%d places in the image are damaged", result.Corruptions+result.CheckErrors), nil
	}
	return "", nil
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
	_, err = accept(ctx, filepath.Join(dir, "good"))
	fmt.Println("while somebody writes it:", errors.Is(err, storage.ErrLocked))
	busy.Close()

	for _, name := range []string{"good", "curious", "letter", "lost"} {
		problem, err := accept(ctx, filepath.Join(dir, name))
		fmt.Printf("%s: rejected %t, failed %t\n", name, problem != "", err != nil)
	}
	// Output:
	// while somebody writes it: true
	// good: rejected false, failed false
	// curious: rejected true, failed false
	// letter: rejected true, failed false
	// lost: rejected false, failed true
}
