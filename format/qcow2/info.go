package qcow2

import "github.com/platter-disk/platter/storage"

// Info describes an image, as qemu-img info does.
type Info struct {
	VirtualSize   int64 // bytes of the disk
	ClusterSize   int64 // bytes
	BackingFile   string
	BackingFormat string
	Encrypted     bool
	Dirty         bool // not closed cleanly: reference counts may be stale
	Specific      SpecificInfo
	Snapshots     []Snapshot
}

// SpecificInfo is what only qcow2 has. Its JSON form is the data of format-specific in qemu-img info
// --output=json, and the order of its fields is that of the human form. What version 2 cannot have is nil.
type SpecificInfo struct {
	Compat          string       `json:"compat"`           // "0.10" (version 2) or "1.1"
	CompressionType string       `json:"compression-type"` // "zlib" or "zstd"
	LazyRefcounts   *bool        `json:"lazy-refcounts,omitempty"`
	Bitmaps         []BitmapInfo `json:"bitmaps,omitempty"`
	RefcountBits    int          `json:"refcount-bits"`
	DataFile        string       `json:"data-file,omitempty"`
	DataFileRaw     *bool        `json:"data-file-raw,omitempty"` // nil without an external data file
	Corrupt         *bool        `json:"corrupt,omitempty"`
	ExtendedL2      *bool        `json:"extended-l2,omitempty"`
}

// BitmapInfo describes a persistent dirty bitmap.
type BitmapInfo struct {
	Flags       []string `json:"flags"` // of "in-use", "auto"
	Name        string   `json:"name"`
	Granularity int64    `json:"granularity"` // bytes of the disk a bit stands for
}

// ReadInfo reads what there is to tell of an image, encrypted ones included. The file may be in use.
func ReadInfo(f storage.File) (*Info, error) {
	h, err := readHeader(f, forInfo)
	if err != nil {
		return nil, err
	}
	info := &Info{
		VirtualSize:   int64(h.Size) &^ (sectorSize - 1),
		ClusterSize:   h.ClusterSize(),
		BackingFile:   h.BackingFile,
		BackingFormat: h.BackingFormat,
		Encrypted:     h.CryptMethod != cryptNone,
		Dirty:         h.Incompatible&IncompatDirty != 0,
		Specific:      h.specificInfo(),
	}
	if info.Snapshots, _, err = readSnapshots(f, h); err != nil {
		return nil, err
	}
	err = forEachBitmap(f, h, func(b Bitmap) error {
		m := BitmapInfo{Name: b.Name, Granularity: 1 << b.GranularityBits, Flags: []string{}}
		if b.InUse() {
			m.Flags = append(m.Flags, "in-use")
		}
		if b.Auto() {
			m.Flags = append(m.Flags, "auto")
		}
		info.Specific.Bitmaps = append(info.Specific.Bitmaps, m)
		return nil
	})
	return info, err
}

func (h *Header) specificInfo() SpecificInfo {
	s := SpecificInfo{Compat: "0.10", CompressionType: "zlib", RefcountBits: h.RefcountBits()}
	if h.CompressionType == CompressionZstd {
		s.CompressionType = "zstd"
	}
	if h.Version < 3 {
		return s
	}
	s.Compat = "1.1"
	bit := func(word, mask uint64) *bool {
		set := word&mask != 0
		return &set
	}
	s.LazyRefcounts = bit(h.Compatible, CompatLazyRefcounts)
	s.Corrupt = bit(h.Incompatible, IncompatCorrupt)
	s.ExtendedL2 = bit(h.Incompatible, IncompatExtendedL2)
	if h.HasDataFile() {
		s.DataFile = h.DataFile
		s.DataFileRaw = bit(h.Autoclear, AutoclearRawData)
	}
	return s
}
