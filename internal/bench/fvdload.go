package bench

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/platter-disk/platter/jobs/prefetch"
)

const (
	loadDisk   = 8 << 30  // bytes; prefetching works on the lower half, the guest on the upper one
	loadOwn    = 64 << 20 // bytes at the end of the disk that the guest wrote before
	loadRead   = 128 << 10
	loadWrite  = 4 << 10
	loadWindow = 4 * time.Second // of work without prefetching or with it, in turn
	loadPairs  = 10              // of such windows in a round, at scale 1
	loadBin    = time.Second     // of the plot

	plotIdle, plotBusy = 12 * time.Second, 40 * time.Second // before and after the load, and the load itself
	plotThrottle       = 10 * time.Second                   // bound of a pause in the plot
)

// LoadRun is a guest at work while its disk is prefetched, in turn with the same guest without that.
type LoadRun struct {
	Work       string    `json:"work"`
	How        string    `json:"prefetching"`
	Without    []float64 `json:"bytes_per_second_without"` // of the guest, in each window
	With       []float64 `json:"bytes_per_second_with"`    // in the window after it
	Lost       float64   `json:"lost"`                     // part of the throughput, from the mean ratio of the pairs
	Error      float64   `json:"lost_error"`               // standard error of that
	Prefetched float64   `json:"prefetched_bytes_per_second"`
	Pauses     int       `json:"pauses"` // of its own
}

// compare sums the windows up. What other programs do to this machine changes slowly beside them, so that neighbours
// are compared.
func (r *LoadRun) compare() {
	var mean, spread float64
	n := float64(len(r.With))
	for i := range r.With {
		mean += math.Log(r.With[i]/r.Without[i]) / n
	}
	for i := range r.With {
		d := math.Log(r.With[i]/r.Without[i]) - mean
		spread += d * d
	}
	r.Lost, r.Error = 1-math.Exp(mean), 0
	if n > 1 {
		r.Error = math.Exp(mean) * math.Sqrt(spread/(n-1)/n)
	}
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

	next *atomic.Int64 // request
}

// ownWork overwrites blocks that the guest wrote before and makes each durable: base image and guest share nothing
// but this machine.
func ownWork() guestWork {
	return guestWork{title: "4 KiB overwrites, each with a flush", workers: 1, size: loadWrite, next: new(atomic.Int64),
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
	return guestWork{title: "128 KiB reads from the base image, 4 at a time", workers: 4, size: loadRead, next: new(atomic.Int64),
		prepare: func(*clone) error { return nil },
		request: func(c *clone, p []byte, i int64) error {
			_, err := c.disk.ReadAt(p, loadDisk/2+i*stride%places*loadRead)
			return err
		},
	}
}

// run works for a while and tells how many bytes were moved; each request is noted in bins, unless that is nil.
func (w guestWork) run(ctx context.Context, c *clone, d time.Duration, note func(time.Time, int)) (int64, error) {
	var moved atomic.Int64
	end := time.Now().Add(d)
	all, ctx := errgroup.WithContext(ctx)
	for range w.workers {
		all.Go(func() error {
			p := make([]byte, w.size)
			for time.Now().Before(end) {
				if err := errors.Join(ctx.Err(), w.request(c, p, w.next.Add(1)-1)); err != nil {
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
	work func() guestWork
	how  string
	o    prefetch.Options
}

func loadCases() []loadCase {
	selfish := prefetch.Options{SharePercent: 100}
	return []loadCase{
		{ownWork, "defaults", prefetch.Options{}},
		{ownWork, "share=100: its own throughput alone decides", selfish},
		{baseWork, "defaults", prefetch.Options{}},
		{baseWork, "share=100: its own throughput alone decides", selfish},
	}
}

// load measures a guest at work with and without prefetching.
func (b *FVDBench) load(ctx context.Context) (*LoadReport, error) {
	if err := require("nbdkit"); err != nil {
		return nil, err
	}
	r := &LoadReport{Link: farLink()}
	cases := loadCases()
	r.Runs = make([]LoadRun, len(cases))
	for round := range b.Rounds {
		for i, c := range cases {
			if err := b.loadRound(ctx, r.Link, c, &r.Runs[i]); err != nil {
				return nil, err
			}
			run := &r.Runs[i]
			fmt.Fprintf(b.Notes, "load, round %d, %s, prefetching %s: the guest loses %.1f %%\n", round+1, run.Work, run.How, 100*run.Lost)
		}
	}
	if b.Plot == "" {
		return r, nil
	}
	r.Plot = b.Plot
	return r, b.plotLoad(ctx, r.Link, plotIdle, plotBusy)
}

// loadRound is a round of one case.
func (b *FVDBench) loadRound(ctx context.Context, l link, c loadCase, run *LoadRun) error {
	work := c.work()
	run.Work, run.How = work.title, c.how
	o := c.o
	o.Trace = func(e prefetch.Event) {
		if e.Kind == prefetch.EventPause && e.Wait > 0 {
			run.Pauses++
		}
	}
	return b.onLoadedClone(ctx, l, work, &o, func(d *clone) error {
		window := func(rates *[]float64) error {
			moved, err := work.run(ctx, d, loadWindow, nil)
			*rates = append(*rates, float64(moved)/loadWindow.Seconds())
			return err
		}
		pairs := loadPairs * b.Scale
		for range pairs {
			d.prefetcher.Pause()
			err := sleep(ctx, loadWindow/20) // what is under way ends
			if err := errors.Join(err, window(&run.Without)); err != nil {
				return err
			}
			d.prefetcher.Resume()
			if err := window(&run.With); err != nil {
				return err
			}
		}
		run.Prefetched += float64(d.prefetcher.Status().Read) / (float64(pairs) * loadWindow.Seconds()) / float64(b.Rounds)
		run.compare()
		return nil
	})
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
	o := prefetch.Options{Throttle: plotThrottle, Trace: func(e prefetch.Event) {
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
		{name: "its minimum", color: "#777777", dashed: true, points: []point{{0, prefetch.DefaultMinRate / 1e6}, {p.end, prefetch.DefaultMinRate / 1e6}}},
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
