package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/platter-disk/platter/jobs/prefetch"
)

const (
	loadDisk   = 4 << 30  // bytes; prefetching works on the lower half, the guest on the upper one
	loadOwn    = 64 << 20 // bytes at the end of the disk that the guest wrote before
	loadRead   = 128 << 10
	loadWrite  = 4 << 10
	loadWindow = 30 * time.Second // of each measurement, at scale 1
	loadBin    = time.Second      // of the plot

	plotIdle, plotBusy = 12 * time.Second, 40 * time.Second // before and after the load, and the load itself
	plotThrottle       = 10 * time.Second                   // bound of a pause in the plot
)

// LoadRun is a guest at work while its disk is prefetched.
type LoadRun struct {
	Work       string    `json:"work"`
	How        string    `json:"prefetching"`
	Rates      []float64 `json:"guest_bytes_per_second"` // of each round
	Lost       float64   `json:"lost"`                   // part of the throughput without prefetching
	Prefetched float64   `json:"prefetched_bytes_per_second"`
	Pauses     int       `json:"pauses"` // in all rounds together
}

// LoadReport is prefetching under load.
type LoadReport struct {
	Link link      `json:"link"`
	Runs []LoadRun `json:"runs"`
	Plot string    `json:"plot,omitempty"` // the file it was written to
}

// guestWork is what a guest does all the time.
type guestWork struct {
	title   string
	workers int
	size    int // bytes of a request
	prepare func(c *clone) error
	request func(c *clone, p []byte, i int64) error
}

// ownWork overwrites blocks that the guest wrote before and makes each durable: base image and guest share nothing
// but this machine.
func ownWork() guestWork {
	return guestWork{title: "4 KiB overwrites, each with a flush", workers: 1, size: loadWrite,
		prepare: func(c *clone) error {
			p := make([]byte, 1<<20)
			for at := int64(loadDisk - loadOwn); at < loadDisk; at += int64(len(p)) {
				if _, err := c.disk.WriteAt(p, at); err != nil {
					return err
				}
			}
			return c.disk.Sync()
		},
		request: func(c *clone, p []byte, i int64) error {
			_, err := c.disk.WriteAt(p, loadDisk-loadOwn+int64(mix(uint64(i))%(loadOwn/loadWrite))*loadWrite)
			return errors.Join(err, c.disk.Sync())
		},
	}
}

// baseWork reads what the disk does not have yet: guest and prefetching share the way to the base image.
func baseWork() guestWork {
	const (
		places = (loadDisk/2 - loadOwn) / loadRead
		stride = 1009 // a prime that does not divide places: every place once
	)
	return guestWork{title: "128 KiB reads from the base image, 4 at a time", workers: 4, size: loadRead,
		prepare: func(*clone) error { return nil },
		request: func(c *clone, p []byte, i int64) error {
			_, err := c.disk.ReadAt(p, loadDisk/2+i*stride%places*loadRead)
			return err
		},
	}
}

// run works for a while and tells how many bytes were moved; each request is noted in bins, unless that is nil.
func (w guestWork) run(ctx context.Context, c *clone, d time.Duration, note func(time.Time, int)) (int64, error) {
	var next, moved atomic.Int64
	end := time.Now().Add(d)
	all, ctx := errgroup.WithContext(ctx)
	for range w.workers {
		all.Go(func() error {
			p := make([]byte, w.size)
			for time.Now().Before(end) {
				if err := errors.Join(ctx.Err(), w.request(c, p, next.Add(1)-1)); err != nil {
					return err
				}
				moved.Add(int64(len(p)))
				if note != nil {
					note(time.Now(), len(p))
				}
			}
			return nil
		})
	}
	err := all.Wait()
	return moved.Load(), err
}

// loadCase is a guest's work and how its disk is prefetched meanwhile.
type loadCase struct {
	work guestWork
	how  string
	o    *prefetch.Options // nil: not at all
}

func loadCases(l link) []loadCase {
	gentle := &prefetch.Options{MinRead: gentleShare * float64(l.Rate)}
	capped := &prefetch.Options{MaxRead: cappedShare * float64(l.Rate)}
	return []loadCase{
		{ownWork(), "none", nil},
		{ownWork(), "defaults", &prefetch.Options{}},
		{ownWork(), fmt.Sprintf("at most %.0f %% of the link", cappedShare*100), capped},
		{baseWork(), "none", nil},
		{baseWork(), "defaults: pauses below 5 MB/s", &prefetch.Options{}},
		{baseWork(), fmt.Sprintf("pauses below %.0f %% of the link", gentleShare*100), gentle},
		{baseWork(), fmt.Sprintf("at most %.0f %% of the link", cappedShare*100), capped},
	}
}

const (
	gentleShare = 0.8  // of the link: prefetching that gets less than that is not alone
	cappedShare = 0.05 // of the link
)

// load measures a guest at work with and without prefetching.
func (b *FVDBench) load(ctx context.Context) (*LoadReport, error) {
	if err := require("nbdkit"); err != nil {
		return nil, err
	}
	r := &LoadReport{Link: farLink()}
	cases := loadCases(r.Link)
	window := loadWindow * time.Duration(b.Scale)
	for _, c := range cases {
		r.Runs = append(r.Runs, LoadRun{Work: c.work.title, How: c.how})
	}
	for round := range b.Rounds {
		for i, c := range cases {
			run := &r.Runs[i]
			err := b.onLoadedClone(ctx, r.Link, c.work, c.o, func(d *clone) error {
				moved, err := c.work.run(ctx, d, window, nil)
				run.Rates = append(run.Rates, float64(moved)/window.Seconds())
				if d.prefetcher != nil {
					s := d.prefetcher.Status()
					run.Prefetched += float64(s.Read) / window.Seconds() / float64(b.Rounds)
					run.Pauses += s.Pauses
				}
				return err
			})
			if err != nil {
				return nil, err
			}
			fmt.Fprintf(b.Notes, "load, round %d, %s, prefetching %s: %.2f MB/s\n", round+1, run.Work, run.How, run.Rates[round]/1e6)
		}
	}
	for i := range r.Runs {
		for k := range r.Runs {
			if cases[k].o == nil && r.Runs[k].Work == r.Runs[i].Work {
				r.Runs[i].Lost = 1 - median(r.Runs[i].Rates)/median(r.Runs[k].Rates)
			}
		}
	}
	if b.Plot == "" {
		return r, nil
	}
	r.Plot = b.Plot
	return r, b.plotLoad(ctx, r.Link, plotIdle, plotBusy)
}

// onLoadedClone calls fn with a new clone of a base image that is far away.
func (b *FVDBench) onLoadedClone(ctx context.Context, l link, w guestWork, o *prefetch.Options, fn func(*clone) error) (err error) {
	dir, err := os.MkdirTemp(b.Dir, "load-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	base, err := startFarBase(ctx, dir, loadDisk, l)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, base.stop()) }()
	name := filepath.Join(dir, "clone.fvd")
	if err := createClone(ctx, name, base, 0); err != nil {
		return err
	}
	c, err := openClone(ctx, name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	if err := w.prepare(c); err != nil {
		return err
	}
	if o != nil {
		c.prefetch(*o)
	}
	return fn(c)
}

// plotLoad draws how prefetching gives way to a guest that comes after idle, stays for busy, and is gone for idle.
func (b *FVDBench) plotLoad(ctx context.Context, l link, idle, busy time.Duration) error {
	begin := time.Now()
	seconds := func(t time.Time) float64 { return t.Sub(begin).Seconds() }
	length := busy + 2*idle
	guest, own := newRates(length), newRates(length)
	p := &plot{
		title: fmt.Sprintf("Prefetching gives way: a guest reads its base image from second %.0f to %.0f over a link of %.0f MB/s",
			idle.Seconds(), (idle + busy).Seconds(), float64(l.Rate)/1e6),
		x: "seconds", y: "MB/s", end: length.Seconds(), caption: "prefetching pauses",
	}
	average := series{name: "its measured average", color: "#2a9d4a"}
	o := prefetch.Options{MinRead: gentleShare * float64(l.Rate), Throttle: plotThrottle, Trace: func(e prefetch.Event) {
		switch at := seconds(e.Time); e.Kind {
		case prefetch.EventRead:
			own.add(at, e.Bytes)
		case prefetch.EventSample:
			if e.ReadAverage >= 0 {
				average.points = append(average.points, point{at, e.ReadAverage / 1e6})
			}
		case prefetch.EventPause:
			p.bands = append(p.bands, band{at, length.Seconds()})
			average.points = append(average.points, point{at, -1}) // it is measured anew afterwards
		case prefetch.EventResume:
			p.bands[len(p.bands)-1].to = at
		}
	}}
	work := baseWork()
	err := b.onLoadedClone(ctx, l, work, nil, func(c *clone) error {
		begin = time.Now()
		c.prefetch(o)
		if err := sleep(ctx, idle); err != nil {
			return err
		}
		if _, err := work.run(ctx, c, busy, func(t time.Time, n int) { guest.add(seconds(t), int64(n)) }); err != nil {
			return err
		}
		return sleep(ctx, idle)
	})
	if err != nil {
		return err
	}
	p.series = []series{
		{name: "guest", color: "#1f5fa8", points: guest.points()},
		{name: "prefetching", color: "#c0392b", points: own.points()},
		average,
		{name: "its minimum", color: "#777777", dashed: true, points: []point{{0, o.MinRead / 1e6}, {p.end, o.MinRead / 1e6}}},
	}
	f, err := os.Create(b.Plot)
	if err != nil {
		return err
	}
	return errors.Join(p.write(f), f.Close())
}

// rates adds up bytes for each bin of the time.
type rates []atomic.Int64

func newRates(length time.Duration) rates { return make(rates, length/loadBin+1) }

// add notes bytes at a number of seconds; what is later than the last bin is left out.
func (r rates) add(at float64, n int64) {
	if i := int(at / loadBin.Seconds()); i >= 0 && i < len(r) {
		r[i].Add(n)
	}
}

// points are the rates in MB/s, in the middle of each bin.
func (r rates) points() []point {
	p := make([]point, len(r))
	for i := range r {
		p[i] = point{(float64(i) + 0.5) * loadBin.Seconds(), float64(r[i].Load()) / 1e6 / loadBin.Seconds()}
	}
	return p
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
