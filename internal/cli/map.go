package cli

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math"

	"github.com/spf13/cobra"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/image"
)

func newMapCommand() *cobra.Command {
	var (
		open          openFlags
		output        outputFlag
		start, length string
	)
	cmd := &cobra.Command{
		Use:   "map [flags] FILENAME",
		Short: "Show which parts of a disk are stored where",
		Long: `Show which parts of a disk hold data, and where in which file of the backing
chain the data lies.

The human form lists only what is stored as it is: "Mapped to" is an offset in the
file that the line names. The JSON form lists all of the disk:

  depth    the layer of the backing chain that decides: 0 for FILENAME itself
  present  some layer has an entry for it
  zero     it reads as zeros
  data     bytes are stored for it
  offset   where, if they are stored as they are`,
		Example: `  platter map disk.qcow2
  platter map --output=json disk.qcow2
  platter map --start-offset=1G --max-length=64M disk.qcow2`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := output.check(); err != nil {
				return err
			}
			from, err := sizeArgument("start offset", start)
			if err != nil {
				return err
			}
			most := int64(math.MaxInt64)
			if length != "" {
				if most, err = sizeArgument("max length", length); err != nil {
					return err
				}
			}
			if len(args) != 1 {
				return usagef(cmd, "Expecting one image file name")
			}
			if err := open.check(cmd); err != nil {
				return err
			}
			img, err := open.open(cmd.Context(), args[0], image.Options{ReadOnly: true})
			if err != nil {
				return err
			}
			defer img.Close()
			out := bufio.NewWriter(cmd.OutOrStdout())
			err = printMap(cmd.Context(), out, img, from, most, output.json())
			if ferr := out.Flush(); err == nil {
				err = ferr
			}
			return err
		},
	}
	open.register(cmd, "`FORMAT` of the image; guessed when not given")
	open.registerShare(cmd.Flags())
	output.register(cmd)
	cmd.Flags().StringVarP(&start, "start-offset", "s", "0", "`OFFSET` to begin at, in bytes or with a suffix k, M, G …")
	cmd.Flags().StringVarP(&length, "max-length", "l", "", "`SIZE` of the part to show")
	return cmd
}

// printMap prints the runs of img in [from, from+most), merged where nothing printed tells them apart.
func printMap(ctx context.Context, out io.Writer, img *image.Image, from, most int64, asJSON bool) error {
	p := mapPrinter{out: out, files: dataFiles(img), json: asJSON}
	p.begin()
	pending := block.Extent{Offset: from, HostOffset: -1}
	from = min(from, img.Size())
	var failed error
	err := img.Extents(from, min(img.Size()-from, most), func(e block.Extent) bool {
		if failed = ctx.Err(); failed != nil {
			return false
		}
		if continues(pending, e) {
			pending.Length += e.Length
			return true
		}
		if pending.Length > 0 {
			failed = p.print(pending)
		}
		pending = e
		return failed == nil
	})
	switch {
	case failed != nil:
		return failed
	case err != nil:
		return err
	}
	if err := p.print(pending); err != nil {
		return err
	}
	p.end()
	return nil
}

// dataFiles names, for each layer of the chain, the file that holds its data.
func dataFiles(img *image.Image) []string {
	var names []string
	for _, layer := range img.Chain() {
		name := layer.Name
		if layer.DataFile != "" {
			name = layer.DataFile
		}
		names = append(names, name)
	}
	return names
}

// continues tells whether b is printed as a longer a.
func continues(a, b block.Extent) bool {
	if a.Length == 0 || a.Depth != b.Depth || a.Allocated != b.Allocated || a.Zero != b.Zero || a.Data != b.Data {
		return false
	}
	if a.HostOffset < 0 || b.HostOffset < 0 {
		return a.HostOffset < 0 && b.HostOffset < 0
	}
	return a.HostOffset+a.Length == b.HostOffset
}

// mapPrinter prints runs in the forms of qemu-img map.
type mapPrinter struct {
	out   io.Writer
	files []string // the file that holds the data of each layer
	json  bool
	lines int
}

func (p *mapPrinter) begin() {
	if p.json {
		fmt.Fprint(p.out, "[")
		return
	}
	fmt.Fprintf(p.out, "%-16s%-16s%-16s%s\n", "Offset", "Length", "Mapped to", "File")
}

func (p *mapPrinter) print(e block.Extent) error {
	if p.json {
		if p.lines > 0 {
			fmt.Fprint(p.out, ",\n")
		}
		p.lines++
		fmt.Fprintf(p.out, `{ "start": %d, "length": %d, "depth": %d, "present": %t, "zero": %t, "data": %t`,
			e.Offset, e.Length, e.Depth, e.Allocated, e.Zero, e.Data)
		if e.HostOffset >= 0 {
			fmt.Fprintf(p.out, `, "offset": %d`, e.HostOffset)
		}
		fmt.Fprint(p.out, "}")
		return nil
	}
	if !e.Data || e.Zero {
		return nil
	}
	if e.HostOffset < 0 {
		return fmt.Errorf("File contains external, encrypted or compressed clusters.")
	}
	file := ""
	if e.Depth < len(p.files) {
		file = p.files[e.Depth]
	}
	fmt.Fprintf(p.out, "%-16s%-16s%-16s%s\n", cHex(e.Offset), cHex(e.Length), cHex(e.HostOffset), file)
	return nil
}

func (p *mapPrinter) end() {
	if p.json {
		fmt.Fprint(p.out, "]\n")
	}
}

// cHex is what "%#x" prints in C: 0 has no prefix.
func cHex(n int64) string {
	if n == 0 {
		return "0"
	}
	return fmt.Sprintf("%#x", n)
}
