//go:build unix

package e2e

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/test/e2e/guestlog"
)

// farBase is a base image that an NBD server holds far away: every read takes 5 ms, and 8 MB pass in a second.
type farBase struct {
	uri    string
	server *exec.Cmd
}

// newFarBase serves a qcow2 image of the template's file system, whose free blocks all hold something: fetching it
// takes a while, and bytes that come from a wrong place show.
func newFarBase(t *testing.T, tm *template, dir string) *farBase {
	t.Helper()
	testenv.Need(t, "nbdkit", "dumpe2fs")
	raw, image, socket := filepath.Join(dir, "far.raw"), filepath.Join(dir, "far.qcow2"), filepath.Join(dir, "far")
	copyFile(t, tm.raw, raw)
	fillFreeBlocks(t, raw)
	testenv.Run(t, platter(t), "convert", "-f", "raw", "-O", "qcow2", raw, image)
	b := &farBase{uri: "nbd+unix:///?socket=" + socket}
	b.server = exec.Command("nbdkit", "-f", "-U", socket, "--filter=delay", "--filter=rate", "file", image, "rdelay=5ms", "rate=64M")
	if err := b.server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.stop() })
	testenv.Until(t, "nbdkit to listen", func() bool {
		_, _, code := output(t, "nbdinfo", "--size", b.uri)
		return code == 0
	})
	return b
}

// stop ends the server of the base image; a second call does nothing.
func (b *farBase) stop() {
	b.server.Process.Kill()
	b.server.Wait()
}

// freeBlocks finds the ranges in what dumpe2fs prints of a block group.
var freeBlocks = regexp.MustCompile(`(\d+)(?:-(\d+))?`)

// fillFreeBlocks writes pseudo-random bytes to every block that an ext4 file system does not use.
func fillFreeBlocks(t *testing.T, raw string) {
	t.Helper()
	f, err := os.OpenFile(raw, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const blockSize = 4096
	rng := rand.New(rand.NewPCG(3, 5))
	filled := 0
	sc := bufio.NewScanner(strings.NewReader(testenv.Run(t, "dumpe2fs", raw)))
	for sc.Scan() {
		list, found := strings.CutPrefix(sc.Text(), "  Free blocks: ")
		if !found {
			continue
		}
		for _, m := range freeBlocks.FindAllStringSubmatch(list, -1) {
			first, _ := strconv.Atoi(m[1])
			last := first
			if m[2] != "" {
				last, _ = strconv.Atoi(m[2])
			}
			p := make([]byte, (last-first+1)*blockSize)
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
			if _, err := f.WriteAt(p, int64(first)*blockSize); err != nil {
				t.Fatal(err)
			}
			filled += last - first + 1
		}
	}
	if filled < guestDisk<<20/blockSize/2 {
		t.Fatalf("dumpe2fs tells of %d free blocks only", filled)
	}
}

// fvdGuest is a guest on a disk in format FVD over a base image far away.
type fvdGuest struct {
	*aftermath
	base    *farBase
	control string
	server  *server
	guest   *guest
}

// startFVD makes a disk and starts a guest on it at once. Prefetching begins after some seconds, or when it is told to.
func startFVD(t *testing.T, m *saved, tm *template, discipline string, seed uint64, delay int) *fvdGuest {
	t.Helper()
	dir := crashDir(t)
	f := &fvdGuest{
		aftermath: &aftermath{template: tm, discipline: discipline, dir: dir, log: guestlog.NewLog(seed), image: filepath.Join(dir, "disk.fvd")},
		base:      newFarBase(t, tm, dir), control: filepath.Join(dir, "control"),
	}
	testenv.Run(t, platter(t), "create", "-q", "-f", "fvd", "-o", fmt.Sprint("compact_image=on,copy_on_read=on,prefetch_start_delay=", delay),
		"-b", f.base.uri, "-F", "qcow2", f.image)
	f.serve(t)
	f.guest = m.restore(t, f.server.uri)
	f.guest.begin(t, seed, 0)
	return f
}

func (f *fvdGuest) serve(t *testing.T) {
	t.Helper()
	f.server = serve(t, f.image, "--format", "fvd", "--discipline", f.discipline, "--socket", filepath.Join(f.dir, "socket"), "--control", f.control)
}

// listen takes note of what the guest says until it has made n promises in all.
func (f *fvdGuest) listen(t *testing.T, n int) {
	t.Helper()
	for f.log.Promises() < n {
		f.note(t, f.guest.next(t))
	}
}

func (f *fvdGuest) note(t *testing.T, line string) {
	t.Helper()
	if err := f.log.Add(line); err != nil {
		t.Fatalf("%v\n%s", err, f.guest.console())
	}
}

// kill ends the server with SIGKILL, and the guest when it has noticed.
func (f *fvdGuest) kill(t *testing.T) {
	t.Helper()
	for len(f.guest.lines) > 0 {
		f.note(t, <-f.guest.lines)
	}
	f.promises = f.log.Promises()
	f.server.kill(t)
	limit := time.Now().Add(noticing)
	for line := f.guest.next(t); !strings.HasPrefix(line, guestlog.WordOver); line = f.guest.next(t) {
		f.note(t, line)
		if time.Now().After(limit) {
			t.Fatalf("the guest did not notice that its disk is gone\n%s", f.guest.console())
		}
	}
	f.guest.off(t)
}

// judgeFVD expects that the image can be recovered, that nothing is wrong with it, and that what is on the disk is
// what was promised.
func (f *fvdGuest) judgeFVD(t *testing.T) {
	t.Helper()
	check := func(when, want string, most int) {
		t.Helper()
		stdout, stderr, code := output(t, platter(t), "check", "-f", "fvd", f.image)
		if code != 0 && code != most || !strings.Contains(stdout+stderr, want) {
			t.Errorf("platter check %s: exit status %d\n%s%s", when, code, stdout, stderr)
		}
	}
	const leaksOnly = 3
	check("before recovery", "replay-pending", leaksOnly) // what was copied and not recorded yet
	testenv.Run(t, platter(t), "io", "-f", "fvd", "-c", "read -q 0 4k", "-c", "flush", f.image)
	check("after recovery", "No errors were found on the image.", 0)
	raw := filepath.Join(f.dir, "disk.raw")
	testenv.Run(t, platter(t), "convert", "-f", "fvd", "-O", "raw", f.image, raw)
	testenv.Run(t, platter(t), "compare", "-f", "fvd", "-F", "raw", f.image, raw)
	if err := f.fileSystem(t, raw); err != nil {
		t.Error(err)
	}
}

// TestGuestFVD lets a guest start at once on a disk whose contents are far away. The disk moves over while the
// guest works; then the server of the base image ends, and the guest goes on.
func TestGuestFVD(t *testing.T) {
	tm := newTemplate(t)
	const never = 1 << 20 // however slow the guest is, prefetching waits for the word
	f := startFVD(t, savedMachine(t, tm.raw), tm, "buffered", firstSeed(t), never)
	f.listen(t, 1)
	testenv.Run(t, platter(t), "prefetch", "--control", f.control, "pause")
	if status := testenv.Run(t, platter(t), "prefetch", "--control", f.control, "status"); !strings.Contains(status, "prefetching:   stopped") {
		t.Errorf("prefetching was told to pause; its status is\n%s", status)
	}
	testenv.Run(t, platter(t), "prefetch", "--control", f.control, "resume")
	testenv.Run(t, platter(t), "prefetch", "--control", f.control, "wait")
	f.base.stop()
	for len(f.guest.lines) > 0 {
		f.note(t, <-f.guest.lines)
	}
	moved := f.log.Promises()
	f.listen(t, moved+50)
	f.kill(t)
	f.judgeFVD(t)
	info := testenv.Run(t, platter(t), "info", f.image)
	if strings.Contains(info, "backing file") || !strings.Contains(info, "base image fully prefetched: true") {
		t.Errorf("the disk moved over, and yet\n%s", info)
	}
	t.Logf("%d promises when the base image went away, %d in the end", moved, f.promises)
}

// TestGuestKillFVD is TestGuestKill while copy-on-read and prefetching are at work.
func TestGuestKillFVD(t *testing.T) {
	tm := newTemplate(t)
	m := savedMachine(t, tm.raw)
	rounds, first := budget(t, "PLATTER_GUEST_ROUNDS", 2), firstSeed(t)
	for _, discipline := range []string{"immediate", "buffered"} {
		t.Run(discipline, func(t *testing.T) {
			attached := 0
			for i := range rounds {
				seed := first + uint64(i)
				t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
					rng := rand.New(rand.NewPCG(seed, uint64(len(discipline))))
					f := startFVD(t, m, tm, discipline, seed, 1)
					f.listen(t, 1+rng.IntN(100))
					time.Sleep(time.Duration(rng.IntN(30_000)) * time.Microsecond)
					f.kill(t)
					if info := testenv.Run(t, platter(t), "info", f.image); strings.Contains(info, "backing file") {
						attached++
					}
					f.judgeFVD(t)
				})
			}
			t.Logf("%d rounds; the base image was still needed in %d", rounds, attached)
		})
	}
}
