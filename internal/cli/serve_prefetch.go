package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/jobs/prefetch"
)

const (
	reportInterval  = 10 * time.Second // between reports of progress
	profileInterval = 5 * time.Second  // between looks at whether a profile is to be written again
)

// prefetchFlags are the flags of serve about base images.
type prefetchFlags struct {
	copyOnRead string // "" follows the image
	prefetch   string // "" follows the image
	follow     []string
	record     []string

	params []parameter // the options in prefetch
}

func (f *prefetchFlags) register(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVar(&f.copyOnRead, "copy-on-read", "", "keep what clients read from a base image: `MODE` is on or off\n(default: what the image asks for; off for qcow2)")
	fs.Lookup("copy-on-read").NoOptDefVal = "on"
	completeWith(cmd, "copy-on-read", "on", "off")
	fs.StringVar(&f.prefetch, "prefetch", "", "fetch the rest of the base image while the disk is in use, then\nlet go of it: `HOW` is on, off (default: what the image asks for),\nor NAME=VALUE,… of\n  "+prefetchHelp("  "))
	fs.Lookup("prefetch").NoOptDefVal = "on"
	fs.StringArrayVar(&f.follow, "profile", nil, "prefetch in the order that the profile `FILE` holds first; once for each\nimage, or for all: auto is IMAGE"+profileSuffix+", if it exists")
	fs.StringArrayVar(&f.record, "record-profile", nil, "record in which order clients read the base image, to `FILE`; once for each\nimage, or for all: auto is IMAGE"+profileSuffix)
}

// check refuses what means nothing.
func (f *prefetchFlags) check(cmd *cobra.Command, images int, readOnly bool) (err error) {
	switch f.copyOnRead {
	case "", "on", "off":
	default:
		return usagef(cmd, "--copy-on-read must be used with on or off as argument")
	}
	switch f.prefetch {
	case "", "on", "off":
	default:
		if f.params, _, err = parseOptionLists([]string{f.prefetch}); err == nil {
			err = setPrefetchOptions(&prefetch.Options{}, f.params)
		}
		if err != nil {
			return usagef(cmd, "--prefetch: %s", err)
		}
	}
	if readOnly && (f.copyOnRead == "on" || f.prefetches() || len(f.follow) > 0) {
		return usagef(cmd, "--read-only leaves no room for --copy-on-read, --prefetch and --profile")
	}
	if len(f.follow) > 0 && f.prefetch == "off" {
		return usagef(cmd, "--profile needs --prefetch")
	}
	for flag, files := range map[string][]string{"profile": f.follow, "record-profile": f.record} {
		if n := len(files); n > 0 && n != images && !(n == 1 && files[0] == profileAuto) {
			return usagef(cmd, "%d --%s for %d images: give one for each, or auto once", n, flag, images)
		}
	}
	return nil
}

// prefetches tells that the command line asks for prefetching.
func (f *prefetchFlags) prefetches() bool { return f.prefetch != "" && f.prefetch != "off" }

// pick is the value of a flag for the i-th image, "" for none.
func pick(files []string, i int) string {
	switch {
	case len(files) == 0:
		return ""
	case len(files) == 1:
		return files[0]
	default:
		return files[i]
	}
}

// fetcher makes a disk that is being served independent of its base image.
type fetcher struct {
	over     *overlay
	disk     *prefetch.CopyOnRead
	size     int64                // bytes that the base image covers
	keeps    bool                 // what clients read
	prefetch *prefetch.Prefetcher // nil: there is none
	recorder *recording           // nil: there is none
	log      *slog.Logger

	cancel context.CancelFunc
	work   sync.WaitGroup
}

// newFetcher prepares what the flags and the i-th image ask for; nil if that is nothing.
func (f *prefetchFlags) newFetcher(img *image.Image, export string, i int, log *slog.Logger) (*fetcher, error) {
	log = log.With("export", export)
	asked := f.copyOnRead == "on" || f.prefetches() || len(f.record) > 0
	over, err := overlayOf(img)
	if err != nil {
		return nil, err
	}
	if over == nil {
		if asked {
			log.Info("there is no base image to copy from")
		}
		return nil, nil
	}
	ft := &fetcher{over: over, size: over.BaseSize(), log: log}
	readOnly := img.Limits().ReadOnly
	options, prefetches := prefetch.Options{}, false
	reading := prefetch.CopyOnReadOptions{MaxOutstanding: -1, Failed: func(err error) { log.Error(err.Error()) }}
	if h := img.FVD(); h != nil && !readOnly {
		header := h.Header()
		ft.keeps = header.CopyOnRead
		reading.MaxOutstanding = int64(min(header.MaxOutstandingCopies, 1<<40))
		options, prefetches = headerPrefetch(header)
	}
	if f.copyOnRead != "" {
		ft.keeps = f.copyOnRead == "on"
	}
	switch {
	case !ft.keeps:
		reading.MaxOutstanding = -1
	case reading.MaxOutstanding < 0:
		reading.MaxOutstanding = 0 // the default
	}
	if f.prefetch != "" {
		prefetches = f.prefetches()
	}
	if err := setPrefetchOptions(&options, f.params); err != nil {
		return nil, err
	}
	if name := pick(f.record, i); name != "" {
		if ft.recorder, err = newRecording(name, img.Name(), ft.size); err != nil {
			return nil, fmt.Errorf("--record-profile: %w", err)
		}
		reading.Recorder = ft.recorder.Recorder
	}
	if name := pick(f.follow, i); name != "" && !readOnly {
		if options.Order, err = readProfile(name, img.Name()); err != nil {
			return nil, fmt.Errorf("--profile: %w", err)
		}
		prefetches = prefetches || options.Order != nil
	}
	if !ft.keeps && !prefetches && ft.recorder == nil {
		return nil, nil
	}
	ft.disk = prefetch.NewCopyOnRead(over, reading)
	if prefetches {
		options.Trace, options.Announce, options.Guest = ft.trace, ft.disk.Announce, ft.disk.Guest()
		ft.prefetch = prefetch.New(over, options)
		if over.keepsBase != "" {
			log.Warn("the image keeps the reference to its base image: " + over.keepsBase)
		}
	}
	return ft, nil
}

// start begins the work in the background, until stop.
func (ft *fetcher) start() {
	ctx, cancel := context.WithCancel(context.Background())
	ft.cancel = cancel
	if ft.prefetch != nil {
		ft.work.Go(func() {
			if err := ft.over.learn(ctx); err != nil && ctx.Err() == nil {
				ft.log.Warn("how much is to be fetched is not known yet", "error", err)
			}
			ft.work.Go(func() { ft.report(ctx) })
			// Its trace reports how it ends.
			_ = ft.prefetch.Run(ctx)
		})
	}
	if ft.recorder != nil {
		ft.work.Go(func() { ft.record(ctx) })
	}
}

// stop ends the work: what is under way is finished, and a profile is written.
func (ft *fetcher) stop() {
	if ft.cancel == nil {
		return
	}
	ft.cancel()
	ft.work.Wait()
}

// trace logs the steps of prefetching that a user wants to know of.
func (ft *fetcher) trace(e prefetch.Event) {
	switch e.Kind {
	case prefetch.EventPause:
		ft.log.Debug("prefetching pauses", "for", e.Wait)
	case prefetch.EventResume:
		ft.log.Debug("prefetching goes on")
	case prefetch.EventRetry:
		ft.log.Warn("the base image cannot be read; prefetching will try again", "in", e.Wait, "error", e.Err)
	case prefetch.EventFailed:
		ft.log.Error("prefetching is off until the image is opened again", "error", e.Err)
	case prefetch.EventDone:
		if ft.over.keepsBase != "" {
			ft.log.Info("prefetching is complete: only snapshots need the base image")
		} else {
			ft.log.Info("prefetching is complete: the base image is not needed any more")
		}
	}
}

// report logs how far prefetching is.
func (ft *fetcher) report(ctx context.Context) {
	st := ft.prefetch.Status()
	ft.log.Info("prefetching", "base", formatSize(st.Total), "left", formatSize(st.Remaining))
	tick := time.NewTicker(reportInterval)
	defer tick.Stop()
	for last := st; ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		st = ft.prefetch.Status()
		switch {
		case st.State == prefetch.StateDone || st.State == prefetch.StateFailed:
			return
		case st.Kept != last.Kept || st.State != last.State:
			ft.log.Info("prefetching", "state", st.State, "left", formatSize(st.Remaining), "fetched", formatSize(st.Kept),
				"rate", formatSize(int64(float64(st.Kept-last.Kept)/reportInterval.Seconds()))+"/s")
		}
		last = st
	}
}

// record writes the profile while it grows, and at the end.
func (ft *fetcher) record(ctx context.Context) {
	tick := time.NewTicker(profileInterval)
	defer tick.Stop()
	for more := true; more; {
		select {
		case <-ctx.Done():
			more = false
		case <-tick.C:
		}
		if err := ft.recorder.save(); err != nil {
			ft.log.Error("the profile is not stored", "error", err)
		}
	}
}

// recording is a profile that is being recorded to a file.
type recording struct {
	*prefetch.Recorder
	path string

	mu    sync.Mutex
	saved int64 // bytes that the file covers
	err   error // of the last attempt to store it
}

// newRecording goes on with the file that name stands for, if it is there: what a server before this one recorded
// came first.
func newRecording(name, imageName string, size int64) (*recording, error) {
	path, err := profileFile(name, imageName)
	if err != nil {
		return nil, err
	}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real // the profile is replaced, not the link to it
	}
	r := &recording{Recorder: prefetch.NewRecorder(size), path: path}
	p, err := loadProfile(path)
	if err != nil && !os.IsNotExist(err) {
		return nil, fmt.Errorf("%w\nA file that is no profile is not replaced", err)
	}
	for _, run := range p {
		r.Touch(run.Offset, run.Length)
	}
	_, r.saved = r.recorded()
	return r, nil
}

// recordsAlone refuses to record to a file that an earlier export records to: the profiles would replace each other.
func recordsAlone(earlier []export, ft *fetcher) error {
	if ft == nil || ft.recorder == nil {
		return nil
	}
	for _, e := range earlier {
		if e.fetcher == nil || e.fetcher.recorder == nil {
			continue
		}
		a, errA := filepath.Abs(e.fetcher.recorder.path)
		b, errB := filepath.Abs(ft.recorder.path)
		if errA == nil && errB == nil && image.SameFile(a, b) {
			return fmt.Errorf("--record-profile: '%s' is given for two images", ft.recorder.path)
		}
	}
	return nil
}

// recorded is the profile so far and how many bytes it covers.
func (r *recording) recorded() (p prefetch.Profile, bytes int64) {
	p = r.Profile()
	for _, run := range p {
		bytes += run.Length
	}
	return p, bytes
}

// save writes the profile, if it grew, in place of the file. An empty one replaces nothing.
func (r *recording) save() (err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p, bytes := r.recorded()
	if bytes == r.saved {
		return nil
	}
	defer func() {
		if r.err = err; err == nil {
			r.saved = bytes
		}
	}()
	if _, err := loadProfile(r.path); err != nil && !os.IsNotExist(err) {
		return fmt.Errorf("%w\nA file that is no profile is not replaced", err) // it appeared meanwhile
	}
	f, err := os.CreateTemp(filepath.Dir(r.path), filepath.Base(r.path)+".*.new")
	if err != nil {
		return err
	}
	_, err = p.WriteTo(f)
	err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), r.path)
	}
	if err != nil {
		err = errors.Join(err, os.Remove(f.Name()))
	}
	return err
}

// baseStatus tells how far a disk is independent of its base image.
type baseStatus struct {
	Size       int64                    `json:"size"`      // bytes that the base image covers
	Remaining  int64                    `json:"remaining"` // of those, bytes that still live there
	Attached   bool                     `json:"attached"`  // the base image is still needed
	CopyOnRead bool                     `json:"copy_on_read"`
	Guest      prefetch.CopyOnReadStats `json:"guest"`              // what clients read
	Prefetch   *prefetch.Status         `json:"prefetch,omitempty"` // absent: not asked for
	Profile    *profileStatus           `json:"profile,omitempty"`  // absent: none is recorded
}

type profileStatus struct {
	File  string `json:"file"`
	Runs  int    `json:"runs"`  // recorded so far
	Bytes int64  `json:"bytes"` // that they cover
	Error string `json:"error,omitempty"`
}

// status is nil for a nil fetcher.
func (ft *fetcher) status() *baseStatus {
	if ft == nil {
		return nil
	}
	s := &baseStatus{Size: ft.size, Attached: ft.disk.BaseSize() > 0 || ft.over.keepsBase != "", CopyOnRead: ft.keeps, Guest: ft.disk.Stats()}
	if ft.prefetch != nil {
		p := ft.prefetch.Status()
		s.Prefetch, s.Remaining = &p, p.Remaining
	} else {
		s.Remaining = prefetch.Remaining(ft.disk)
	}
	if r := ft.recorder; r != nil {
		p, bytes := r.recorded()
		s.Profile = &profileStatus{File: r.path, Runs: len(p), Bytes: bytes}
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.err != nil {
			s.Profile.Error = r.err.Error()
		}
	}
	return s
}
