package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/platter-disk/platter/jobs/prefetch"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/server"
)

// controller answers what is asked on the control socket of serve: HTTP with JSON.
//
//	GET  /status   the exports and what was done so far (statusReply)
//	POST /flush    makes everything durable that was acknowledged; ?export=NAME for one export
//	POST /quit     ends the server as SIGTERM does; the answer comes before the end
//	POST /prefetch/pause, /prefetch/resume
//	               stops prefetching, or ends whatever it waits for; ?export=NAME for one export. The answer is
//	               what /status says of the exports (exportsReply)
//
// An error is {"error": "…"} with a status of 400 or above.
type controller struct {
	server  *server.Server
	exports []export
	quit    func()
}

// listenControl opens the control socket. Only the user that runs the server may connect to it.
func listenControl(path string) (net.Listener, error) {
	l, err := server.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("--control: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("--control: %w", err)
	}
	return l, nil
}

// serve answers until ctx ends.
func (c *controller) serve(ctx context.Context, l net.Listener) error {
	srv := &http.Server{Handler: c.handler(), ReadTimeout: 10 * time.Second, MaxHeaderBytes: 64 << 10}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-ctx.Done()
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownLimit)
		defer cancel()
		if srv.Shutdown(limit) != nil {
			srv.Close()
		}
	}()
	err := srv.Serve(l)
	if errors.Is(err, http.ErrServerClosed) {
		<-stopped
		return nil
	}
	return fmt.Errorf("--control: %w", err)
}

func (c *controller) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", c.status)
	mux.HandleFunc("POST /flush", c.flush)
	mux.HandleFunc("POST /quit", c.end)
	mux.HandleFunc("POST /prefetch/pause", c.prefetching((*prefetch.Prefetcher).Pause))
	mux.HandleFunc("POST /prefetch/resume", c.prefetching((*prefetch.Prefetcher).Resume))
	return mux
}

// statusReply is the answer to GET /status.
type statusReply struct {
	Version string `json:"version"`
	PID     int    `json:"pid"`
	exportsReply
	Connections connectionStatus         `json:"connections"`
	Inline      uint64                   `json:"inline"` // requests that were answered without handing them to a worker
	Commands    map[string]commandStatus `json:"commands"`
}

// exportsReply is what there is to say of exports.
type exportsReply struct {
	Exports []exportStatus `json:"exports"`
}

type exportStatus struct {
	Name     string      `json:"name"`
	Image    string      `json:"image"`
	Format   string      `json:"format"`
	Size     int64       `json:"size"` // bytes
	ReadOnly bool        `json:"read_only"`
	Base     *baseStatus `json:"base,omitempty"` // absent: nothing is copied from a base image
}

type connectionStatus struct {
	Open     int    `json:"open"`
	Accepted uint64 `json:"accepted"`
	Refused  uint64 `json:"refused"`
}

type commandStatus struct {
	Requests uint64 `json:"requests"`
	Bytes    uint64 `json:"bytes"`
	Errors   uint64 `json:"errors"`
}

func (c *controller) status(w http.ResponseWriter, _ *http.Request) {
	st := c.server.Stats()
	reply := statusReply{
		Version:      version(),
		PID:          os.Getpid(),
		exportsReply: exportsReply{make([]exportStatus, 0, len(c.exports))},
		Connections:  connectionStatus{st.Connections, st.Accepted, st.Refused},
		Inline:       st.Inline,
		Commands:     map[string]commandStatus{},
	}
	for _, e := range c.exports {
		reply.Exports = append(reply.Exports, e.status())
	}
	for i, n := range st.Commands {
		if cmd := nbd.Command(i); cmd != nbd.CmdDisc {
			reply.Commands[strings.ToLower(cmd.String())] = commandStatus{n.Requests, n.Bytes, n.Errors}
		}
	}
	answer(w, http.StatusOK, reply)
}

func (e *export) status() exportStatus {
	return exportStatus{e.name, e.image.Name(), e.image.Format(), e.image.Size(), e.image.Limits().ReadOnly, e.fetcher.status()}
}

// asked lists the exports that a request is about. If there is none it refuses the request.
func (c *controller) asked(w http.ResponseWriter, r *http.Request) []export {
	q := r.URL.Query()
	if !q.Has("export") {
		return c.exports
	}
	for i, e := range c.exports {
		if e.name == q.Get("export") {
			return c.exports[i : i+1]
		}
	}
	refuse(w, http.StatusNotFound, fmt.Errorf("there is no export %q", q.Get("export")))
	return nil
}

func (c *controller) flush(w http.ResponseWriter, r *http.Request) {
	exports := c.asked(w, r)
	for _, e := range exports {
		if err := e.device().Flush(); err != nil {
			refuse(w, http.StatusInternalServerError, fmt.Errorf("export %q: %w", e.name, err))
			return
		}
	}
	if exports != nil {
		answer(w, http.StatusOK, struct{}{})
	}
}

// prefetching does something to the prefetching of exports.
func (c *controller) prefetching(do func(*prefetch.Prefetcher)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		exports := c.asked(w, r)
		var reply exportsReply
		for _, e := range exports {
			if e.fetcher != nil && e.fetcher.prefetch != nil {
				do(e.fetcher.prefetch)
				reply.Exports = append(reply.Exports, e.status())
			}
		}
		switch {
		case len(reply.Exports) > 0:
			answer(w, http.StatusOK, reply)
		case exports != nil:
			refuse(w, http.StatusConflict, errors.New("nothing is being prefetched"))
		}
	}
}

func (c *controller) end(w http.ResponseWriter, _ *http.Request) {
	answer(w, http.StatusAccepted, struct{}{})
	c.quit()
}

func refuse(w http.ResponseWriter, status int, err error) {
	answer(w, status, struct {
		Error string `json:"error"`
	}{err.Error()})
}

func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	// An error means that the client is gone: there is nobody to tell.
	_ = json.NewEncoder(w).Encode(v)
}
