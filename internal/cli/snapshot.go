package cli

import (
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image"
)

// snapshotFlags are the flags of snapshot.
type snapshotFlags struct {
	open   openFlags
	output outputFlag
	list   bool
	create string
	apply  string
	remove string
	quiet  bool
}

func newSnapshotCommand() *cobra.Command {
	var f snapshotFlags
	cmd := &cobra.Command{
		Use:   "snapshot [flags] FILENAME",
		Short: "List, create, apply or delete the snapshots in an image",
		Long: `List, create, apply or delete the snapshots in a qcow2 image. A snapshot keeps what the
disk holds now; it takes space only as the disk changes afterwards.

To apply a snapshot makes the disk what it was. What the disk holds at that time is
lost, unless another snapshot has it. Without a flag the snapshots are listed.`,
		Example: `  platter snapshot -c before-upgrade disk.qcow2
  platter snapshot -l disk.qcow2
  platter snapshot -a before-upgrade disk.qcow2
  platter snapshot -d before-upgrade disk.qcow2
  platter convert -l before-upgrade -O raw disk.qcow2 old.img`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error { return f.run(cmd, args) },
	}
	fs := cmd.Flags()
	fs.BoolVarP(&f.list, "list", "l", false, "list the snapshots")
	fs.StringVarP(&f.create, "create", "c", "", "create a snapshot called `NAME`")
	fs.StringVarP(&f.apply, "apply", "a", "", "make the disk what it was in the snapshot with the id or `NAME`")
	fs.StringVarP(&f.remove, "delete", "d", "", "delete the snapshot called `NAME`")
	fs.BoolVarP(&f.quiet, "quiet", "q", false, "do not warn that the format was guessed")
	f.output.register(cmd)
	f.open.register(cmd, "`FORMAT` of the image; guessed when not given")
	f.open.registerShare(fs)
	return cmd
}

func (f *snapshotFlags) run(cmd *cobra.Command, args []string) error {
	changed := cmd.Flags().Changed
	actions := 0
	for _, name := range []string{"list", "create", "apply", "delete"} {
		if changed(name) {
			actions++
		}
	}
	switch {
	case actions > 1:
		return usagef(cmd, "Cannot mix '-l', '-a', '-c', '-d'")
	case len(args) != 1:
		return usagef(cmd, "Expecting one image file name")
	}
	if err := errors.Join(f.open.check(cmd), f.output.check()); err != nil {
		return err
	}
	list := actions == 0 || f.list
	img, err := f.open.open(cmd.Context(), args[0], image.Options{ReadOnly: list})
	if err != nil {
		return err
	}
	switch {
	case list:
		err = f.printList(cmd.OutOrStdout(), img)
	case changed("create"):
		err = f.change(cmd, img, "create", f.create, func(q *qcow2.Image) error {
			_, err := q.CreateSnapshot(f.create, qcow2.SnapshotOptions{})
			return err
		})
	case changed("apply"):
		err = f.change(cmd, img, "apply", f.apply, func(q *qcow2.Image) error { return q.ApplySnapshot(f.apply) })
	default:
		err = f.change(cmd, img, "delete", f.remove, func(q *qcow2.Image) error { return deleteSnapshot(q, f.remove) })
	}
	return errors.Join(err, img.Close())
}

// change makes a change to the snapshots of an image, which must be a qcow2 image.
func (f *snapshotFlags) change(cmd *cobra.Command, img *image.Image, verb, name string, do func(*qcow2.Image) error) error {
	if !f.quiet {
		warnProbedRaw(cmd, img)
	}
	err := fmt.Errorf("images of format %s have no snapshots", img.Format())
	if q := img.Qcow2(); q != nil {
		err = do(q)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, qcow2.ErrNoSnapshot) && verb == "apply":
		err = errors.New("Failed to load snapshot: No such file or directory")
	default:
		err = withoutName(err, img.Name())
	}
	return fmt.Errorf("Could not %s snapshot '%s': %w", verb, name, err)
}

// deleteSnapshot deletes the first snapshot with a name. Like qemu-img it does not look at ids, so that nobody
// deletes a snapshot because its number happens to be a name.
func deleteSnapshot(q *qcow2.Image, name string) error {
	list, err := q.Snapshots()
	if err != nil {
		return err
	}
	for _, s := range list {
		if s.Name == name {
			return q.DeleteSnapshot(s.ID)
		}
	}
	return qcow2.ErrNoSnapshot
}

// printList prints the snapshots of an image. Other formats have none.
func (f *snapshotFlags) printList(out io.Writer, img *image.Image) error {
	var infos []snapshotInfo
	if q := img.Qcow2(); q != nil {
		list, err := q.Snapshots()
		if err != nil {
			return err
		}
		infos = snapshotInfos(list)
	}
	if f.output.json() {
		return printJSON(out, append([]snapshotInfo{}, infos...))
	}
	if len(infos) == 0 {
		return nil
	}
	_, err := io.WriteString(out, snapshotList(infos))
	return err
}

// snapshotParam is the argument of convert -l: an id or a name, or snapshot.id=ID,snapshot.name=NAME.
type snapshotParam struct{ idOrName, id, name string }

func parseSnapshotParam(s string) (snapshotParam, error) {
	if !strings.HasPrefix(s, "snapshot.") {
		return snapshotParam{idOrName: s}, nil
	}
	params, _, err := parseOptionLists([]string{s})
	if err != nil {
		return snapshotParam{}, err
	}
	var p snapshotParam
	for _, o := range params {
		switch o.name {
		case "snapshot.id":
			p.id = o.value
		case "snapshot.name":
			p.name = o.value
		default:
			return p, fmt.Errorf("Invalid parameter '%s'\nFailed in parsing snapshot param '%s'", o.name, s)
		}
	}
	return p, nil
}

// snapshotSource is a snapshot together with the image that it is in.
type snapshotSource struct {
	block.Device
	img *image.Image
}

func (s *snapshotSource) Close() error { return errors.Join(s.Device.Close(), s.img.Close()) }

// open opens the snapshot of an image that the parameter names.
func (p snapshotParam) open(img *image.Image) (block.Device, error) {
	q := img.Qcow2()
	if q == nil {
		return nil, fmt.Errorf("Failed to load snapshot: images of format %s have no snapshots", img.Format())
	}
	list, err := q.Snapshots()
	if err != nil {
		return nil, err
	}
	which := p.idOrName
	for _, s := range list {
		if which == "" && (p.id != "" || p.name != "") && (p.id == "" || p.id == s.ID) && (p.name == "" || p.name == s.Name) {
			which = s.ID
		}
	}
	dev, err := q.SnapshotDevice(which)
	switch {
	case which == "" || errors.Is(err, qcow2.ErrNoSnapshot):
		return nil, errors.New("Failed to load snapshot: Can't find snapshot")
	case err != nil:
		return nil, fmt.Errorf("Failed to load snapshot: %w", withoutName(err, img.Name()))
	}
	return dev, nil
}

// snapshotLine is a line of the snapshot list: id, name, size of the saved memory, date, clock, icount.
const snapshotLine = "%-9s %-16s %8s%20s%13s%11s\n"

// snapshotInfos describes the snapshots of an image; nil for none.
func snapshotInfos(list []qcow2.Snapshot) []snapshotInfo {
	var infos []snapshotInfo
	for _, s := range list {
		one := snapshotInfo{
			VMClockSec: s.VMClock / 1e9, VMClockNsec: s.VMClock % 1e9,
			ID: s.ID, Name: s.Name, DateSec: s.Seconds, DateNsec: s.Nanoseconds, VMStateSize: s.VMStateSize,
		}
		if s.ICount != math.MaxUint64 {
			one.Icount = &s.ICount
		}
		infos = append(infos, one)
	}
	return infos
}

// snapshotList is the human form of a list of snapshots.
func snapshotList(infos []snapshotInfo) string {
	var b strings.Builder
	b.WriteString("Snapshot list:\n")
	fmt.Fprintf(&b, snapshotLine, "ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
	for _, s := range infos {
		s.print(&b)
	}
	return b.String()
}

func (s *snapshotInfo) print(out io.Writer) {
	icount := ""
	if s.Icount != nil {
		icount = fmt.Sprint(*s.Icount)
	}
	clock := fmt.Sprintf("%02d:%02d:%02d.%03d", s.VMClockSec/3600, s.VMClockSec/60%60, s.VMClockSec%60, s.VMClockNsec/1e6)
	date := time.Unix(int64(s.DateSec), 0).Format(time.DateTime)
	fmt.Fprintf(out, snapshotLine, s.ID, s.Name, formatSize(int64(s.VMStateSize)), date, clock, icount)
}
