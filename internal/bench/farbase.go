package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"

	"github.com/platter-disk/platter/nbd"
)

// farBase is a base image on the other side of a network: nbdkit serves it, slowed down, and logs what is read.
type farBase struct {
	p    *process
	log  *os.File
	read int64 // bytes that the log shows up to where it was read
	rest []byte
}

// link is what lies between a base image and those who read it.
type link struct {
	Delay string `json:"delay"` // of each read, as nbdkit takes it; "": none
	Rate  int64  `json:"rate"`  // bytes a second; 0: no limit
}

// startFarBase starts a server with a base image of the given size in bytes.
func startFarBase(ctx context.Context, dir string, size int64, l link) (*farBase, error) {
	logName := filepath.Join(dir, "base.log")
	s := Server{"base", func(_, socket string) []string {
		argv := []string{"nbdkit", "--foreground", "--unix", socket, "--filter=log"}
		var parameters []string
		if l.Delay != "" {
			argv, parameters = append(argv, "--filter=delay"), append(parameters, "delay-read="+l.Delay)
		}
		if l.Rate > 0 {
			// Without burstiness of its own the filter lets two seconds' worth through at once.
			argv = append(argv, "--filter=rate")
			parameters = append(parameters, fmt.Sprintf("rate=%d", l.Rate*8), "burstiness=0.1")
		}
		argv = append(argv, "pattern", fmt.Sprintf("size=%d", size), "logfile="+logName)
		return append(argv, parameters...)
	}}
	p, err := s.start(ctx, dir, "")
	if err != nil {
		return nil, err
	}
	log, err := os.Open(logName)
	if err != nil {
		return nil, errors.Join(err, p.stop())
	}
	return &farBase{p: p, log: log}, nil
}

// loggedRead is a line of nbdkit's log filter for a read that begins.
var loggedRead = regexp.MustCompile(`connection=\d+ Read id=\d+ offset=0x[0-9a-f]+ count=0x([0-9a-f]+) `)

// bytesRead is how many bytes were read from the base image since it was last called.
func (b *farBase) bytesRead() (int64, error) {
	before := b.read
	lines := bufio.NewReader(b.log)
	for {
		line, err := lines.ReadBytes('\n')
		b.rest = append(b.rest, line...)
		if err == io.EOF { // perhaps in the middle of a line
			return b.read - before, nil
		}
		if err != nil {
			return 0, err
		}
		if m := loggedRead.FindSubmatch(b.rest); m != nil {
			n, err := strconv.ParseInt(string(m[1]), 16, 64)
			if err != nil {
				return 0, fmt.Errorf("%s: %w", b.log.Name(), err)
			}
			b.read += n
		}
		b.rest = b.rest[:0]
	}
}

// dial connects to the base image.
func (b *farBase) dial() (*nbd.Client, error) {
	return nbd.Dial(b.p.uri, nbd.ClientOptions{ReadOnly: true})
}

func (b *farBase) stop() error {
	return errors.Join(b.p.stop(), b.log.Close(), os.Remove(b.log.Name()))
}
