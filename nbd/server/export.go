package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"slices"
	"sync"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/nbd"
)

// Export is a device under a name.
type Export struct {
	Name        string // "" is the default export, the one a client gets that names none
	Description string // for people, may be empty
	Device      block.Device
	ReadOnly    bool // refuse changes even where the device would take them

	// Default makes the export also answer to the empty name. An export whose Name is "" does anyway.
	Default bool

	// MinBlock is the alignment in bytes that requests must have: a power of two, at most 64 KiB, default 1.
	// The end of a device beyond the last multiple of it is not visible.
	MinBlock int
	// PreferredBlock is advertised to clients: a power of two in bytes, at least MinBlock and 512. The default is what the
	// device prefers, within 4 KiB to 1 MiB: clients may align their caches and buffers to it.
	PreferredBlock int
}

type export struct {
	Export
	size     uint64 // bytes, when it was added
	blocks   nbd.BlockSizes
	failures *logLimit // of requests; an export's own, so that the trouble of one does not hide another's

	removed bool           // RemoveExport was called: no connection is added to users; guarded by the server's mu
	users   sync.WaitGroup // connections that may use the device
}

// Bounds in bytes of the preferred block size that an export has by default.
const (
	leastPreferred = 4 << 10
	mostPreferred  = 1 << 20
)

// ErrUnknownExport is wrapped by the error of RemoveExport when no export has the name.
var ErrUnknownExport = errors.New("the server has no export of that name")

// AddExport makes a device available. It can be called while the server runs, before and after Serve. The device must
// stay open until RemoveExport has returned, or Shutdown without an error; its size as it is now is what clients see. A
// name that is taken, a second default export, block sizes or strings that the protocol does not allow, are errors, and
// so is ErrShutdown.
func (s *Server) AddExport(e Export) error {
	if e.Device == nil {
		return fmt.Errorf("nbd export %q: no device", e.Name)
	}
	for what, text := range map[string]string{"name": e.Name, "description": e.Description} {
		if err := nbd.ValidString(what, text); err != nil {
			return fmt.Errorf("nbd export %q: %w", e.Name, err)
		}
	}
	if e.MinBlock == 0 {
		e.MinBlock = 1
	}
	if e.PreferredBlock == 0 {
		allowed := min(mostPreferred, 1<<(bits.Len(uint(s.cfg.MaxRequest))-1))
		unit := int(min(e.Device.Limits().Preferred, int64(allowed)))
		e.PreferredBlock = max(unit, leastPreferred, e.MinBlock)
	}
	if e.MinBlock < 0 || e.PreferredBlock < 0 || e.PreferredBlock > s.cfg.MaxRequest {
		return fmt.Errorf("nbd export %q: block sizes %d and %d, expected 1 to %d", e.Name, e.MinBlock, e.PreferredBlock, s.cfg.MaxRequest)
	}
	x := &export{Export: e, failures: newLogLimit(s.cfg.Logger.With("export", e.Name), slog.LevelWarn, "nbd: request failed")}
	x.blocks = nbd.BlockSizes{
		Minimum:   uint32(e.MinBlock),
		Preferred: uint32(e.PreferredBlock),
		Maximum:   uint32(s.cfg.MaxRequest - s.cfg.MaxRequest%e.MinBlock),
	}
	if err := x.blocks.Validate(); err != nil {
		return fmt.Errorf("nbd export %q: %w", e.Name, err)
	}
	size := e.Device.Size()
	x.size = uint64(size - size%int64(e.MinBlock))
	x.ReadOnly = e.ReadOnly || e.Device.Limits().ReadOnly
	x.Default = e.Default || e.Name == ""

	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining.Load() {
		return ErrShutdown
	}
	for _, other := range s.exports {
		if other.Name == x.Name {
			return fmt.Errorf("nbd export %q: the name is taken", x.Name)
		}
		if other.Default && x.Default {
			return fmt.Errorf("nbd export %q: %q is the default export already", x.Name, other.Name)
		}
	}
	s.exports = append(s.exports, x)
	return nil
}

// RemoveExport takes an export away while the server runs. From then on no client gets it. Its connections end as they
// do in Shutdown: what they have begun is finished and answered, what they have not begun is answered with ESHUTDOWN, and
// they are closed. When RemoveExport returns nobody uses the device any more, so that the caller may close it, and the
// name is free; until then it is taken, lest one client be connected to both disks. A connection may stay half open for a
// second more, for its client to read the last replies.
//
// When ctx ends first the connections are cut and ctx's error is returned, but still only when the requests that run
// in the device have ended: a device that does not answer holds it up.
//
// name is the export's own, even where it also answers to the empty one as the default. If no export has the name the
// error wraps ErrUnknownExport. A call while another is removing the export waits like that.
func (s *Server) RemoveExport(ctx context.Context, name string) error {
	s.mu.Lock()
	at := slices.IndexFunc(s.exports, func(x *export) bool { return x.Name == name })
	if at < 0 {
		s.mu.Unlock()
		return fmt.Errorf("nbd export %q: %w", name, ErrUnknownExport)
	}
	x := s.exports[at]
	x.removed = true
	for c := range s.connsOf(x) {
		c.drain()
	}
	s.mu.Unlock()
	err := s.settle(ctx, x, &x.users)
	x.users.Wait() // connections that were cut, until the device lets go of them
	s.mu.Lock()
	s.exports = slices.DeleteFunc(s.exports, func(other *export) bool { return other == x })
	s.mu.Unlock()
	x.failures.summarize()
	return err
}

// find returns the export that answers to a name, or nil.
func (s *Server) find(name string) *export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.findLocked(name)
}

// findLocked is find for callers that hold mu.
func (s *Server) findLocked(name string) *export {
	for _, x := range s.exports {
		if !x.removed && (x.Name == name || name == "" && x.Default) {
			return x
		}
	}
	return nil
}

// list returns the exports that clients can have, in the order they were added.
func (s *Server) list() []*export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(s.exports), func(x *export) bool { return x.removed })
}

// flags are the transmission flags for a connection with the given form of replies.
func (x *export) flags(mode nbd.ReplyMode) nbd.TransmissionFlags {
	// One device serves all connections, and its Flush covers whatever completed on any of them.
	f := nbd.HasFlags | nbd.SendFlush | nbd.CanMultiConn | nbd.SendCache
	if x.ReadOnly {
		f |= nbd.ReadOnly
	} else {
		f |= nbd.SendFUA | nbd.SendTrim | nbd.SendWriteZeroes | nbd.SendFastZero
	}
	if mode != nbd.SimpleReplies {
		f |= nbd.SendDF
	}
	if mode == nbd.ExtendedReplies {
		f |= nbd.SendBlockStatusPayload
	}
	return f
}

// errno is the protocol's error for what a device returned.
func errno(command nbd.Command, err error) nbd.Errno {
	switch {
	case errors.Is(err, block.ErrReadOnly):
		return nbd.EPERM
	case errors.Is(err, block.ErrOutOfRange):
		if command == nbd.CmdWrite || command == nbd.CmdWriteZeroes {
			return nbd.ENOSPC
		}
		return nbd.EINVAL
	case errors.Is(err, block.ErrClosed):
		return nbd.ESHUTDOWN
	case isAny(err, noSpace[:]):
		return nbd.ENOSPC
	case isAny(err, noPermission[:]):
		return nbd.EPERM
	}
	return nbd.EIO
}

func isAny(err error, targets []error) bool {
	for _, t := range targets {
		if errors.Is(err, t) {
			return true
		}
	}
	return false
}
