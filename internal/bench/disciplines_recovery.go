package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/image"
)

const (
	crashFlushes = 1000    // allocating writes with a flush each, before a crash
	crashPending = 64      // and those that no flush follows
	crashRoom    = 1 << 30 // bytes of the disk that are not mapped, where those writes go
)

// A recovery that takes less than quickRecovery is measured several times and the fastest counts: one barrier
// that waits for somebody else's writes takes longer than all the rest.
const (
	quickRecovery  = 2 * time.Second
	recoveryRounds = 5
)

// QemuCheck names what recovers images in the place of qemu-nbd: it would do the same when it opens one.
const QemuCheck = "qemu-img check -r all"

// RecoveryResult is what it took to make an image usable again after a crash.
type RecoveryResult struct {
	Mapped       int64   `json:"mapped_bytes"`
	Discipline   string  `json:"discipline"`
	By           string  `json:"recovered_by"`
	Reads        int64   `json:"read_calls"`
	BytesRead    int64   `json:"bytes_read"`
	Writes       int64   `json:"write_calls"`
	BytesWritten int64   `json:"bytes_written"`
	Syncs        int64   `json:"fdatasyncs"`
	Seconds      float64 `json:"seconds"`
	Leaked       int     `json:"leaked_clusters"` // left over
}

// Recover crashes images under each of Platter's disciplines and measures the next open for writing. size is
// how many bytes of the disk are mapped. With qemu, qemu-img recovers one of the images, too.
func (b *DisciplineBench) Recover(ctx context.Context, size int64, qemu bool) (results []RecoveryResult, err error) {
	name := filepath.Join(b.Dir, "recovery.qcow2")
	defer func() {
		if rerr := os.Remove(name); !errors.Is(rerr, os.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	}()
	add := func(r RecoveryResult, err error) error {
		if err != nil {
			return fmt.Errorf("recovery, %s: %w", r.Discipline, err)
		}
		r.Mapped = size
		fmt.Fprintf(b.Notes, "recovery at %d bytes mapped, %s: %.3f s\n", size, r.Discipline, r.Seconds)
		results = append(results, r)
		return nil
	}
	for _, discipline := range qcow2.Disciplines() {
		if err := b.makeMapped(ctx, name, size); err != nil {
			return nil, err
		}
		if err := add(b.recover(ctx, name, discipline, size)); err != nil {
			return nil, err
		}
	}
	if qemu {
		if err := b.makeMapped(ctx, name, size); err != nil {
			return nil, err
		}
		if err := add(b.recoverByQemu(ctx, name, size)); err != nil {
			return nil, err
		}
	}
	return results, nil
}

// makeMapped makes a new image of which size bytes are mapped, to places in the file that hold nothing.
func (b *DisciplineBench) makeMapped(ctx context.Context, name string, size int64) error {
	o := image.CreateOptions{}
	o.Size, o.ClusterSize, o.Preallocation = size, caseCluster, block.PreallocMetadata
	if err := image.Create(ctx, "qcow2", name, o); err != nil {
		return err
	}
	img, err := b.open(ctx, name, qcow2.Ordered)
	if err != nil {
		return err
	}
	return errors.Join(img.Resize(size+crashRoom, block.PreallocOff), img.Close())
}

// crash writes to an image, from an offset on where nothing is mapped, and abandons it: no more than what has
// reached the file is left.
func (b *DisciplineBench) crash(ctx context.Context, name, discipline string, from int64) error {
	img, err := b.open(ctx, name, discipline)
	if err != nil {
		return err
	}
	// From here on nothing can reach the file, as if the process had been killed. Until the ring is half full
	// the journal writes nothing in the background, and crashFlushes keep it below that.
	defer img.File().Close()
	buf := make([]byte, caseBlock)
	signed(buf)
	flushes := int64(crashFlushes)
	if b.Operations > 0 {
		flushes = min(flushes, int64(b.Operations))
	}
	for i := range flushes + crashPending {
		if _, err := img.WriteAt(buf, from+i*caseCluster); err != nil {
			return err
		}
		if i >= flushes {
			continue
		}
		if err := errors.Join(img.Flush(), ctx.Err()); err != nil {
			return err
		}
	}
	return nil
}

func (b *DisciplineBench) recover(ctx context.Context, name, discipline string, size int64) (RecoveryResult, error) {
	r := RecoveryResult{Discipline: discipline, By: "open for writing"}
	for round := range int64(recoveryRounds) {
		if err := b.crash(ctx, name, discipline, size+round*(crashFlushes+crashPending)*caseCluster); err != nil {
			return r, err
		}
		begin := time.Now()
		img, err := b.open(ctx, name, discipline)
		if err != nil {
			return r, err
		}
		took := time.Since(begin)
		if round == 0 {
			r.count(img.ledger.tally())
			r.Seconds = took.Seconds()
		}
		r.Seconds = min(r.Seconds, took.Seconds())
		if err := img.Close(); err != nil {
			return r, err
		}
		if round == 0 {
			if err := r.leaks(ctx, name); err != nil {
				return r, err
			}
		}
		if took > quickRecovery {
			break
		}
	}
	return r, nil
}

func (r *RecoveryResult) count(t tally) {
	r.Reads, r.BytesRead, r.Writes, r.BytesWritten, r.Syncs = t.Reads, t.BytesRead, t.Writes, t.Metadata+t.Data, t.Syncs
}

// leaks checks the recovered image.
func (r *RecoveryResult) leaks(ctx context.Context, name string) error {
	img, err := image.Open(ctx, name, image.Options{Format: "qcow2", ReadOnly: true})
	if err != nil {
		return err
	}
	found, err := qcow2.Check(img.File(), qcow2.CheckOptions{})
	if err := errors.Join(err, img.Close()); err != nil {
		return err
	}
	if found.Corruptions+found.CheckErrors > 0 {
		return fmt.Errorf("%s: %d errors after recovery", name, found.Corruptions+found.CheckErrors)
	}
	r.Leaked = int(found.Leaks)
	return nil
}

// recoverByQemu has qemu-img repair a lazy image: once to take the time, once to record what it does.
func (b *DisciplineBench) recoverByQemu(ctx context.Context, name string, size int64) (RecoveryResult, error) {
	r := RecoveryResult{Discipline: "lazy, by qemu-img", By: QemuCheck}
	if err := b.crash(ctx, name, qcow2.Lazy, size); err != nil {
		return r, err
	}
	check := []string{"qemu-img", "check", "-q", "-r", "all", "-f", "qcow2", name}
	begin := time.Now()
	if err := runProgram(ctx, check...); err != nil {
		return r, err
	}
	r.Seconds = time.Since(begin).Seconds()

	if err := b.makeMapped(ctx, name, size); err != nil {
		return r, err
	}
	if err := b.crash(ctx, name, qcow2.Lazy, size); err != nil {
		return r, err
	}
	t, err := runTraced(ctx, b.Dir, check...)
	if err != nil {
		return r, err
	}
	r.count(t)
	return r, r.leaks(ctx, name)
}

// runTraced runs a program and tells what it did to its files. dir is for the record.
func runTraced(ctx context.Context, dir string, argv ...string) (t tally, err error) {
	record := filepath.Join(dir, "program.strace")
	trace := append([]string{"strace"}, straceFlags(record, len(sign), tallyCalls())...)
	if err := runProgram(ctx, append(trace, argv...)...); err != nil {
		return t, err
	}
	f, err := os.Open(record)
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(record)) }()
	return parseTally(f)
}

// runProgram runs a program that is to succeed.
func runProgram(ctx context.Context, argv ...string) error {
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", argv[0], err, out)
	}
	return nil
}
