package server

import (
	"errors"
	"fmt"
	"log/slog"

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
	// PreferredBlock is advertised to clients: a power of two, at least MinBlock and 512, default 4096.
	PreferredBlock int
}

type export struct {
	Export
	size     uint64 // bytes, when it was added
	blocks   nbd.BlockSizes
	failures *logLimit // of requests; an export's own, so that the trouble of one does not hide another's
}

// AddExport makes a device available. It can be called while the server runs, before and after Serve. The device must
// stay open until Shutdown has returned; its size as it is now is what clients see. A name that is taken, a second
// default export, block sizes or strings that the protocol does not allow, are errors, and so is ErrShutdown.
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
		e.PreferredBlock = max(4096, e.MinBlock)
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

// find returns the export that answers to a name, or nil.
func (s *Server) find(name string) *export {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.exports {
		if x.Name == name || name == "" && x.Default {
			return x
		}
	}
	return nil
}

// list returns all exports in the order they were added.
func (s *Server) list() []*export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*export(nil), s.exports...)
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
