package prefetch

import (
	"math/rand/v2"
	"time"
)

// Defaults of Options, those of the 2011 driver (FVD specification 2.12).
const (
	DefaultSlots       = 2
	DefaultPerPrefetch = 1 << 20                // bytes
	DefaultMinRate     = 5120 << 10             // bytes a second
	DefaultMeasure     = 100 * time.Millisecond // of operation time
	DefaultThrottle    = 30 * time.Second
	DefaultAlpha       = 80          // percent
	DefaultRetry       = time.Second // doubling up to maxRetry
	DefaultOrderReads  = 8
	DefaultShare       = 5 // percent

	defaultCheckpoint = 64 << 20 // bytes kept between checkpoints
	maxSlots          = 1024
	maxPerPrefetch    = 64 << 20
	maxBuffers        = 256 << 20 // bytes of all slots; an image's header may ask for more
	maxRetry          = 30 * time.Second
	maxOrderReads     = 64
	maxOrderRead      = 256 << 10              // bytes
	rateSlice         = 100 * time.Millisecond // an operation is no larger than what a maximum rate allows in that time
)

// Options says how a Prefetcher goes about its work. Zero values mean the defaults above unless something else is
// said; rates are bytes a second.
type Options struct {
	StartDelay  time.Duration // before the first read; what Order lists does not wait for it
	Slots       int           // buffers between reading and writing, 1 to 1024 and 256 MiB together, at least one
	PerPrefetch int64         // bytes a read, rounded up to whole blocks, at most 64 MiB

	MinRead, MinWrite float64 // averages below which it may pause; negative: never
	MaxRead, MaxWrite float64 // rates it keeps to; 0: none

	ReadMeasure, WriteMeasure time.Duration // operation time of a sample
	AlphaPercent              int           // how much of the old average a new sample leaves

	// Throttle bounds a pause: it lasts 1 ms and up to that, evenly distributed. Negative: never pauses.
	Throttle time.Duration

	// Guest tells when the guest of this disk is at work; nil: there is none. While it is, prefetching makes what it
	// copies durable at once, and takes at most SharePercent of the guest's time, 1 to 100. What Order lists is
	// exempt: that is what the guest will wait for.
	Guest        *Activity
	SharePercent int

	// Retry is how long to wait after the base image could not be read before trying again; it doubles with each
	// failure in a row, up to 30 s. Negative: prefetching is off after the first failure. A copy that cannot be
	// written always ends it: what fills the disk or breaks it is not to be tried again.
	Retry time.Duration

	// Order is what to fetch first. These are small parts in many places, so that several reads are under way at a
	// time, OrderReads of up to 256 KiB; at most 64, 0: the default.
	Order      Profile
	OrderReads int
	orderRead  int64 // bytes

	// Announce is told of each such read before it begins, see CopyOnRead.Announce; nil: nobody is.
	Announce func(off, n int64) (finished func(), ok bool)

	// CheckpointEvery is after how many bytes kept they are made durable, so that a restart goes on from
	// there; negative: only at the end.
	CheckpointEvery int64

	// Trace is told every step, from one goroutine at a time; may be nil. It may ask how far the Prefetcher is, have it
	// pause and resume.
	Trace func(Event)

	Clock Clock          // nil: the real time
	Rand  func() float64 // in [0, 1); nil: math/rand
}

func (o Options) withDefaults(unit int64) Options {
	if o.Slots < 1 || o.Slots > maxSlots {
		o.Slots = DefaultSlots
	}
	if o.PerPrefetch <= 0 {
		o.PerPrefetch = DefaultPerPrefetch
	}
	o.PerPrefetch = min(o.PerPrefetch, max(maxPerPrefetch, unit))
	o.PerPrefetch, o.orderRead = o.wholeUnits(o.PerPrefetch, unit), o.wholeUnits(maxOrderRead, unit)
	o.Slots = int(max(1, min(int64(o.Slots), maxBuffers/o.PerPrefetch)))
	if o.OrderReads < 1 || o.OrderReads > maxOrderReads {
		o.OrderReads = DefaultOrderReads
	}
	if o.Announce == nil {
		o.Announce = func(int64, int64) (func(), bool) { return func() {}, true }
	}
	for _, r := range []*float64{&o.MinRead, &o.MinWrite} {
		if *r == 0 {
			*r = DefaultMinRate
		}
	}
	for _, d := range []struct {
		v   *time.Duration
		def time.Duration
	}{{&o.ReadMeasure, DefaultMeasure}, {&o.WriteMeasure, DefaultMeasure}, {&o.Throttle, DefaultThrottle}, {&o.Retry, DefaultRetry}} {
		if *d.v == 0 {
			*d.v = d.def
		}
	}
	if o.AlphaPercent <= 0 || o.AlphaPercent > 100 {
		o.AlphaPercent = DefaultAlpha
	}
	if o.SharePercent <= 0 || o.SharePercent > 100 {
		o.SharePercent = DefaultShare
	}
	if o.CheckpointEvery == 0 {
		o.CheckpointEvery = defaultCheckpoint
	}
	if o.Trace == nil {
		o.Trace = func(Event) {}
	}
	if o.Clock == nil {
		o.Clock = systemClock{}
	}
	if o.Rand == nil {
		o.Rand = rand.Float64
	}
	return o
}

// wholeUnits is the size of an operation, about n bytes: less where that is much at a maximum rate, since the first
// operation at a rate does not wait.
func (o *Options) wholeUnits(n, unit int64) int64 {
	for _, rate := range []float64{o.MaxRead, o.MaxWrite} {
		if slice := rate * rateSlice.Seconds(); rate > 0 && slice < float64(n) {
			n = int64(slice)
		}
	}
	return max(1, (n+unit-1)/unit) * unit
}
