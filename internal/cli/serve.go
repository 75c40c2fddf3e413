package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/server"
)

// shutdownLimit is how long clients may take, once the server was told to end, to accept the replies they
// are owed. After it their connections are cut.
const shutdownLimit = 30 * time.Second

// serveFlags are the flags of serve.
type serveFlags struct {
	open    openFlags
	tls     serveTLS
	sockets listenFlags
	base    prefetchFlags

	exports      []string
	readOnly     bool
	metadata     metadataFlags
	grow         growFlag
	cache        string
	discard      string
	create       string
	control      string
	l2Cache      string
	maxConns     int
	maxRequest   string
	exitWhenIdle bool
	verbose      bool
}

func newServeCommand() *cobra.Command {
	f := &serveFlags{}
	cmd := &cobra.Command{
		Use:   "serve [flags] IMAGE...",
		Short: "Serve disks to virtual machines and other NBD clients",
		Long: `Serve disks to virtual machines and other clients of the NBD protocol (Network Block
Device): QEMU, libnbd, nbdcopy, fio, the Linux kernel.

When clients can connect, one line is printed on standard output: the URI of the disk.
Everything else is printed on standard error. SIGTERM, SIGHUP (the terminal closes) or
Ctrl-C ends the server: it finishes the requests it has begun, makes everything durable,
leaves the images clean and exits with status 0. A second SIGTERM or Ctrl-C ends it at
once.

Clients connect to a Unix socket (--socket), over TCP (--listen), or both. With
neither, a Unix socket is made in a new directory that only you can enter. Where systemd
or libnbd passes sockets (socket activation), those are used, neither flag can be
given, and nothing is printed on standard output: whoever passed them knows where they
are.

Several images are served under their base names, or the names given with --export,
one for each image in the same order. A client that names no export gets the first.`,
		Example: `  platter serve disk.qcow2
  platter serve --create 10G --socket /run/disk.sock disk.qcow2
  platter serve --listen 127.0.0.1:10809 --read-only a.qcow2 b.qcow2
  platter serve --listen :10809 --tls-certificate cert.pem --tls-key key.pem --tls-required disk.qcow2
  nbdcopy -- [ platter serve --exit-when-idle disk.qcow2 ] disk.img`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.run(cmd, args)
		},
	}
	f.open.register(cmd, "format of the images; guessed when not given")
	fs := cmd.Flags()
	f.open.registerShare(fs)
	fs.StringVar(&f.sockets.socket, "socket", "", "listen on a Unix socket at `PATH`")
	fs.StringVar(&f.sockets.tcp, "listen", "", "listen on TCP at `HOST:PORT`; an empty HOST is every address")
	fs.StringArrayVar(&f.exports, "export", nil, "`NAME` of the export; once for each image (default: no name for\na single image, else the base name)")
	fs.BoolVarP(&f.readOnly, "read-only", "r", false, "refuse every change")
	f.metadata.register(cmd)
	fs.StringVar(&f.cache, "cache", "writeback", "`MODE` is writeback, none (past the page cache, O_DIRECT) or writethrough\n(every change durable before it is acknowledged)")
	completeWith(cmd, "cache", "writeback", "none", "writethrough")
	fs.StringVar(&f.discard, "discard", "unmap", "what to do with space that a client discards: `MODE` is unmap\n(give it back to the file system) or ignore")
	completeWith(cmd, "discard", "unmap", "ignore")
	fs.StringVar(&f.create, "create", "", "make a disk of `SIZE` bytes where the image does not exist (qcow2,\nunless --format says otherwise)")
	fs.StringVar(&f.l2Cache, "l2-cache-size", "", "`SIZE` of the cache for the tables of each qcow2 image (default: by the disk's size)")
	fs.StringVar(&f.control, "control", "", "accept commands on a Unix socket at `PATH`: HTTP with JSON,\nGET /status, POST /flush, POST /quit, POST /prefetch/pause, POST\n/prefetch/resume; platter prefetch --control asks there")
	fs.IntVar(&f.maxConns, "max-connections", 128, "`N` connections at a time; further ones are closed at once")
	fs.StringVar(&f.maxRequest, "max-request", "32M", "`SIZE` of the largest read or write of a client, 64k to 1G")
	fs.BoolVar(&f.exitWhenIdle, "exit-when-idle", false, "end when the last client leaves, after at least one has used a disk;\nasking what there is does not count as use")
	fs.BoolVarP(&f.verbose, "verbose", "v", false, "log every connection and every refused request")
	f.grow.register(fs)
	f.base.register(cmd)
	f.tls.register(fs)
	return cmd
}

// export is an image that is served, and under which name.
type export struct {
	name    string
	image   *image.Image
	fetcher *fetcher // nil: nothing is copied from a base image
}

// device is what clients use.
func (e *export) device() block.Device {
	if e.fetcher != nil {
		return e.fetcher.disk
	}
	return e.image
}

func (f *serveFlags) run(cmd *cobra.Command, args []string) (err error) {
	config, options, err := f.parse(cmd, args)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(cmd.Context())
	defer cancel()
	if f.exitWhenIdle {
		config.OnIdle = func() {
			config.Logger.Info("the last client has left")
			cancel()
		}
	}
	if err := f.sockets.takePassed(cmd); err != nil {
		return err
	}
	defer closeAll(f.sockets.passed)

	lines := &baseLines{grace: baseGrace, warn: func(message string) { config.Logger.Warn(message) }}
	exports, err := f.openImages(ctx, cmd, args, options, lines)
	defer func() {
		cancel()
		defer lines.ending(ctx)()
		for _, e := range exports {
			if e.fetcher != nil {
				e.fetcher.stop()
			}
			if cerr := e.device().Close(); cerr != nil {
				err = errors.Join(err, fmt.Errorf("closing '%s': %w", e.image.Name(), cerr))
			}
		}
	}()
	if err != nil {
		return err
	}
	for i := range exports {
		e := &exports[i]
		if e.fetcher, err = f.base.newFetcher(e.image, e.name, i, config.Logger); err != nil {
			return err
		}
		if err := recordsAlone(exports[:i], e.fetcher); err != nil {
			return err
		}
	}
	srv, err := server.New(config)
	if err != nil {
		return err
	}
	for i, e := range exports {
		if err := srv.AddExport(server.Export{
			Name:        e.name,
			Default:     i == 0,
			Description: filepath.Base(e.image.Name()),
			Device:      e.device(),
			ReadOnly:    f.readOnly,
		}); err != nil {
			return err
		}
	}
	listeners, cleanup, err := f.sockets.listen()
	defer cleanup()
	if err != nil {
		return err
	}
	var control net.Listener
	if f.control != "" {
		if control, err = listenControl(f.control); err != nil {
			closeAll(listeners)
			return err
		}
	}

	var work errgroup.Group
	for _, l := range listeners {
		work.Go(func() error {
			err := srv.Serve(ctx, l)
			cancel() // one socket failed, or all are to end
			if errors.Is(err, ctx.Err()) {
				return nil
			}
			if errors.Is(err, server.ErrShutdown) { // all are to end, and this one had not begun
				return nil
			}
			return err
		})
	}
	if control != nil {
		c := &controller{server: srv, exports: exports, quit: cancel}
		work.Go(func() error {
			defer cancel()
			return c.serve(ctx, control)
		})
	}
	uris := exportURIs(listeners, exports, f.tls.required)
	if len(f.sockets.passed) > 0 {
		config.Logger.Info("serving", "uris", uris)
	} else {
		announce(cmd, uris)
	}
	for _, e := range exports {
		if e.fetcher != nil {
			e.fetcher.start()
		}
	}

	<-ctx.Done()
	config.Logger.Info("ending: finishing requests, flushing, closing")
	limit, stop := context.WithTimeout(context.WithoutCancel(ctx), shutdownLimit)
	defer stop()
	if err := srv.Shutdown(limit); err != nil {
		config.Logger.Warn("connections were cut", "after", shutdownLimit, "error", err)
	}
	return work.Wait()
}

// parse turns the flags into what the packages below want.
func (f *serveFlags) parse(cmd *cobra.Command, args []string) (server.Config, image.Options, error) {
	level := slog.LevelInfo
	if f.verbose {
		level = slog.LevelDebug
	}
	config := server.Config{
		Logger:         slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level})),
		MaxConnections: f.maxConns,
	}
	options := image.Options{
		ReadOnly: f.readOnly,
		Discard:  f.discard == "unmap",
	}
	fail := func(err error) (server.Config, image.Options, error) { return config, options, err }
	if len(args) == 0 {
		return fail(usagef(cmd, "Expecting one or more image file names"))
	}
	if err := f.open.check(cmd); err != nil {
		return fail(err)
	}
	if n := len(f.exports); n > 0 && n != len(args) {
		return fail(usagef(cmd, "%d --export for %d images: give one for each, or none", n, len(args)))
	}
	if err := f.base.check(cmd, len(args), f.readOnly); err != nil {
		return fail(err)
	}
	mode, ok := parseCache(f.cache)
	if !ok || mode.unsafe {
		return fail(usagef(cmd, "--cache must be used with writeback, none or writethrough as argument"))
	}
	options = f.metadata.apply(mode.apply(options))
	if f.discard != "unmap" && f.discard != "ignore" {
		return fail(usagef(cmd, "--discard must be used with unmap or ignore as argument"))
	}
	if f.maxConns < 1 {
		return fail(usagef(cmd, "--max-connections must be at least 1"))
	}
	maxRequest, err := sizeArgument("--max-request", f.maxRequest)
	if err != nil {
		return fail(err)
	}
	if maxRequest < 64<<10 || maxRequest > 1<<30 {
		return fail(usagef(cmd, "--max-request must be between 64k and 1G"))
	}
	config.MaxRequest = int(maxRequest)
	config.MaxBytesPerClient = max(64<<20, maxRequest)
	config.MaxBytes = max(512<<20, maxRequest)
	if f.l2Cache != "" {
		if options.L2CacheSize, err = sizeArgument("--l2-cache-size", f.l2Cache); err != nil {
			return fail(err)
		}
	}
	if f.create != "" && f.readOnly {
		return fail(usagef(cmd, "--create and --read-only are mutually exclusive"))
	}
	config.TLS, config.TLSConfig, err = f.tls.config(cmd)
	return config, options, err
}

// openImages opens the images, making those that are to be made. The images it returns are open even when
// it also returns an error.
func (f *serveFlags) openImages(ctx context.Context, cmd *cobra.Command, names []string, o image.Options, lines *baseLines) ([]export, error) {
	exports := make([]export, 0, len(names))
	for i, name := range names {
		if err := f.createMissing(ctx, cmd, name); err != nil {
			return exports, err
		}
		// A request that has begun is finished when the server is told to end, its storage made larger if need be.
		watched, opened := lines.opening(ctx)
		img, err := f.open.open(watched, name, f.grow.apply(context.WithoutCancel(ctx), o))
		opened()
		if err != nil {
			return exports, interrupted(ctx, err)
		}
		if !f.readOnly {
			warnProbedRaw(cmd, img)
		}
		e := export{image: img}
		switch {
		case len(f.exports) > 0:
			e.name = f.exports[i]
		case len(names) > 1:
			e.name = filepath.Base(name)
		}
		exports = append(exports, e)
	}
	return exports, nil
}

// createMissing makes the disk that --create asks for, unless it exists.
func (f *serveFlags) createMissing(ctx context.Context, cmd *cobra.Command, name string) error {
	path, local := image.LocalPath(name)
	if f.create == "" || f.open.imageOpts || hasOptions(name) || !local {
		return nil
	}
	size, err := sizeArgument("image size", f.create)
	if err != nil {
		return err
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return nil // it exists, or opening it will say what is wrong
	}
	format := f.open.format
	if format == "" {
		format = "qcow2"
	}
	g, err := f.open.gate()
	if err != nil {
		return err
	}
	o := image.CreateOptions{Gate: g}
	o.Size = size
	if err := image.Create(ctx, format, name, o); err != nil {
		return err
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "platter: created '%s' (%s, %s)\n", name, format, formatSize(size))
	return nil
}

// maxSocketPath is the length of a socket's path that every system allows: sun_path has 104 bytes on macOS
// and 108 on Linux, with a terminating zero.
const maxSocketPath = 103

// listenFlags say where clients connect.
type listenFlags struct {
	socket, tcp string

	passed []net.Listener // by whoever started the program (socket activation); in place of the flags
}

// takePassed takes the sockets that were passed to the program. Where there are any the flags are refused: a unit
// of systemd says where to listen in one place, and a client such as libnbd waits for a server on its own socket
// only, so that another address is a mistake that should not go unnoticed.
func (f *listenFlags) takePassed(cmd *cobra.Command) (err error) {
	if f.passed, err = server.ActivationListeners(); err != nil || len(f.passed) == 0 {
		return err
	}
	for _, flag := range []struct{ name, value string }{{"--socket", f.socket}, {"--listen", f.tcp}} {
		if flag.value != "" {
			closeAll(f.passed)
			return usagef(cmd, "%s cannot be used where sockets are passed to the program (socket activation: LISTEN_FDS is set)", flag.name)
		}
	}
	return nil
}

// listen opens the sockets, unless they were passed. cleanup is to be called when the listeners are closed; it is
// never nil.
func (f *listenFlags) listen() (listeners []net.Listener, cleanup func(), err error) {
	cleanup = func() {}
	if len(f.passed) > 0 {
		return f.passed, cleanup, nil
	}
	defer func() {
		if err != nil {
			closeAll(listeners)
			listeners = nil
		}
	}()
	if f.socket == "" && f.tcp == "" {
		dir, err := os.MkdirTemp("", "platter-")
		if err != nil {
			return nil, cleanup, err
		}
		cleanup = func() { os.RemoveAll(dir) }
		f.socket = filepath.Join(dir, "nbd.sock")
	}
	for _, a := range []struct{ network, address string }{{"unix", f.socket}, {"tcp", f.tcp}} {
		if a.address == "" {
			continue
		}
		l, err := server.Listen(a.network, a.address)
		if err != nil {
			if a.network == "unix" && len(a.address) > maxSocketPath {
				err = fmt.Errorf("%w (the path has %d bytes; some systems allow no more than %d)", err, len(a.address), maxSocketPath)
			}
			return listeners, cleanup, err
		}
		listeners = append(listeners, l)
	}
	return listeners, cleanup, nil
}

func closeAll(listeners []net.Listener) {
	for _, l := range listeners {
		l.Close()
	}
}

// exportURIs are all ways to connect, that to the first export on the first socket first.
func exportURIs(listeners []net.Listener, exports []export, secure bool) []string {
	uris := make([]string, 0, len(exports)*len(listeners))
	for _, e := range exports {
		for _, l := range listeners {
			uris = append(uris, exportURI(l.Addr(), e.name, secure))
		}
	}
	return uris
}

// announce prints the first URI, the line that scripts wait for, and before it the other ones on standard error.
func announce(cmd *cobra.Command, uris []string) {
	for _, uri := range uris[1:] {
		fmt.Fprintln(cmd.ErrOrStderr(), uri)
	}
	fmt.Fprintln(cmd.OutOrStdout(), uris[0])
}

// exportURI is the address of an export as NBD clients read it.
func exportURI(addr net.Addr, name string, secure bool) string {
	u := nbd.URI{Network: "tcp", Address: addr.String(), Export: name, TLS: secure}
	if addr.Network() == "unix" {
		u.Network = "unix"
		if abs, err := filepath.Abs(u.Address); err == nil && u.Address != "" && u.Address[0] != '@' {
			u.Address = abs
		}
	} else if host, port, err := net.SplitHostPort(u.Address); err == nil {
		if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
			u.Address = net.JoinHostPort("localhost", port)
		}
	}
	return u.String()
}
