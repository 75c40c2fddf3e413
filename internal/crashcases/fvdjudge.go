package crashcases

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"strings"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/storage"
)

// This file judges what crashes leave of an FVD image, beyond what the lab asks of every disk. Numbers in brackets are
// those of the invariants of FVD specification 5; docs/fvd.md says what covers which.

const (
	fvdHeaderSize  = 8192
	fvdCloserLooks = 16 // one state in so many is looked at more closely
)

// fvdFound is what a crash has left, before anybody recovered it.
type fvdFound struct {
	header *fvd.Header
	bitmap []byte
	copies *fvdFiles // nil: no closer look at this state
}

// inspect looks at the files of a disk before it is opened.
func (r *fvdRun) inspect(f fvdFiles) (*fvdFound, error) {
	h, err := fvd.ReadHeader(f.image) // [14] it can be read after any crash
	if err != nil {
		return nil, err
	}
	meta := make([]byte, max(fvdHeaderSize, h.BitmapOffset+h.BitmapSize, h.JournalOffset+h.JournalSize))
	if err := storage.ReadFull(f.image, meta, 0); err != nil {
		return nil, err
	}
	if err := r.constantHeader(meta); err != nil {
		return nil, err
	}
	found := &fvdFound{header: h, bitmap: meta[h.BitmapOffset:][:h.BitmapSize]}
	// What chooses a state must be in the state, so that all runs choose the same ones.
	if crc32.ChecksumIEEE(meta)%fvdCloserLooks == 0 {
		found.copies = &fvdFiles{base: f.base}
		if found.copies.image, err = copyOf(f.image); err == nil && f.data != nil {
			found.copies.data, err = copyOf(f.data)
		}
	}
	return found, err
}

// constantHeader wants nothing in the header to have changed but what may [14].
func (r *fvdRun) constantHeader(head []byte) error {
	mutable := [][2]int{{3208, 3220}, {3240, 3244}} // stable_journal_epoch, clean_shutdown; base_img_fully_prefetched
	if r.grows {
		mutable = [][2]int{{8, 16}, {2136, 2152}, {3208, 3220}, {3240, 3244}, {3344, 3352}} // also the size, the table's place, features
	}
	from := 0
	for _, m := range append(mutable, [2]int{fvdHeaderSize, 0}) {
		if got, want := head[from:m[0]], r.header[from:m[0]]; !bytes.Equal(got, want) {
			return fmt.Errorf("the header is %x from byte %d on, and was %x when the image was created", got, from, want)
		}
		from = m[1]
	}
	return nil
}

// Check wants no finding but the traces of the crash [7, 11, 13, 15], memory to be consistent [7, 11, 12], and the
// recovery to have kept to the rules.
func (s *fvdSubject) Check() error {
	if err := s.run.check(s.files.image, s.data, false); err != nil {
		return err
	}
	if err := s.im.Audit(); err != nil {
		return err
	}
	if err := s.checkRecovery(); err != nil {
		return err
	}
	if s.found.copies == nil {
		return nil
	}
	return s.closerLook()
}

// check wants the checker to find nothing but what the workload cannot help.
func (r *fvdRun) check(image storage.File, data fvd.CheckOptions, closed bool) error {
	res, err := fvd.Check(image, data)
	if err != nil {
		return err
	}
	for _, found := range res.Findings {
		switch found.Kind {
		case fvd.FindingReplay, fvd.FindingTorn:
			if !closed {
				continue
			}
		case fvd.FindingLeak: // a device cannot tell what is stored: its free chunks look leaked
			if r.data == dataDevice {
				continue
			}
		case fvd.FindingDirtyImage: // nothing but an operator's word makes it clean again [31]
			if r.c.Discipline == fvdNone {
				continue
			}
		}
		return fmt.Errorf("%d corruptions, %d leaks; first: %s", res.Corruptions, res.Leaks, found.Text)
	}
	return nil
}

// checkRecovery compares what lies on the disk since the image was opened with what was found before.
func (s *fvdSubject) checkRecovery() error {
	before := s.found.header
	after, err := fvd.ReadHeader(s.files.image)
	if err != nil {
		return err
	}
	switch {
	case after.StableEpoch < before.StableEpoch: // [16]
		return fmt.Errorf("stable_journal_epoch went back from %d to %d", before.StableEpoch, after.StableEpoch)
	case before.FullyPrefetched && !after.FullyPrefetched:
		return errors.New("base_img_fully_prefetched was taken back")
	case s.foundDirty() && after.CleanShutdown: // [31]
		return errors.New("an image without a journal became clean by being repaired or opened")
	}
	bitmap := make([]byte, len(s.found.bitmap))
	if err := storage.ReadFull(s.files.image, bitmap, int64(after.BitmapOffset)); err != nil {
		return err
	}
	for i, b := range s.found.bitmap {
		if b&^bitmap[i] != 0 { // [10]
			return fmt.Errorf("byte %d of the bitmap was %#x and is %#x after recovery: bits were cleared", i, b, bitmap[i])
		}
	}
	if before.CleanShutdown || before.JournalSize == 0 || s.run.create.PlainJournal {
		return nil // in a plain journal BITMAP records have no epoch and always count
	}
	// Whatever lies in the journal is outdated by now: no epoch there is as high as the next one [16].
	return s.readOnly(s.files, func(im *fvd.Image) error {
		if n := im.Replay().Records; n > 0 {
			return fmt.Errorf("after recovery %d records of the journal still count", n)
		}
		return nil
	})
}

// closerLook compares the disk with what it reads as when the same files are read in other ways.
func (s *fvdSubject) closerLook() error {
	want, err := s.run.contents(s.im)
	if err != nil {
		return err
	}
	same := func(how string, f fvdFiles) error {
		return s.readOnly(f, func(im *fvd.Image) error {
			got, err := s.run.contents(im)
			if err != nil {
				return fmt.Errorf("%s: %w", how, err)
			}
			for i := 0; i < len(want); i += storage.SectorSize {
				if !bytes.Equal(got[i:i+storage.SectorSize], want[i:i+storage.SectorSize]) {
					return fmt.Errorf("%s: the sector at byte %d of the watched ranges is another one", how, i)
				}
			}
			return nil
		})
	}
	if err := same("opened for reading before recovery", *s.found.copies); err != nil { // [25]
		return err
	}
	h := s.found.header
	if !h.CleanShutdown {
		turned := *s.found.copies
		if turned.image, err = rewriteJournal(turned.image, h, reverseSectors); err != nil {
			return err
		}
		if err := same("with the sectors of the journal in reverse order", turned); err != nil { // [24]
			return err
		}
	}
	emptied := s.files
	if emptied.image, err = rewriteJournal(s.files.image, h, func(p []byte) { clear(p) }); err != nil {
		return err
	}
	return same("with an empty journal after recovery", emptied) // [21, 22]
}

// readOnly opens files that nobody may write [25] and has look look at the disk.
func (s *fvdSubject) readOnly(f fvdFiles, look func(im *fvd.Image) error) (err error) {
	h, err := fvd.ReadHeader(f.image)
	if err != nil {
		return err
	}
	o, err := s.run.options(f, h, true)
	if err != nil {
		return err
	}
	im, err := fvd.Open(sealed{f.image}, o)
	if err != nil {
		return fmt.Errorf("opened for reading: %w", err)
	}
	defer func() { err = errors.Join(err, im.Close()) }()
	return look(im)
}

// contents is what the watched ranges of a disk read as.
func (r *fvdRun) contents(disk block.Device) ([]byte, error) {
	ranges := slices.Concat(r.watch, r.ranges)
	if len(ranges) == 0 {
		ranges = []crashlab.Range{{Offset: 0, Length: disk.Size()}}
	}
	var all []byte
	for _, w := range ranges {
		p := make([]byte, w.Length)
		if _, err := disk.ReadAt(p, w.Offset); err != nil && !errors.Is(err, io.EOF) { // a disk that did not grow yet
			return nil, err
		}
		all = append(all, p...)
	}
	return all, nil
}

// rewriteJournal returns a copy of an image with another journal.
func rewriteJournal(image storage.File, h *fvd.Header, change func(journal []byte)) (storage.File, error) {
	c, err := copyOf(image)
	if err != nil {
		return nil, err
	}
	journal := make([]byte, h.JournalSize)
	if err := storage.ReadFull(c, journal, int64(h.JournalOffset)); err != nil {
		return nil, err
	}
	change(journal)
	_, err = c.WriteAt(journal, int64(h.JournalOffset))
	return c, err
}

func reverseSectors(p []byte) {
	var t [storage.SectorSize]byte
	for i, k := 0, len(p)-len(t); i < k; i, k = i+len(t), k-len(t) {
		copy(t[:], p[i:])
		copy(p[i:], p[k:k+len(t)])
		copy(p[k:], t[:])
	}
}

// noteDirty is what a disk that is used again says of the state in which it was found: without a journal, and not
// closed cleanly.
const noteDirty = "the image was found dirty"

// foundDirty reports whether the crash left an image of which nobody knows what its tables lack (FVD specification
// 1.12).
func (s *fvdSubject) foundDirty() bool {
	h := s.found.header
	return !h.CleanShutdown && h.JournalSize == 0 && (h.TableOffset > 0 || h.BitmapSize > 0)
}

// judge wants no image to call itself clean that must not: once a write was answered that changed the tables, until
// the image is closed [20, 21]; once a write of metadata failed [30]; and ever again, if it was found dirty [31].
func (r *fvdRun) judge(s crashlab.Subject, at crashlab.Moment) error {
	if at.Phase == crashlab.PhaseRecovery || !s.(*fvdSubject).found.header.CleanShutdown {
		return nil
	}
	changed, closing := "", false
	for _, m := range at.Marks() {
		switch {
		case m.Text == noteDirty:
			return fmt.Errorf("the image is marked clean, and %s", strings.TrimPrefix(m.Text, "the image "))
		case at.Phase != crashlab.PhaseWork: // a disk that was used before: its writes need not change any table
		case strings.HasPrefix(m.Text, "failed: "):
			return fmt.Errorf("the image is marked clean, after this: %s", m.Text)
		case strings.HasPrefix(m.Text, "guest issues close"):
			closing = true
		case changed == "" && r.changesTables(m.Text):
			changed = m.Text
		}
	}
	if changed != "" && !closing {
		return fmt.Errorf("the image is marked clean, after this: %s", changed)
	}
	return nil
}

// changesTables reports whether a mark tells that a write was answered which changes bitmap or table, if it is the first
// one there.
func (r *fvdRun) changesTables(mark string) bool {
	var off, n int64
	if _, err := fmt.Sscanf(mark, "answered: write of %d bytes at %d", &n, &off); err != nil {
		return false
	}
	return r.create.Compact || off < r.base
}

// closed judges the files of a disk that was closed: nothing is left to do, unless a write of metadata failed.
func (r *fvdRun) closed(files []storage.File) error {
	if r.broken.Swap(false) {
		return nil // see judge
	}
	f := r.files(files)
	h, err := fvd.ReadHeader(f.image)
	if err != nil {
		return err
	}
	if !h.CleanShutdown && r.c.Discipline != fvdNone {
		return errors.New("the image is not marked clean after it was closed")
	}
	var data fvd.CheckOptions
	if data.Data, data.DataDevice, err = r.openData(f.data, true); err != nil {
		return err
	}
	err = r.check(f.image, data, true)
	if data.DataDevice == nil {
		return err
	}
	// Space that a crash cost the data image is that format's business.
	return errors.Join(err, data.DataDevice.Close(), checkQcow2(f.data, leakBound(qcow2.Ordered)))
}
