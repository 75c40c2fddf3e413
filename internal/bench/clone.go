package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"

	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/image/gate"
	"github.com/platter-disk/platter/jobs/prefetch"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/server"
)

// clone is a machine's disk over a base image, served in this process with copy-on-read, and the connection of its
// guest.
type clone struct {
	disk       *nbd.Client
	recorder   *prefetch.Recorder
	copies     *prefetch.CopyOnRead
	prefetcher *prefetch.Prefetcher // nil: none

	server     *server.Server
	ctx        context.Context // of server and prefetcher
	stop       context.CancelFunc
	prefetched chan error
}

// createClone makes a disk over a base image in the file called name; blockSize is in bytes, 0 for the default.
func createClone(ctx context.Context, name string, b *farBase, blockSize int64) error {
	o := image.CreateOptions{Gate: gate.Any{}}
	o.BackingFile, o.BackingFormat = b.p.uri, "raw"
	o.FVD.BlockSize, o.FVD.CopyOnRead = blockSize, true
	return image.Create(ctx, "fvd", name, o)
}

// openClone serves a disk that createClone made, on a Unix socket beside it.
func openClone(ctx context.Context, name string) (c *clone, err error) {
	im, err := image.Open(ctx, name, image.Options{Format: "fvd", Gate: gate.Any{}})
	if err != nil {
		return nil, err
	}
	c = &clone{recorder: prefetch.NewRecorder(im.Size())}
	c.copies = prefetch.NewCopyOnRead(im.FVD(), prefetch.CopyOnReadOptions{Recorder: c.recorder})
	c.ctx, c.stop = context.WithCancel(ctx)
	defer func() {
		if err != nil {
			err = errors.Join(err, c.close())
		}
	}()
	if c.server, err = server.New(server.Config{Logger: slog.New(slog.DiscardHandler)}); err != nil {
		return nil, err
	}
	if err := c.server.AddExport(server.Export{Device: c.copies}); err != nil {
		return nil, err
	}
	socket := name + ".sock"
	l, err := server.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	go c.serve(l)
	if c.disk, err = nbd.Dial(nbd.URI{Network: "unix", Address: socket}.String(), nbd.ClientOptions{}); err != nil {
		return nil, err
	}
	return c, nil
}

// prefetch begins to prefetch.
func (c *clone) prefetch(o prefetch.Options) {
	o.Announce, o.Guest = c.copies.Announce, c.copies.Guest()
	c.prefetcher = prefetch.New(c.copies.Overlay, o)
	c.prefetched = make(chan error, 1)
	go func() { c.prefetched <- c.prefetcher.Run(c.ctx) }()
}

// serve ends when the context does or with Shutdown; a socket that fails shows at the guest.
func (c *clone) serve(l net.Listener) { _ = c.server.Serve(c.ctx, l) }

// close ends everything and leaves the image clean.
func (c *clone) close() error {
	var errs []error
	c.stop()
	if c.prefetched != nil {
		if err := <-c.prefetched; err != nil && !errors.Is(err, context.Canceled) {
			errs = append(errs, fmt.Errorf("prefetching: %w", err))
		}
	}
	if c.disk != nil {
		errs = append(errs, c.disk.Close())
	}
	if c.server != nil {
		limit, cancel := context.WithTimeout(context.Background(), startLimit)
		defer cancel()
		errs = append(errs, c.server.Shutdown(limit))
	}
	return errors.Join(append(errs, c.copies.Close())...)
}
