package fvd

import (
	"errors"
	"fmt"
	"math"
	"sort"
)

const (
	maxBlockSize   = 1 << 26 // ours; a block is copied up and prefetched whole, in memory
	maxChunkSize   = 1 << 32 // ours; keeps id*chunk_size within 63 bits
	maxVirtualSize = 1 << 61 // ours; keeps every sum of offsets within 63 bits
	maxEpoch       = 1 << 63 // FVD specification 1.14

	tableEntriesPlain   = 119 // table entries a mixed sector, without trailer (FVD specification 1.5)
	tableEntriesTrailer = 114 // with trailer (FVD specification 4.2)
)

// minJournalSize is the smallest journal in bytes for an image with that many table entries: one request that
// dirties the whole table fits (FVD specification 1.5).
func minJournalSize(entries int64, trailer bool) int64 {
	per := int64(tableEntriesPlain)
	if trailer {
		per = tableEntriesTrailer
	}
	return sectorSize * max(1, ceilDiv(entries, per))
}

// region is a part of the image file that the header claims.
type region struct {
	field     string
	fieldByte int
	off, size uint64
}

// validate applies the open-time rules of FVD specification 1.14 to an image file of the given size in bytes. A
// header it accepts has a geometry whose arithmetic cannot overflow.
func (h *Header) validate(fileSize int64) error {
	if unknown := h.Features &^ knownFeatures & featuresMustBeKnow; unknown != 0 {
		return &FieldError{"features", 3344, fmt.Sprintf("%#x", uint64(h.Features)), fmt.Sprintf("no bit of %#x", uint64(unknown))}
	}
	for _, check := range []func() error{h.validateDisk, h.validateBase, h.validateTable, h.validateJournal, h.validatePrefetch} {
		if err := check(); err != nil {
			return err
		}
	}
	return h.validateRegions(fileSize)
}

// multiple reports a field that is not a multiple of unit or lies outside [lo, hi].
func multiple(name string, at int, v, unit, lo, hi uint64) error {
	if v%unit != 0 || v < lo || v > hi {
		return &FieldError{name, at, fmt.Sprint(v), fmt.Sprintf("a multiple of %d from %d to %d", unit, lo, hi)}
	}
	return nil
}

func (h *Header) validateDisk() error {
	if err := multiple("virtual_disk_size", 8, h.VirtualSize, sectorSize, 0, maxVirtualSize); err != nil {
		return err
	}
	if h.DataFile != "" {
		if h.DataOffset != 0 {
			return &FieldError{"data_offset", 16, fmt.Sprint(h.DataOffset), "0, as the image has a data file"}
		}
		return nil
	}
	return multiple("data_offset", 16, h.DataOffset, sectorSize, headerSize, maxVirtualSize)
}

func (h *Header) validateBase() error {
	if h.BaseImage == "" {
		if h.BaseSize != 0 {
			return &FieldError{"base_img_size", 2104, fmt.Sprint(h.BaseSize), "0, as the image has no base image"}
		}
		return nil
	}
	if err := multiple("base_img_size", 2104, h.BaseSize, sectorSize, 0, h.VirtualSize); err != nil {
		return err
	}
	if !h.hasBitmap() {
		return nil
	}
	if err := multiple("block_size", 2128, h.BlockSize, sectorSize, sectorSize, maxBlockSize); err != nil {
		return err
	}
	if err := multiple("bitmap_offset", 2112, h.BitmapOffset, pageSize, headerSize, maxVirtualSize); err != nil {
		return err
	}
	blocks := ceilDiv(int64(h.BaseSize), int64(h.BlockSize))
	return multiple("bitmap_size", 2120, h.BitmapSize, pageSize, uint64(ceilDiv(blocks, 8)), maxVirtualSize)
}

// validateBaseLength refuses a recorded length that no base image can have which the image accepts. It is for those who
// set the field: an image that has such a value is only refused together with its base image, which it cannot match.
func (h *Header) validateBaseLength() error {
	switch {
	case h.BaseLength == 0:
		return nil
	case h.BaseImage == "":
		return &FieldError{"base_length", 3352, fmt.Sprint(h.BaseLength), "0, as the image has no base image"}
	case h.BaseLength > maxVirtualSize || uint64(roundUp(int64(h.BaseLength), sectorSize)) < h.BaseSize:
		return &FieldError{"base_length", 3352, fmt.Sprint(h.BaseLength), fmt.Sprintf("0 (any) or the length of a base image that covers base_img_size %d", h.BaseSize)}
	}
	return nil
}

func (h *Header) validateTable() error {
	if !h.hasTable() {
		if h.Features&FeatureTableInData != 0 {
			return &FieldError{"features", 3344, fmt.Sprintf("%#x", uint64(h.Features)), "no table-in-data bit, as the image has no table"}
		}
		return nil
	}
	if err := multiple("table_offset", 2136, h.TableOffset, pageSize, headerSize, maxVirtualSize); err != nil {
		return err
	}
	if err := multiple("chunk_size", 2152, h.ChunkSize, sectorSize, sectorSize, maxChunkSize); err != nil {
		return err
	}
	// A block that straddles two chunks could get its bit without one of their mappings (defect D-09).
	if h.hasBitmap() && h.ChunkSize%h.BlockSize != 0 {
		return &FieldError{"chunk_size", 2152, fmt.Sprint(h.ChunkSize), fmt.Sprintf("a multiple of block_size %d", h.BlockSize)}
	}
	entries := ceilDiv(int64(h.VirtualSize), int64(h.ChunkSize))
	if entries > maxChunks {
		return &FieldError{"chunk_size", 2152, fmt.Sprint(h.ChunkSize),
			fmt.Sprintf("large enough for %d bytes in at most %d chunks", h.VirtualSize, maxChunks)}
	}
	if err := multiple("table_size", 2144, h.TableSize, pageSize, uint64(4*entries), maxVirtualSize); err != nil {
		return err
	}
	if h.GrowUnit < h.ChunkSize || h.GrowUnit > maxVirtualSize {
		return &FieldError{"storage_grow_unit", 2160, fmt.Sprint(h.GrowUnit), fmt.Sprintf("at least chunk_size %d", h.ChunkSize)}
	}
	return nil
}

func (h *Header) validateJournal() error {
	if h.StableEpoch >= maxEpoch {
		return &FieldError{"stable_journal_epoch", 3208, fmt.Sprint(h.StableEpoch), "less than 2^63"}
	}
	if h.JournalSize == 0 {
		return nil
	}
	if !h.hasBitmap() && !h.hasTable() {
		return &FieldError{"journal_size", 3200, fmt.Sprint(h.JournalSize), "0, as the image has neither bitmap nor table"}
	}
	if err := multiple("journal_offset", 3192, h.JournalOffset, pageSize, headerSize, maxVirtualSize); err != nil {
		return err
	}
	var entries int64
	if h.hasTable() {
		entries = ceilDiv(int64(h.VirtualSize), int64(h.ChunkSize))
	}
	least := minJournalSize(entries, h.Features&FeatureJournalTrailer != 0)
	return multiple("journal_size", 3200, h.JournalSize, sectorSize, uint64(least), maxVirtualSize)
}

func (h *Header) validatePrefetch() error {
	if h.PrefetchAlpha > 100 {
		return &FieldError{"prefetch_perf_calc_alpha", 3336, fmt.Sprint(h.PrefetchAlpha), "a percentage"}
	}
	if !h.hasBitmap() || h.FullyPrefetched {
		return nil
	}
	if h.PrefetchSlots < 1 {
		return &FieldError{"num_prefetch_slots", 3244, "0", "at least 1"}
	}
	return multiple("bytes_per_prefetch", 3248, h.BytesPerPrefetch, h.BlockSize, h.BlockSize, maxVirtualSize)
}

func (h *Header) validateRegions(fileSize int64) error {
	regions := h.regions()
	for _, r := range regions {
		if r.off+r.size > uint64(fileSize) {
			return &FieldError{r.field, r.fieldByte, fmt.Sprintf("%d with %d bytes", r.off, r.size),
				fmt.Sprintf("a region inside the file of %d bytes", fileSize)}
		}
	}
	if h.DataFile == "" {
		data := region{"data_offset", 16, h.DataOffset, h.VirtualSize}
		if h.hasTable() {
			data.size = math.MaxUint64 - h.DataOffset
		}
		for _, r := range regions {
			if r.field == "table_offset" && h.Features&FeatureTableInData != 0 {
				continue
			}
			if err := disjoint(r, data); err != nil {
				return err
			}
		}
	}
	regions = append(regions, region{"magic", 0, 0, headerSize})
	sort.Slice(regions, func(i, j int) bool { return regions[i].off < regions[j].off })
	for i := 1; i < len(regions); i++ {
		if err := disjoint(regions[i], regions[i-1]); err != nil {
			return err
		}
	}
	return nil
}

// regions lists bitmap, journal and table, those that exist.
func (h *Header) regions() []region {
	var all []region
	if h.hasBitmap() {
		all = append(all, region{"bitmap_offset", 2112, h.BitmapOffset, h.BitmapSize})
	}
	if h.JournalSize > 0 {
		all = append(all, region{"journal_offset", 3192, h.JournalOffset, h.JournalSize})
	}
	if h.hasTable() {
		all = append(all, region{"table_offset", 2136, h.TableOffset, h.TableSize})
	}
	return all
}

func disjoint(a, b region) error {
	if a.off < b.off+b.size && b.off < a.off+a.size {
		return &FieldError{a.field, a.fieldByte, fmt.Sprintf("%d with %d bytes", a.off, a.size),
			fmt.Sprintf("a region that does not overlap the one of %s at %d", b.field, b.off)}
	}
	return nil
}

// ErrFeatures is wrapped when an image uses a feature that only allows reading it here.
var ErrFeatures = errors.New("the image uses a feature that this version can only read")

// writable refuses unknown features that an older or other writer must not touch.
func (h *Header) writable() error {
	if unknown := h.Features &^ knownFeatures & featuresReadable; unknown != 0 {
		return fmt.Errorf("fvd header: feature bits %#x are unknown: %w", uint64(unknown), ErrFeatures)
	}
	return nil
}
