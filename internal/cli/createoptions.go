package cli

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/image/gate"
)

// optionKind says what the value of an option looks like.
type optionKind uint8

const (
	optionString optionKind = iota
	optionSize
	optionSwitch
	optionNumber
	optionSignedSize // a size; below 0 it switches off what it is the size of
)

var optionKindNames = [...]string{"<str>", "<size>", "<bool (on/off)>", "<num>", "<size>"}

// optionSpec describes an option of creation or of amend.
type optionSpec struct {
	name     string
	kind     optionKind
	fallback string // shown in the "Formatting" line where the option is not given; "" hides it
	help     string
}

// createSpecs returns the creation options of a format, in the order in which qemu-img prints their values;
// ok is false for an unknown format.
func createSpecs(format string) (specs []optionSpec, ok bool) {
	switch format {
	case "qcow2":
		return []optionSpec{
			{"cluster_size", optionSize, "65536", "qcow2 cluster size"},
			{"extended_l2", optionSwitch, "off", "Extended L2 tables"},
			{"preallocation", optionString, "", "Preallocation mode (allowed values: off, metadata, falloc, full)"},
			{"compression_type", optionString, "zlib", "Compression method used for image cluster compression"},
			{"size", optionSize, "", "Virtual disk size"},
			{"compat", optionString, "", "Compatibility level (v2 [0.10] or v3 [1.1])"},
			{"backing_file", optionString, "", "File name of a base image"},
			{"backing_fmt", optionString, "", "Image format of the base image"},
			{"data_file", optionString, "", "File name of an external data file"},
			{"data_file_raw", optionSwitch, "", "The external data file must stay valid as a raw image"},
			{"lazy_refcounts", optionSwitch, "off", "Postpone refcount updates"},
			{"refcount_bits", optionNumber, "16", "Width of a reference count entry in bits"},
			{"nocow", optionSwitch, "", "Turn off copy-on-write (valid only on btrfs)"},
		}, true
	case "fvd":
		return []optionSpec{
			{"compact_image", optionSwitch, "off", "Take space as the disk is written, by way of a lookup table"},
			{"block_size", optionSize, "", "Bytes that a bit of the bitmap stands for (base image; default: from 4k on, for a bitmap of 4M at most)"},
			{"chunk_size", optionSize, "1048576", "Unit of allocation of a compact image"},
			{"storage_grow_unit", optionSize, "104857600", "By how much a compact image grows at a time"},
			{"preallocation", optionString, "", "Preallocation mode (allowed values: off, metadata, falloc, full)"},
			{"size", optionSize, "", "Virtual disk size"},
			{"backing_file", optionString, "", "File name of a base image"},
			{"backing_fmt", optionString, "", "Image format of the base image (default: found out now and recorded)"},
			{"data_file", optionString, "", "File name of a data file, beside the image unless absolute"},
			{"data_file_fmt", optionString, "", "Image format of the data file (allowed values: raw, qcow2)"},
			{"copy_on_read", optionSwitch, "", "Keep what is read from the base image"},
			{"prefetch_start_delay", optionNumber, "", "Seconds after which the rest of the base image is fetched; 0 and below: never"},
			{"detect_sparse_hole", optionSize, "", "Look for zeros in the base image, in units of that many bytes"},
			{"journal_size", optionSignedSize, "", "Bytes of the journal; 0: 16 MiB or what the table needs; -1: none"},
			{"journal_buf_size", optionSize, "", "Bytes of journal records kept until the guest flushes; 0: none are (default 64k)"},
			{"journal_clean_buf_period", optionNumber, "", "Milliseconds after which they are written all the same (default 5000)"},
			{"journal_checksums", optionSwitch, "", "Checksums in the journal, and records that unmap chunks (default on)"},
			{"add_storage_cmd", optionString, "", "Recorded and never executed"},
			{"nocow", optionSwitch, "", "Turn off copy-on-write (valid only on btrfs)"},
		}, true
	case "raw":
		return []optionSpec{
			{"size", optionSize, "", "Virtual disk size"},
			{"nocow", optionSwitch, "", "Turn off copy-on-write (valid only on btrfs)"},
			{"preallocation", optionString, "", "Preallocation mode (allowed values: off, falloc, full)"},
		}, true
	default:
		return nil, false
	}
}

// createValues are the creation options that a command line gives, by name, in their canonical spelling:
// sizes in bytes, switches on or off.
type createValues struct {
	format string
	specs  []optionSpec
	values map[string]string
}

func newCreateValues(format string) (*createValues, error) {
	specs, ok := createSpecs(format)
	if !ok {
		return nil, fmt.Errorf("Unknown file format '%s'", format)
	}
	return &createValues{format: format, specs: specs, values: map[string]string{}}, nil
}

// findSpec returns the description of an option, or nil.
func findSpec(specs []optionSpec, name string) *optionSpec {
	for i := range specs {
		if specs[i].name == name {
			return &specs[i]
		}
	}
	return nil
}

// canonical checks a value of the option and returns its canonical spelling: a size in bytes, a switch on or off.
func (s *optionSpec) canonical(value string) (string, error) {
	switch s.kind {
	case optionSize:
		n, err := sizeParameter(s.name, value)
		return fmt.Sprint(n), err
	case optionSignedSize:
		digits, negative := strings.CutPrefix(value, "-")
		n, err := sizeParameter(s.name, digits)
		if negative {
			n = -n
		}
		return fmt.Sprint(n), err
	case optionSwitch:
		switch value {
		case "on", "yes", "true", "y":
			return "on", nil
		case "off", "no", "false", "n":
			return "off", nil
		}
		return "", fmt.Errorf("Parameter '%s' expects 'on' or 'off'", s.name)
	case optionNumber:
		if _, err := strconv.ParseInt(value, 0, 32); err != nil {
			return "", fmt.Errorf("Parameter '%s' expects a number", s.name)
		}
	}
	return value, nil
}

// has tells whether the format knows an option.
func (c *createValues) has(name string) bool { return findSpec(c.specs, name) != nil }

// set checks and stores an option; the last of several counts.
func (c *createValues) set(p parameter) error {
	spec := findSpec(c.specs, p.name)
	if spec == nil {
		return fmt.Errorf("Invalid parameter '%s'", p.name)
	}
	value, err := spec.canonical(p.value)
	if err != nil {
		return err
	}
	c.values[p.name] = value
	return nil
}

// fill stores what a command line of create gives: the size in bytes, if any, the -o options, -b and -F.
func (c *createValues) fill(size []string, params []parameter, backing, backingFormat string) error {
	for _, p := range params {
		if err := c.set(p); err != nil {
			return err
		}
	}
	if len(size) > 0 {
		if _, twice := c.values["size"]; twice {
			return fmt.Errorf("The image size must be specified only once")
		}
		c.values["size"] = size[0]
	}
	return c.setBacking(backing, backingFormat)
}

// setBacking stores what -b and -F say.
func (c *createValues) setBacking(file, format string) error {
	if file != "" {
		if !c.has("backing_file") {
			return fmt.Errorf("Backing file not supported for file format '%s'", c.format)
		}
		c.values["backing_file"] = file
	}
	if format != "" {
		if !c.has("backing_fmt") {
			return fmt.Errorf("Backing file format not supported for file format '%s'", c.format)
		}
		c.values["backing_fmt"] = format
	}
	return nil
}

func (c *createValues) get(name string) string { return c.values[name] }

// number returns the value of a size or number, 0 where it is not given.
func (c *createValues) number(name string) int64 {
	n, err := strconv.ParseInt(c.values[name], 0, 64)
	if err != nil {
		return 0 // not given: set refuses what is no number
	}
	return n
}

func (c *createValues) on(name string) bool { return c.values[name] == "on" }

// options are the values as package image takes them. A size that is not given is negative.
func (c *createValues) options(g gate.Gate) (image.CreateOptions, error) {
	o := image.CreateOptions{
		CreateOptions: qcow2.CreateOptions{
			Size:            -1,
			ClusterSize:     c.number("cluster_size"),
			RefcountBits:    int(c.number("refcount_bits")),
			ExtendedL2:      c.on("extended_l2"),
			CompressionType: c.get("compression_type"),
			BackingFile:     c.get("backing_file"),
			BackingFormat:   c.get("backing_fmt"),
			DataFileName:    c.get("data_file"),
			DataFileRaw:     c.on("data_file_raw"),
			LazyRefcounts:   c.on("lazy_refcounts"),
		},
		NoCoW: c.on("nocow"),
		Gate:  g,
	}
	if _, given := c.values["size"]; given {
		o.Size = c.number("size")
	}
	if c.format == "fvd" {
		if err := c.fvdOptions(&o.FVD); err != nil {
			return o, err
		}
	}
	if compat, given := c.values["compat"]; given {
		if o.Version = compatVersion(compat); o.Version == 0 {
			return o, fmt.Errorf("Parameter 'version' does not accept value '%s'", compat)
		}
	}
	if prealloc, given := c.values["preallocation"]; given {
		var err error
		if o.Preallocation, err = block.ParsePreallocation(prealloc); err != nil {
			return o, fmt.Errorf("Parameter 'preallocation' does not accept value '%s'", prealloc)
		}
	}
	// Package qcow2 takes a zero for "not given".
	_, clusterSize := c.values["cluster_size"]
	_, refcountBits := c.values["refcount_bits"]
	switch {
	case clusterSize && o.ClusterSize == 0:
		return o, fmt.Errorf("Cluster size must be a power of two between 512 and 2048k")
	case refcountBits && o.RefcountBits == 0:
		return o, fmt.Errorf("Refcount width must be a power of two and may not exceed 64 bits")
	case o.BackingFile == "" && o.BackingFormat != "":
		return o, fmt.Errorf("Backing format cannot be used without backing file")
	}
	return o, nil
}

// compatVersion is the version of qcow2 that the option compat names, or 0.
func compatVersion(compat string) uint32 {
	switch compat {
	case "v2", "0.10":
		return 2
	case "v3", "1.1":
		return 3
	}
	return 0
}

// fvdOptions are the values that only FVD has. Package fvd takes a zero for "not given".
func (c *createValues) fvdOptions(o *fvd.CreateOptions) error {
	*o = fvd.CreateOptions{
		Compact:            c.on("compact_image"),
		BlockSize:          c.number("block_size"),
		ChunkSize:          c.number("chunk_size"),
		GrowUnit:           c.number("storage_grow_unit"),
		DataFormat:         c.get("data_file_fmt"),
		CopyOnRead:         c.on("copy_on_read"),
		PrefetchStartDelay: c.number("prefetch_start_delay"),
		DetectSparseHole:   c.number("detect_sparse_hole"),
		JournalSize:        c.number("journal_size"),
		JournalBuffer:      c.number("journal_buf_size"),
		JournalBufferDelay: time.Duration(c.number("journal_clean_buf_period")) * time.Millisecond,
		PlainJournal:       c.get("journal_checksums") == "off",
		AddStorageCmd:      c.get("add_storage_cmd"),
	}
	if _, given := c.values["journal_buf_size"]; given && o.JournalBuffer == 0 {
		o.JournalBuffer = -1 // every record is written at once
	}
	for _, name := range []string{"block_size", "chunk_size", "storage_grow_unit"} {
		if _, given := c.values[name]; given && c.number(name) == 0 {
			return fmt.Errorf("Parameter '%s' expects a size above 0", name)
		}
	}
	switch {
	case o.JournalBufferDelay < 0 || c.number("journal_clean_buf_period") > int64(time.Hour/time.Millisecond):
		return fmt.Errorf("Parameter 'journal_clean_buf_period' expects a number of milliseconds from 0 to an hour")
	case o.DataFormat != "" && c.get("data_file") == "":
		return fmt.Errorf("data_file_fmt cannot be used without data_file")
	}
	return nil
}

// effective tells whether the default of an option means anything to the image.
func (c *createValues) effective(name string) bool {
	switch name {
	case "chunk_size", "storage_grow_unit":
		return c.format != "fvd" || c.on("compact_image")
	}
	return true
}

// String lists the options as the "Formatting" line does, defaults included.
func (c *createValues) String() string {
	var b strings.Builder
	for _, s := range c.specs {
		value, given := c.values[s.name]
		if !given && c.effective(s.name) {
			value = s.fallback
		}
		if value != "" {
			fmt.Fprintf(&b, " %s=%s", s.name, quoteCommas(value))
		}
	}
	return b.String()
}

// wantsOptionHelp tells whether -o help is among the option lists.
func wantsOptionHelp(lists []string) bool {
	_, help, err := parseOptionLists(lists)
	return help && err == nil
}

// printCreateHelp answers -o help.
func printCreateHelp(out io.Writer, format string) error {
	specs, ok := createSpecs(format)
	if !ok {
		return fmt.Errorf("Unknown file format '%s'", format)
	}
	printOptionSpecs(out, fmt.Sprintf("Supported %s options:", format), specs)
	return nil
}

// printOptionSpecs lists options by name under a title.
func printOptionSpecs(out io.Writer, title string, specs []optionSpec) {
	fmt.Fprintln(out, title)
	slices.SortFunc(specs, func(a, b optionSpec) int { return strings.Compare(a.name, b.name) })
	for _, s := range specs {
		if s.help == "" {
			fmt.Fprintf(out, "  %s\n", s.name)
			continue
		}
		fmt.Fprintf(out, "  %-22s - %s\n", s.name+"="+optionKindNames[s.kind], s.help)
	}
}
