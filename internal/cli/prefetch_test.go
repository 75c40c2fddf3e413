//go:build unix

package cli

import (
	"bufio"
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/jobs/prefetch"
	"github.com/platter-disk/platter/nbd"
	"github.com/platter-disk/platter/nbd/server"
)

// overlayFormats are the ways to ask for copying: by flags, and by an FVD image's header.
var overlayFormats = []struct {
	format  string
	options []string
	flags   []string
}{
	{"qcow2", nil, []string{"--copy-on-read", "--prefetch=throttle=0"}},
	{"fvd", []string{"copy_on_read=on", "prefetch_start_delay=1"}, nil},
}

// TestServePrefetch: a disk moves over while clients use it, lets go of its base image, and needs it no more.
func TestServePrefetch(t *testing.T) {
	for _, f := range overlayFormats {
		t.Run(f.format, func(t *testing.T) {
			dir := t.TempDir()
			image, control, socket := filepath.Join(dir, "disk"), filepath.Join(dir, "c"), filepath.Join(dir, "s")
			base := newFarBase(t, dir)
			base.overlay(t, f.format, image, f.options...)
			r := startServe(t, append(f.flags, "--control", control, "--socket", socket, image)...)
			want := bytes.Clone(base.want)
			write(t, r.uri, want, 5000, farSize/2+70_000, farSize-1400)
			sameBytes(t, "while it moves", readAll(t, r.uri), want)
			prefetchStatus(t, "--control", control, "resume") // do not wait for the start
			platterHere(t, "prefetch", "--control", control, "wait")
			b := prefetchStatus(t, "--control", control).Base
			if b.Attached || b.Remaining != 0 || b.Prefetch.State != prefetch.StateDone || !b.CopyOnRead {
				t.Errorf("status: %+v", b)
			}
			if moved := b.Guest.Kept + b.Prefetch.Kept; moved < farSize-farHole-3*131072 || moved > farSize {
				t.Errorf("%d bytes were copied: %+v", moved, b)
			}
			// The connection is closed: nothing of the base is read from now on, by anybody.
			testenv.Until(t, "the connection to the base image to end", func() bool { return !base.connected() })
			_, before := base.reads()
			sameBytes(t, "without the base", readAll(t, r.uri), want)
			write(t, r.uri, want, 131072)
			if _, after := base.reads(); after != before {
				t.Errorf("%d bytes of the base image were read after it was let go", after-before)
			}
			if !strings.Contains(r.said(), "prefetching is complete") {
				t.Errorf("stderr says nothing of it:\n%s", r.said())
			}
			r.end(t)
			os.Rename(filepath.Join(dir, "base"), filepath.Join(dir, "gone"))
			r = startServe(t, append(f.flags, "--control", control, image)...)
			sameBytes(t, "opened again", readAll(t, r.uri), want)
			if b := prefetchStatus(t, "--control", control).Base; b != nil {
				t.Errorf("opened again: %+v", b)
			}
			r.end(t)
			platterHere(t, "check", image)
			if info := platterHere(t, "info", image); strings.Contains(info, base.uri) {
				t.Errorf("the image names its base image:\n%s", info)
			}
		})
	}
}

// TestServePrefetchResumes: pausing, stopping and killing the server cost nothing that was made durable; nothing is
// fetched a second time but what was not.
func TestServePrefetchResumes(t *testing.T) {
	for _, f := range overlayFormats {
		t.Run(f.format, func(t *testing.T) {
			dir := t.TempDir()
			image, control, socket := filepath.Join(dir, "disk"), filepath.Join(dir, "c"), filepath.Join(dir, "s")
			base := newFarBase(t, dir)
			base.overlay(t, f.format, image)
			args := []string{"--prefetch=size=256k,checkpoint=512k,throttle=0,max-read=8M", "--control", control, "--socket", socket, image}
			want := bytes.Clone(base.want)

			const some = 5 << 18 // bytes, five reads
			base.hold(some)
			uri, cmd := process(t, args...)
			until(t, control, "the first MiB", func(b *baseStatus) bool { return b.Prefetch.Kept >= 1<<20 })
			b := *prefetchStatus(t, "--control", control, "pause").Base
			if b.Prefetch.State != prefetch.StateStopped {
				t.Errorf("after pause: %+v", b.Prefetch)
			}
			base.release()
			still := until(t, control, "the last read before the pause", func(b *baseStatus) bool { return b.Prefetch.Pauses > 0 })
			write(t, uri, want, 3<<20, 3<<20+300_000)
			if b := prefetchStatus(t, "--control", control).Base; b.Prefetch.Kept != still.Prefetch.Kept || b.Prefetch.State != prefetch.StateStopped {
				t.Errorf("while it is paused: %+v, before %+v", b.Prefetch, still.Prefetch)
			}
			base.hold(some)
			prefetchStatus(t, "--control", control, "resume")
			until(t, control, "2 MiB", func(b *baseStatus) bool { return b.Prefetch.Kept >= 2<<20 })
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			base.release()
			if err := cmd.Wait(); err != nil {
				t.Fatalf("after SIGTERM: %v", err)
			}
			left := prefetchStatus(t, image, "status").Base.Remaining
			if _, read := base.reads(); read < 2<<20 || left > farSize-2<<20 {
				t.Errorf("%d bytes are left, %d were read", left, read)
			}

			base.hold(some)
			_, cmd = process(t, args...)
			b = *until(t, control, "some more", func(b *baseStatus) bool { return b.Prefetch.Kept >= 1<<20 })
			if b.Remaining > left-1<<20 {
				t.Errorf("started again: %+v, %d bytes were left", b, left)
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			base.release()

			uri, cmd = process(t, args...)
			platterHere(t, "prefetch", "--control", control, "wait", "-q")
			sameBytes(t, "after all that", readAll(t, uri), want)
			// What was not durable when the server was killed was read twice: a checkpoint's worth, two reads and a
			// cluster that a client wrote into.
			if _, read := base.reads(); read > farSize+1<<20+2<<18+1<<17 {
				t.Errorf("%d bytes of a base image of %d were read", read, farSize)
			}
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Wait(); err != nil {
				t.Fatalf("after SIGTERM: %v", err)
			}
			// A server that was killed may leave leaks (status 3), nothing else.
			if o := runInPlace(t, "check", image); o.status != 0 && o.status != 3 {
				t.Errorf("check: status %d\n%s%s", o.status, o.stdout, o.stderr)
			}
		})
	}
}

// TestServePrefetchRetries: a base image that fails stops nobody but prefetching, which shows in the status, and goes
// on when the base image is back.
func TestServePrefetchRetries(t *testing.T) {
	for _, f := range overlayFormats {
		t.Run(f.format, func(t *testing.T) {
			dir := t.TempDir()
			image, control := filepath.Join(dir, "disk"), filepath.Join(dir, "c")
			base := newFarBase(t, dir)
			base.overlay(t, f.format, image)
			want := bytes.Clone(base.want)
			base.hold(5 << 18)
			r := startServe(t, "--copy-on-read", "--prefetch=size=64k,retry=50ms,throttle=0,max-read=8M", "--control", control, image)
			until(t, control, "the first MiB", func(b *baseStatus) bool { return b.Prefetch.Kept >= 1<<20 })
			base.fail(true)
			base.release()
			b := until(t, control, "a failure", func(b *baseStatus) bool { return b.Prefetch.State == prefetch.StateRetrying && b.Prefetch.Retries > 1 })
			if b.Prefetch.Error == "" {
				t.Errorf("status: %+v", b.Prefetch)
			}
			write(t, r.uri, want, 0) // a whole cluster of its own would do, too
			c := dial(t, r.uri, nbd.ClientOptions{})
			p := make([]byte, 1<<20)
			if _, err := c.ReadAt(p, 0); err != nil {
				t.Errorf("what was copied cannot be read: %v", err)
			}
			sameBytes(t, "while the base fails", p, want[:1<<20])
			if _, err := c.ReadAt(p, farSize-1<<20); err == nil {
				t.Error("what the base image refuses was read")
			}
			if !strings.Contains(r.said(), "prefetching will try again") {
				t.Errorf("stderr says nothing of it:\n%s", r.said())
			}
			base.fail(false)
			prefetchStatus(t, "--control", control, "resume")
			platterHere(t, "prefetch", "--control", control, "wait")
			sameBytes(t, "afterwards", readAll(t, r.uri), want)
			r.end(t)
		})
	}
}

// TestPrefetchImage: without a server; interrupted, it goes on where it was.
func TestPrefetchImage(t *testing.T) {
	for _, f := range overlayFormats {
		t.Run(f.format, func(t *testing.T) {
			dir := t.TempDir()
			image, raw := filepath.Join(dir, "disk"), filepath.Join(dir, "raw")
			base := newFarBase(t, dir)
			base.overlay(t, f.format, image, f.options...)
			if st := prefetchStatus(t, image, "status"); st.Base.Remaining < farSize-farHole || !st.Base.Attached {
				t.Errorf("status: %+v", st.Base)
			}
			base.hold(5 << 18)
			// The rate leaves the signal time to arrive when reads go on.
			cmd := exec.Command("platter", "prefetch", "--progress=json", "-o", "size=64k,max-read=1M", image)
			stderr, err := cmd.StderrPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewScanner(stderr)
			var line progressLine
			for line.Done < 1<<19 && lines.Scan() {
				if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
					t.Fatalf("%q: %v", lines.Text(), err)
				}
			}
			base.awaitHeld()
			if err := cmd.Process.Signal(os.Interrupt); err != nil {
				t.Fatal(err)
			}
			base.release()
			var rest []string
			for lines.Scan() {
				rest = append(rest, lines.Text())
			}
			_ = cmd.Wait()
			if code := cmd.ProcessState.ExitCode(); code != statusInterrupted || !strings.Contains(strings.Join(rest, " "), "What was copied stays") {
				t.Errorf("interrupted: status %d, %q", code, rest)
			}
			platterHere(t, "check", image)
			left := prefetchStatus(t, image, "status").Base.Remaining
			if left > farSize-1<<20 || left == 0 {
				t.Errorf("%d bytes are left", left)
			}
			st := prefetchStatus(t, image)
			if st.Base.Attached || st.Base.Prefetch.Kept != left {
				t.Errorf("%d bytes were left, %+v", left, st.Base.Prefetch)
			}
			// The base image's name leads nowhere now.
			os.Rename(filepath.Join(dir, "base"), filepath.Join(dir, "gone"))
			platterHere(t, "convert", "-O", "raw", image, raw)
			got, err := os.ReadFile(raw)
			if err != nil {
				t.Fatal(err)
			}
			sameBytes(t, "without the base", got, base.want)
			if out := platterHere(t, "prefetch", image); !strings.Contains(out, "nothing is to be copied") {
				t.Errorf("a second time: %q", out)
			}
		})
	}
}

// TestProfiles: what clients read is recorded, and fetched first the next time.
func TestProfiles(t *testing.T) {
	for _, f := range overlayFormats {
		t.Run(f.format, func(t *testing.T) {
			dir := t.TempDir()
			image, control := filepath.Join(dir, "disk"), filepath.Join(dir, "c")
			base := newFarBase(t, dir)
			base.overlay(t, f.format, image)
			r := startServe(t, "--record-profile", "auto", "--control", control, "--read-only", image)
			c := dial(t, r.uri, nbd.ClientOptions{ReadOnly: true})
			p := make([]byte, 4096)
			for _, off := range []int64{6 << 20, 1 << 20, 6<<20 + 65536, 3 << 20} {
				if _, err := c.ReadAt(p, off); err != nil {
					t.Fatal(err)
				}
			}
			b := prefetchStatus(t, "--control", control).Base
			if b.Profile == nil || b.Profile.Runs != 4 || b.Profile.Bytes != 4<<14 || b.Prefetch != nil || b.CopyOnRead || b.Guest.BaseRead != 4*4096 {
				t.Errorf("status: %+v, %+v", b, b.Profile)
			}
			r.end(t)
			text, err := os.ReadFile(image + ".profile")
			if want := "platter prefetch profile 1\n6291456 16384\n1048576 16384\n6356992 16384\n3145728 16384\n"; err != nil || string(text) != want {
				t.Errorf("the profile is %q, want %q; %v", text, want, err)
			}
			if files, _ := filepath.Glob(image + "*.new"); len(files) > 0 {
				t.Errorf("left behind: %v", files)
			}
			// A server that is started again goes on recording.
			r = startServe(t, "--record-profile", "auto", "--read-only", image)
			c = dial(t, r.uri, nbd.ClientOptions{ReadOnly: true})
			for _, off := range []int64{1 << 20, 4 << 20} {
				if _, err := c.ReadAt(p, off); err != nil {
					t.Fatal(err)
				}
			}
			r.end(t)
			longer, err := os.ReadFile(image + ".profile")
			if want := string(text) + "4194304 16384\n"; err != nil || string(longer) != want {
				t.Errorf("the profile is %q, want %q; %v", longer, want, err)
			}
			if o := runInPlace(t, "serve", "--record-profile", image, image); o.status != 1 || !strings.Contains(o.stderr, "A file that is no profile is not replaced") {
				t.Errorf("recording to the image itself: %+v", o)
			}
			before, _ := base.reads()
			// The profile asks for prefetching, and does not wait for its start.
			r = startServe(t, "--profile", image+".profile", "--control", control, image)
			until(t, control, "the parts of the profile", func(b *baseStatus) bool { return b.Prefetch.Kept >= 5<<14 })
			platterHere(t, "prefetch", "--control", control, "resume")
			platterHere(t, "prefetch", "--control", control, "wait")
			r.end(t)
			runs, _ := base.reads()
			first := map[int64]bool{}
			for _, run := range runs[len(before):] {
				if len(first) < 5 && run.Length <= 65536 {
					first[run.Offset] = true
				}
			}
			for _, off := range []int64{6 << 20, 1 << 20, 6<<20 + 65536, 3 << 20} {
				if !first[off] {
					t.Errorf("%d is not among what was fetched first: %v", off, first)
				}
			}
		})
	}
}

// TestPrefetchSnapshots: an image with internal snapshots copies everything and keeps the reference they need.
func TestPrefetchSnapshots(t *testing.T) {
	dir := t.TempDir()
	base, image := filepath.Join(dir, "base"), filepath.Join(dir, "disk")
	if err := os.WriteFile(base, bytes.Repeat([]byte{7}, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	platterHere(t, "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", image)
	platterHere(t, "snapshot", "-c", "one", image)
	o := runInPlace(t, "prefetch", image)
	if o.status != 0 || !strings.Contains(o.stderr, "internal snapshots") {
		t.Errorf("status %d: %s", o.status, o.stderr)
	}
	if info := platterHere(t, "info", image); !strings.Contains(info, "backing file: "+base) {
		t.Errorf("the reference is gone:\n%s", info)
	}
	if st := prefetchStatus(t, image, "status"); st.Base.Remaining != 0 {
		t.Errorf("status: %+v", st.Base)
	}
}

// TestPrefetchRefuses is about command lines that cannot work.
func TestPrefetchRefuses(t *testing.T) {
	dir := t.TempDir()
	image, control := filepath.Join(dir, "disk"), filepath.Join(dir, "c")
	r := startServe(t, "--create", "1M", "--control", control, image)
	bad := filepath.Join(dir, "bad")
	if err := os.WriteFile(bad, []byte("platter prefetch profile 1\n5\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ args, want string }{
		{"prefetch", "Expecting an image"},
		{"prefetch " + image, "can be asked with --control"},
		{"prefetch " + image + " pause", "pause needs --control"},
		{"prefetch a b", "Expecting one image"},
		{"prefetch --export x a", "--export is for --control"},
		{"prefetch -o slots=0 absent", "'slots' expects a number between 1 and 1024"},
		{"prefetch -o speed=1 absent", "Invalid parameter 'speed'"},
		{"prefetch --profile " + bad + " absent", "line 2"},
		{"prefetch absent", missing()},
		{"prefetch --control " + control + " pause", "nothing is being prefetched"},
		{"prefetch --control " + control + " --export other resume", `no export "other"`},
		{"prefetch --control " + control + " --export other", `no export "other"`},
		{"prefetch --control " + control + " dance", "not 'dance'"},
		{"prefetch --control " + control + " status disk", "--control needs no image"},
		{"prefetch --control " + filepath.Join(dir, "none"), missing()},
		{"serve --copy-on-read=maybe x", "--copy-on-read must be used with"},
		{"serve --prefetch=delay=soon x", "'delay' expects a time"},
		{"serve --prefetch=size=1 x", "between 4k and 64M"},
		{"serve --prefetch=max-read=fast x", "'max-read' expects"},
		{"serve --read-only --prefetch x", "--read-only leaves no room"},
		{"serve --prefetch=off --profile x y", "--profile needs --prefetch"},
		{"serve --read-only --profile x y", "--read-only leaves no room"},
		{"serve --record-profile a --record-profile b x", "2 --record-profile for 1 images"},
		{"serve --prefetch --profile p x y", "1 --profile for 2 images"},
	} {
		o := runInPlace(t, strings.Fields(tc.args)...)
		if o.status != 1 || o.stdout != "" || !strings.Contains(o.stderr, tc.want) {
			t.Errorf("%s: status %d, stdout %q, stderr %q; want status 1 and %q", tc.args, o.status, o.stdout, o.stderr, tc.want)
		}
	}
	r.end(t)
}

// FuzzControl sends requests to a control socket: whatever they are, the answer is JSON.
func FuzzControl(f *testing.F) {
	f.Add("POST", "/prefetch/pause?export=disk")
	f.Add("GET", "/status")
	f.Add("POST", "/flush?export=%zz")
	srv, err := server.New(server.Config{})
	if err != nil {
		f.Fatal(err)
	}
	h := (&controller{server: srv, quit: func() {}}).handler()
	method := regexp.MustCompile(`^[A-Z]{1,10}$`)
	f.Fuzz(func(t *testing.T, m, target string) {
		line := "http://control/" + strings.TrimPrefix(target, "/")
		if !method.MatchString(m) || strings.ContainsAny(line, " \r\n\t") {
			return
		}
		req, err := http.NewRequest(m, line, nil)
		if err != nil {
			return
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, req)
		if w.Header().Get("Content-Type") == "application/json" && !json.Valid(w.Body.Bytes()) || w.Code < 200 {
			t.Fatalf("status %d: %q", w.Code, w.Body)
		}
	})
}

// FuzzControlReply decodes answers of a control socket.
func FuzzControlReply(f *testing.F) {
	f.Add(200, []byte(`{"exports":[{"name":"a","base":{"prefetch":{"state":"done"}}}]}`))
	f.Add(404, []byte(`{"error":"there is no export \"x\""}`))
	f.Fuzz(func(t *testing.T, status int, body []byte) {
		var reply exportsReply
		err := decodeControlReply(status, body, &reply)
		if err != nil {
			if strings.ContainsRune(err.Error(), 0x1b) {
				t.Fatalf("an escape sequence in %q", err)
			}
			return
		}
		var b bytes.Buffer
		for _, e := range reply.Exports {
			printBase(&b, e)
		}
		if bytes.ContainsRune(b.Bytes(), 0x1b) {
			t.Fatalf("an escape sequence in %q", b.String())
		}
	})
}
