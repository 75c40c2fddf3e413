package fvd

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/platter-disk/platter/internal/hostpath"
	"github.com/platter-disk/platter/storage"
)

// ErrNotClean is wrapped when an image must be opened and closed first, to bring its journal into its tables.
var ErrNotClean = errors.New("the image was not closed cleanly")

// Bounds of settings, those of who uses them: package jobs/prefetch.
const (
	maxPrefetchSlots    = 1024
	maxBytesPerPrefetch = 64 << 20
)

// Setting is a change of a header field of an image that nobody has open.
type Setting struct {
	Name  string // one of SettingNames
	Value string // a number, on or off, a name
}

// settingField translates the names that the 2011 tool gives to header fields (FVD specification 2.13) where they
// differ from those of the header. The size is not among them: Image.Resize changes it.
func settingField(name string) string {
	switch name {
	case "max_num_outstanding_prefetch_writes":
		return "num_prefetch_slots"
	case "prefetch_over_threshold_throttle_time":
		return "prefetch_throttle_time"
	}
	if strings.HasSuffix(name, "_throughput_threshold") {
		return strings.TrimSuffix(name, "_threshold")
	}
	return name
}

// SettingNames lists what Amend can change.
func SettingNames() []string {
	return []string{
		"base_img", "base_img_fmt", "base_length", "data_file", "data_file_fmt", "need_zero_init", "copy_on_read", "clean_shutdown",
		"max_outstanding_copy_on_read_data", "prefetch_start_delay", "max_num_outstanding_prefetch_writes",
		"bytes_per_prefetch", "prefetch_min_read_throughput_threshold", "prefetch_max_read_throughput_threshold",
		"prefetch_min_write_throughput_threshold", "prefetch_max_write_throughput_threshold",
		"prefetch_perf_calc_alpha", "prefetch_read_throughput_measure_time", "prefetch_write_throughput_measure_time",
		"prefetch_over_threshold_throttle_time", "storage_grow_unit", "journal_buf_size", "journal_clean_buf_period",
	}
}

// set parses a value into the field.
func (f *field) set(value string) error {
	bad := func(want string) error { return &FieldError{f.name, f.off, strconv.Quote(value), want} }
	switch p := f.ptr.(type) {
	case *uint32:
		n, err := strconv.ParseUint(value, 10, 32)
		if err != nil {
			return bad("a number from 0 to 2^32-1")
		}
		*p = uint32(n)
	case *uint64:
		n, err := strconv.ParseUint(value, 10, 64)
		if err != nil {
			return bad("a number from 0 to 2^64-1")
		}
		*p = n
	case *int64:
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil {
			return bad("a number")
		}
		*p = n
	case *bool:
		switch strings.ToLower(value) {
		case "on", "true", "yes", "1":
			*p = true
		case "off", "false", "no", "0":
			*p = false
		default:
			return bad("on or off")
		}
	case *string:
		*p = value
	}
	return nil
}

// Amend changes header fields of an image that nobody has open and that was closed cleanly; only clean_shutdown can
// be set on one that was not, at the operator's risk and if it has no journal. A change of the base image's name
// does not touch any data: the caller answers for the new one holding the same bytes. It clears the journal
// first, so that no record of the old base's days is ever replayed (D-16), and forgets the old one's length unless
// base_length says the new one's. What no image ever uses, as it is bounded elsewhere, is refused. A crash leaves the
// old header or the new one.
func Amend(f storage.File, settings []Setting) error {
	h, err := ReadHeader(f)
	if err != nil {
		return err
	}
	if err := amend(f, h, settings); err != nil {
		return fmt.Errorf("fvd image %s: %w", f.Name(), err)
	}
	return nil
}

func amend(f storage.File, h *Header, settings []Setting) error {
	if err := h.writable(); err != nil {
		return err
	}
	old := *h
	given := map[string]bool{} // by field
	for _, s := range settings {
		given[settingField(s.Name)] = true
		if !slices.Contains(SettingNames(), s.Name) {
			return fmt.Errorf("unknown setting %q, want one of %s", s.Name, strings.Join(SettingNames(), ", "))
		}
		for _, field := range h.fields() {
			if field.name == settingField(s.Name) {
				if err := field.set(s.Value); err != nil {
					return err
				}
			}
		}
	}
	if err := h.checkSettings(f.Name(), given); err != nil {
		return err
	}
	if h.MaxOutstandingCopies == 0 && old.MaxOutstandingCopies != 0 {
		return &FieldError{"max_outstanding_copy_on_read_data", 3224, "0", "above 0; copy_on_read=off stops copying"}
	}
	if !old.CleanShutdown && (old.JournalSize > 0 || len(settings) != 1 || settings[0].Name != "clean_shutdown") {
		if old.JournalSize == 0 && (old.hasBitmap() || old.hasTable()) {
			return fmt.Errorf("%w; check it, and then set clean_shutdown alone", ErrNotClean)
		}
		return fmt.Errorf("%w; a repair, or opening it for writing and closing it, makes it clean", ErrNotClean)
	}
	if h.BaseImage != old.BaseImage {
		if err := h.changeBase(&old, given["base_length"]); err != nil {
			return err
		}
	}
	size, err := f.Size()
	if err != nil {
		return err
	}
	if err := h.validate(size); err != nil {
		return err
	}
	if err := finishHeader(f); err != nil {
		return err
	}
	if h.BaseImage != old.BaseImage {
		if err := scrubJournal(f, &old); err != nil {
			return err
		}
	}
	return replaceHeader(f, h)
}

// checkSettings refuses values of the fields given that nobody would use as they are, and references of an image, whose
// file has that name, to itself.
func (h *Header) checkSettings(name string, given map[string]bool) error {
	for _, most := range []struct {
		field  string
		at     int
		v, max uint64
		why    string
	}{
		{"num_prefetch_slots", 3244, uint64(h.PrefetchSlots), maxPrefetchSlots, "more are never used"},
		{"bytes_per_prefetch", 3248, h.BytesPerPrefetch, maxBytesPerPrefetch, "more is never read at once"},
		{"journal_buf_size", 3320, h.JournalBuffer, journalBatch, "more is never kept"},
	} {
		if given[most.field] && most.v > most.max {
			return &FieldError{most.field, most.at, fmt.Sprint(most.v), fmt.Sprintf("at most %d: %s", most.max, most.why)}
		}
	}
	if given["data_file"] && samePath(h.DataFile, name) {
		return &FieldError{"data_file", 24, strconv.Quote(h.DataFile), "another file than the image itself"}
	}
	if given["base_img"] && samePath(h.BaseImage, name) {
		return &FieldError{"base_img", 1064, strconv.Quote(h.BaseImage), "another file than the image itself"}
	}
	if given["base_length"] {
		return h.validateBaseLength()
	}
	return nil
}

// samePath reports whether a reference, which is relative to where the image is, names the image. It compares names;
// another name of the same file is found out when the image is opened, by the lock that it holds.
func samePath(ref, image string) bool {
	if ref == "" {
		return false
	}
	return filepath.Clean(hostpath.Beside(image, ref)) == filepath.Clean(image)
}

// changeBase adapts what goes with the name of the base image; measured: base_length is the length of the new one.
func (h *Header) changeBase(old *Header, measured bool) error {
	if !measured || h.BaseImage == "" {
		h.BaseLength = 0
	}
	switch {
	case old.BaseImage == "":
		return errors.New("an image that was created without a base image has no bitmap and cannot get one")
	case h.BaseImage == "" && !old.FullyPrefetched:
		return fmt.Errorf("base image %q: %w", old.BaseImage, ErrStillNeeded)
	case h.BaseImage == "":
		h.BaseSize, h.BaseFormat = 0, ""
		if !h.hasTable() {
			h.JournalSize = 0
		}
	}
	return nil
}

// maxScrubRuns bounds how many runs of a journal's stored bytes are gathered before they are overwritten.
const maxScrubRuns = 4096

// scrubJournal overwrites every record, durably. Holes hold none and stay.
func scrubJournal(f storage.File, h *Header) error {
	at, end := int64(h.JournalOffset), int64(h.JournalOffset+h.JournalSize)
	for at < end {
		var runs []storage.Extent // not overwritten while they are being listed
		next := end
		err := f.DataExtents(at, end-at, func(e storage.Extent) bool {
			if e.Data {
				runs = append(runs, e)
			}
			if len(runs) == maxScrubRuns {
				next = min(end, roundUp(e.Offset+e.Length, pageSize))
			}
			return len(runs) < maxScrubRuns
		})
		if err != nil {
			return err
		}
		for _, e := range runs { // extents may end anywhere, records begin at sectors
			from, to := max(at, roundDown(e.Offset, pageSize)), min(end, roundUp(e.Offset+e.Length, pageSize))
			if err := fillBlank(f, uint64(from), uint64(to-from)); err != nil {
				return err
			}
		}
		at = next
	}
	return f.Sync()
}
