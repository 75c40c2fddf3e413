package cli

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/platter-disk/platter/image"
)

// growFlag is --grow-storage of commands that write: how a volume that is full becomes larger. The command that
// an FVD image may name for this (add_storage_cmd) is never executed: who opens a disk has not agreed to run what
// its author wrote.
type growFlag struct{ program string }

func (f *growFlag) register(fs *pflag.FlagSet) {
	fs.StringVar(&f.program, "grow-storage", "", "run `PROGRAM` BYTES FILE when FILE, the volume that holds the data of an fvd\nimage, is full: it makes it larger by at least that many bytes")
}

// apply sets what of the flag concerns opening images.
func (f *growFlag) apply(ctx context.Context, o image.Options) image.Options {
	if f.program == "" {
		return o
	}
	o.GrowStorage = func(full string, need int64) error {
		program := exec.CommandContext(ctx, f.program, strconv.FormatInt(need, 10), full)
		program.WaitDelay = time.Second // what it leaves running may hold its output open for ever
		out, err := program.CombinedOutput()
		if err != nil && !errors.Is(err, exec.ErrWaitDelay) {
			return fmt.Errorf("growing '%s' by %d bytes: %s: %w: %s", full, need, f.program, err, strings.TrimSpace(string(out)))
		}
		return nil
	}
	return o
}
