package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/internal/hostpath"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/storage"
)

func newInfoCommand() *cobra.Command {
	var (
		open   openFlags
		output outputFlag
		chain  bool
	)
	cmd := &cobra.Command{
		Use:   "info [flags] FILENAME",
		Short: "Show what kind of disk an image file holds",
		Long: `Show what kind of disk an image file holds: its format, the size of the disk, how
much space the file takes, its backing file, its internal snapshots.`,
		Example: `  platter info disk.qcow2
  platter info --backing-chain overlay.qcow2
  platter info --output=json disk.qcow2`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := output.check(); err != nil {
				return err
			}
			if len(args) != 1 {
				return usagef(cmd, "Expecting one image file name")
			}
			if err := open.check(cmd); err != nil {
				return err
			}
			infos, err := readInfos(cmd.Context(), &open, args[0], chain)
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if !output.json() {
				for i, info := range infos {
					if i > 0 {
						fmt.Fprintln(out)
					}
					if err := info.print(out); err != nil {
						return err
					}
				}
				return nil
			}
			if chain {
				return printJSON(out, infos)
			}
			return printJSON(out, infos[0])
		},
	}
	open.register(cmd, "`FORMAT` of the image; guessed when not given")
	open.registerShare(cmd.Flags())
	output.register(cmd)
	cmd.Flags().BoolVar(&chain, "backing-chain", false, "show every image of the backing chain")
	return cmd
}

// imageInfo is what info tells of one image; its JSON form is that of qemu-img info --output=json.
type imageInfo struct {
	Snapshots       []snapshotInfo  `json:"snapshots,omitempty"`
	BackingFormat   string          `json:"backing-filename-format,omitempty"`
	VirtualSize     int64           `json:"virtual-size"` // bytes
	Filename        string          `json:"filename"`
	ClusterSize     int64           `json:"cluster-size,omitempty"` // bytes
	Format          string          `json:"format"`
	Encrypted       bool            `json:"encrypted,omitempty"`
	ActualSize      *int64          `json:"actual-size,omitempty"` // bytes of disk space; absent where nobody knows
	FormatSpecific  *formatSpecific `json:"format-specific,omitempty"`
	FullBackingName string          `json:"full-backing-filename,omitempty"`
	BackingName     string          `json:"backing-filename,omitempty"`
	Dirty           *bool           `json:"dirty-flag,omitempty"` // absent where it has no meaning
}

// formatSpecific is what only one format has.
type formatSpecific struct {
	Type string `json:"type"`
	Data any    `json:"data"`
}

// snapshotInfo is an internal snapshot.
type snapshotInfo struct {
	Icount      *uint64 `json:"icount,omitempty"` // absent where the snapshot has none
	VMClockNsec uint64  `json:"vm-clock-nsec"`
	Name        string  `json:"name"`
	DateSec     uint32  `json:"date-sec"`
	DateNsec    uint32  `json:"date-nsec"`
	VMClockSec  uint64  `json:"vm-clock-sec"`
	ID          string  `json:"id"`
	VMStateSize uint64  `json:"vm-state-size"` // bytes
}

// readInfos reads what is to be told of an image, and with chain of everything below it.
func readInfos(ctx context.Context, open *openFlags, name string, chain bool) ([]*imageInfo, error) {
	first, err := readInfo(ctx, open, name)
	if err != nil {
		return nil, err
	}
	infos := []*imageInfo{first}
	if !chain || first.BackingName == "" {
		return infos, nil
	}
	// The chain is opened once as a whole: that passes every reference through the gate and finds cycles.
	img, err := open.open(ctx, name, image.Options{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	layers := img.Chain()
	if err := img.Close(); err != nil {
		return nil, err
	}
	for _, layer := range layers[1:] {
		below := *open
		below.imageOpts, below.format = false, layer.Format
		info, err := readInfo(ctx, &below, layer.Name)
		if err != nil {
			return nil, err
		}
		infos = append(infos, info)
	}
	return infos, nil
}

// readInfo reads what is to be told of one image. It needs no more than the header to make sense: what the
// image refers to may be missing.
func readInfo(ctx context.Context, open *openFlags, name string) (*imageInfo, error) {
	img, format, err := open.openFile(ctx, name, true)
	if err != nil {
		return nil, err
	}
	defer img.Close()
	top := img.Chain()[0]
	path := top.Name
	info := &imageInfo{Filename: shownName(top), Format: format, VirtualSize: img.Size(), ActualSize: diskUsage(path)}
	switch {
	case format == "qcow2":
		err = info.addQcow2(img.File(), path)
	case format == "fvd":
		err = info.addFVD(img.File(), path)
	case !nbd.IsURI(path):
		info.Dirty = new(bool)
	}
	if err != nil {
		return nil, fmt.Errorf("Could not open '%s': %w", name, err)
	}
	return info, nil
}

// shownName is the name that an image is opened by: its file's, unless it is only a part of that.
func shownName(l image.Layer) string {
	if l.Offset == 0 && l.Length == 0 {
		return l.Name
	}
	part := map[string]any{"driver": l.Format, "offset": l.Offset, "file": map[string]string{"filename": l.Name}}
	if l.Length != 0 {
		part["size"] = l.Length
	}
	var b strings.Builder
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(part); err != nil { // there is nothing in it that JSON has not
		return l.Name
	}
	return "json:" + strings.TrimSuffix(b.String(), "\n")
}

// addQcow2 adds what a qcow2 image tells of itself.
func (i *imageInfo) addQcow2(f storage.File, path string) error {
	q, err := qcow2.ReadInfo(f)
	if err != nil {
		return err
	}
	i.VirtualSize, i.ClusterSize, i.Encrypted, i.Dirty = q.VirtualSize, q.ClusterSize, q.Encrypted, &q.Dirty
	if q.BackingFile != "" {
		i.BackingName, i.BackingFormat = q.BackingFile, q.BackingFormat
		i.FullBackingName = fullBackingName(path, q.BackingFile)
	}
	i.FormatSpecific = &formatSpecific{Type: "qcow2", Data: q.Specific}
	i.Snapshots = snapshotInfos(q.Snapshots)
	return nil
}

// addFVD adds what an FVD image tells of itself. A disk that has moved over whole has no base image any more, even
// if it still remembers its name.
func (i *imageInfo) addFVD(f storage.File, path string) error {
	v, err := fvd.ReadInfo(f)
	if err != nil {
		return err
	}
	dirty := !v.CleanShutdown
	i.VirtualSize, i.ClusterSize, i.Dirty = v.VirtualSize, v.ChunkSize, &dirty
	if v.BaseImage != "" && !v.FullyPrefetched {
		i.BackingName, i.BackingFormat = v.BaseImage, v.BaseFormat
		i.FullBackingName = fullBackingName(path, v.BaseImage)
	}
	i.FormatSpecific = &formatSpecific{Type: "fvd", Data: v}
	return nil
}

// fullBackingName is where a backing file is that the image at path refers to: a relative path is relative to
// the directory of the image.
func fullBackingName(path, ref string) string {
	colon, slash := strings.IndexByte(ref, ':'), strings.IndexByte(ref, '/')
	if protocol := colon > 0 && (slash < 0 || colon < slash); protocol || nbd.IsURI(path) {
		return ref
	}
	return hostpath.Beside(path, ref)
}

func printJSON(out io.Writer, v any) error {
	enc := json.NewEncoder(out)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "    ")
	return enc.Encode(v)
}

// print prints the human form.
func (i *imageInfo) print(out io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "image: %s\nfile format: %s\nvirtual size: %s (%d bytes)\n", i.Filename, i.Format, formatSize(i.VirtualSize), i.VirtualSize)
	if i.ActualSize == nil {
		b.WriteString("disk size: unavailable\n")
	} else {
		fmt.Fprintf(&b, "disk size: %s\n", formatSize(*i.ActualSize))
	}
	if i.Encrypted {
		b.WriteString("encrypted: yes\n")
	}
	if i.ClusterSize > 0 {
		fmt.Fprintf(&b, "cluster_size: %d\n", i.ClusterSize)
	}
	if i.Dirty != nil && *i.Dirty {
		b.WriteString("cleanly shut down: no\n")
	}
	if i.BackingName != "" {
		fmt.Fprintf(&b, "backing file: %s", i.BackingName)
		if i.FullBackingName == "" {
			b.WriteString(" (cannot determine actual path)")
		} else if i.FullBackingName != i.BackingName {
			fmt.Fprintf(&b, " (actual path: %s)", i.FullBackingName)
		}
		b.WriteByte('\n')
		if i.BackingFormat != "" {
			fmt.Fprintf(&b, "backing file format: %s\n", i.BackingFormat)
		}
	}
	if len(i.Snapshots) > 0 {
		b.WriteString(snapshotList(i.Snapshots))
	}
	if i.FormatSpecific != nil {
		b.WriteString("Format specific information:\n")
		if err := printTree(&b, i.FormatSpecific.Data); err != nil {
			return err
		}
	}
	_, err := io.WriteString(out, b.String())
	return err
}
