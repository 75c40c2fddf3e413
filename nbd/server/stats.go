package server

import (
	"sync/atomic"

	"github.com/platter-disk/platter/nbd"
)

// Stats counts what a server did since it was created.
type Stats struct {
	Connections int    // open now, those in the handshake included
	Accepted    uint64 // ever
	Refused     uint64 // closed at once because there were too many
	Inline      uint64 // requests served by a connection's reader, without a worker
	Commands    [nbd.NumCommands]CommandStats
}

// CommandStats counts the requests of one command, indexed by nbd.Command in Stats.
type CommandStats struct {
	Requests uint64 // answered, those that failed included
	Bytes    uint64 // of those that succeeded: read, written, zeroed, discarded …
	Errors   uint64 // that failed, those that broke a rule included
}

// Stats returns the counts. It can be called at any time.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	st.Connections = len(s.conns)
	for c := range s.conns {
		c.counters.addTo(&st)
	}
	return st
}

// counters are a connection's own, so that connections do not fight for a cache line.
type counters struct {
	inline   atomic.Uint64
	commands [nbd.NumCommands]struct{ requests, bytes, errors atomic.Uint64 }
}

func (c *counters) succeeded(command nbd.Command, bytes uint64) {
	n := &c.commands[command]
	n.requests.Add(1)
	n.bytes.Add(bytes)
}

func (c *counters) failed(command nbd.Command) {
	if command < nbd.NumCommands {
		c.commands[command].requests.Add(1)
		c.commands[command].errors.Add(1)
	}
}

func (c *counters) addTo(st *Stats) {
	st.Inline += c.inline.Load()
	for i := range c.commands {
		st.Commands[i].Requests += c.commands[i].requests.Load()
		st.Commands[i].Bytes += c.commands[i].bytes.Load()
		st.Commands[i].Errors += c.commands[i].errors.Load()
	}
}
