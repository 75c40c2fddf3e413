package cli

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/storage"
)

func newAmendCommand() *cobra.Command {
	var (
		open    openFlags
		options optionsFlag
		quiet   bool
	)
	cmd := &cobra.Command{
		Use:   "amend [flags] -o OPTIONS FILENAME",
		Short: "Change what an image says about itself",
		Long: `Change settings in the header of an image that nobody has open. Sizes are in bytes, or
have a suffix k, M, G …; rates are in KB/s, times in ms. A crash leaves the old settings
or the new ones.

In format qcow2: compat=1.1 brings an image of version 2 to version 3 (there is no way
back), lazy_refcounts=on|off chooses how counts are kept, data_file_raw=off no longer
promises that the data file is a raw image, size makes the disk larger.

In format fvd: the base image and data file, copy-on-read and prefetching, the journal's
buffer, the size. base_img names another copy of the same bytes; nothing is copied
("platter rebase" copies what differs). An empty name is accepted once nothing lives
there any more. clean_shutdown=on marks an image without a journal as usable after a
crash, and may hide lost writes: check it first.`,
		Example: `  platter amend -f qcow2 -o help
  platter amend -o compat=1.1,lazy_refcounts=on disk.qcow2
  platter amend -o copy_on_read=on,prefetch_start_delay=30 clone.fvd
  platter amend -o base_img=/mnt/images/base.qcow2 clone.fvd`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			params, help, err := options.read(cmd, &open)
			if err != nil {
				return err
			}
			switch {
			case help:
				return printAmendHelp(cmd, open.format)
			case len(params) == 0:
				return usagef(cmd, "Must specify options (-o)")
			case len(args) != 1:
				return usagef(cmd, "Expecting one image file name")
			}
			if err := amend(cmd, &open, args[0], params); err != nil {
				return err
			}
			if !quiet {
				fmt.Fprintln(cmd.OutOrStdout(), "Image amended.")
			}
			return nil
		},
	}
	open.register(cmd, "`FORMAT` of the image; guessed when not given")
	options.register(cmd, "`OPTIONS` to change, name=value between commas;\n\"-o help\" lists them")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print nothing but errors")
	return cmd
}

// amendSize is the setting that is not a field of its own: changing it lays out the new part of the disk.
const amendSize = "size"

// amendSpecs returns what amend can change in images of a format; ok is false if it cannot change any.
func amendSpecs(format string) (specs []optionSpec, ok bool) {
	switch format {
	case "qcow2":
		all, _ := createSpecs(format)
		for _, name := range []string{"compat", "data_file_raw", "lazy_refcounts", "refcount_bits", amendSize} {
			specs = append(specs, *findSpec(all, name))
		}
	case "fvd":
		specs = []optionSpec{
			{amendSize, optionSize, "", "Virtual disk size; not smaller than it is"},
			{"base_img", optionString, "", "File name of another copy of the base image; empty: it is not needed any more"},
			{"base_img_fmt", optionString, "", "Image format of the base image"},
			{"base_length", optionSize, "", "Size of the base image, which is compared when the image is opened; 0: it is not"},
			{"data_file", optionString, "", "File name of the data file, beside the image unless absolute"},
			{"data_file_fmt", optionString, "", "Image format of the data file (allowed values: raw, qcow2)"},
			{"need_zero_init", optionSwitch, "", "Only storage that reads as zeros where nothing was written will do"},
			{"copy_on_read", optionSwitch, "", "Keep what is read from the base image"},
			{"clean_shutdown", optionSwitch, "", "The image was closed cleanly; \"on\" may hide lost writes"},
			{"max_outstanding_copy_on_read_data", optionSize, "", "Bytes of copies that may wait to be written; reads beyond keep nothing"},
			{"prefetch_start_delay", optionNumber, "", "Seconds after which the rest of the base image is fetched; 0 and below: never"},
			{"max_num_outstanding_prefetch_writes", optionNumber, "", "Buffers between reading and writing"},
			{"bytes_per_prefetch", optionSize, "", "Bytes of a read"},
			{"prefetch_min_read_throughput_threshold", optionNumber, "", "KB/s of reading below which prefetching pauses now and then; 0: never"},
			{"prefetch_max_read_throughput_threshold", optionNumber, "", "KB/s to read at most"},
			{"prefetch_min_write_throughput_threshold", optionNumber, "", "KB/s of writing below which prefetching pauses now and then; 0: never"},
			{"prefetch_max_write_throughput_threshold", optionNumber, "", "KB/s to write at most"},
			{"prefetch_perf_calc_alpha", optionNumber, "", "Percent that a sample leaves of the average"},
			{"prefetch_read_throughput_measure_time", optionNumber, "", "Milliseconds of reading that make a sample"},
			{"prefetch_write_throughput_measure_time", optionNumber, "", "Milliseconds of writing that make a sample"},
			{"prefetch_over_threshold_throttle_time", optionNumber, "", "Milliseconds of the longest pause"},
			{"storage_grow_unit", optionSize, "", "By how much a compact image grows at a time"},
			{"journal_buf_size", optionSize, "", "Bytes of journal records kept until the guest flushes; 0: none are"},
			{"journal_clean_buf_period", optionNumber, "", "Milliseconds after which they are written all the same"},
		}
	}
	return specs, specs != nil
}

// amendment is what amend is to change.
type amendment struct {
	size     int64       // 0: stays
	settings []parameter // in their canonical spelling
}

func newAmendment(format string, params []parameter) (*amendment, error) {
	specs, ok := amendSpecs(format)
	if !ok {
		return nil, errNoAmendments(format)
	}
	a := &amendment{}
	for _, p := range params {
		spec := findSpec(specs, p.name)
		if spec == nil {
			return nil, errNotAmendable(format, p.name)
		}
		value, err := spec.canonical(p.value)
		if err != nil {
			return nil, err
		}
		if p.name != amendSize {
			a.settings = append(a.settings, parameter{p.name, value})
			continue
		}
		if strings.HasPrefix(strings.TrimSpace(p.value), "+") { // qemu-img takes it for the size without the sign
			return nil, fmt.Errorf("Parameter 'size' is the new size of the disk, not what is added to it: %s\n"+
				"You can use 'platter resize' to add to the size.", p.value)
		}
		if a.size, err = strconv.ParseInt(value, 10, 64); err != nil || a.size == 0 {
			return nil, errSizeNotPositive
		}
	}
	return a, nil
}

func errNoAmendments(format string) error {
	return fmt.Errorf("Format driver '%s' does not support option amendment", format)
}

// errNotAmendable says why there is no such setting.
func errNotAmendable(format, name string) error {
	specs, _ := createSpecs(format)
	switch {
	case format == "qcow2" && (name == "backing_file" || name == "backing_fmt"):
		return errors.New("Cannot amend the backing file\nYou can use 'platter rebase' instead.")
	case name == "backing_file" || name == "backing_fmt":
		return errors.New("Cannot amend the backing file\nYou can use 'platter rebase' instead, or base_img where its copy has moved.")
	case findSpec(specs, name) != nil:
		return fmt.Errorf("Invalid parameter '%s'\nThis option is only supported for image creation", name)
	}
	return fmt.Errorf("Invalid parameter '%s'", name)
}

// amend changes an image: first its header, then the size of its disk. What will be refused is, as far as can be known,
// before the first change.
func amend(cmd *cobra.Command, open *openFlags, name string, params []parameter) error {
	img, format, err := open.openFile(cmd.Context(), name, false)
	if err != nil {
		return err
	}
	a, err := newAmendment(format, params)
	if err == nil && a.size == 0 {
		err = a.apply(img.File(), format)
	} else if err == nil {
		begun := true
		err = errors.Join(refused(a.apply(trialFile{img.File(), &begun}, format)), a.checkSize(img.File(), format))
	}
	if err := errors.Join(err, img.Close()); err != nil || a.size == 0 {
		return err
	}
	if len(a.settings) > 0 {
		if err := a.applyBeforeSize(cmd, open, name, format); err != nil {
			return err
		}
	}
	disk, err := open.open(cmd.Context(), name, image.Options{})
	if err != nil {
		return err
	}
	return errors.Join(disk.Resize(a.size, block.PreallocOff), disk.Close())
}

// applyBeforeSize makes the changes of the header, once it has turned out that the size can be changed.
func (a *amendment) applyBeforeSize(cmd *cobra.Command, open *openFlags, name, format string) error {
	if !a.decidesOpening() {
		if err := a.trySize(cmd, open, name); err != nil {
			return err
		}
	}
	img, _, err := open.openFile(cmd.Context(), name, false)
	if err != nil {
		return err
	}
	return errors.Join(a.apply(img.File(), format), img.Close())
}

// decidesOpening tells whether the image may open, or its size be changed, only because of one of the settings.
func (a *amendment) decidesOpening() bool {
	return slices.ContainsFunc(a.settings, func(p parameter) bool {
		switch p.name {
		case "compat", "clean_shutdown", "need_zero_init", "base_img", "base_img_fmt", "base_length", "data_file", "data_file_fmt":
			return true
		}
		return false
	})
}

// checkSize refuses a size that no disk in f can be given, and one that would cut off a part of it: that is not to happen
// by the way.
func (a *amendment) checkSize(f storage.File, format string) error {
	var old int64
	switch format {
	case "qcow2":
		h, err := qcow2.ReadHeader(f)
		if err != nil {
			return err
		}
		old = int64(h.Size)
	default:
		h, err := fvd.ReadHeader(f)
		if err != nil {
			return err
		}
		old = int64(h.VirtualSize)
	}
	switch {
	case a.size < old && format == "qcow2":
		return fmt.Errorf("Cannot amend the size from %d to %d bytes\nYou can use 'platter resize --shrink' instead.", old, a.size)
	case a.size < old:
		return fmt.Errorf("shrinking from %d to %d bytes: %w", old, a.size, errors.ErrUnsupported)
	case a.size%storage.SectorSize != 0:
		return fmt.Errorf("The new size must be a multiple of %d, not %d", storage.SectorSize, a.size)
	}
	return nil
}

// trySize finds out whether the size would be refused.
func (a *amendment) trySize(cmd *cobra.Command, open *openFlags, name string) error {
	begun := false
	disk, err := open.open(cmd.Context(), name, image.Options{
		Wrap: func(f storage.File) storage.File { return trialFile{f, &begun} },
	})
	if err != nil {
		return err
	}
	begun = true
	return errors.Join(refused(disk.Resize(a.size, block.PreallocOff)), refused(disk.Close()))
}

// apply makes the changes of the header.
func (a *amendment) apply(f storage.File, format string) error {
	if format == "qcow2" {
		change, err := a.qcow2()
		if err != nil {
			return err
		}
		return qcow2.Amend(f, change)
	}
	var settings []fvd.Setting
	for _, p := range a.settings {
		settings = append(settings, fvd.Setting{Name: p.name, Value: p.value})
	}
	return fvd.Amend(f, settings)
}

// qcow2 is the amendment as package qcow2 takes it.
func (a *amendment) qcow2() (change qcow2.Amendment, err error) {
	for _, p := range a.settings {
		on := p.value == "on"
		switch p.name {
		case "compat":
			if change.Version = compatVersion(p.value); change.Version == 0 {
				return change, fmt.Errorf("Unknown compatibility level %s", p.value)
			}
		case "lazy_refcounts":
			change.LazyRefcounts = &on
		case "data_file_raw":
			change.DataFileRaw = &on
		case "refcount_bits":
			bits, err := strconv.ParseInt(p.value, 0, 32)
			if err != nil || bits < 1 || bits > 64 || bits&(bits-1) != 0 {
				return change, errors.New("Refcount width must be a power of two and may not exceed 64 bits")
			}
			change.RefcountBits = int(bits)
		}
	}
	return change, nil
}

// printAmendHelp answers -o help, for one format or for all that have settings.
func printAmendHelp(cmd *cobra.Command, format string) error {
	formats := []string{format}
	if format == "" {
		formats = []string{"fvd", "qcow2"}
	}
	for _, format := range formats {
		specs, ok := amendSpecs(format)
		if !ok {
			return errNoAmendments(format)
		}
		printOptionSpecs(cmd.OutOrStdout(), fmt.Sprintf("Amend options for '%s':", format), specs)
	}
	return nil
}
