package cli

import (
	"context"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/jobs/prefetch"
	"github.com/platter-disk/platter/nbd"
)

const (
	profileAuto   = "auto"     // as a profile's file name: beside the image
	profileSuffix = ".profile" // what is appended to the image's name then

	kibi = 1 << 10 // FVD headers give rates in units of 1024 bytes a second (FVD specification 2.4)
)

// prefetchHelp describes the options of prefetching; indent begins each line after the first.
func prefetchHelp(indent string) string {
	return strings.Join([]string{
		"delay=TIME       wait that long before the first read (10s, 1m)",
		"slots=N          buffers between reading and writing (2)",
		"size=SIZE        bytes of a read (1M)",
		"max-read=SIZE    bytes a second to read at most; max-write (0: no limit)",
		"min-read=SIZE    bytes a second below which to pause now and then, for",
		"                 the sake of others; min-write (5M; 0: never)",
		"throttle=TIME    the longest such pause (30s; 0: none)",
		"share=PERCENT    of its time that a busy guest loses at most (5; 100:",
		"                 whatever it takes)",
		"measure=TIME     time of operations that makes a sample (100ms)",
		"alpha=PERCENT    what a sample leaves of the average (80)",
		"retry=TIME       wait after the base image could not be read,",
		"                 doubling up to 30s (1s; 0: give up)",
		"checkpoint=SIZE  bytes after which copies are made durable (64M)",
	}, "\n"+indent)
}

// setPrefetchOptions sets what an option list says, over what o holds.
func setPrefetchOptions(o *prefetch.Options, params []parameter) error {
	for _, p := range params {
		if err := setPrefetchOption(o, p); err != nil {
			return err
		}
	}
	return nil
}

func setPrefetchOption(o *prefetch.Options, p parameter) error {
	switch p.name {
	case "delay":
		return durationParameter(p, &o.StartDelay, 0)
	case "throttle":
		return durationParameter(p, &o.Throttle, -1)
	case "retry":
		return durationParameter(p, &o.Retry, -1)
	case "measure":
		if err := durationParameter(p, &o.ReadMeasure, 0); err != nil {
			return err
		}
		o.WriteMeasure = o.ReadMeasure
		return nil
	case "max-read":
		return rateParameter(p, &o.MaxRead, 0)
	case "max-write":
		return rateParameter(p, &o.MaxWrite, 0)
	case "min-read":
		return rateParameter(p, &o.MinRead, -1)
	case "min-write":
		return rateParameter(p, &o.MinWrite, -1)
	case "slots":
		return countParameter(p, &o.Slots, 1024)
	case "share":
		return countParameter(p, &o.SharePercent, 100)
	case "alpha":
		return countParameter(p, &o.AlphaPercent, 100)
	case "size":
		n, err := sizeParameter(p.name, p.value)
		if err == nil && (n < 4096 || n > 64<<20) {
			err = fmt.Errorf("Parameter 'size' must be between 4k and 64M")
		}
		o.PerPrefetch = n
		return err
	case "checkpoint":
		n, err := sizeParameter(p.name, p.value)
		if o.CheckpointEvery = n; n == 0 {
			o.CheckpointEvery = -1
		}
		return err
	default:
		return fmt.Errorf("Invalid parameter '%s'", p.name)
	}
}

// durationParameter reads a time; zero is what stands for none.
func durationParameter(p parameter, to *time.Duration, zero time.Duration) error {
	d, err := time.ParseDuration(p.value)
	if err != nil || d < 0 {
		return fmt.Errorf("Parameter '%s' expects a time, such as 500ms, 10s or 5m", p.name)
	}
	if *to = d; d == 0 {
		*to = zero
	}
	return nil
}

// rateParameter reads bytes a second; zero is what stands for none.
func rateParameter(p parameter, to *float64, zero float64) error {
	n, err := sizeParameter(p.name, p.value)
	if *to = float64(n); n == 0 {
		*to = zero
	}
	return err
}

func countParameter(p parameter, to *int, most int) error {
	n, err := strconv.Atoi(p.value)
	if err != nil || n < 1 || n > most {
		return fmt.Errorf("Parameter '%s' expects a number between 1 and %d", p.name, most)
	}
	*to = n
	return nil
}

// headerPrefetch is the prefetching that the header of an FVD image asks for; on is false if it asks for none, and
// then the delay is 0.
func headerPrefetch(h fvd.Header) (o prefetch.Options, on bool) {
	atLeast := func(kb uint64) float64 {
		if kb == 0 {
			return -1
		}
		return float64(kb) * kibi
	}
	milliseconds := func(n uint64) time.Duration {
		return time.Duration(min(n, math.MaxInt64/uint64(time.Millisecond))) * time.Millisecond
	}
	o = prefetch.Options{
		StartDelay:  time.Duration(min(max(h.PrefetchStartDelay, 0), math.MaxInt64/int64(time.Second))) * time.Second,
		Slots:       int(min(h.PrefetchSlots, 1024)),
		PerPrefetch: int64(min(h.BytesPerPrefetch, 64<<20)),
		MinRead:     atLeast(h.PrefetchMinRead), MinWrite: atLeast(h.PrefetchMinWrite),
		MaxRead: float64(h.PrefetchMaxRead) * kibi, MaxWrite: float64(h.PrefetchMaxWrite) * kibi,
		ReadMeasure: milliseconds(h.PrefetchReadMeasure), WriteMeasure: milliseconds(h.PrefetchWriteMeasure),
		AlphaPercent: int(min(h.PrefetchAlpha, 100)),
		Throttle:     milliseconds(h.PrefetchThrottle),
	}
	if h.PrefetchThrottle == 0 {
		o.Throttle = -1
	}
	return o, h.PrefetchStartDelay > 0
}

// overlay is an open image whose base image can be copied.
type overlay struct {
	prefetch.Overlay
	guard     *prefetch.Guarded // nil for a format that knows of copies
	keepsBase string            // why the reference to the base image must stay; "": it goes
}

// overlayOf is nil for an image that has no base image, or needs it no more.
func overlayOf(img *image.Image) (*overlay, error) {
	if f := img.FVD(); f != nil {
		if f.BaseSize() == 0 {
			return nil, nil
		}
		return &overlay{Overlay: f}, nil
	}
	q := img.Qcow2()
	if q == nil || len(img.Chain()) < 2 {
		return nil, nil
	}
	snapshots, err := q.Snapshots()
	if err != nil {
		return nil, fmt.Errorf("'%s': %w", img.Name(), err)
	}
	over, header := &overlay{}, q.Header()
	o := prefetch.GuardedOptions{
		Unit:     img.Limits().Preferred,
		Whole:    !header.ExtendedL2(),
		BaseSize: img.LayerDevice(1).Size(),
	}
	if len(snapshots) > 0 {
		over.keepsBase = fmt.Sprintf("it has %d internal snapshots, which need the base image", len(snapshots))
	} else {
		o.Detach = func() error { return q.SetBacking("", "") }
	}
	over.guard = prefetch.Guard(img, o)
	over.Overlay = over.guard
	return over, nil
}

// learn finds out what there is to copy.
func (o *overlay) learn(ctx context.Context) error {
	if o.guard == nil {
		return nil
	}
	return o.guard.Learn(ctx)
}

// profileFile resolves the file name of a profile.
func profileFile(name, imageName string) (string, error) {
	if name != profileAuto {
		return name, nil
	}
	if nbd.IsURI(imageName) || hasOptions(imageName) {
		return "", fmt.Errorf("'%s' is no file: there is no profile beside it", imageName)
	}
	return imageName + profileSuffix, nil
}

// readProfile reads the profile of an image. Beside the image there need not be one.
func readProfile(name, imageName string) (prefetch.Profile, error) {
	path, err := profileFile(name, imageName)
	if err != nil {
		return nil, err
	}
	p, err := loadProfile(path)
	if name == profileAuto && os.IsNotExist(err) {
		return nil, nil
	}
	return p, err
}

func loadProfile(path string) (prefetch.Profile, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p, err := prefetch.ReadProfile(f)
	if err != nil {
		return nil, fmt.Errorf("'%s': %w", path, err)
	}
	return p, nil
}
