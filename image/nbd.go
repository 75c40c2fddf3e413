package image

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/storage"
)

// dialNBD connects to an export, unless ctx ends before. Of the options ReadOnly is given apart: it is not the caller's
// to say, but follows from what the export is used for.
func dialNBD(ctx context.Context, uri string, o nbd.ClientOptions, readOnly bool) (storage.File, error) {
	o.ReadOnly = readOnly
	c, err := nbd.DialContext(ctx, uri, o)
	if err != nil {
		return nil, err
	}
	return c, nil
}

func isNBD(name string) bool { return nbd.IsURI(name) }

// checkNBD validates an NBD URI.
func checkNBD(name string) (string, error) {
	_, err := nbd.ParseURI(name)
	return name, err
}

// parseOldNBD parses QEMU's names from before there were NBD URIs:
//
//	nbd:HOST:PORT[:exportname=NAME]
//	nbd:unix:PATH[:exportname=NAME]
func parseOldNBD(name string) (*location, error) {
	server, export, _ := strings.Cut(strings.TrimPrefix(name, "nbd:"), ":exportname=")
	if path, ok := strings.CutPrefix(server, "unix:"); ok {
		return nbdLocation(nbd.URI{Network: "unix", Address: path, Export: export})
	}
	i := strings.LastIndexByte(server, ':')
	if i < 0 {
		return nil, fmt.Errorf("%q: expected nbd:HOST:PORT or nbd:unix:PATH", name)
	}
	host := strings.TrimSuffix(strings.TrimPrefix(server[:i], "["), "]")
	return nbdLocation(nbd.URI{Network: "tcp", Address: net.JoinHostPort(host, server[i+1:]), Export: export})
}

// nbdLocation checks a URI that was made of its parts by writing it out and reading it back.
func nbdLocation(u nbd.URI) (*location, error) {
	uri, err := checkNBD(u.String())
	return &location{uri: uri}, err
}

// decodeNBD takes the options of the nbd driver: server.* or host, port and path, and export.
func decodeNBD(t *tree) (*location, error) {
	server, err := t.takeGroup("server")
	if err != nil {
		return nil, err
	}
	if server == nil {
		server = newTree()
		for _, key := range []string{"host", "port", "path"} {
			if t.has(key) {
				server.children[key] = t.take(key)
			}
		}
	}
	var values [5]string
	for i, key := range []string{"type", "host", "port", "path"} {
		if values[i], err = server.takeString(key); err != nil {
			return nil, fmt.Errorf("server: %w", err)
		}
	}
	if values[4], err = t.takeString("export"); err != nil {
		return nil, err
	}
	if rest := server.leftover(); rest != "" {
		return nil, qemuError("Block protocol 'nbd' doesn't support the option 'server.%s'", printable(rest))
	}
	kind, host, port, path, export := values[0], values[1], values[2], values[3], values[4]
	switch {
	case kind != "" && kind != "inet" && kind != "unix":
		return nil, fmt.Errorf("server.type %q, expected inet or unix", kind)
	case path != "" && host != "":
		return nil, fmt.Errorf("nbd: path %q and host %q exclude each other", path, host)
	case path != "" && kind != "inet":
		return nbdLocation(nbd.URI{Network: "unix", Address: path, Export: export})
	case host != "" && kind != "unix":
		if port == "" {
			port = nbd.DefaultPort
		}
		return nbdLocation(nbd.URI{Network: "tcp", Address: net.JoinHostPort(host, port), Export: export})
	}
	return nil, errors.New("nbd: the server's host or path is missing")
}
