package qcow2

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"

	"github.com/platter-disk/platter/block"
)

// backingDevice is the device underneath an image. Requests look at it without a lock: it is set before the first
// one, and taken away while the whole disk is held.
type backingDevice struct{ p atomic.Pointer[block.Device] }

// get returns the device, or nil if there is none.
func (b *backingDevice) get() block.Device {
	if p := b.p.Load(); p != nil {
		return *p
	}
	return nil
}

func (b *backingDevice) set(d block.Device) {
	if d == nil {
		b.p.Store(nil)
		return
	}
	b.p.Store(&d)
}

// SetBacking changes the reference to the backing file that the image holds: its name, at most 1023 bytes, and its
// format, at most 15. It is durable when SetBacking returns, and a crash before that leaves either the old
// reference or the new one. No data is looked at: what the image does not hold is read from the new file once the
// image is opened again, and until then from the device that it was opened with. file "" removes the reference;
// the image then reads zeros where it holds nothing, at once, and closes the device underneath.
//
// An error that wraps ErrHeaderFull says that cluster 0 has no room for the name. Requests may go on meanwhile;
// the devices of snapshots must be closed before the backing file can be removed.
func (im *Image) SetBacking(file, format string) error {
	done, err := im.alone("change the backing file")
	if err != nil {
		return err
	}
	defer done()
	if err := im.checkBacking(file, format); err != nil {
		return fmt.Errorf("%s: %w", im.file.Name(), err)
	}
	if err := im.discipline.replaceHeader(func(h *Header) { h.BackingFile, h.BackingFormat = file, format }); err != nil {
		return err
	}
	backing := im.backing.get()
	if file != "" || backing == nil {
		return nil
	}
	im.backing.set(nil)
	return backing.Close()
}

// checkBacking refuses references that an image must not have. The caller holds resizing.
func (im *Image) checkBacking(file, format string) error {
	problem := ""
	switch {
	case len(file) > maxBackingName:
		problem = fmt.Sprintf("a name of %d bytes, at most %d fit", len(file), maxBackingName)
	case strings.ContainsRune(file, 0) || strings.ContainsRune(format, 0):
		problem = "a name with a NUL byte cannot be stored"
	case file != "" && format == "":
		problem = "backing format must be specified"
	case file == "" && format != "":
		problem = "Backing format cannot be used without backing file"
	case len(format) > maxBackingFormat:
		problem = fmt.Sprintf("backing format '%s': %d bytes, at most %d fit", printable(format), len(format), maxBackingFormat)
	case file != "" && im.rawData():
		problem = "Backing file and data-file-raw cannot be used at the same time"
	}
	if problem != "" {
		return errors.New(problem)
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	for id, n := range im.viewed {
		if n > 0 && file == "" {
			return fmt.Errorf("snapshot %q: %w", id, ErrSnapshotInUse)
		}
	}
	return nil
}

// editHeader is replaceHeader for a caller that holds mu and has nothing of the header outside the file.
func (im *Image) editHeader(edit func(*Header)) error {
	old := *im.header
	edit(im.header)
	err := im.rewriteHeader()
	if err != nil {
		*im.header = old
	}
	return err
}

func (w *committer) replaceHeader(edit func(*Header)) error {
	w.im.mu.Lock()
	defer w.im.mu.Unlock()
	return w.im.editHeader(edit)
}

// replaceHeader works past the log, whose records have no place for it (docs/qcow2-journal.md). Everything that was
// logged has to be in its place first: the whole header is written, not what changed.
func (d *journal) replaceHeader(edit func(*Header)) error {
	im := d.im
	return d.quiesced(func() error {
		// A session that has yet to begin will write its extension.
		trial := *im.header
		edit(&trial)
		edited, err := trial.Encode()
		if err == nil {
			err = d.headerHasRoom(edited, &trial)
		}
		if err != nil {
			return fmt.Errorf("%s: with the journal's extension: %w", im.file.Name(), err)
		}
		return im.editHeader(edit)
	})
}
