package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/jobs/prefetch"
	"github.com/platter-disk/platter/storage"
)

// The actions of prefetch.
const (
	actionStatus = "status"
	actionPause  = "pause"
	actionResume = "resume"
	actionWait   = "wait"
)

// waitInterval is how often wait looks.
const waitInterval = 200 * time.Millisecond

// prefetchCommandFlags are the flags of prefetch.
type prefetchCommandFlags struct {
	open     openFlags
	output   outputFlag
	progress progressFlags
	grow     growFlag
	control  string
	export   string
	options  []string
	profile  string
}

func newPrefetchCommand() *cobra.Command {
	f := &prefetchCommandFlags{}
	cmd := &cobra.Command{
		Use:   "prefetch [flags] IMAGE [status] | --control SOCKET [status|pause|resume|wait]",
		Short: "Copy what a disk needs of its base image into it",
		Long: `Copy what a disk needs of its base image (backing file) into it, until it needs the base
image no more, and let go of it: the image then refers to no base image.

With IMAGE this is done at once; nobody else may have the image open. When it is
interrupted, what was copied stays, and the next time goes on from there. With
"status" it only tells how much is left.

With --control it asks a running "platter serve --prefetch --control SOCKET" how far it
is, or has it pause, resume, or waits until it is done.`,
		Example: `  platter prefetch disk.qcow2
  platter prefetch -o max-read=20M disk.fvd
  platter prefetch disk.qcow2 status --output json
  platter prefetch --control /run/disk.ctl pause`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.run(cmd, args)
		},
	}
	f.open.register(cmd, "format of the image; guessed when not given")
	f.output.register(cmd)
	fs := cmd.Flags()
	f.progress.register(fs)
	f.grow.register(fs)
	fs.StringVar(&f.control, "control", "", "ask the server with the control socket at `PATH`")
	fs.StringVar(&f.export, "export", "", "ask about the export `NAME` only")
	fs.StringArrayVarP(&f.options, "options", "o", nil, "`OPTIONS` for copying at once, NAME=VALUE,… of those below; what the\nimage says is for servers and does not count, throttle and retry\nare 0 unless given:\n  "+prefetchHelp("  "))
	fs.StringVar(&f.profile, "profile", "", "begin with what the profile `FILE` lists; auto is IMAGE"+profileSuffix+", if it exists")
	return cmd
}

func (f *prefetchCommandFlags) run(cmd *cobra.Command, args []string) error {
	if err := errors.Join(f.output.check(), f.progress.check(cmd), f.open.check(cmd)); err != nil {
		return err
	}
	if f.control != "" {
		return f.runControl(cmd, args)
	}
	switch {
	case len(args) == 0:
		return usagef(cmd, "Expecting an image file name or --control")
	case cmd.Flags().Changed("export"):
		return usagef(cmd, "--export is for --control")
	case len(args) == 1:
		return f.runImage(cmd, args[0])
	case len(args) == 2 && args[1] == actionStatus:
		return f.imageStatus(cmd, args[0])
	case len(args) == 2 && (args[1] == actionPause || args[1] == actionResume || args[1] == actionWait):
		return usagef(cmd, "%s needs --control, the socket of the server that has the image", args[1])
	default:
		return usagef(cmd, "Expecting one image file name, and status or nothing after it")
	}
}

// newBaseLines are those of a command.
func newBaseLines(cmd *cobra.Command) *baseLines {
	return &baseLines{grace: baseGrace, warn: func(message string) { warn(cmd, "%s", message) }}
}

// openOverlay opens an image whose base image is to be copied. over is nil if there is nothing to copy.
func (f *prefetchCommandFlags) openOverlay(cmd *cobra.Command, name string, readOnly bool, lines *baseLines) (*image.Image, *overlay, error) {
	ctx, opened := lines.opening(cmd.Context())
	defer opened()
	img, err := f.open.open(ctx, name, f.grow.apply(cmd.Context(), image.Options{ReadOnly: readOnly}))
	if err != nil {
		if errors.Is(err, storage.ErrLocked) {
			err = fmt.Errorf("%w\nA server that has it can be asked with --control", err)
		}
		return nil, nil, interrupted(ctx, err)
	}
	over, err := overlayOf(img)
	if err == nil && over != nil {
		err = over.learn(ctx)
	}
	if err != nil {
		return nil, nil, errors.Join(interrupted(ctx, err), img.Close())
	}
	return img, over, nil
}

// runImage copies everything that is left.
func (f *prefetchCommandFlags) runImage(cmd *cobra.Command, name string) (err error) {
	params, help, err := parseOptionLists(f.options)
	if err != nil {
		return err
	}
	if help {
		fmt.Fprintln(cmd.OutOrStdout(), "Supported options:\n  "+prefetchHelp("  "))
		return nil
	}
	// There is no guest to give way to.
	o := prefetch.Options{Throttle: -1, Retry: -1}
	if err := setPrefetchOptions(&o, params); err != nil {
		return err
	}
	if f.profile != "" {
		if o.Order, err = readProfile(f.profile, name); err != nil {
			return fmt.Errorf("--profile: %w", err)
		}
	}
	lines := newBaseLines(cmd)
	img, over, err := f.openOverlay(cmd, name, false, lines)
	if err != nil {
		return err
	}
	defer lines.ending(cmd.Context())()
	defer func() { err = errors.Join(err, img.Close()) }()
	if over == nil {
		return f.print(cmd, exportStatus{Image: name, Format: img.Format(), Size: img.Size()})
	}
	size, total := over.BaseSize(), prefetch.Remaining(over)
	if m := f.progress.meter(cmd, "prefetch"); m != nil {
		done := int64(0)
		m.update(0, total)
		o.Trace = func(e prefetch.Event) {
			if e.Kind == prefetch.EventWrite {
				done += e.Bytes
				m.update(done, total)
			}
		}
		defer m.end()
	}
	p := prefetch.New(over, o)
	if err := p.Run(cmd.Context()); err != nil {
		return f.unfinished(cmd.Context(), name, p.Status(), err)
	}
	if over.keepsBase != "" {
		warn(cmd, "'%s' keeps the reference to its base image: %s", name, over.keepsBase)
	}
	st := p.Status()
	return f.print(cmd, exportStatus{Image: name, Format: img.Format(), Size: img.Size(),
		Base: &baseStatus{Size: size, Attached: over.keepsBase != "", Prefetch: &st}})
}

// unfinished says how far an attempt came that failed or was interrupted.
func (f *prefetchCommandFlags) unfinished(ctx context.Context, name string, st prefetch.Status, err error) error {
	stays := fmt.Sprintf("What was copied stays (%s); %s are left", formatSize(st.Kept), formatSize(st.Remaining))
	if ctx.Err() != nil {
		return &exitError{statusInterrupted, fmt.Errorf("'%s': interrupted. %s", name, stays)}
	}
	return fmt.Errorf("'%s': %w\n%s", name, err, stays)
}

// imageStatus tells what is left to copy.
func (f *prefetchCommandFlags) imageStatus(cmd *cobra.Command, name string) (err error) {
	img, over, err := f.openOverlay(cmd, name, true, newBaseLines(cmd))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	st := exportStatus{Image: name, Format: img.Format(), Size: img.Size(), ReadOnly: true}
	if over != nil {
		st.Base = &baseStatus{Size: over.BaseSize(), Remaining: prefetch.Remaining(over), Attached: true}
	}
	return f.print(cmd, st)
}

// runControl asks a server.
func (f *prefetchCommandFlags) runControl(cmd *cobra.Command, args []string) error {
	action := actionStatus
	switch {
	case len(args) == 1:
		action = args[0]
	case len(args) > 1:
		return usagef(cmd, "--control needs no image: Expecting status, pause, resume or wait")
	}
	client := newControlClient(f.control)
	one := cmd.Flags().Changed("export")
	var reply exportsReply
	var err error
	switch action {
	case actionStatus:
		reply, err = f.serverStatus(cmd.Context(), client, one)
	case actionPause, actionResume:
		err = client.do(cmd.Context(), "POST", "/prefetch/"+action, f.export, one, &reply)
	case actionWait:
		reply, err = f.wait(cmd, client, one)
	default:
		return usagef(cmd, "Expecting status, pause, resume or wait, not '%s'", action)
	}
	if err != nil {
		return err
	}
	return f.print(cmd, reply.Exports...)
}

// serverStatus is what a server says of one export, or of all.
func (f *prefetchCommandFlags) serverStatus(ctx context.Context, client *controlClient, one bool) (reply exportsReply, err error) {
	if err := client.do(ctx, "GET", "/status", "", false, &reply); err != nil || !one {
		return reply, err
	}
	for _, e := range reply.Exports {
		if e.Name == f.export {
			return exportsReply{[]exportStatus{e}}, nil
		}
	}
	return reply, fmt.Errorf("control socket '%s': there is no export %q", f.control, f.export)
}

// wait asks until everything is copied, or will not be.
func (f *prefetchCommandFlags) wait(cmd *cobra.Command, client *controlClient, one bool) (reply exportsReply, err error) {
	m := f.progress.meter(cmd, "prefetch")
	if m != nil {
		defer m.end()
	}
	for {
		if reply, err = f.serverStatus(cmd.Context(), client, one); err != nil {
			return reply, err
		}
		var left, total int64
		busy := false
		for _, e := range reply.Exports {
			if e.Base == nil || e.Base.Prefetch == nil {
				continue
			}
			p := e.Base.Prefetch
			if p.State == prefetch.StateFailed {
				return reply, fmt.Errorf("export %q: prefetching is off: %s", e.Name, printableText(p.Error))
			}
			busy = busy || p.State != prefetch.StateDone
			left, total = left+p.Remaining, total+p.Total
		}
		if m != nil {
			m.update(total-left, total)
		}
		if !busy {
			return reply, nil
		}
		select {
		case <-cmd.Context().Done():
			return reply, cmd.Context().Err()
		case <-time.After(waitInterval):
		}
	}
}

// print reports on exports or on an image.
func (f *prefetchCommandFlags) print(cmd *cobra.Command, exports ...exportStatus) error {
	out := cmd.OutOrStdout()
	if f.output.json() {
		e := json.NewEncoder(out)
		e.SetIndent("", "    ")
		return e.Encode(exportsReply{exports})
	}
	if f.progress.quiet {
		return nil
	}
	for _, e := range exports {
		printBase(out, e)
	}
	return nil
}

// printBase prints the state of one disk for people.
func printBase(out io.Writer, e exportStatus) {
	title := e.Image
	if e.Name != "" {
		title = e.Name + " (" + e.Image + ")"
	}
	line := func(name, format string, args ...any) {
		fmt.Fprintf(out, "  %-14s %s\n", name+":", printableText(fmt.Sprintf(format, args...)))
	}
	fmt.Fprintln(out, printableText(title))
	b := e.Base
	if b == nil {
		line("base image", "nothing is to be copied from one")
		return
	}
	switch {
	case b.Attached:
		line("base image", "%s, %s left to copy", formatSize(b.Size), formatSize(b.Remaining))
	default:
		line("base image", "not needed any more")
	}
	if g := b.Guest; b.CopyOnRead || g.BaseRead > 0 {
		line("clients", "read %s of it, %s kept, %s not kept", formatSize(g.BaseRead), formatSize(g.Kept), formatSize(g.Dropped))
		if g.Error != "" {
			line("copy-on-read", "%s", g.Error)
		}
	}
	if p := b.Prefetch; p != nil {
		line("prefetching", "%s; read %s, kept %s", p.State, formatSize(p.Read), formatSize(p.Kept))
		if p.ReadAverage >= 0 {
			line("reading", "%s/s", formatSize(int64(p.ReadAverage)))
		}
		if p.Pauses > 0 || p.Retries > 0 {
			line("interruptions", "%d pauses, %d retries", p.Pauses, p.Retries)
		}
		if p.Yielded >= 1 {
			line("gave way", "%.0f s to the guest", p.Yielded)
		}
		if p.Error != "" {
			line("error", "%s", p.Error)
		}
	}
	if p := b.Profile; p != nil {
		line("profile", "%s: %d runs, %s", p.File, p.Runs, formatSize(p.Bytes))
		if p.Error != "" {
			line("profile error", "%s", p.Error)
		}
	}
}
